"""A training step on one screen: batch -> forwards -> terms -> weighted sum -> logs.

    segments of the step           the training text, and which tokens are supervised   (StepTask.segments)
    counts of the step             the denominator of each term                         (step_counts)
    batches of this process        prepared one step ahead, in a thread                 (Prefetcher)
    hidden states of each batch    one forward, or several under soft self-context      (forward)
    sums of the terms              from hidden states, head and targets                 (term_sums)
    loss                           sum over terms of weight * sum / count               (micro_batch)

Shapes: B rows, T tokens, D hidden size, K bins, N coordinate slots, G = N / 4 boxes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from coordexp.config.schema import Params
from coordexp.geometry.bins import NUM_BINS
from coordexp.infra.device import factor_dtype, without_autocast
from coordexp.infra.logs import COORD_SUM
from coordexp.infra.prefetch import Prefetcher
from coordexp.losses.box_terms import box_pairs
from coordexp.losses.coord_terms import CoordSlots, rounded_bins, slot_diagnostics
from coordexp.losses.readout import read_coordinates
from coordexp.losses.terms import (
    TERMS,
    Place,
    computed,
    loss_factors,
    means,
    sum_slots,
    supervises_coordinates,
    term_weights,
)
from coordexp.losses.vocabulary_terms import HeadProducts, HeadSlots, vocabulary_sums
from coordexp.models.coordinate_rows import CoordinateRows
from coordexp.models.forward import head_table, hidden_states
from coordexp.packing.collator import WHOLE, Collator, PackedBatch, RankSlice, Segment, rank_batches, teacher_segment
from coordexp.packing.samples import SampleSource
from coordexp.text.codecs import Role
from coordexp.training.distributed import Row, in_forward
from coordexp.training.loop import MicroBatch
from coordexp.training.schedule import ramp
from coordexp.training.soft_context import self_contexts

Counts = Mapping[Place, float]
TEXT = "text_ce"
ANCHOR = "a1_"  # prefix of the terms of the first of several forwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """The objective of a stage: its terms with their weights, and the parameters that they use.

    `steps` is the length of the run; the fractions of `anneal` refer to it.
    """

    params: Params
    weights: Mapping[str, float]
    first_coord_id: int
    steps: int

    @classmethod
    def stage1(cls, params: Params, first_coord_id: int, steps: int) -> Criterion:
        """Text cross-entropy and the coordinate terms with stage 1's weights."""
        weights = {TEXT: 1.0} | term_weights(params.stage1)
        return cls(params=params, weights=weights, first_coord_id=first_coord_id, steps=steps)

    @classmethod
    def stage2(cls, params: Params, first_coord_id: int, steps: int) -> Criterion:
        """All terms, with the weights from the top level and from the `stage2` block."""
        weights = term_weights(params, params.stage2)
        return cls(params=params, weights=weights, first_coord_id=first_coord_id, steps=steps)

    def at(self, step: int) -> Criterion:
        """The criterion of one step under annealing; the truncation of the target scales with its sigma."""
        params, anneal = self.params, self.params.anneal
        if not (anneal.sigma_fraction or anneal.temperature_fraction):
            return self
        sigma = ramp(anneal.sigma_from, params.sigma, round(anneal.sigma_fraction * self.steps))(step)
        hot = ramp(anneal.temperature_from, params.temperature, round(anneal.temperature_fraction * self.steps))(step)
        changes = {"sigma": sigma, "truncate": round(params.truncate * sigma / params.sigma), "temperature": hot}
        return replace(self, params=params.model_copy(update=changes))

    def anchor(self) -> Criterion:
        """The coordinate supervision of the first of several forwards, in addition to its text loss."""
        factor = self.params.stage2.a1_coord_weight
        weights = {name: factor * weight for name, weight in self.weights.items() if supervises_coordinates(name)}
        return replace(self, weights=weights)


