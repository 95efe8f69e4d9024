"""Fixtures of this folder."""

from helpers import workspace, world
from stage_runs import ready

__all__ = ["ready", "workspace", "world"]
