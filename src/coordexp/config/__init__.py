"""Typed, strict parameters, which each stage reads once, when it starts."""