class StepTask(ABC):
    """Runs one planned step after another; a subclass defines which segments a step has."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        criterion: Criterion,
        collator: Collator,
        steps: int,
        rank_slice: RankSlice = WHOLE,
        grad_monitor_every: int = 0,
        not_before: Collection[int] = frozenset(),
    ) -> None:
        self._model = model
        self._criterion = criterion
        self._collator = collator
        self._slice = rank_slice
        self._grad_monitor_every = grad_monitor_every
        self._batches = Prefetcher(self._batches_of, steps, not_before)

    @abstractmethod
    def segments(self, step: int) -> tuple[list[Segment], Sequence[Sequence[int]], Row]:
        """The segments of a step, the segments in each row, and values to log; runs in a thread."""

    @abstractmethod
    def items(self, step: int) -> Mapping[str, Any]:
        """The training items of one step, as JSON values for a message."""

    def n_forwards(self, step: int) -> int:
        """Number of forwards over each batch of a step."""
        return 1

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This process's batches of a step, each with its loss; the sum over all processes is the loss of the step."""
        criterion, n_forwards = self._criterion.at(step), self.n_forwards(step)
        monitored = monitored_parameters(self._model, self._grad_monitor_every, step)
        for (on_cpu, counts, logs), waited in self._batches.take(step):
            batch = on_cpu.to(self._model.device)
            micro = micro_batch(self._model, criterion, batch, counts, n_forwards, monitored)
            yield replace(micro, logs={**micro.logs, **logs, "time/wait_s": waited})

    def _batches_of(self, step: int) -> Iterator[tuple[PackedBatch, Counts, Row]]:
        segments, rows, logs = self.segments(step)
        counts = step_counts(segments)
        for batch in rank_batches(self._collator, segments, rows, self._slice):
            yield batch, counts, logs


