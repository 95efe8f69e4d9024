"""The configuration of one run of the graph: parsed once, when a stage starts, and passed on unchanged."""

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
    """Validated parameters, the profile that they name, and the paths of its files."""

    params: Params
    profile: Profile
    paths: ProfilePaths

    def __post_init__(self) -> None:
        if self.profile.rollout.engine == "vllm" and self.params.decode.beams > 1:
            raise ConfigError(
                f"decode.beams is {self.params.decode.beams}, but rollout.engine is vllm, which has no beam search. "
                "Set beams: 1, or rollout.engine: hf."
            )
        rollout, decode = self.profile.rollout, self.params.decode
        if rollout.engine == "vllm" and rollout.serve.ngram_tokens and decode.needs_walk:
            raise ConfigError(
                f"rollout.serve.ngram_tokens is {rollout.serve.ngram_tokens}, but decode.corners is {decode.corners} "
                f"and decode.duplicate_iou {decode.duplicate_iou}: vLLM cannot draft tokens together with the logits "
                "processor that these need. Set ngram_tokens: 0, or corners: any and duplicate_iou: 1.0."
            )

    @classmethod
    def read(cls, params: Path, profile: str | None = None, root: Path | None = None) -> RunConfig:
        """Read the parameter file, and the profile that it names (or `profile`, if given).

        Profiles are in configs/ next to the parameter file. data/, runs/, and reports/ are there too, unless `root` is
        given.
        """
        values = load_params(params)
        values = values.model_copy(update={"profile": profile or values.profile})
        chosen = load_profile(params.parent / "configs" / f"{values.profile}.yaml")
        paths = ProfilePaths(values.profile, params.parent if root is None else root)
        return cls(params=values, profile=chosen, paths=paths)
