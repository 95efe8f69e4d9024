"""The engine protocol: whatever generates token ids for samples, and how it is told to sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from coordexp.packing.samples import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """Sampling settings; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int


@dataclass(frozen=True, slots=True)
class Generation:
    """Generated ids of one image, without prompt and padding; a finished answer ends with the end-of-turn id."""

    ids: NDArray[np.int32]
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Generates answers; results come in the order of the samples, whatever the order of work."""

    def generate(self, samples: Sequence[Sample], settings: DecodeSettings) -> list[Generation]:
        """One generation per sample."""
        ...
