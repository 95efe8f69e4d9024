"""The engine protocol: whatever generates token ids for samples, how it is asked, and the journal of what it answered.

The journal keeps finished generations on disk as they come, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import reprlib
import threading
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from coordexp.config.schema import DecodeParams
from coordexp.geometry.bins import NUM_BINS
from coordexp.infra.artefacts import sealed_row, unsealed_row
from coordexp.infra.foreign import strict_json
from coordexp.infra.random_streams import draw_seed
from coordexp.infra.resume import mark
from coordexp.packing.samples import Sample
from coordexp.records.images import record_sha256
from coordexp.text.grammar import AnswerGrammar

log = logging.getLogger(__name__)

Question = tuple[str, int, int, bytes]  # name, width and height of a picture; prompt

LINE_KEYS = {"key", "ids", "finish_reason", "probs"}  # of the journal, whose lines hold their own hash beside them
READOUT_KEYS = {"score", "box", "box_top_k"}  # of `decode`: how an answer is judged, not how it is generated


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """How answers are generated: the parameters, and beside them the codec, the seed and, for `grammar: closed`, the
    only names that are allowed.

    An engine that knows how likely the model finds what it emits says so, unless nobody will read it (`keep_probs`).
    """

    params: DecodeParams
    codec: str
    seed: int
    names: tuple[str, ...] = ()
    keep_probs: bool = True

    def identity(self) -> str:
        """All of it that decides what is generated, as text; a beam alone is no search."""
        idle = {"beams"} if self.params.beams == 1 else set()
        return json.dumps([self.params.model_dump(exclude=READOUT_KEYS | idle), self.codec, self.seed, self.names])

    def grammar(self, tokenizer: PreTrainedTokenizerBase) -> AnswerGrammar | None:
        """What answers must keep to; None if any token may come."""
        if self.params.grammar == "none":
            return None
        return AnswerGrammar(tokenizer, self.codec, self.params, self.names)


def greedy(max_new_tokens: int, box: str, score: str) -> DecodeParams:
    """Greedy decoding without constraints, for callers that take no parameters."""
    return DecodeParams.model_validate(
        {
            "max_new_tokens": max_new_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "score": score,
            "box": box,
            "box_top_k": 16,
            "grammar": "none",
            "corners": "any",
            "duplicate_iou": 1.0,
            "beams": 1,
        }
    )


@dataclass(frozen=True, slots=True, eq=False)
class TokenProbs:
    """How likely the model finds what was emitted, at temperature 1 and before penalties and masks: what re-scoring
    would say.

    Shapes: A tokens, C of them coordinates, K bins. `logprobs_A` in nats; `coord_probs_CK` sums to 1, None for a codec
    without coordinate tokens.
    """

    logprobs_A: NDArray[np.float64]
    coord_probs_CK: NDArray[np.float16] | None

    def to_json(self) -> dict[str, Any]:
        """All bits, as JSON values."""
        probs = self.coord_probs_CK
        packed = None if probs is None else base64.b64encode(zlib.compress(probs.tobytes(), level=1)).decode()
        return {"logprobs": self.logprobs_A.tolist(), "coord_probs": packed}

    @classmethod
    def from_json(cls, value: Any, n_tokens: int) -> TokenProbs:
        """What `to_json` made; raises ValueError saying what is wrong with it."""
        if not isinstance(value, dict) or value.keys() != {"logprobs", "coord_probs"}:
            raise ValueError("the probabilities are no object of logprobs and coord_probs")
        logprobs, packed = value["logprobs"], value["coord_probs"]
        if not isinstance(logprobs, list) or [type(p) for p in logprobs] != [float] * n_tokens:
            raise ValueError(f"the log-probabilities are {reprlib.repr(logprobs)}, expected {n_tokens} numbers")
        if packed is None:
            return cls(np.array(logprobs), None)
        try:
            # A few bytes can unpack to gigabytes: of what is stored, no more than a distribution for each token.
            stream = zlib.decompressobj()
            content = stream.decompress(base64.b64decode(packed, validate=True), 2 * NUM_BINS * n_tokens + 1)
            if not stream.eof:
                raise ValueError("they are cut, or more than there are tokens")
            probs = np.frombuffer(content, np.float16).reshape(-1, NUM_BINS)
        except (TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"the distributions cannot be read ({error})") from error
        return cls(np.array(logprobs), probs)


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """Generated ids of one image, without prompt and padding; a finished answer ends with the end-of-turn id.

    `probs` is None if the engine does not know them, or was told that nobody needs them.
    """

    ids: NDArray[np.int32]
    finish_reason: Literal["stop", "length"]
    probs: TokenProbs | None = None

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

    def generate(self, samples: Sequence[Sample], request: DecodeRequest) -> list[Generation]:
        """One generation per sample."""
        ...


def request_key(sample: Sample, request: DecodeRequest, image_root: Path) -> str:
    """What decides an answer of given weights: the picture's name and bytes, its size, prompt and request.

    Raises:
        DataError: the picture cannot be read.
    """
    content = record_sha256(image_root, sample.image)[:16]
    size = f"{sample.resized_width}x{sample.resized_height}"
    identity = f"{sample.image_id}:{sample.image}:{content}:{size}:{sample.prompt_ids.tolist()}:{request.identity()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def question_of(sample: Sample) -> Question:
    """What of a sample a model sees: its picture at its size, and the prompt."""
    return sample.image, sample.resized_width, sample.resized_height, sample.prompt_ids.tobytes()


def answer_seeds(samples: Sequence[Sample], seed: int) -> list[int]:
    """The seed of each answer: `seed`, and of a sample that is listed again `seed` + 1, + 2, ...

    So several draws for one image are those of several runs.
    """
    listed: Counter[tuple[int, Question]] = Counter()
    seeds = []
    for sample in samples:
        key = sample.image_id, question_of(sample)
        seeds.append(draw_seed(seed, listed[key]))
        listed[key] += 1
    return seeds


class Journal:
    """One JSON line per finished generation; safe to append to from several threads.

    Of several processes each writes a file of its own (`of_process`), and any of them reads all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._is_marked = False
        path.parent.mkdir(parents=True, exist_ok=True)

    def of_process(self, number: int) -> Journal:
        """The journal that a further process appends to, beside this one; read with it."""
        return Journal(self.path.with_stem(f"{self.path.stem}-{number}"))

    def read(self, vocabulary_size: int) -> dict[str, Generation]:
        """The finished generations by key. Damaged lines are dropped: what they answered is generated again."""
        done: dict[str, Generation] = {}
        for path in self._files():
            done |= _read_journal(path, vocabulary_size)
        return done

    def append(self, key: str, generation: Generation) -> None:
        """Add a finished generation; it is on disk when this returns."""
        row = {
            "key": key,
            "ids": generation.ids.tolist(),
            "finish_reason": generation.finish_reason,
            "probs": generation.probs and generation.probs.to_json(),
        }
        with self._lock, self.path.open("a", encoding="utf-8") as out:
            # A cut line of an earlier run must not swallow this one.
            out.write(("\n" if _ends_mid_line(self.path) else "") + json.dumps(sealed_row(row)) + "\n")
            out.flush()
            os.fsync(out.fileno())
            if not self._is_marked:
                mark(self.path.parent)
                self._is_marked = True

    def _files(self) -> list[Path]:
        stem, suffix = self.path.stem, self.path.suffix
        return sorted(
            p for p in self.path.parent.glob(f"*{suffix}") if re.fullmatch(f"{re.escape(stem)}(-[0-9]+)?", p.stem)
        )


