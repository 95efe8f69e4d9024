"""One forward with its losses: from a packed batch to weighted terms. Every training stage ends here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from coordexp.config.schema import ReadoutRule
from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.box_terms import BOX_TERMS, box_terms
from coordexp.losses.coord_terms import COORD_TERMS, coordinate_terms, slice_terms
from coordexp.losses.diagnostics import CoordDiagnostics, slot_diagnostics
from coordexp.losses.objective import COORD_SUPERVISION, ObjectiveWeights, combine, loss_factors, weighted_terms
from coordexp.losses.partition import CoordSlots, scale
from coordexp.losses.readout import read_coordinates
from coordexp.losses.soft_targets import SoftTarget
from coordexp.losses.terms import TermSum
from coordexp.losses.text_terms import text_terms
from coordexp.losses.unlikelihood import UNLIKELIHOOD_TERMS, unlikelihood_terms
from coordexp.models.forward import slot_logits
from coordexp.packing.collator import PackedBatch, Segment
from coordexp.text.codecs import Role
from coordexp.training.fused_batch import fused_batch_terms
from coordexp.training.grad_monitor import gradient_logs
from coordexp.training.loop import LogRow, MicroBatch
from coordexp.training.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Annealing:
    """Width of the soft target in bins, and temperature, by step."""

    sigma: Schedule
    temperature: Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimised: weights, target family, temperature, and how a box is read from its distributions.

    With `annealing`, `target` and `temperature` are where it ends; `at` says what holds in a step. `fused` says how:
    logits over a large vocabulary are gone through in chunks instead of being stored.
    """

    weights: ObjectiveWeights
    target: SoftTarget
    temperature: float
    first_coord_id: int
    smoothl1_beta_bins: float
    coord_decode_mode: ReadoutRule
    top_k: int
    annealing: Annealing | None = None
    fused: bool = False

    def at(self, step: int) -> Objective:
        """The objective of one step; a wider target is cut off as much farther out."""
        if self.annealing is None:
            return self
        sigma = self.annealing.sigma(step)
        truncate = round(self.target.truncate * sigma / self.target.sigma)
        target = replace(self.target, sigma=sigma, truncate=truncate)
        return replace(self, target=target, temperature=self.annealing.temperature(step), annealing=None)


@dataclass(frozen=True, slots=True)
class LossPart:
    """Terms with their weights; `prefix` keeps the names of one forward's terms apart from another's in the log."""

    terms: dict[str, TermSum]
    weights: ObjectiveWeights
    prefix: str = ""


def denominators(segments: Sequence[Segment]) -> dict[str, Tensor]:
    """Global counts of one optimizer step by term, from its segments: known before any forward runs.

    Shared by all micro-batches of the step, which makes accumulating k of them equal to one large batch.
    """
    text = sum(float(s.text_weights.sum()) for s in segments)
    gated = sum(int(((s.text_weights > 0) & (s.answer_roles != Role.CLOSE)).sum()) for s in segments)
    boxes = sum(len(s.box_tokens) for s in segments)
    counts = {"text_ce": text, "text_gate": float(gated)}
    counts |= {name: 4.0 * boxes for name in COORD_TERMS}
    counts |= {name: float(boxes) for name in BOX_TERMS}
    counts |= {name: float(sum(len(s.unlikely_tokens) for s in segments)) for name in UNLIKELIHOOD_TERMS}
    return {name: torch.tensor(count) for name, count in counts.items()}


def objective_terms(
    model: Qwen3VLForConditionalGeneration,
    objective: Objective,
    batch: PackedBatch,
    text_hidden: Tensor,
    coord_hidden: Tensor,
    counts: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, TermSum], CoordSlots]:
    """Terms of one batch, and what is kept of the logits of its coordinate slots.

    `text_hidden` and `coord_hidden` (B * T, D) differ only under soft self-context, where text is anchored on the first
    forward and coordinates on the last; otherwise pass the same tensor twice. `counts` are the denominators of the
    step: a fused objective that knows them finds its gradients on the way, and otherwise in a second pass.
    """
    wanted = objective.weights.wanted
    with torch.autocast(text_hidden.device.type, enabled=False):
        if objective.fused:
            terms, coord = _fused_terms(model, objective, batch, text_hidden, coord_hidden, counts)
        else:
            terms = _text_terms(model, objective, batch, text_hidden.float())
            coord_terms, coord = _coordinate_terms(model, objective, batch, coord_hidden.float())
            terms |= coord_terms
        if not wanted.isdisjoint(BOX_TERMS):
            coords_N = read_coordinates(
                objective.coord_decode_mode, coord.logits_NK, objective.temperature, objective.top_k
            )
            boxes_G4 = coords_N.reshape(-1, 4)
            targets_G4 = batch.coord_targets.reshape(-1, 4) / NUM_BINS
            terms |= box_terms(boxes_G4, targets_G4, objective.smoothl1_beta_bins, wanted)
    return terms, coord


