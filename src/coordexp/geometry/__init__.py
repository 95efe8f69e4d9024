"""Boxes and the coordinate bins. The only place where rounding conventions live."""
