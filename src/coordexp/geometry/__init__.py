"""Boxes and coordinate bins: the only package that defines rounding conventions."""
