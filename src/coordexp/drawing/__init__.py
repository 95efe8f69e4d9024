"""Boxes and panels on pictures, for the report and for looks at a model in training."""
