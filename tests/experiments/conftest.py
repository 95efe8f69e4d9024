"""Worlds and workspaces of the training tests."""

from helpers import workspace, world

__all__ = ["workspace", "world"]