def _fused_terms(
    model: Qwen3VLForConditionalGeneration,
    objective: Objective,
    batch: PackedBatch,
    text_hidden: Tensor | None,
    coord_hidden: Tensor,
    counts: Mapping[str, Tensor] | None,
) -> tuple[dict[str, TermSum], CoordSlots]:
    """Token terms without logits at all slots; those of the coordinate slots alone if there is no `text_hidden`."""
    wanted, temperature = objective.weights.wanted, objective.temperature
    factors = None if counts is None else loss_factors(objective.weights, counts)
    found = fused_batch_terms(
        model, batch, text_hidden, coord_hidden, objective.first_coord_id, temperature, wanted, factors
    )
    coord = CoordSlots(scale(found.coord_MK, 1 / temperature), found.text_log_odds_N[: len(batch.coord_slots)])
    terms = slice_terms(coord.logits_NK, batch.coord_targets, objective.target, temperature, wanted)
    return found.terms | terms, coord


def _text_terms(
    model: Qwen3VLForConditionalGeneration, objective: Objective, batch: PackedBatch, hidden: Tensor
) -> dict[str, TermSum]:
    wanted = objective.weights.wanted
    terms = text_terms(
        slot_logits(model, hidden, batch.text_slots),
        batch.text_targets,
        objective.first_coord_id,
        objective.temperature,
        wanted,
        batch.text_weights,
        (batch.text_roles != int(Role.CLOSE)).float(),
    )
    unlikely_logits_UV = slot_logits(model, hidden, batch.unlikely_slots)
    return terms | unlikelihood_terms(unlikely_logits_UV, batch.unlikely_ids, wanted)


def _coordinate_terms(
    model: Qwen3VLForConditionalGeneration, objective: Objective, batch: PackedBatch, hidden: Tensor
) -> tuple[dict[str, TermSum], CoordSlots]:
    coord_logits_NV = slot_logits(model, hidden, batch.coord_slots)
    terms = coordinate_terms(
        coord_logits_NV,
        batch.coord_targets,
        objective.first_coord_id,
        objective.target,
        objective.temperature,
        objective.weights.wanted,
    )
    return terms, CoordSlots.of(coord_logits_NV, objective.first_coord_id, objective.temperature)


def anchor_part(
    model: Qwen3VLForConditionalGeneration,
    objective: Objective,
    batch: PackedBatch,
    hidden: Tensor,
    factor: float,
    counts: Mapping[str, Tensor] | None = None,
) -> tuple[LossPart | None, CoordSlots]:
    """Token terms at the coordinate slots of an earlier forward, at `factor` times their weights.

    No part if the factor is 0: then the slots are there for diagnosis alone. The rest as in `objective_terms`.
    """
    weights = objective.weights.as_dict()
    scaled = ObjectiveWeights(**{name: factor * weights[name] for name in COORD_SUPERVISION})
    anchored = replace(objective, weights=scaled)
    with torch.autocast(hidden.device.type, enabled=False), torch.set_grad_enabled(factor > 0):
        if objective.fused:
            terms, coord = _fused_terms(model, anchored, batch, None, hidden, counts)
        else:
            terms, coord = _coordinate_terms(model, anchored, batch, hidden.float())
    return (LossPart(terms, scaled, "a1_") if factor > 0 else None), coord


def diagnose(objective: Objective, batch: PackedBatch, coord: CoordSlots) -> CoordDiagnostics:
    """`coord_diag/*` sums of a batch."""
    return slot_diagnostics(coord, batch.coord_targets, objective.target, objective.temperature)


def to_micro_batch(
    parts: Sequence[LossPart], counts: Mapping[str, Tensor], extra: LogRow, monitored: Sequence[nn.Parameter] = ()
) -> MicroBatch:
    """Combine terms into a loss with its logs; with `monitored` parameters, also the gradient of each term on them."""
    losses: list[Tensor] = []
    weighted: dict[str, Tensor] = {}
    row: LogRow = {}
    for part in parts:
        loss, logs = combine(part.terms, part.weights, counts)
        losses.append(loss)
        for name, value in logs.items():
            area, term = name.split("/")
            if area != "count":
                row[f"{area}/{part.prefix}{term}"] = float(value)
        if monitored:
            found = weighted_terms(part.terms, part.weights, counts)
            weighted |= {part.prefix + name: value for name, value in found.items()}
    if monitored:
        row |= gradient_logs(weighted, monitored)
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return MicroBatch(loss, row | extra)


def coord_logs(diagnostics: CoordDiagnostics, prefix: str = "coord_diag") -> dict[str, float]:
    """Diagnostics under their logging names."""
    return {f"{prefix}/{name}": value for name, value in diagnostics.summary().items()}
