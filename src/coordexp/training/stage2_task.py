"""Stage 2: the EM update. Each step is channel A (ground-truth context) or channel B (the model's own rollouts)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Qwen3VLForConditionalGeneration

from coordexp.config.schema import Stage2Params
from coordexp.packing.collator import WHOLE, Collator, RankSlice, Segment, teacher_segment
from coordexp.packing.samples import Sample, SampleSource
from coordexp.rollout.records import Rollout
from coordexp.text.codecs import AnswerEncoder
from coordexp.training.channel_b import channel_b_segments, missed_objects
from coordexp.training.distributed import Row
from coordexp.training.loop import MicroBatch
from coordexp.training.rollout_pool import RolloutPool
from coordexp.training.schedule import is_channel_b, step_items
from coordexp.training.step import Criterion, StepTask


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The channel of a step and the samples (indices into the store) it trains on."""

    channel: str  # "A" or "B"
    items: tuple[int, ...]


def plan_steps(
    n_samples: int,
    rolled_out: Sequence[int],
    samples_per_step: int,
    steps: int,
    b_ratio: float,
    seed: int,
    refresh_steps: int = 0,
) -> list[StepPlan]:
    """Channel and samples of every step: A samples from the whole split, B from the samples with a rollout.

    From step `refresh_steps` on (0: never), B samples from those without a rollout, if there are any: fresh rollouts
    exist by then, and training on the same images again would measure memorization.
    """
    unseen = sorted({*range(n_samples)} - {*rolled_out}) if refresh_steps else []

    def drawn(samples: Sequence[int], stream: str) -> Iterator[tuple[int, ...]]:
        listed = step_items(len(samples), samples_per_step, steps, seed, stream) if samples else []
        return (tuple(samples[i] for i in items) for items in listed)

    for_a, for_b = drawn(range(n_samples), "stage2/order-a"), drawn(rolled_out, "stage2/order-b")
    for_fresh = drawn(unseen, "stage2/order-fresh")
    plan = []
    for step in range(steps):
        if not is_channel_b(step, b_ratio):
            plan.append(StepPlan("A", next(for_a)))
        else:
            plan.append(StepPlan("B", next(for_fresh if unseen and step >= refresh_steps else for_b)))
    return plan


def plan_segments(
    plan: StepPlan,
    step: int,
    source: SampleSource,
    rollouts: Mapping[int, Rollout],
    encoder: AnswerEncoder,
    params: Stage2Params,
) -> tuple[list[Segment], Row]:
    """Segments of one step, and the log of channel B: matches, false negatives, false positives, fallbacks."""
    if plan.channel == "A":
        return [teacher_segment(source.get(i, step)) for i in plan.items], {"channel": "A"}
    samples: list[Sample] = [source.store[i] for i in plan.items]  # rollouts were matched in the stored order
    mine = [rollouts[s.image_id] for s in samples]
    segments = [seg for s, r in zip(samples, mine, strict=True) for seg in channel_b_segments(s, r, encoder, params)]
    matched = sum(len(r.pairs) for r in mine)
    n_true = [len(s.descs) - sum(s.iscrowd) for s in samples]
    appended = [len(missed_objects(r, n, params)) if r.usable else n for r, n in zip(mine, n_true, strict=True)]
    logs: Row = {
        "channel": "B",
        "stage2_ab/matched_total": matched,
        "stage2_ab/fn_appended_total": sum(appended),
        "stage2_ab/fp_context_total": sum(len(r.objects) for r in mine) - matched,
        "stage2_ab/fallback_total": sum(not r.usable for r in mine),
        "stage2_ab/fn_truncated_total": sum(n_true) - matched - sum(appended),
        "stage2_ab/unlikely_total": sum(len(segment.unlikely_tokens) for segment in segments),
    }
    return segments, logs


class Stage2Task(StepTask):
    """Runs one planned step at a time, of channel A or B."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        criterion: Criterion,
        source: SampleSource,
        rollouts: RolloutPool,
        encoder: AnswerEncoder,
        collator: Collator,
        plan: Sequence[StepPlan],
        rank_slice: RankSlice = WHOLE,
        grad_monitor_every: int = 0,
    ) -> None:
        not_before = rollouts.refresh_steps
        super().__init__(model, criterion, collator, len(plan), rank_slice, grad_monitor_every, not_before)
        self._params = criterion.params.stage2
        self._source = source
        self._rollouts = rollouts
        self._encoder = encoder
        self._plan = plan

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """The batches of the step, after generating fresh rollouts if they are due."""
        self._rollouts.refresh(step)
        yield from super().micro_batches(step)

    def n_forwards(self, step: int) -> int:
        """Several forwards for channel A only: channel B already runs on the model's own context."""
        return self._params.n_softctx_iter if self._plan[step].channel == "A" else 1

    def segments(self, step: int) -> tuple[list[Segment], list[list[int]], Row]:
        """The segments of the step, with the log of channel B and the token counts of fresh rollouts."""
        plan = self._plan[step]
        rollouts: Mapping[int, Rollout] = {}
        compute: Row = {}
        if plan.channel == "B":
            rollouts, logs = self._rollouts.at(step, [self._source.store[i] for i in plan.items])
            compute = {**logs}
        segments, found = plan_segments(plan, step, self._source, rollouts, self._encoder, self._params)
        return segments, self._collator.rows(segments), compute | found

    def items(self, step: int) -> Mapping[str, Any]:
        """Channel and image ids of a step."""
        plan = self._plan[step]
        return {"channel": plan.channel, "images": [self._source.store[i].image_id for i in plan.items]}
