"""Coordinate errors on held-out images, by the context in which the model reads the coordinates.

The training log reports errors on training images, each under different weights, so neither two of its epochs nor two
runs are comparable. The eval callback measures the same dev images at every evaluation instead, in these contexts:

    A1         the annotated answer, as in stage 1
    A2 .. AN   the soft self-context of channel A, if stage 2 uses one
    own        the model's own greedy answer, as in channel B: the objects that it locates (`dev_answers.PAIRING`)

It writes one row per image and evaluation; for A1 to AN the row also describes the distributions. Each image has a
forward of its own, so the other images and the number of processes do not change a bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coordexp.config.run import RunConfig
from coordexp.infra.device import inference_plan
from coordexp.losses.coord_terms import CoordSlots, expected_bin_errors, held_out_diagnostics
from coordexp.models.forward import hidden_states
from coordexp.models.loading import Checkpoint
from coordexp.packing.collator import Collator, PackedBatch, Segment, teacher_segment
from coordexp.packing.samples import Sample
from coordexp.rollout.decode import AnswerReader
from coordexp.rollout.engine import Generation
from coordexp.rollout.records import match_rollouts, parsed_rollout
from coordexp.training.builders import first_coord_id
from coordexp.training.channel_b import self_context_segment
from coordexp.training.dev_answers import PAIRING
from coordexp.training.soft_context import self_contexts
from coordexp.training.step import TEXT, Criterion, term_sums

OWN, DIAGNOSTICS = "own", "coord_diag"
ErrorRow = dict[str, Any]  # see `ContextErrors.row`


@dataclass(frozen=True, slots=True)
class ContextErrors:
    """Measures one dev image after another with the current weights."""

    checkpoint: Checkpoint
    criterion: Criterion
    collator: Collator
    reader: AnswerReader
    n_forwards: int  # of channel A

    @classmethod
    def of(cls, run: RunConfig, stage: str, checkpoint: Checkpoint, reader: AnswerReader) -> ContextErrors:
        """For a stage; stage 1 and the control depend on no parameter of stage 2, so they have no A2."""
        criterion = Criterion(
            params=run.params, weights={TEXT: 1.0}, first_coord_id=first_coord_id(checkpoint), steps=1
        )
        collator = checkpoint.collator(run.paths.raw, run.profile.packing.pack_tokens)
        n_forwards = run.params.stage2.n_softctx_iter if stage == "stage2" else 1
        return cls(checkpoint, criterion, collator, reader, n_forwards)

    @torch.no_grad()
    def row(self, sample: Sample, generation: Generation) -> ErrorRow:
        """The row of one image: nats and tokens of its annotated text, and error in bins per object by context.

        The error is None for an object that the model's own answer does not locate. `coord_diag` has means over the
        coordinate slots for each context of channel A (`losses/coord_terms.py`).
        """
        with inference_plan(self.checkpoint.model.device).autocast(self.checkpoint.model):
            return {"image_id": sample.image_id, **self._annotated(sample), OWN: self._own(sample, generation)}

    def _annotated(self, sample: Sample) -> ErrorRow:
        model, criterion = self.checkpoint.model, self.criterion
        batch = self._batch(teacher_segment(sample))
        first = hidden_states(model, batch)
        sums, _ = term_sums(model, criterion, batch, first, first)
        later = self_contexts(model, batch, first, criterion.params, criterion.first_coord_id, self.n_forwards)
        slots = {f"A{n}": self._slots(batch, hidden) for n, hidden in enumerate((first, *later), 1)}
        diagnostics = {name: held_out_diagnostics(found) for name, found in slots.items()}
        return {
            "text_ce": round(float(sums[TEXT]), 4),
            "text_tokens": len(batch.text_slots),
            **{name: _errors(found) for name, found in slots.items()},
            DIAGNOSTICS: {
                name: {key: round(value, 6) for key, value in row.items()} for name, row in diagnostics.items()
            },
        }

    def _own(self, sample: Sample, generation: Generation) -> list[float | None]:
        parsed = parsed_rollout(sample.image_id, generation, self.reader.parse(generation))
        [rollout] = match_rollouts([parsed], [sample], PAIRING)
        errors: list[float | None] = [None] * (len(sample.descs) - sum(sample.iscrowd))
        if rollout.pairs:
            batch = self._batch(self_context_segment(sample, rollout))
            found = _errors(self._slots(batch, hidden_states(self.checkpoint.model, batch)))
            for (_, annotated), error in zip(rollout.pairs, found, strict=True):
                errors[annotated] = error
        return errors

    def _batch(self, segment: Segment) -> PackedBatch:
        return self.collator.layout([segment], [[0]]).to(self.checkpoint.model.device)

    def _slots(self, batch: PackedBatch, hidden: Tensor) -> CoordSlots:
        return term_sums(self.checkpoint.model, self.criterion, batch, None, hidden)[1]


def _errors(slots: CoordSlots) -> list[float]:
    """Mean |E[k] - y| over the four coordinates of each box, in bins."""
    return [round(error, 3) for error in expected_bin_errors(slots).reshape(-1, 4).mean(-1).tolist()]


def mean_errors(rows: Sequence[ErrorRow]) -> dict[str, float]:
    """Mean error in bins by context, over the objects that have a value; a context without values is left out."""
    contexts = [name for name in rows[0] if isinstance(rows[0][name], list)] if rows else []
    found = {name: [e for row in rows for e in row[name] if e is not None] for name in contexts}
    return {name: sum(errors) / len(errors) for name, errors in found.items() if errors}
