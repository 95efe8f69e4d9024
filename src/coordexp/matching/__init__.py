"""Which prediction is which object: pair cost, gate, and one-to-one assignment."""
