"""Channel B targets: from a matched rollout to the segments that stage 2 trains on (the data of the M-step).

Two passes (`passes: two`):
    self-context  the rollout's own tokens; only the coordinates of accepted matches are supervised, against GT
    completion    the reordered GT: matched objects in the order of their predictions, then the missed objects
                  (appended, or sorted in), without false positives; all text is supervised, but only the coordinates
                  of missed objects
Each ground-truth object thus gets its geometry loss exactly once: in the model's own context if it was found, otherwise
in the completion. With `reordered_ce_weight`, all coordinate tokens of the completion also get a cross-entropy loss.

One pass (`passes: one`): the valid predictions, serialized again as context, then the missed objects. Unmatched
predictions are context without supervision: with incomplete annotations, many of them are real objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.config.schema import Stage2Params
from coordexp.geometry.bins import encode_boxes, target_bins
from coordexp.geometry.boxes import reading_order
from coordexp.packing.collator import Segment, coordinate_positions, teacher_segment
from coordexp.packing.samples import Sample
from coordexp.rollout.records import Rollout
from coordexp.text.codecs import AnswerEncoder, EncodedAnswer, Role, TextObject
from coordexp.training.duplicates import divergence_positions, duplicate_ranks

_NO_TOKENS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An object of the one-pass target: its text, and the indices of its ground truth and its prediction, if any."""

    text: TextObject
    truth: int | None
    prediction: int | None


@dataclass(frozen=True, slots=True)
class _Truth:
    """Non-crowd ground truth of a sample as text and as unrounded target bins (M, 4)."""

    objects: list[TextObject]
    targets_M4: NDArray[np.float32]
    boxes_M4: NDArray[np.float32]


def channel_b_segments(sample: Sample, rollout: Rollout, encoder: AnswerEncoder, params: Stage2Params) -> list[Segment]:
    """Segments of one sample; if its rollout did not parse, teacher forcing on the ground truth instead."""
    if not rollout.usable:
        return [teacher_segment(sample)]
    truth = _truth(sample)
    if params.passes == "two":
        unlikely = _diverging_tokens(rollout, encoder) if marks_duplicates(params) else _NO_TOKENS
        return [
            self_context_segment(sample, rollout, unlikely),
            _completion(sample, rollout, truth, encoder, params),
        ]
    return [_clean_prefix(sample, rollout, truth, encoder, params)]


def _truth(sample: Sample) -> _Truth:
    keep = [i for i, crowd in enumerate(sample.iscrowd) if not crowd]
    boxes = sample.boxes_xyxy_px[keep]
    bins = encode_boxes(boxes, sample.width, sample.height)
    objects = [TextObject(sample.descs[i], tuple(int(b) for b in row)) for i, row in zip(keep, bins, strict=True)]  # type: ignore[arg-type]
    return _Truth(objects, target_bins(boxes, sample.width, sample.height).astype(np.float32), boxes)


def self_context_segment(sample: Sample, rollout: Rollout, unlikely: NDArray[np.int64] = _NO_TOKENS) -> Segment:
    """The rollout as generated: no text loss, and a box target per accepted match, in the order of `pairs`."""
    # The tokens are those that were sampled, not an encoding of the parsed objects: coordinates are to improve in the
    # very context that inference produces. Text weights of 0 keep the model from imitating its own errors.
    ids = np.array(rollout.ids, np.int32)
    positions = [rollout.objects[i].coord_positions for i, _ in rollout.pairs]
    return Segment(
        sample=sample,
        answer_ids=ids,
        answer_roles=np.full(len(ids), Role.STRUCT, np.uint8),
        text_weights=np.zeros(len(ids), np.float32),
        box_tokens=np.array(positions, np.int64).reshape(-1, 4),
        box_targets=_truth(sample).targets_M4[[j for _, j in rollout.pairs]].reshape(-1, 4),
        unlikely_tokens=unlikely,
    )


def _diverging_tokens(rollout: Rollout, encoder: AnswerEncoder) -> NDArray[np.int64]:
    """Positions where duplicates diverge from the answer without them, in the generated tokens.

    They are computed on the canonical encoding of the objects. If the generated tokens differ from that encoding before
    such a position (an object was dropped, or a category name was tokenized differently), the position is left out.
    """
    canonical = encoder.encode([TextObject(o.desc, o.bins) for o in rollout.objects])
    generated = np.array(rollout.ids, np.int32)
    shared = min(len(generated), len(canonical.ids))
    differs = np.flatnonzero(generated[:shared] != canonical.ids[:shared])
    agreeing = int(differs[0]) if len(differs) else shared
    positions = divergence_positions(canonical, duplicate_ranks(rollout))
    return positions[positions < agreeing]


def marks_duplicates(params: Stage2Params) -> bool:
    """Whether the token that begins a duplicate gets an unlikelihood loss."""
    return params.duplicate_unlikelihood_weight > 0


def stop_weight(params: Stage2Params, over_generated: bool) -> float:
    """Weight of the token that ends an answer; scaled by `over_close_weight` for an over-generated rollout."""
    return params.eos_weight * (params.over_close_weight if over_generated else 1.0)


