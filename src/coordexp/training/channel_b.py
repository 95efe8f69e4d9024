"""Channel B targets: from a matched rollout to the segments that stage 2 trains on (the M-step's data).

Two passes (`passes: two`, full-idea document section 7):
    self-context  the rollout's own tokens; only the coordinates of accepted matches are supervised, against GT
    completion    GT reordered: matched objects at the rank of their prediction, missed ones appended (or sorted in),
                  extras dropped; text is supervised everywhere, coordinates of the missed objects only
so each ground-truth object gets its geometry exactly once: in the model's own context if it was found, else in the
completion.

One pass (`passes: one`): the valid predictions re-serialised as context, then the missed objects. Unmatched predictions
are context only: with incomplete labels, many of them are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.geometry.bins import encode_boxes, target_bins
from coordexp.geometry.boxes import reading_order
from coordexp.packing.collator import Segment, coordinate_positions, teacher_segment
from coordexp.packing.samples import Sample
from coordexp.rollout.records import Rollout
from coordexp.text.codecs import AnswerEncoder, Role, TextObject


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelBSettings:
    """Policies of channel B. `eos_weight` scales the text loss of the closing tokens."""

    passes: str  # "two" or "one"
    missed: str  # "append" or "sorted"
    eos_weight: float


@dataclass(frozen=True, slots=True)
class _Truth:
    """Non-crowd ground truth of a sample as text and as unrounded target bins (M, 4)."""

    objects: list[TextObject]
    targets_M4: NDArray[np.float32]
    boxes_M4: NDArray[np.float32]


def channel_b_segments(
    sample: Sample, rollout: Rollout, encoder: AnswerEncoder, settings: ChannelBSettings
) -> list[Segment]:
    """Segments of one sample; a rollout that did not parse falls back to teacher forcing on the ground truth."""
    if not rollout.usable:
        return [teacher_segment(sample)]
    truth = _truth(sample)
    if settings.passes == "two":
        return [_self_context(sample, rollout, truth), _completion(sample, rollout, truth, encoder, settings)]
    return [_clean_prefix(sample, rollout, truth, encoder, settings)]


def _truth(sample: Sample) -> _Truth:
    keep = [i for i, crowd in enumerate(sample.iscrowd) if not crowd]
    boxes = sample.boxes_xyxy_px[keep]
    bins = encode_boxes(boxes, sample.width, sample.height)
    objects = [TextObject(sample.descs[i], tuple(int(b) for b in row)) for i, row in zip(keep, bins, strict=True)]  # type: ignore[arg-type]
    return _Truth(objects, target_bins(boxes, sample.width, sample.height).astype(np.float32), boxes)


def _self_context(sample: Sample, rollout: Rollout, truth: _Truth) -> Segment:
    """The rollout as it was generated; no text loss, boxes of accepted matches against their ground truth."""
    ids = np.array(rollout.ids, np.int32)
    positions = [rollout.objects[i].coord_positions for i, _ in rollout.pairs]
    return Segment(
        sample=sample,
        answer_ids=ids,
        answer_roles=np.full(len(ids), Role.STRUCT, np.uint8),
        text_weights=np.zeros(len(ids), np.float32),
        box_tokens=np.array(positions, np.int64).reshape(-1, 4),
        box_targets=truth.targets_M4[[j for _, j in rollout.pairs]].reshape(-1, 4),
    )


def completion_order(rollout: Rollout, boxes_M4: NDArray, missed_policy: str) -> list[int]:
    """Ground-truth indices in the order of the completion: matched ones by prediction rank, missed ones by policy."""
    matched = [j for _, j in sorted(rollout.pairs)]
    missed = [j for j in range(len(boxes_M4)) if j not in set(matched)]
    order = matched + missed
    return [order[i] for i in reading_order(boxes_M4[order])] if missed_policy == "sorted" and order else order


def _completion(
    sample: Sample, rollout: Rollout, truth: _Truth, encoder: AnswerEncoder, settings: ChannelBSettings
) -> Segment:
    order = completion_order(rollout, truth.boxes_M4, settings.missed)
    answer = encoder.encode([truth.objects[j] for j in order])
    matched = {j for _, j in rollout.pairs}
    rows = [rank for rank, j in enumerate(order) if j not in matched]
    weights = np.isin(answer.roles, (Role.STRUCT, Role.DESC, Role.CLOSE)).astype(np.float32)
    return Segment(
        sample=sample,
        answer_ids=answer.ids,
        answer_roles=answer.roles,
        text_weights=_close_weighted(weights, answer.roles, settings.eos_weight),
        box_tokens=coordinate_positions(answer.roles)[rows].reshape(-1, 4),
        box_targets=truth.targets_M4[[order[r] for r in rows]].reshape(-1, 4),
    )


def _clean_prefix(
    sample: Sample, rollout: Rollout, truth: _Truth, encoder: AnswerEncoder, settings: ChannelBSettings
) -> Segment:
    """Predictions re-serialised (matched: scaffold and GT boxes; extras: context), then missed objects in full."""
    partner = dict(rollout.pairs)
    predicted = [TextObject(o.desc, o.bins) for o in rollout.objects]
    missed = [j for j in range(len(truth.objects)) if j not in set(partner.values())]
    entries: list[tuple[TextObject, int | None, bool]] = [  # object, its ground truth, is it a prediction
        *((obj, partner.get(i), True) for i, obj in enumerate(predicted)),
        *((truth.objects[j], j, False) for j in missed),
    ]
    if settings.missed == "sorted":
        entries = [entries[i] for i in _order_by_bins([e[0] for e in entries])]
    answer = encoder.encode([e[0] for e in entries])
    weights = np.zeros(len(answer.ids), np.float32)
    for rank, (_, gt_index, is_prediction) in enumerate(entries):
        if gt_index is None:
            continue
        roles = (Role.STRUCT,) if is_prediction else (Role.STRUCT, Role.DESC)
        weights[(answer.object_index == rank) & np.isin(answer.roles, roles)] = 1.0
    weights[answer.roles == Role.CLOSE] = 1.0
    supervised = [(rank, j) for rank, (_, j, _) in enumerate(entries) if j is not None]
    return Segment(
        sample=sample,
        answer_ids=answer.ids,
        answer_roles=answer.roles,
        text_weights=_close_weighted(weights, answer.roles, settings.eos_weight),
        box_tokens=coordinate_positions(answer.roles)[[r for r, _ in supervised]].reshape(-1, 4),
        box_targets=truth.targets_M4[[j for _, j in supervised]].reshape(-1, 4),
    )


def _order_by_bins(objects: Sequence[TextObject]) -> NDArray[np.int64]:
    return reading_order(np.array([o.bins for o in objects], np.float64).reshape(-1, 4))


def _close_weighted(weights: NDArray[np.float32], roles: NDArray[np.uint8], eos_weight: float) -> NDArray[np.float32]:
    return np.where(roles == Role.CLOSE, weights * np.float32(eos_weight), weights).astype(np.float32)
