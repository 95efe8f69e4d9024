"""What one run of the graph is told, parsed once at its edge and passed as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordexp.config.loading import load_params, load_profile
from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.schema import Params
from coordexp.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Checked parameters, the profile that they name, and the places of its files."""

    params: Params
    profile: Profile
    paths: ProfilePaths

    def __post_init__(self) -> None:
        rollout, decode = self.profile.rollout, self.params.decode
        if rollout.engine == "vllm" and rollout.serve.ngram_tokens and decode.needs_walk:
            raise ConfigError(
                f"rollout.serve.ngram_tokens is {rollout.serve.ngram_tokens}, but decode.corners is {decode.corners} "
                f"and decode.duplicate_iou {decode.duplicate_iou}: vLLM drafts nothing beside the logits processor "
                "that these need. Set ngram_tokens: 0, or corners: any and duplicate_iou: 1.0."
            )

    @classmethod
    def read(cls, params: Path, profile: str | None = None, root: Path | None = None) -> RunConfig:
        """From the parameter file, the profile that it or `profile` names, and the folder of data/, runs/ and reports/.

        Profiles are in configs/ beside the parameter file, and so is everything else unless `root` is given.
        """
        values = load_params(params)
        values = values.model_copy(update={"profile": profile or values.profile})
        chosen = load_profile(params.parent / "configs" / f"{values.profile}.yaml")
        paths = ProfilePaths(values.profile, params.parent if root is None else root)
        return cls(params=values, profile=chosen, paths=paths)
