"""The common part of the in-memory decoders: a cache of slots, the prompts, and the record of each token.

Shapes: R open answers, T tokens that an answer runs in one step, V vocabulary, K bins, L cache columns, H key heads, D
head size, N tokens of packed prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, Qwen3VLForConditionalGeneration

from coordexp.geometry.bins import NUM_BINS
from coordexp.infra.device import compute_dtype
from coordexp.infra.prefetch import ahead
from coordexp.models.forward import hidden_states, input_table, slot_logits
from coordexp.models.loading import Checkpoint
from coordexp.packing.collator import Collator, Segment
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeRequest, Generation, TokenProbs, question_of
from coordexp.rollout.token_choice import TokenChoice
from coordexp.text.codecs import END_OF_TURN
from coordexp.text.grammar import AnswerGrammar
from coordexp.text.vocabulary import token_id

_MORE_COLUMNS = 64  # minimum growth of the cache, which is copied each time it grows


class SlotCache(Cache):
    """Keys and values of several answers of different lengths; slots 0..R-1 hold the open answers.

    Each answer is left-aligned in its slot and has its own length, so answers join and leave without padding the
    others. A mask per query hides the columns beyond the length.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration, slots: int) -> None:
        super().__init__(layers=[])
        text, weight = model.model.language_model.config, input_table(model).weight
        dtype = compute_dtype(weight)
        shape = (text.num_hidden_layers, slots, text.num_key_value_heads, 0, text.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2))
        self.lengths = np.zeros(slots, np.int64)
        self._rows = self._columns = torch.empty(0)
        self._seen: tuple[int, int] | None = None

    def fill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Prepare for a forward over packed prompts, which go into these slots."""
        self._reserve(max(lengths))
        self.lengths[list(slots)] = lengths
        rows, columns = np.repeat(slots, lengths), np.concatenate([np.arange(n) for n in lengths])
        self._seen = None
        self._write_at(rows[None], columns[None])

    def extend(self, n_open: int, n_tokens: int) -> Tensor:
        """Prepare for a forward over `n_tokens` more tokens of each open answer; returns the (R, T, L) attention mask.

        `lengths` does not change: the caller adds the number of accepted tokens. Keys of rejected drafts stay beyond
        the length until later tokens overwrite them.
        """
        columns_RT = self.lengths[:n_open, None] + np.arange(n_tokens)
        width = int(columns_RT.max()) + 1
        self._reserve(width)
        self._seen = n_open, width
        self._write_at(np.arange(n_open)[:, None], columns_RT)
        return torch.arange(width, device=self.keys.device) <= self._columns[..., None]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """transformers' cache interface: store (B, H, T, D) states, return those that the queries attend to."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._rows, :, self._columns] = key_states.transpose(1, 2).to(keys.dtype)
        values[self._rows, :, self._columns] = value_states.transpose(1, 2).to(values.dtype)
        if self._seen is None:
            return key_states, value_states
        n_open, width = self._seen
        return keys[:n_open, :, :width], values[:n_open, :, :width]

    def copy(self, source: int, target: int) -> None:
        """Copy the contents of one slot into another."""
        n = self.lengths[target] = self.lengths[source]
        for states in (self.keys, self.values):
            states[:, target, :, :n] = states[:, source, :, :n]

    def reorder(self, first: int, sources: Sequence[int]) -> None:
        """Fill the slots from `first` on with the contents of slots `first + source`."""
        taken, targets = [first + source for source in sources], slice(first, first + len(sources))
        n = self.lengths[taken].max(initial=0)
        self.lengths[targets] = self.lengths[taken]
        for states in (self.keys, self.values):
            states[:, targets, :, :n] = states[:, taken, :, :n]

    def _write_at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        self._rows, self._columns = (torch.from_numpy(places).to(self.keys.device) for places in (rows, columns))

    def _reserve(self, columns: int) -> None:
        missing = columns - self.keys.shape[3]
        if missing > 0:
            more = (0, 0, 0, max(missing, _MORE_COLUMNS))
            self.keys, self.values = (torch.nn.functional.pad(states, more) for states in (self.keys, self.values))


