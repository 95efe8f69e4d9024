"""Typed, strict parameters, read once at the edge of each stage."""