class TeacherTask(StepTask):
    """Teacher forcing: each step trains on the packs that the plan assigns to it."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        criterion: Criterion,
        source: SampleSource,
        collator: Collator,
        packs_by_step: Sequence[Sequence[Sequence[int]]],
        rank_slice: RankSlice = WHOLE,
        grad_monitor_every: int = 0,
    ) -> None:
        super().__init__(model, criterion, collator, len(packs_by_step), rank_slice, grad_monitor_every)
        self._source = source
        self._packs_by_step = packs_by_step

    def segments(self, step: int) -> tuple[list[Segment], list[list[int]], Row]:
        """The annotated answers of all samples in the packs of the step."""
        segments: list[Segment] = []
        rows = []
        for pack in self._packs_by_step[step]:
            rows.append(list(range(len(segments), len(segments) + len(pack))))
            segments += [teacher_segment(self._source.get(i, step)) for i in pack]
        return segments, rows, {}

    def items(self, step: int) -> Mapping[str, Any]:
        """The image ids of each pack of a step."""
        return {"packs": [[self._source.store[i].image_id for i in pack] for pack in self._packs_by_step[step]]}


def step_counts(segments: Sequence[Segment]) -> Counts:
    """Number of slots in one optimizer step by place, known from its segments before any forward runs.

    All micro-batches of the step share these denominators, so accumulating k of them equals one large batch. Averaging
    the means of unequal micro-batches instead would weight their tokens unequally.
    """
    boxes = sum(len(s.box_tokens) for s in segments)
    return {
        "text": sum(float(s.text_weights.sum()) for s in segments),
        "inner_text": sum(int(((s.text_weights > 0) & (s.answer_roles != Role.CLOSE)).sum()) for s in segments),
        "coord": 4 * boxes,
        "box": boxes,
        "unlikely": sum(len(s.unlikely_tokens) for s in segments),
        "reordered": sum(len(s.reordered_tokens) for s in segments),
    }


def micro_batch(
    model: Qwen3VLForConditionalGeneration,
    criterion: Criterion,
    batch: PackedBatch,
    counts: Counts,
    n_forwards: int = 1,
    monitored: Sequence[nn.Parameter] = (),
) -> MicroBatch:
    """The loss of one batch and its log values; with `monitored` parameters, also the gradient norm of each term."""
    weighted, logs = in_forward(model, partial(forward, model, criterion, batch, counts, n_forwards))
    assert weighted, f"no term has a weight: {dict(criterion.weights)}"
    if monitored:
        logs |= gradient_logs(weighted, monitored)
    return MicroBatch(torch.stack(list(weighted.values())).sum(), logs)


def forward(
    model: Qwen3VLForConditionalGeneration, criterion: Criterion, batch: PackedBatch, counts: Counts, n_forwards: int
) -> tuple[dict[str, Tensor], Row]:
    """The weighted terms of one batch by name, and its log row."""
    first = last = hidden_states(model, batch)
    if n_forwards > 1:
        for later in self_contexts(model, batch, first, criterion.params, criterion.first_coord_id, n_forwards):
            last = later
    sums, slots = term_sums(model, criterion, batch, first, last, counts)
    weighted, logs = weigh(sums, criterion.weights, counts)
    logs |= {"tokens": batch.n_tokens * n_forwards, "samples": batch.n_segments, "coord_diag": slot_diagnostics(slots)}
    if n_forwards > 1:
        anchor = criterion.anchor()
        with torch.set_grad_enabled(any(anchor.weights.values())):
            sums, slots = term_sums(model, anchor, batch, None, first, counts)
        anchored, anchor_logs = weigh(sums, anchor.weights, counts, ANCHOR)
        weighted |= anchored
        logs |= anchor_logs | {"coord_diag_a1": slot_diagnostics(slots)}
    return weighted, logs


def weigh(
    sums: Mapping[str, Tensor], weights: Mapping[str, float], counts: Counts, prefix: str = ""
) -> tuple[dict[str, Tensor], Row]:
    """weight * sum / count of each term with a nonzero weight; logs `loss/<term>` (weighted) and `raw/<term>`.

    `loss/coord_reg` is the sum of the weighted coordinate terms.
    """
    weighted: dict[str, Tensor] = {}
    logs: Row = {}
    coordinates: list[float] = []
    for name, mean in means(sums, counts).items():
        if weights[name]:
            weighted[prefix + name] = weights[name] * mean
            logs[f"loss/{prefix}{name}"] = value = float(weighted[prefix + name].detach())
            coordinates += [value] if TERMS[name].place == "coord" else []
        logs[f"raw/{prefix}{name}"] = float(mean.detach())
    if coordinates:
        logs[f"loss/{prefix}{COORD_SUM}"] = sum(coordinates)
    return weighted, logs


def term_sums(
    model: Qwen3VLForConditionalGeneration,
    criterion: Criterion,
    batch: PackedBatch,
    text_hidden: Tensor | None,
    coord_hidden: Tensor,
    counts: Counts | None = None,
) -> tuple[dict[str, Tensor], CoordSlots]:
    """Sums of the criterion's terms over one batch, and its coordinate slots.

    `text_hidden` and `coord_hidden` (B * T, D) differ only under soft self-context, where the text loss uses the first
    forward and the coordinate loss the last. Without `text_hidden`, only the terms of coordinate slots are computed.
    With the `counts` of the step, the pass through the head also computes gradients; otherwise a second pass does.
    """
    params, weights = criterion.params, criterion.weights
    products = factor_dtype(coord_hidden)
    with without_autocast(coord_hidden):
        sums, logits_NK, odds_N = _vocabulary_sums(model, criterion, batch, text_hidden, coord_hidden, counts, products)
        slots = CoordSlots(logits_NK, odds_N, batch.coord_targets, params)
        sums |= {t.name: sum_slots(t.values(slots)) for t in computed(weights, "coord") if not t.sees_vocabulary}
        if text_hidden is not None and (box_terms := computed(weights, "box")):
            rule, top_k = params.stage2.coord_decode_mode, params.stage2.top_k
            boxes_G4 = read_coordinates(rule, logits_NK, params.temperature, top_k).reshape(-1, 4)
            pairs = box_pairs(boxes_G4, batch.coord_targets.reshape(-1, 4) / NUM_BINS, params.smoothl1_beta_bins)
            sums |= {t.name: sum_slots(t.values(pairs)) for t in box_terms}
    return sums, slots


def _vocabulary_sums(
    model: Qwen3VLForConditionalGeneration,
    criterion: Criterion,
    batch: PackedBatch,
    text_hidden: Tensor | None,
    coord_hidden: Tensor,
    counts: Counts | None,
    products: torch.dtype,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Terms over the whole vocabulary, in one pass through the head; also logits and log-odds of coordinate slots.

    Each place uses the temperature of its terms: dividing the hidden states by it divides the logits. Coordinate slots
    come first. Text slots occur twice if the temperature of the text gate is not that of the cross-entropy.
    """
    head_VD, temperature = head_table(model), criterion.params.temperature
    labels = criterion.first_coord_id + rounded_bins(batch.coord_targets)
    asked: list[_Asked] = [
        (coord_hidden, batch.coord_slots, labels, temperature, {"coord": torch.ones_like(batch.coord_targets)})
    ]
    if text_hidden is not None:
        by_temperature: dict[float, dict[Place, Tensor]] = {1.0: {"text": batch.text_weights}}
        by_temperature.setdefault(temperature, {})["inner_text"] = (batch.text_roles != int(Role.CLOSE)).float()
        asked += [
            (text_hidden, batch.text_slots, batch.text_targets, t, places) for t, places in by_temperature.items()
        ]
        marked: list[tuple[Place, Tensor, Tensor]] = [
            ("unlikely", batch.unlikely_slots, batch.unlikely_ids),
            ("reordered", batch.reordered_slots, batch.reordered_ids),
        ]
        asked += [
            (text_hidden, slots, token_ids, 1.0, {place: torch.ones_like(token_ids, dtype=torch.float32)})
            for place, slots, token_ids in marked
        ]
    hidden: list[Tensor] = []
    ids: list[Tensor] = []
    weights: list[dict[str, Tensor]] = []
    for hidden_flat, slots, token_ids, at, places in asked:
        terms = {
            t.name: w for place, w in places.items() for t in computed(criterion.weights, place) if t.sees_vocabulary
        }
        if terms or not hidden:  # the logits of coordinate slots are needed in any case, others only for a term
            chosen = hidden_flat.index_select(0, slots)
            hidden.append(chosen if at == 1 else chosen / at)
            ids.append(token_ids)
            weights.append(terms)
    names = [name for terms in weights for name in terms]
    absent = [torch.zeros(len(part), device=head_VD.device) for part in ids]
    head_slots = HeadSlots(
        token_ids_N=torch.cat(ids),
        weights={n: torch.cat([w.get(n, none) for w, none in zip(weights, absent, strict=True)]) for n in names},
        first_coord_id=criterion.first_coord_id,
        n_coord=len(batch.coord_slots),
    )
    factors = None if counts is None else loss_factors(criterion.weights, counts)
    rows_KD = model.lm_head.rows if isinstance(model.lm_head, CoordinateRows) else None
    how = HeadProducts.on(head_VD, products)
    sums, coord_NK, odds = vocabulary_sums(torch.cat(hidden), head_VD, head_slots, factors, rows_KD, how)
    return sums, coord_NK * temperature, odds[: head_slots.n_coord]


