"""The engine protocol: generators of token ids for samples, their requests, and the journal of their answers.

The journal writes each finished generation to disk, so that an interrupted run can resume.
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

Question = tuple[str, int, int, bytes]  # name, width and height of an image; prompt

LINE_KEYS = {"key", "ids", "finish_reason", "probs"}  # of a journal line, in addition to the hash of the line
READOUT_KEYS = {"score", "box", "box_top_k"}  # keys of `decode` that affect reading an answer, not generating it


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """How answers are generated: decode parameters, codec, seed and, for `grammar: closed`, the allowed names.

    With `keep_probs`, an engine that computes the probabilities of the emitted tokens returns them.
    """

    params: DecodeParams
    codec: str
    seed: int
    names: tuple[str, ...] = ()
    keep_probs: bool = True

    def identity(self) -> str:
        """Everything that determines the generated tokens, as text; `beams: 1` counts as no beam search."""
        idle = {"beams"} if self.params.beams == 1 else set()
        return json.dumps([self.params.model_dump(exclude=READOUT_KEYS | idle), self.codec, self.seed, self.names])

    def grammar(self, tokenizer: PreTrainedTokenizerBase) -> AnswerGrammar | None:
        """The grammar of the answers; None if every token is allowed."""
        if self.params.grammar == "none":
            return None
        return AnswerGrammar(tokenizer, self.codec, self.params, self.names)


def greedy(max_new_tokens: int, box: str, score: str) -> DecodeParams:
    """Parameters of greedy decoding without constraints, for callers without decode parameters."""
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
    """The model's probabilities of the emitted tokens, at temperature 1, without penalties and masks, as in re-scoring.

    Shapes: A tokens, C of them coordinates, K bins. `logprobs_A` is in nats. `coord_probs_CK` sums to 1 over K; it is
    None for a codec without coordinate tokens.
    """

    logprobs_A: NDArray[np.float64]
    coord_probs_CK: NDArray[np.float16] | None

    def to_json(self) -> dict[str, Any]:
        """JSON values without loss of precision."""
        probs = self.coord_probs_CK
        packed = None if probs is None else base64.b64encode(zlib.compress(probs.tobytes(), level=1)).decode()
        return {"logprobs": self.logprobs_A.tolist(), "coord_probs": packed}

    @classmethod
    def from_json(cls, value: Any, n_tokens: int) -> TokenProbs:
        """The inverse of `to_json`; raises ValueError with the reason if the value is invalid."""
        if not isinstance(value, dict) or value.keys() != {"logprobs", "coord_probs"}:
            raise ValueError("the probabilities are not an object with logprobs and coord_probs")
        logprobs, packed = value["logprobs"], value["coord_probs"]
        if not isinstance(logprobs, list) or [type(p) for p in logprobs] != [float] * n_tokens:
            raise ValueError(f"the log-probabilities are {reprlib.repr(logprobs)}, expected {n_tokens} numbers")
        if packed is None:
            return cls(np.array(logprobs), None)
        try:
            # A few bytes can unpack to gigabytes, so at most one distribution per token is unpacked.
            stream = zlib.decompressobj()
            content = stream.decompress(base64.b64decode(packed, validate=True), 2 * NUM_BINS * n_tokens + 1)
            if not stream.eof:
                raise ValueError("they are truncated, or more than the tokens")
            probs = np.frombuffer(content, np.float16).reshape(-1, NUM_BINS)
        except (TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"the distributions cannot be read ({error})") from error
        return cls(np.array(logprobs), probs)


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """Generated ids of one image, without prompt and padding; a finished answer ends with the end-of-turn id.

    `probs` is None if the engine does not compute them, or if the request does not need them.
    """

    ids: NDArray[np.int32]
    finish_reason: Literal["stop", "length"]
    probs: TokenProbs | None = None

    @classmethod
    def from_json(cls, ids: Any, finish_reason: Any, vocabulary_size: int) -> Generation:
        """A generation from untrusted JSON values; raises ValueError with the reason if they are invalid."""
        if not is_token_ids(ids):
            raise ValueError(f"the ids are {reprlib.repr(ids)}, expected a list of token ids")
        if ids and max(ids) >= vocabulary_size:
            raise ValueError(f"the largest id is {reprlib.repr(max(ids))}, expected ids below {vocabulary_size}")
        if finish_reason not in ("stop", "length"):
            raise ValueError(f"the finish reason is {reprlib.repr(finish_reason)}, expected 'stop' or 'length'")
        return cls(np.array(ids, np.int32), finish_reason)


def is_token_ids(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of integers >= 0; true and 1.0 are not integers."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


class Engine(Protocol):
    """Generates answers; the results are in the order of the samples, whatever the order of the work."""

    def generate(self, samples: Sequence[Sample], request: DecodeRequest) -> list[Generation]:
        """One generation per sample."""
        ...


def request_key(sample: Sample, request: DecodeRequest, image_root: Path) -> str:
    """Hash of what determines an answer for given weights: the image's name, bytes and size, the prompt, the request.

    Raises:
        DataError: the image cannot be read.
    """
    content = record_sha256(image_root, sample.image)[:16]
    size = f"{sample.resized_width}x{sample.resized_height}"
    identity = f"{sample.image_id}:{sample.image}:{content}:{size}:{sample.prompt_ids.tolist()}:{request.identity()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def question_of(sample: Sample) -> Question:
    """The part of a sample that the model sees: its image at its size, and the prompt."""
    return sample.image, sample.resized_width, sample.resized_height, sample.prompt_ids.tobytes()


def answer_seeds(samples: Sequence[Sample], seed: int) -> list[int]:
    """The seed of each answer: `seed`, and `seed` + 1, + 2, ... for repetitions of a sample.

    Several answers to one image thus equal those of several runs.
    """
    listed: Counter[tuple[int, Question]] = Counter()
    seeds = []
    for sample in samples:
        key = sample.image_id, question_of(sample)
        seeds.append(draw_seed(seed, listed[key]))
        listed[key] += 1
    return seeds


class Journal:
    """One JSON line per finished generation; several threads may append.

    With several processes, each writes its own file (`of_process`), and each reads all files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._is_marked = False
        path.parent.mkdir(parents=True, exist_ok=True)

    def of_process(self, number: int) -> Journal:
        """The journal of another process, next to this one; `read` includes it."""
        return Journal(self.path.with_stem(f"{self.path.stem}-{number}"))

    def read(self, vocabulary_size: int) -> dict[str, Generation]:
        """The finished generations by key. Damaged lines are dropped, and their answers generated again."""
        done: dict[str, Generation] = {}
        for path in self._files():
            done |= _read_journal(path, vocabulary_size)
        return done

    def append(self, key: str, generation: Generation) -> None:
        """Append a finished generation; it is on disk when this returns."""
        row = {
            "key": key,
            "ids": generation.ids.tolist(),
            "finish_reason": generation.finish_reason,
            "probs": generation.probs and generation.probs.to_json(),
        }
        with self._lock, self.path.open("a", encoding="utf-8") as out:
            # A truncated last line of a killed run must not swallow this one.
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
    """The intact rows of a journal by line number, and the reason for each damaged line."""
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
            "%s: %d damaged lines, whose answers are generated again; the first: %s", path, len(damaged), damaged[0]
        )
    return done


def _finished(row: dict[str, Any], vocabulary_size: int) -> tuple[str, Generation]:
    """Key and generation of a row; raises ValueError unless `append` wrote it for this vocabulary."""
    if row.keys() != LINE_KEYS or not isinstance(row["key"], str):
        raise ValueError(f"it is not an object with {', '.join(sorted(LINE_KEYS))}")
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
