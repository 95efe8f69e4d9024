"""Stage 2: the EM update. Each step is channel A (ground-truth context) or channel B (the model's own rollouts)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from coordexp.config.schema import Stage2Params
from coordexp.packing.collator import Collator, PackedBatch, Segment, teacher_segment
from coordexp.packing.rank_slices import WHOLE, RankSlice, rank_batches
from coordexp.packing.samples import Sample
from coordexp.rollout.records import Rollout
from coordexp.text.codecs import AnswerEncoder
from coordexp.training.channel_b import channel_b_segments, missed_objects
from coordexp.training.grad_monitor import monitored_parameters
from coordexp.training.loop import LogRow, MicroBatch
from coordexp.training.objective_step import (
    LossPart,
    Objective,
    anchor_part,
    coord_logs,
    denominators,
    diagnose,
    objective_terms,
    to_micro_batch,
)
from coordexp.training.prefetch import Prefetcher
from coordexp.training.rollout_pool import RolloutPool
from coordexp.training.sample_source import SampleSource
from coordexp.training.schedule import is_channel_b, step_items
from coordexp.training.sharding import in_forward
from coordexp.training.soft_context import SoftContext, self_context_forwards


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The channel of a step and the samples (indices into the store) it trains on."""

    channel: str  # "A" or "B"
    items: tuple[int, ...]


def plan_steps(
    n_samples: int, rolled_out: Sequence[int], samples_per_step: int, steps: int, b_ratio: float, seed: int
) -> list[StepPlan]:
    """Channel and samples of every step: A draws from the whole split, B from the samples that have a rollout."""
    for_a = iter(step_items(n_samples, samples_per_step, steps, seed, "stage2/order-a"))
    for_b = iter(step_items(len(rolled_out), samples_per_step, steps, seed, "stage2/order-b") if rolled_out else [])
    plan = []
    for step in range(steps):
        if is_channel_b(step, b_ratio):
            plan.append(StepPlan("B", tuple(rolled_out[i] for i in next(for_b))))
        else:
            plan.append(StepPlan("A", tuple(next(for_a))))
    return plan


def plan_segments(
    plan: StepPlan,
    step: int,
    source: SampleSource,
    rollouts: Mapping[int, Rollout],
    encoder: AnswerEncoder,
    params: Stage2Params,
) -> tuple[list[Segment], LogRow]:
    """Segments of one step and what channel B found: objects matched and missed, extras, fallbacks."""
    if plan.channel == "A":
        return [teacher_segment(source.get(i, step)) for i in plan.items], {"channel": "A"}
    samples: list[Sample] = [source.store[i] for i in plan.items]  # rollouts were matched in the stored order
    mine = [rollouts[s.image_id] for s in samples]
    segments = [seg for s, r in zip(samples, mine, strict=True) for seg in channel_b_segments(s, r, encoder, params)]
    matched = sum(len(r.pairs) for r in mine)
    n_true = [len(s.descs) - sum(s.iscrowd) for s in samples]
    appended = [len(missed_objects(r, n, params)) if r.usable else n for r, n in zip(mine, n_true, strict=True)]
    logs: LogRow = {
        "channel": "B",
        "stage2_ab/matched_total": matched,
        "stage2_ab/fn_appended_total": sum(appended),
        "stage2_ab/fp_context_total": sum(len(r.objects) for r in mine) - matched,
        "stage2_ab/fallback_total": sum(not r.usable for r in mine),
        "stage2_ab/fn_truncated_total": sum(n_true) - matched - sum(appended),
        "stage2_ab/unlikely_total": sum(len(segment.unlikely_tokens) for segment in segments),
    }
    return segments, logs


class Stage2Task:
    """Runs one planned step at a time; both channels share collator, objective and logging."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        objective: Objective,
        soft_context: SoftContext,
        source: SampleSource,
        rollouts: RolloutPool,
        encoder: AnswerEncoder,
        stage2: Stage2Params,
        collator: Collator,
        plan: Sequence[StepPlan],
        share: RankSlice = WHOLE,
        a1_coord_weight: float = 0.0,
        grad_monitor_every: int = 0,
    ) -> None:
        self._model = model
        self._objective = objective
        self._soft_context = soft_context
        self._source = source
        self._rollouts = rollouts
        self._encoder = encoder
        self._stage2 = stage2
        self._collator = collator
        self._plan = plan
        self._share = share
        self._a1_coord_weight = a1_coord_weight
        self._grad_monitor_every = grad_monitor_every
        self._batches = Prefetcher(self._batches_of, len(plan), rollouts.refresh_steps)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This process's share of the rows of the step; both passes of channel B share its forwards."""
        plan, objective = self._plan[step], self._objective.at(step)
        self._rollouts.refresh(step)
        # Channel B already runs on the model's own context; soft self-context is channel A's.
        n_iter = self._soft_context.n_iter if plan.channel == "A" else 1
        context = replace(self._soft_context, n_iter=n_iter, temperature=objective.temperature)
        monitored = monitored_parameters(self._model, self._grad_monitor_every, step)
        for (on_cpu, counts, logs), waited in self._batches.take(step):
            batch = on_cpu.to(self._model.device)
            parts, measured = in_forward(self._model, partial(self._forward, batch, objective, context, counts))
            yield to_micro_batch(parts, counts, logs | measured | {"time/wait_s": waited}, monitored)

    def _forward(
        self, batch: PackedBatch, objective: Objective, context: SoftContext, counts: Mapping[str, Tensor]
    ) -> tuple[list[LossPart], LogRow]:
        """Terms of one batch, with what is measured on the way."""
        first, last = self_context_forwards(self._model, batch, context)
        terms, coord = objective_terms(self._model, objective, batch, first, last, counts)
        parts = [LossPart(terms, objective.weights)]
        logs: LogRow = {"tokens": batch.n_tokens * context.n_iter, "samples": batch.n_segments}
        logs |= coord_logs(diagnose(objective, batch, coord))
        if context.n_iter > 1:
            anchor, a1_coord = anchor_part(self._model, objective, batch, first, self._a1_coord_weight, counts)
            parts += [anchor] if anchor else []
            logs |= coord_logs(diagnose(objective, batch, a1_coord), "coord_diag_a1")
        return parts, logs

    def _batches_of(self, step: int) -> Iterator[tuple[PackedBatch, dict[str, Tensor], LogRow]]:
        """This process's batches of a step, each with the counts of the whole step and what channel B found in it."""
        rollouts, compute = self._rollouts_of(step)
        plan = self._plan[step]
        segments, found = plan_segments(plan, step, self._source, rollouts, self._encoder, self._stage2)
        counts = denominators(segments)
        for batch in rank_batches(self._collator, segments, self._collator.rows(segments), self._share):
            yield batch, counts, compute | found

    def _rollouts_of(self, step: int) -> tuple[Mapping[int, Rollout], LogRow]:
        """Rollouts of the step's samples and what fresh ones took; none for channel A."""
        plan = self._plan[step]
        if plan.channel == "A":
            return {}, {}
        rollouts, logs = self._rollouts.at(step, [self._source.store[i] for i in plan.items])
        return rollouts, {**logs}

    def items(self, step: int) -> dict[str, Any]:
        """Channel and images of a step."""
        plan = self._plan[step]
        return {"channel": plan.channel, "images": [self._source.store[i].image_id for i in plan.items]}