class Prompts:
    """Runs the prompts of samples, in order, into the slots of a cache.

    A thread loads images, at most `most` ahead. Consecutive equal prompts are computed once.
    """

    def __init__(
        self, model: Qwen3VLForConditionalGeneration, collator: Collator, samples: Sequence[Sample], most: int
    ) -> None:
        self._model, self._collator, self._samples = model, collator, samples
        self._at = 0
        self._pictures = ahead(self._read_pictures(), max(1, most))

    def read(self, cache: SlotCache, slots: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Run the next prompts into these slots; returns (R, V) logits and the rotary position of each first token."""
        asked = self._samples[self._at : self._at + len(slots)]
        self._at += len(slots)
        pictures = [next(self._pictures) for _ in asked]
        is_new = [i == 0 or question_of(asked[i]) != question_of(asked[i - 1]) for i in range(len(asked))]
        new = [i for i, first in enumerate(is_new) if first]
        segments = [prompt_segment(asked[i]) for i in new]
        batch = self._collator.layout(segments, [list(range(len(new)))], [pictures[i] for i in new])
        batch, lengths = batch.to(cache.keys.device), [segment.length for segment in segments]
        cache.fill([slots[i] for i in new], lengths)
        hidden_ND = hidden_states(self._model, batch, cache=cache)
        last = torch.from_numpy(np.cumsum(lengths) - 1).to(hidden_ND.device)
        logits_RV, ropes = slot_logits(self._model, hidden_ND, last), (batch.position_ids[1, 0, last] + 1).tolist()
        if len(new) == len(asked):
            return logits_RV, ropes
        read_as = (np.cumsum(is_new) - 1).tolist()
        for i, source in enumerate(read_as):
            if not is_new[i]:
                cache.copy(slots[new[source]], slots[i])
        return logits_RV[read_as], [ropes[source] for source in read_as]

    def close(self) -> None:
        """Stop loading images."""
        self._pictures.close()

    def _read_pictures(self) -> Iterator[NDArray[np.float32]]:
        last, patches = None, np.empty(0, np.float32)
        for sample in self._samples:
            if question_of(sample) != last:
                last, patches = question_of(sample), self._collator.patches(sample)
            yield patches


@dataclass(slots=True, kw_only=True, eq=False)
class Written:
    """Tokens of an answer and, if requested, their log-probabilities and the distributions at coordinates."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    coord_probs: list[Tensor] = field(default_factory=list)

    def copy(self) -> Written:
        """A copy that can be extended independently."""
        return Written(ids=[*self.ids], logprobs=[*self.logprobs], coord_probs=[*self.coord_probs])

    def append(self, token: int, logprob: float | None, probs_K: Tensor | None) -> None:
        """Add a token and its probabilities."""
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if probs_K is not None:
            self.coord_probs.append(probs_K)


class Decoder(ABC):
    """Generates the answers of a checkpoint to a request; the subclass defines the search."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        collator: Collator,
        request: DecodeRequest,
        grammar: AnswerGrammar | None,
        slots: int,
    ) -> None:
        """`slots` is the maximum number of answers (or beams) that are open at a time."""
        config, coord = checkpoint.model.config, checkpoint.coord
        self._model, self._collator, self._request, self._grammar = checkpoint.model, collator, request, grammar
        self._slots, self._tokenizer = slots, checkpoint.tokenizer
        self._room = request.params.max_new_tokens
        self._end_id = token_id(checkpoint.tokenizer, END_OF_TURN)
        has_coords = coord is not None and request.codec != "digits"
        self._coord_ids = range(coord.first_id, coord.end_id) if coord and has_coords else range(0)
        # Image and video tokens are placeholders for visual input. The model could not re-read an answer with one.
        self._choice = TokenChoice(request.params, [config.image_token_id, config.video_token_id])
        self.forwards = 0  # number of forwards over open answers, for measurements

    @abstractmethod
    def decode(self, samples: Sequence[Sample], seeds: Sequence[int] | None = None) -> list[Generation]:
        """One generation per sample, in their order; sampling uses `seeds`, by default `answer_seeds`."""

    def _known(self, logits_RV: Tensor, ids_R: Tensor) -> list[tuple[float | None, Tensor | None]]:
        """The log-probability of each of these tokens, and the distribution over bins if it is a coordinate."""
        if not self._request.keep_probs:
            return [(None, None)] * len(ids_R)
        logprobs_R = logits_RV.gather(1, ids_R[:, None])[:, 0] - logits_RV.logsumexp(1)
        probs_of: dict[int, Tensor] = {}
        if span := self._coord_ids:
            rows = ((ids_R >= span.start) & (ids_R < span.stop)).nonzero()[:, 0]
            probs = logits_RV[rows, span.start : span.stop].softmax(-1).half().cpu()
            probs_of = dict(zip(rows.tolist(), probs, strict=True))
        return [(logprob, probs_of.get(row)) for row, logprob in enumerate(logprobs_R.tolist())]

    def _ended(self, ids: Sequence[int]) -> bool:
        return ids[-1] == self._end_id or len(ids) == self._room

    def _generation(self, answer: Written) -> Generation:
        probs = None
        if self._request.keep_probs:
            coord_probs = None
            if self._coord_ids:
                coord_probs = np.array([p.numpy() for p in answer.coord_probs], np.float16).reshape(-1, NUM_BINS)
            probs = TokenProbs(np.array(answer.logprobs), coord_probs)
        ids = np.array(answer.ids, np.int32)
        return Generation(ids, "stop" if ids[-1] == self._end_id else "length", probs)


def prompt_segment(sample: Sample) -> Segment:
    """A segment that consists of the prompt alone."""
    no_ids, no_boxes = np.empty(0, np.int32), np.empty((0, 4), np.int64)
    no_weights = np.empty(0, np.float32)
    return Segment(sample, no_ids, np.empty(0, np.uint8), no_weights, no_boxes, no_boxes.astype(np.float32))
