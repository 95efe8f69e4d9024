"""What one run of the graph is told, parsed once at its edge and passed as it is."""

from __future__ import annotations

from dataclasses import dataclass

from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.schema import Params


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Checked parameters, the profile that they name, and the places of its files."""

    params: Params
    profile: Profile
    paths: ProfilePaths