# Hidden states, slots, tokens, temperature, weights by place.
_Asked = tuple[Tensor, Tensor, Tensor, float, dict[Place, Tensor]]


def monitored_parameters(model: nn.Module, every: int, step: int) -> list[nn.Parameter]:
    """The trainable parameters in every `every`-th step, none in other steps; `every` 0 means never."""
    due = every > 0 and step % every == 0
    return [p for p in model.parameters() if p.requires_grad] if due else []


def gradient_logs(weighted: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> Row:
    """`grad/<term>_norm` of each weighted term and `grad/<term>_cos_text`, its cosine with the gradient of text_ce.

    The graph survives for the backward pass of the step; `.grad` and the random generators do not change. The cosine
    with a zero gradient is undefined and left out. Terms are differentiated one at a time, so at most two gradients
    are in memory. In a step with several micro-batches or processes, the log has the values of the main process's
    first micro-batch.
    """
    text = list(_gradient(weighted[TEXT], parameters)) if TEXT in weighted else []
    text_norm = _norm(text)
    logs: Row = {}
    for name, value in weighted.items():
        gradient = text if name == TEXT and text else list(_gradient(value, parameters))
        norm = _norm(gradient)
        logs[f"grad/{name}_norm"] = norm
        if name != TEXT and norm * text_norm > 0:
            product = sum(float((a * b).sum()) for a, b in zip(gradient, text, strict=True))
            logs[f"grad/{name}_cos_text"] = product / (norm * text_norm)
    return logs


def _gradient(value: Tensor, parameters: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    found = torch.autograd.grad(value, list(parameters), retain_graph=True, allow_unused=True)
    for gradient, parameter in zip(found, parameters, strict=True):
        yield torch.zeros_like(parameter) if gradient is None else gradient.detach()


def _norm(gradient: Sequence[Tensor]) -> float:
    return sum(float(part.double().square().sum()) for part in gradient) ** 0.5
