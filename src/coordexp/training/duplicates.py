"""Duplicates in a rollout, and the token at which each of them diverges from the answer without it.

Only that token gets a loss: the tokens before it are shared with the clean answer, and those after it follow from it.

Shapes: N objects.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from coordexp.geometry.bins import decode_norm
from coordexp.geometry.boxes import Boxes, as_boxes, pairwise_iou
from coordexp.records.descriptions import normalise_desc
from coordexp.rollout.records import Rollout
from coordexp.text.codecs import EncodedAnswer, Role

DUPLICATE_IOU = 0.9


def duplicate_ranks(rollout: Rollout) -> list[int]:
    """Unmatched objects that repeat an earlier one: the same normalized name and an IoU of at least DUPLICATE_IOU.

    The box alone does not make a duplicate: objects of two categories may share a box.
    """
    boxes_N4 = as_boxes(decode_norm([o.bins for o in rollout.objects]))
    repeats_N = same_object(boxes_N4, [o.desc for o in rollout.objects]).any(axis=1)
    matched = {i for i, _ in rollout.pairs}
    return [int(i) for i in np.flatnonzero(repeats_N) if i not in matched]


def same_object(boxes_N4: Boxes, descs: Sequence[str]) -> NDArray[np.bool_]:
    """(N, N) whether object i repeats object j; true only for j < i."""
    names_N = np.array([normalise_desc(desc) for desc in descs])
    same_NN = (pairwise_iou(boxes_N4, boxes_N4) >= DUPLICATE_IOU) & (names_N[:, None] == names_N[None, :])
    return np.tril(same_NN, -1)


def divergence_positions(answer: EncodedAnswer, ranks: Collection[int]) -> NDArray[np.int64]:
    """For each object in `ranks`, the position of its first token that differs from the answer without the object.

    That answer continues with the next object not in `ranks`, or with the close. An object whose tokens all agree has
    no such position.
    """
    found = []
    for rank in sorted(ranks):
        own = np.flatnonzero(answer.object_index == rank)
        start, length = int(own[0]), len(own)
        clean = _clean_continuation(answer, rank, ranks)
        instead = answer.ids[clean : clean + length]
        differs = np.flatnonzero(answer.ids[start : start + len(instead)] != instead)
        if len(differs):
            found.append(start + int(differs[0]))
    return np.array(found, np.int64)


def _clean_continuation(answer: EncodedAnswer, rank: int, ranks: Collection[int]) -> int:
    """The position where the answer continues after an object and the objects in `ranks` that follow it."""
    later = sorted({int(i) for i in answer.object_index if i > rank} - set(ranks))
    if later:
        return int(np.flatnonzero(answer.object_index == later[0])[0])
    return int(np.flatnonzero(answer.roles == Role.CLOSE)[0])
