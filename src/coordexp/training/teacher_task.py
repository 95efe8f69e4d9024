"""Teacher forcing on the ground truth: stage 1, and the control that continues it (no box terms, one forward)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from coordexp.models.forward import hidden_states
from coordexp.packing.collator import Collator, PackedBatch, Segment, teacher_segment
from coordexp.packing.rank_slices import WHOLE, RankSlice, rank_batches
from coordexp.training.grad_monitor import monitored_parameters
from coordexp.training.loop import LogRow, MicroBatch
from coordexp.training.objective_step import (
    LossPart,
    Objective,
    coord_logs,
    denominators,
    diagnose,
    objective_terms,
    to_micro_batch,
)
from coordexp.training.prefetch import Prefetcher
from coordexp.training.sample_source import SampleSource
from coordexp.training.sharding import in_forward


class TeacherTask:
    """Each step trains on given samples, laid out in the rows that the plan gave them."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        objective: Objective,
        source: SampleSource,
        collator: Collator,
        packs_by_step: Sequence[Sequence[Sequence[int]]],
        share: RankSlice = WHOLE,
        grad_monitor_every: int = 0,
    ) -> None:
        self._model = model
        self._objective = objective
        self._source = source
        self._collator = collator
        self._packs_by_step = packs_by_step
        self._share = share
        self._grad_monitor_every = grad_monitor_every
        self._batches = Prefetcher(self._batches_of, len(packs_by_step))

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This process's share of the packs of the step."""
        objective = self._objective.at(step)
        monitored = monitored_parameters(self._model, self._grad_monitor_every, step)
        for (on_cpu, counts), waited in self._batches.take(step):
            batch = on_cpu.to(self._model.device)
            parts, logs = in_forward(self._model, partial(self._forward, batch, objective, counts))
            yield to_micro_batch(parts, counts, logs | {"time/wait_s": waited}, monitored)

    def _forward(
        self, batch: PackedBatch, objective: Objective, counts: Mapping[str, Tensor]
    ) -> tuple[list[LossPart], LogRow]:
        """Terms of one batch, with what is measured on the way."""
        hidden = hidden_states(self._model, batch)
        terms, coord = objective_terms(self._model, objective, batch, hidden, hidden, counts)
        logs: LogRow = {"tokens": batch.n_tokens, "samples": batch.n_segments}
        logs |= coord_logs(diagnose(objective, batch, coord))
        return [LossPart(terms, objective.weights)], logs

    def _batches_of(self, step: int) -> Iterator[tuple[PackedBatch, dict[str, Tensor]]]:
        """This process's batches of a step, each with the counts of the whole step."""
        segments: list[Segment] = []
        rows = []
        for pack in self._packs_by_step[step]:
            rows.append(list(range(len(segments), len(segments) + len(pack))))
            segments += [teacher_segment(self._source.get(i, step)) for i in pack]
        counts = denominators(segments)
        for batch in rank_batches(self._collator, segments, rows, self._share):
            yield batch, counts

    def items(self, step: int) -> dict[str, Any]:
        """The images of each pack of a step."""
        return {"packs": [[self._source.store[i].image_id for i in pack] for pack in self._packs_by_step[step]]}
