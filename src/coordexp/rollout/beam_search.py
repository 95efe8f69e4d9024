"""Beam search with the model in memory: for each image, the most probable of several answers decoded in parallel.

The rules are those of transformers' `generate` (length penalty 1, no early stopping). Each step considers the 2 W most
probable continuations of all beams. Those of the first W that end become candidates for the answer, ranked by
log-probability per token; the first W that do not end remain open. The search stops when W candidates exist and the
best open beam has no higher log-probability per token than any of them, or at the token budget. Scores get the same
probabilities as in slot_decoder.py. There is no drafting: the beams of an image advance together, one token per
forward.

Shapes: W beams per image, R open beams of all images, V vocabulary, K bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from coordexp.models.forward import next_hidden_states, slot_logits
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import Generation
from coordexp.rollout.slot_cache import Decoder, Prompts, SlotCache, Written
from coordexp.text.grammar_walk import AnswerWalk


@dataclass(frozen=True, slots=True, eq=False)
class _Beam:
    """An unfinished answer and its log-probability under penalty and masks."""

    written: Written
    held: frozenset[int]  # distinct tokens of prompt and answer
    walk: AnswerWalk | None
    score: float = 0.0


@dataclass(slots=True, eq=False)
class _Search:
    """The beams of one image, in the slots from W times its index among the open searches; all of equal length."""

    place: int  # among the samples
    rope: int  # rotary position of the token that runs next
    beams: list[_Beam]
    ended: list[tuple[float, Written]] = field(default_factory=list)  # with log-probability per token, best first


class BeamSearch(Decoder):
    """Generates answers with `decode.beams` beams, for as many images at a time as fit into `slots`."""

    @torch.inference_mode()
    def decode(self, samples: Sequence[Sample], seeds: Sequence[int] | None = None) -> list[Generation]:
        """One generation per sample, in their order; deterministic, so the seeds have no effect."""
        width = self._request.params.beams
        n_open = min(max(1, self._slots // width), len(samples))
        cache = SlotCache(self._model, n_open * width)
        waiting = list(range(len(samples)))
        searches: list[_Search] = []
        done: dict[int, Generation] = {}
        with closing(Prompts(self._model, self._collator, samples, 1)) as prompts:
            while waiting or searches:
                free = n_open - len(searches)
                if free and waiting:
                    chosen, waiting = waiting[:free], waiting[free:]
                    begun = self._begin(cache, prompts, samples, chosen, len(searches))
                    searches += begun
                else:
                    self._step(cache, searches)
                for i in reversed(range(len(searches))):
                    if self._is_over(searches[i]):
                        done[searches[i].place] = self._generation(searches[i].ended[0][1])
                        self._close(cache, searches, i)
        return [done[i] for i in range(len(samples))]

    def _begin(
        self, cache: SlotCache, prompts: Prompts, samples: Sequence[Sample], chosen: Sequence[int], first: int
    ) -> list[_Search]:
        """Run the prompts, and choose the first token of each beam."""
        width = self._request.params.beams
        logits_RV, ropes = prompts.read(cache, [width * (first + i) for i in range(len(chosen))])
        searches = []
        for i, rope in zip(chosen, ropes, strict=True):
            held = frozenset(samples[i].prompt_ids.tolist() if self._choice.penalizes else ())
            walk = AnswerWalk(self._grammar) if self._grammar else None
            searches.append(_Search(i, rope, [_Beam(Written(), held, walk)]))
        self._take(cache, searches, first, logits_RV)
        return searches

    def _step(self, cache: SlotCache, searches: Sequence[_Search]) -> None:
        """Run the last token of every open beam; slots without a beam run a dummy token."""
        width, device = self._request.params.beams, cache.keys.device
        ids = [[b.written.ids[-1] for b in s.beams] + [self._end_id] * (width - len(s.beams)) for s in searches]
        ids_R1 = torch.tensor(ids, device=device).reshape(-1, 1)
        rope_R1 = torch.tensor([s.rope for s in searches], device=device).repeat_interleave(width)[:, None]
        mask_R1L = cache.extend(len(ids_R1), 1)
        hidden_R1D = next_hidden_states(self._model, ids_R1, rope_R1, mask_R1L, cache)
        self.forwards += 1
        cache.lengths[: len(ids_R1)] += 1
        open_ = [width * i + j for i, search in enumerate(searches) for j in range(len(search.beams))]
        for search in searches:
            search.rope += 1
        self._take(cache, searches, 0, slot_logits(self._model, hidden_R1D[:, 0], torch.tensor(open_, device=device)))

    def _take(self, cache: SlotCache, searches: Sequence[_Search], first: int, logits_RV: Tensor) -> None:
        """Extend the beams of these searches, whose indices among the open searches start at `first`."""
        logits_RV = logits_RV.float()
        beams = [beam for search in searches for beam in search.beams]
        allowed_RT = None
        if self._grammar:
            allowed_RT = torch.from_numpy(np.stack([beam.walk.allowed() for beam in beams if beam.walk]))
            allowed_RT = allowed_RT.to(logits_RV.device)
        scores_RV = self._choice.scores(logits_RV.log_softmax(-1), [beam.held for beam in beams], allowed_RT)
        scores_RV += torch.tensor([beam.score for beam in beams], device=scores_RV.device)[:, None]
        ends = np.cumsum([0, *(len(search.beams) for search in searches)]).tolist()
        for i, (start, end) in enumerate(pairwise(ends), first):
            parents = self._continue(searches[i - first], scores_RV[start:end], logits_RV[start:end])
            cache.reorder(i * self._request.params.beams, parents)

    def _continue(self, search: _Search, scores_WV: Tensor, logits_WV: Tensor) -> list[int]:
        """Choose the next beams of a search and finish others; returns the index of the beam that each one extends."""
        # 2 W candidates are enough: before the budget, each beam ends in one token only, so W open ones remain.
        width, n_tokens = self._request.params.beams, scores_WV.shape[1]
        best, places = scores_WV.flatten().topk(min(2 * width, scores_WV.numel()))
        is_possible = best > -torch.inf
        best, places = best[is_possible], places[is_possible]
        parents, tokens = places // n_tokens, places % n_tokens
        known = self._known(logits_WV[parents], tokens)
        beams: list[_Beam] = []
        parents_of: list[int] = []
        rows = zip(best.tolist(), parents.tolist(), tokens.tolist(), known, strict=True)
        for rank, (score, parent, token, known_of_token) in enumerate(rows):
            beam = search.beams[parent]
            written = beam.written.copy()
            written.append(token, *known_of_token)
            if self._ended(written.ids):
                if rank < width:
                    search.ended.append((score / len(written.ids), written))
            elif len(beams) < width:
                walk = beam.walk.copy() if beam.walk else None
                if walk:
                    walk.advance(token)
                beams.append(_Beam(written, beam.held | {token} if self._choice.penalizes else beam.held, walk, score))
                parents_of.append(parent)
        search.ended = sorted(search.ended, key=lambda pair: -pair[0])[:width]
        search.beams = beams
        return parents_of

    def _is_over(self, search: _Search) -> bool:
        if not search.beams:
            return True
        best = search.beams[0]
        is_full = len(search.ended) == self._request.params.beams
        return is_full and best.score / len(best.written.ids) <= search.ended[-1][0]

    def _close(self, cache: SlotCache, searches: list[_Search], i: int) -> None:
        """Free the slots of a search by moving the last open search into them."""
        last, width = searches.pop(), self._request.params.beams
        if i < len(searches):
            for j in range(width):
                cache.copy(len(searches) * width + j, i * width + j)
            searches[i] = last
