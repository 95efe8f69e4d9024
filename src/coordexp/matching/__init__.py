"""One-to-one matching of predictions to annotated objects: pair cost, gate, and assignment."""
