"""Boxes on images and panels of them, for the report and for the eval callback of training."""
