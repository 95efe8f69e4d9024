"""Batched decoding with the model in memory, with continuous batching: finished answers take part in no forward.

Prompts and images are packed without padding into the slots of a cache. Each step then runs the next tokens of every
open answer: the last chosen token, and those that must follow it under a grammar or are drafted. When an answer ends,
its slot is free at once: the last open answer moves into it, so that the open answers always occupy the first slots
(as in Orca's iteration-level scheduling, Yu et al. 2022, OSDI). The decoder records the probabilities that scores need:
the log-probability of each token, and the distribution over all bins at each coordinate.

Shapes: R open answers, T tokens that an answer runs in one step, V vocabulary, K bins, A tokens of one answer, C
coordinates in it, L cache columns, H key heads, D head size, N tokens of packed prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordexp.infra.random_streams import stream_seed
from coordexp.models.forward import next_hidden_states, slot_logits
from coordexp.packing.samples import Sample
from coordexp.rollout.draft import FormatDraft
from coordexp.rollout.engine import Generation, answer_seeds
from coordexp.rollout.slot_cache import Decoder, Prompts, SlotCache, Written
from coordexp.text.grammar_walk import AnswerWalk

_REFUSALS = 3  # rejected drafts after which an answer gets none: it does not follow the format of the training answers
_REFILL = 8  # prompts run when 1 / _REFILL of the slots is free, so that one forward serves several


@dataclass(slots=True, eq=False)
class OpenAnswer(Written):
    """An unfinished answer."""

    place: int  # index of its sample
    rope: int  # rotary position of the token that runs next
    held: set[int]  # distinct tokens of prompt and answer
    walk: AnswerWalk | None
    random: torch.Generator | None
    forced: list[int] = field(default_factory=list)  # tokens that must follow; the walk has already passed them
    allowed_T: NDArray[np.bool_] | None = None  # tokens that are allowed after `forced`
    n_coords: int = 0
    ends_in_coord: bool = False
    refusals: int = 0  # drafts that were rejected at their first token

    def __post_init__(self) -> None:
        self._look_ahead()

    def run(self, draft: FormatDraft | None, room: int) -> list[int]:
        """The tokens of the next step: the last one and its forced or drafted successors, within `room` in total."""
        ahead: Sequence[int] = self.forced
        if draft and not ahead and self.refusals < _REFUSALS:
            ahead = draft.after(self.ids, self.n_coords, self.ends_in_coord)
        return [self.ids[-1], *ahead[: room - len(self.ids) - 1]]

    def take(self, token: int, is_coord: bool) -> None:
        """Update the state after a token was appended (the forced one, if there is one)."""
        self.held.add(token)
        self.n_coords += is_coord
        self.ends_in_coord = is_coord
        if self.forced:
            self.forced.pop(0)
        elif self.walk:
            self.walk.advance(token)
            self._look_ahead()

    def _look_ahead(self) -> None:
        # Where the grammar allows a single token, no logits are needed to choose it: collect these tokens up to the
        # next real choice, so that one forward runs them all.
        while self.walk and not self.walk.ended:
            self.allowed_T = self.walk.allowed()
            if np.count_nonzero(self.allowed_T) > 1:
                return
            self.forced.append(int(self.allowed_T.argmax()))
            self.walk.advance(self.forced[-1])


class SlotDecoder(Decoder):
    """Generates answers by greedy decoding or sampling."""

    @torch.inference_mode()
    def decode(self, samples: Sequence[Sample], seeds: Sequence[int] | None = None) -> list[Generation]:
        """One generation per sample, in their order; sampling uses `seeds`, by default `answer_seeds`."""
        cache = SlotCache(self._model, min(self._slots, len(samples)))
        draft = FormatDraft(self._tokenizer, self._request.codec) if self._coord_ids else None
        seeds = seeds or answer_seeds(samples, self._request.seed)
        waiting = list(range(len(samples)))
        open_: list[OpenAnswer] = []
        done: dict[int, Generation] = {}
        with closing(Prompts(self._model, self._collator, samples, len(cache.lengths) // _REFILL)) as prompts:
            while waiting or open_:
                free = len(cache.lengths) - len(open_)
                if waiting and (free * _REFILL >= len(cache.lengths) or not open_):
                    chosen, waiting = waiting[:free], waiting[free:]
                    logits_RV, ropes = prompts.read(cache, range(len(open_), len(open_) + len(chosen)))
                    begun = [self._answer(i, samples[i], seeds[i], rope) for i, rope in zip(chosen, ropes, strict=True)]
                    self._take(begun, logits_RV)
                    open_ += begun
                else:
                    self._step(cache, open_, draft)
                for slot in reversed(range(len(open_))):
                    if self._ended(open_[slot].ids):
                        ended = _close(cache, open_, slot)
                        done[ended.place] = self._generation(ended)
        return [done[i] for i in range(len(samples))]

    def _answer(self, place: int, sample: Sample, seed: int, rope: int) -> OpenAnswer:
        random = None
        if self._choice.draws:
            random = torch.Generator().manual_seed(stream_seed(seed, "decode/answer", sample.image_id))
        held = set(sample.prompt_ids.tolist()) if self._choice.penalizes else set()
        return OpenAnswer(place, rope, held, AnswerWalk(self._grammar) if self._grammar else None, random)

    def _step(self, cache: SlotCache, answers: Sequence[OpenAnswer], draft: FormatDraft | None) -> None:
        """Run the next tokens of every open answer, and append the tokens that follow."""
        runs = [answer.run(draft, self._room) for answer in answers]
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
        # Token t of a run counts if it is the token that was chosen after the previous ones. The first mismatch ends
        # the run of its answer; the columns behind it are ignored by the mask and overwritten later.
        while rows:
            slots = torch.tensor([row * width + t for row in rows], device=device)
            self._take([answers[row] for row in rows], slot_logits(self._model, hidden_RTD.flatten(0, 1), slots))
            cache.lengths[rows] += 1
            for row in rows:
                answers[row].rope += 1
            t += 1
            rows = [row for row in rows if self._goes_on(answers[row], runs[row], t)]

    def _goes_on(self, answer: OpenAnswer, run: Sequence[int], t: int) -> bool:
        """Whether token `t` of a run is the chosen one, so that its cache column is valid."""
        if t >= len(run) or self._ended(answer.ids):
            return False
        is_right = answer.ids[-1] == run[t]
        answer.refusals += t == 1 and not is_right
        return is_right

    def _take(self, answers: Sequence[OpenAnswer], logits_RV: Tensor) -> None:
        """Append the next token to each answer: the forced one, or one chosen by its logits."""
        logits_RV = logits_RV.float()
        ids_R = torch.tensor([answer.forced[0] if answer.forced else -1 for answer in answers])
        free = (ids_R < 0).nonzero()[:, 0]
        if len(free):
            choosing = [answers[row] for row in free.tolist()]
            all_free = len(free) == len(answers)
            ids_R[free] = self._chosen(choosing, logits_RV if all_free else logits_RV[free.to(logits_RV.device)])
        known = self._known(logits_RV, ids_R.to(logits_RV.device))
        for answer, token, (logprob, probs_K) in zip(answers, ids_R.tolist(), known, strict=True):
            answer.append(token, logprob, probs_K)
            answer.take(token, token in self._coord_ids)

    def _chosen(self, answers: Sequence[OpenAnswer], logits_RV: Tensor) -> Tensor:
        allowed_RT = uniform_R = None
        if self._grammar:
            allowed_RT = torch.from_numpy(np.stack([a.allowed_T for a in answers if a.allowed_T is not None]))
            allowed_RT = allowed_RT.to(logits_RV.device)
        if self._choice.draws:
            uniform_R = torch.cat([torch.rand(1, generator=answer.random) for answer in answers])
        scores_RV = self._choice.scores(logits_RV, [answer.held for answer in answers], allowed_RT)
        return self._choice.choose(scores_RV, uniform_R).cpu()


def _close(cache: SlotCache, answers: list[OpenAnswer], slot: int) -> OpenAnswer:
    """Free a slot by moving the last open answer into it."""
    last = answers.pop()
    if slot == len(answers):
        return last
    ended, answers[slot] = answers[slot], last
    cache.copy(len(answers), slot)
    return ended