def is_over_generated(rollout: Rollout, n_true: int) -> bool:
    """Whether the rollout has more valid objects than the annotation."""
    return len(rollout.objects) > n_true


def missed_objects(rollout: Rollout, n_true: int, params: Stage2Params) -> list[int]:
    """Indices of the ground truth that the target adds to the matched objects.

    With `over_generation: truncate`, nothing is added to a rollout that has too many objects and at least one match.
    The target then ends early and teaches the model to stop.
    """
    matched = {j for _, j in rollout.pairs}
    if params.over_generation == "truncate" and matched and is_over_generated(rollout, n_true):
        return []
    return [j for j in range(n_true) if j not in matched]


def completion_order(rollout: Rollout, boxes_M4: NDArray, params: Stage2Params) -> list[int]:
    """Ground-truth indices in the order of the completion: matched ones by prediction rank, missed ones by policy."""
    # Matched objects keep the order in which the model found them. A fixed order would penalize a correct answer for
    # naming the objects in another sequence, although they form a set.
    order = [j for _, j in sorted(rollout.pairs)] + missed_objects(rollout, len(boxes_M4), params)
    return [order[i] for i in reading_order(boxes_M4[order])] if params.missed == "sorted" and order else order


def _completion(
    sample: Sample, rollout: Rollout, truth: _Truth, encoder: AnswerEncoder, params: Stage2Params
) -> Segment:
    order = completion_order(rollout, truth.boxes_M4, params)
    over_generated = is_over_generated(rollout, len(truth.objects))
    answer = encoder.encode([truth.objects[j] for j in order])
    matched = {j for _, j in rollout.pairs}
    # Coordinate targets for missed objects only: matched ones already have theirs in the self-context segment.
    rows = [rank for rank, j in enumerate(order) if j not in matched]
    weights = np.isin(answer.roles, (Role.STRUCT, Role.DESC, Role.CLOSE)).astype(np.float32)
    weights[encoder.stop_position(answer)] = stop_weight(params, over_generated)
    coordinates_M4 = coordinate_positions(answer.roles)
    return Segment(
        sample=sample,
        answer_ids=answer.ids,
        answer_roles=answer.roles,
        text_weights=weights,
        box_tokens=coordinates_M4[rows].reshape(-1, 4),
        box_targets=truth.targets_M4[[order[r] for r in rows]].reshape(-1, 4),
        reordered_tokens=coordinates_M4.reshape(-1) if params.reordered_ce_weight else _NO_TOKENS,
    )


def _clean_prefix(
    sample: Sample, rollout: Rollout, truth: _Truth, encoder: AnswerEncoder, params: Stage2Params
) -> Segment:
    """Serialized predictions (matched: scaffold and GT boxes; false positives: context), then the missed objects."""
    partner = dict(rollout.pairs)
    n_true = len(truth.objects)
    predicted = [
        _Entry(TextObject(o.desc, o.bins), partner.get(i), i)
        for i, o in enumerate(rollout.objects)
        if i in partner or params.extras == "context"
    ]
    missed = [_Entry(truth.objects[j], j, None) for j in missed_objects(rollout, n_true, params)]
    entries = predicted + missed
    if params.missed == "sorted":
        entries = [entries[i] for i in _order_by_bins([e.text for e in entries])]
    answer = encoder.encode([e.text for e in entries])
    repeated = set(duplicate_ranks(rollout)) if marks_duplicates(params) else set()
    duplicates = [rank for rank, e in enumerate(entries) if e.prediction in repeated]
    weights = _prefix_weights(entries, answer)
    weights[encoder.stop_position(answer)] = stop_weight(params, is_over_generated(rollout, n_true))
    supervised = [(rank, e.truth) for rank, e in enumerate(entries) if e.truth is not None]
    return Segment(
        sample=sample,
        answer_ids=answer.ids,
        answer_roles=answer.roles,
        text_weights=weights,
        box_tokens=coordinate_positions(answer.roles)[[r for r, _ in supervised]].reshape(-1, 4),
        box_targets=truth.targets_M4[[j for _, j in supervised]].reshape(-1, 4),
        unlikely_tokens=divergence_positions(answer, duplicates),
    )


def _prefix_weights(entries: Sequence[_Entry], answer: EncodedAnswer) -> NDArray[np.float32]:
    """Text weights: the scaffold of matched predictions, scaffold and name of missed objects, and the close."""
    weights = (answer.roles == Role.CLOSE).astype(np.float32)
    for rank, entry in enumerate(entries):
        if entry.truth is not None:
            roles = (Role.STRUCT, Role.DESC) if entry.prediction is None else (Role.STRUCT,)
            weights[(answer.object_index == rank) & np.isin(answer.roles, roles)] = 1.0
    return weights


def _order_by_bins(objects: Sequence[TextObject]) -> NDArray[np.int64]:
    return reading_order(np.array([o.bins for o in objects], np.float64).reshape(-1, 4))
