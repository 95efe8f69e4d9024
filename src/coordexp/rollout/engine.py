"""The engine protocol: whatever generates token ids for samples, and how it is told to sample."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from coordexp.packing.samples import Sample
from coordexp.text.grammar import Constraints


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """Sampling settings; temperature 0 is greedy, and without constraints any token may come."""

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int
    constraints: Constraints | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """Generated ids of one image, without prompt and padding; a finished answer ends with the end-of-turn id."""

    ids: NDArray[np.int32]
    finish_reason: Literal["stop", "length"]

    @classmethod
    def from_json(cls, ids: Any, finish_reason: Any, vocabulary_size: int) -> Generation:
        """A generation of JSON values from outside; raises ValueError saying what is wrong with them."""
        if not is_token_ids(ids):
            raise ValueError(f"the ids are {reprlib.repr(ids)}, expected a list of token ids")
        if ids and max(ids) >= vocabulary_size:
            raise ValueError(f"there is the id {reprlib.repr(max(ids))}, expected ids below {vocabulary_size}")
        if finish_reason not in ("stop", "length"):
            raise ValueError(f"the finish reason is {reprlib.repr(finish_reason)}, expected 'stop' or 'length'")
        return cls(np.array(ids, np.int32), finish_reason)


def is_token_ids(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of integers from 0; neither true nor 1.0 is one."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


class Engine(Protocol):
    """Generates answers; results come in the order of the samples, whatever the order of work."""

    def generate(self, samples: Sequence[Sample], settings: DecodeSettings) -> list[Generation]:
        """One generation per sample."""
        ...
