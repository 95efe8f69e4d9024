"""Batched decoding over the model in memory, in which no forward is spent on an answer that has ended.

Prompts and pictures are read packed, without padding, into the slots of a cache. Each step then runs the next tokens of
every open answer: the last one that was chosen, and those that are sure to follow it under a grammar. An answer that
ends gives its slot away at once; the last open answer moves into it, so that the open ones are always the first.
What scores need is kept on the way: how likely the model finds each token, and where a coordinate was emitted, how
likely it finds every bin.

Shapes: R open answers, T tokens that an answer runs in one step, V vocabulary, K bins, A tokens of one answer, C
coordinates in it, L cache columns, H key heads, D head size, N tokens of packed prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, Qwen3VLForConditionalGeneration

from coordexp.geometry.bins import NUM_BINS
from coordexp.infra.device import compute_dtype
from coordexp.infra.random_streams import stream_seed
from coordexp.models.forward import hidden_states, input_table, next_hidden_states, slot_logits
from coordexp.models.loading import Checkpoint
from coordexp.packing.collator import Collator, Segment
from coordexp.packing.samples import Sample
from coordexp.rollout.draft import FormatDraft
from coordexp.rollout.engine import DecodeRequest, Generation, TokenProbs
from coordexp.rollout.token_choice import TokenChoice
from coordexp.text.codecs import END_OF_TURN
from coordexp.text.grammar import AnswerGrammar
from coordexp.text.grammar_walk import AnswerWalk
from coordexp.text.vocabulary import token_id

_MORE_COLUMNS = 64  # that the cache grows by at least: each time, it is copied
_REFUSALS = 3  # of drafts, after which an answer gets no more: it is not written as the training answers are
_REFILL = 8  # prompts are read when this fraction (one in so many) of the slots is free: one forward for several


class SlotCache(Cache):
    """Keys and values of several answers of different lengths; slots 0..R-1 hold the open ones."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, slots: int) -> None:
        super().__init__(layers=[])
        text, weight = model.model.language_model.config, input_table(model).weight
        shape = (text.num_hidden_layers, slots, text.num_key_value_heads, 0, text.head_dim)
        self.keys, self.values = (
            torch.zeros(shape, dtype=compute_dtype(weight), device=weight.device) for _ in range(2)
        )
        self.lengths = np.zeros(slots, np.int64)
        self._rows = self._columns = torch.empty(0)
        self._seen: tuple[int, int] | None = None

    def fill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """The next forward is of packed prompts, which go into these slots."""
        self._reserve(max(lengths))
        self.lengths[list(slots)] = lengths
        rows, columns = np.repeat(slots, lengths), np.concatenate([np.arange(n) for n in lengths])
        self._seen = None
        self._write_at(rows[None], columns[None])

    def extend(self, n_open: int, n_tokens: int) -> Tensor:
        """The next forward is of so many more tokens of each open answer; which columns each sees, (R, T, L).

        `lengths` stay: how many of the tokens count is for the caller to say.
        """
        columns_RT = self.lengths[:n_open, None] + np.arange(n_tokens)
        width = int(columns_RT.max()) + 1
        self._reserve(width)
        self._seen = n_open, width
        self._write_at(np.arange(n_open)[:, None], columns_RT)
        return torch.arange(width, device=self.keys.device) <= self._columns[..., None]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """transformers' interface: takes (B, H, T, D) states, gives what the queries attend to."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._rows, :, self._columns] = key_states.transpose(1, 2).to(keys.dtype)
        values[self._rows, :, self._columns] = value_states.transpose(1, 2).to(values.dtype)
        if self._seen is None:
            return key_states, value_states
        n_open, width = self._seen
        return keys[:n_open, :, :width], values[:n_open, :, :width]

    def move(self, source: int, target: int) -> None:
        """Put the answer of one slot into another."""
        n = self.lengths[target] = self.lengths[source]
        for states in (self.keys, self.values):
            states[:, target, :, :n] = states[:, source, :, :n]

    def _write_at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        self._rows, self._columns = (torch.from_numpy(places).to(self.keys.device) for places in (rows, columns))

    def _reserve(self, columns: int) -> None:
        missing = columns - self.keys.shape[3]
        if missing > 0:
            more = (0, 0, 0, max(missing, _MORE_COLUMNS))
            self.keys, self.values = (torch.nn.functional.pad(states, more) for states in (self.keys, self.values))


@dataclass(slots=True, eq=False)
class _Answer:
    """An answer that is being written."""

    place: int  # among the samples
    rope: int  # rotary position of the token that runs next
    held: set[int]  # the different tokens of prompt and answer
    walk: AnswerWalk | None
    random: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # what must follow; the walk stands behind it
    allowed_T: NDArray[np.bool_] | None = None  # behind that
    logprobs: list[float] = field(default_factory=list)
    coord_probs: list[Tensor] = field(default_factory=list)
    n_coords: int = 0
    ends_in_coord: bool = False
    refusals: int = 0  # of drafts, at their first token

    def __post_init__(self) -> None:
        self._look_ahead()

    def run(self, draft: FormatDraft | None, room: int) -> list[int]:
        """The tokens of the next step: the last one, and those that must or are likely to follow, in a whole answer of
        at most `room` tokens."""
        ahead: Sequence[int] = self.forced
        if draft and not ahead and self.refusals < _REFUSALS:
            ahead = draft.after(self.ids, self.n_coords, self.ends_in_coord)
        return [self.ids[-1], *ahead[: room - len(self.ids) - 1]]

    def take(self, token: int, is_coord: bool) -> None:
        """Append a token, the forced one if there is one."""
        self.ids.append(token)
        self.held.add(token)
        self.n_coords += is_coord
        self.ends_in_coord = is_coord
        if self.forced:
            self.forced.pop(0)
        elif self.walk:
            self.walk.advance(token)
            self._look_ahead()

    def _look_ahead(self) -> None:
        while self.walk and not self.walk.ended:
            self.allowed_T = self.walk.allowed()
            if np.count_nonzero(self.allowed_T) > 1:
                return
            self.forced.append(int(self.allowed_T.argmax()))
            self.walk.advance(self.forced[-1])


class SlotDecoder:
    """Answers of a checkpoint to a request, up to `slots` at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        collator: Collator,
        request: DecodeRequest,
        grammar: AnswerGrammar | None,
        slots: int,
    ) -> None:
        config, coord = checkpoint.model.config, checkpoint.coord
        self._model, self._collator, self._request, self._grammar = checkpoint.model, collator, request, grammar
        self._slots = slots
        self._room = request.params.max_new_tokens
        self._end_id = token_id(checkpoint.tokenizer, END_OF_TURN)
        has_coords = coord is not None and request.codec != "digits"
        self._coord_ids = range(coord.first_id, coord.end_id) if coord and has_coords else range(0)
        self._draft = FormatDraft(checkpoint.tokenizer, request.codec) if has_coords else None
        # They stand for pictures: an answer that holds one could not be read by the model again.
        self._choice = TokenChoice(request.params, [config.image_token_id, config.video_token_id])
        self.forwards = 0  # over tokens of open answers, for measurements

    @torch.inference_mode()
    def decode(self, samples: Sequence[Sample]) -> list[Generation]:
        """One generation per sample, in their order."""
        cache = SlotCache(self._model, min(self._slots, len(samples)))
        waiting = list(range(len(samples)))
        open_: list[_Answer] = []
        done: dict[int, Generation] = {}
        while waiting or open_:
            free = len(cache.lengths) - len(open_)
            if waiting and (free * _REFILL >= len(cache.lengths) or not open_):
                chosen, waiting = waiting[:free], waiting[free:]
                open_ += self._begin(cache, samples, chosen, len(open_))
            else:
                self._step(cache, open_)
            for slot in reversed(range(len(open_))):
                if self._ended(open_[slot]):
                    ended = _close(cache, open_, slot)
                    done[ended.place] = self._generation(ended)
        return [done[i] for i in range(len(samples))]

    def _begin(self, cache: SlotCache, samples: Sequence[Sample], chosen: Sequence[int], first: int) -> list[_Answer]:
        """Read prompts into the slots from `first`, and take the first token of their answers."""
        segments = [_question(samples[i]) for i in chosen]
        batch = self._collator.layout(segments, [list(range(len(segments)))]).to(cache.keys.device)
        lengths = [segment.length for segment in segments]
        cache.fill(range(first, first + len(chosen)), lengths)
        hidden_ND = hidden_states(self._model, batch, cache=cache)
        last = torch.from_numpy(np.cumsum(lengths) - 1).to(hidden_ND.device)
        ropes = batch.position_ids[1, 0, last] + 1
        answers = [self._answer(i, samples[i], rope) for i, rope in zip(chosen, ropes.tolist(), strict=True)]
        self._take(answers, slot_logits(self._model, hidden_ND, last))
        return answers

    def _answer(self, place: int, sample: Sample, rope: int) -> _Answer:
        random = None
        if self._choice.draws:
            random = torch.Generator().manual_seed(stream_seed(self._request.seed, "decode/answer", sample.image_id))
        held = set(sample.prompt_ids.tolist()) if self._choice.penalizes else set()
        return _Answer(place, rope, held, AnswerWalk(self._grammar) if self._grammar else None, random)

    def _step(self, cache: SlotCache, answers: Sequence[_Answer]) -> None:
        """Run the next tokens of every open answer, and take what follows each of them."""
        runs = [answer.run(self._draft, self._room) for answer in answers]
        n_R = np.array([len(run) for run in runs])
        width, device = int(n_R.max()), cache.keys.device
        ids_RT = torch.tensor([run + [self._end_id] * (width - len(run)) for run in runs], device=device)
        rope_RT = torch.tensor([[answer.rope] for answer in answers], device=device) + torch.arange(
            width, device=device
        )
        mask_RTL = cache.extend(len(answers), width)
        hidden_RTD = next_hidden_states(self._model, ids_RT, rope_RT, mask_RTL, cache)
        self.forwards += 1
        rows, t = list(range(len(answers))), 0
        while rows:
            slots = torch.tensor([row * width + t for row in rows], device=device)
            self._take([answers[row] for row in rows], slot_logits(self._model, hidden_RTD.flatten(0, 1), slots))
            cache.lengths[rows] += 1
            for row in rows:
                answers[row].rope += 1
            t += 1
            rows = [row for row in rows if self._goes_on(answers[row], runs[row], t)]

    def _goes_on(self, answer: _Answer, run: Sequence[int], t: int) -> bool:
        """Whether the token at `t` of a run is the one that was taken: then what it made of the cache counts."""
        if t >= len(run) or self._ended(answer):
            return False
        is_right = answer.ids[-1] == run[t]
        answer.refusals += t == 1 and not is_right
        return is_right

    def _take(self, answers: Sequence[_Answer], logits_RV: Tensor) -> None:
        """Append the next token to each answer: the forced one, or one that is chosen by its logits."""
        logits_RV = logits_RV.float()
        ids_R = torch.tensor([answer.forced[0] if answer.forced else -1 for answer in answers])
        free = (ids_R < 0).nonzero()[:, 0]
        if len(free):
            choosing = [answers[row] for row in free.tolist()]
            all_free = len(free) == len(answers)
            ids_R[free] = self._chosen(choosing, logits_RV if all_free else logits_RV[free.to(logits_RV.device)])
        if self._request.keep_probs:
            self._keep(answers, logits_RV, ids_R.to(logits_RV.device))
        for answer, token in zip(answers, ids_R.tolist(), strict=True):
            answer.take(token, token in self._coord_ids)

    def _chosen(self, answers: Sequence[_Answer], logits_RV: Tensor) -> Tensor:
        allowed_RT = uniform_R = None
        if self._grammar:
            allowed_RT = torch.from_numpy(np.stack([a.allowed_T for a in answers if a.allowed_T is not None]))
            allowed_RT = allowed_RT.to(logits_RV.device)
        if self._choice.draws:
            uniform_R = torch.cat([torch.rand(1, generator=answer.random) for answer in answers])
        scores_RV = self._choice.scores(logits_RV, [answer.held for answer in answers], allowed_RT)
        return self._choice.choose(scores_RV, uniform_R).cpu()

    def _keep(self, answers: Sequence[_Answer], logits_RV: Tensor, ids_R: Tensor) -> None:
        """How likely the model finds the tokens, and where they are coordinates, all bins."""
        logprobs_R = logits_RV.gather(1, ids_R[:, None])[:, 0] - logits_RV.logsumexp(1)
        for answer, logprob in zip(answers, logprobs_R.tolist(), strict=True):
            answer.logprobs.append(logprob)
        if span := self._coord_ids:
            rows = ((ids_R >= span.start) & (ids_R < span.stop)).nonzero()[:, 0]
            probs = logits_RV[rows, span.start : span.stop].softmax(-1).half().cpu()
            for row, probs_K in zip(rows.tolist(), probs, strict=True):
                answers[row].coord_probs.append(probs_K)

    def _ended(self, answer: _Answer) -> bool:
        return answer.ids[-1] == self._end_id or len(answer.ids) == self._room

    def _generation(self, answer: _Answer) -> Generation:
        probs = None
        if self._request.keep_probs:
            coord_probs = None
            if self._coord_ids:
                coord_probs = np.array([p.numpy() for p in answer.coord_probs], np.float16).reshape(-1, NUM_BINS)
            probs = TokenProbs(np.array(answer.logprobs), coord_probs)
        ids = np.array(answer.ids, np.int32)
        return Generation(ids, "stop" if ids[-1] == self._end_id else "length", probs)


def _close(cache: SlotCache, answers: list[_Answer], slot: int) -> _Answer:
    """Free a slot: the last open answer moves into it."""
    last = answers.pop()
    if slot == len(answers):
        return last
    ended, answers[slot] = answers[slot], last
    cache.move(len(answers), slot)
    return ended


def _question(sample: Sample) -> Segment:
    """A segment of the prompt alone."""
    no_ids, no_boxes = np.empty(0, np.int32), np.empty((0, 4), np.int64)
    no_weights = np.empty(0, np.float32)
    return Segment(sample, no_ids, np.empty(0, np.uint8), no_weights, no_boxes, no_boxes.astype(np.float32))