def journal_rows(path: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The rows of a journal that are what was written, by their line, and what is wrong with each other line."""
    rows, damaged = {}, []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows[number] = unsealed_row(strict_json(line.decode()))
        except ValueError as error:
            damaged.append(f"line {number}: {error}")
    return rows, damaged


def _read_journal(path: Path, vocabulary_size: int) -> dict[str, Generation]:
    done: dict[str, Generation] = {}
    rows, damaged = journal_rows(path)
    for number, row in rows.items():
        try:
            key, generation = _finished(row, vocabulary_size)
        except ValueError as error:
            damaged.append(f"line {number}: {error}")
            continue
        done[key] = generation
    if damaged:
        log.warning(
            "%s: %d damaged lines, whose answers are generated again; the first is %s", path, len(damaged), damaged[0]
        )
    return done


def _finished(row: dict[str, Any], vocabulary_size: int) -> tuple[str, Generation]:
    """Key and generation of a row; raises ValueError if it is none that `append` wrote for this vocabulary."""
    if row.keys() != LINE_KEYS or not isinstance(row["key"], str):
        raise ValueError(f"it is no object of {', '.join(sorted(LINE_KEYS))}")
    generation = Generation.from_json(row["ids"], row["finish_reason"], vocabulary_size)
    if row["probs"] is None:
        return row["key"], generation
    return row["key"], replace(generation, probs=TokenProbs.from_json(row["probs"], len(generation.ids)))


def _ends_mid_line(path: Path) -> bool:
    with path.open("rb") as handle:
        if handle.seek(0, 2) == 0:
            return False
        handle.seek(-1, 2)
        return handle.read(1) != b"\n"
