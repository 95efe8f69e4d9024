"""Boxes and panels on pictures, for the report and for the eval callback of training."""
