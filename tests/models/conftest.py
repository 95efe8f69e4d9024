"""Fixtures of this folder."""

from helpers import world

__all__ = ["world"]
