"""Fixtures of this folder."""

from helpers import workspace, world

__all__ = ["workspace", "world"]
