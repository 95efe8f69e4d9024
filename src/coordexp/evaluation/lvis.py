"""LVIS average precision: federated labels, frequency groups, 300 detections per image (Gupta, arXiv:1908.03195).

LVIS annotators searched each image for some categories only. A detection does not count if its category is neither
annotated in its image nor verified absent; a false positive does not count either if the instances of its category are
not all annotated. Areas are as in coco.py: LVIS annotates them from its masks.

faster-coco-eval in its LVIS mode gives the numbers of record. The matches in this module agree with it and serve the
bootstrap. The limit of 300 applies to all categories of an image together, as in lvis-api, and before both.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from coordexp.errors import DataError
from coordexp.evaluation.average_precision import CategoryMatches, Pairs, Rules, match_categories
from coordexp.evaluation.coco import detection_dataset, ground_truth_dataset, set_area_ranges
from coordexp.evaluation.table import Bools, DetectionTable, Ints
from coordexp.records.categories import Category, Frequency
from coordexp.records.descriptions import normalise_desc
from coordexp.records.schema import Record

FREQUENCIES: tuple[Frequency, ...] = get_args(Frequency)
MAX_DETECTIONS = 300  # per image over all categories, highest score first
# Position of each number in COCOeval_faster.all_stats with lvis_style and one detection limit.
_STATS = {"mAP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR300": 6, "APr": -3, "APc": -2, "APf": -1}


@dataclass(frozen=True, slots=True, kw_only=True)
class FederatedLabels:
    """LVIS's labels other than boxes; names are normalized."""

    frequency: Mapping[str, Frequency]
    absent: Mapping[int, frozenset[str]]  # image id -> names verified absent from it
    not_exhaustive: Mapping[int, frozenset[str]]  # image id -> names whose instances are not all annotated


def federated_from(source: Mapping[str, Any], where: str) -> FederatedLabels:
    """The labels of a decoded LVIS annotation file; `where` names it in messages.

    Raises:
        DataError: categories without a frequency, or images without their category lists.
    """
    try:
        names = {c["id"]: normalise_desc(c["name"]) for c in source["categories"]}
        frequency = {names[c["id"]]: c["frequency"] for c in source["categories"]}
        absent, partial = (
            {image["id"]: frozenset(names[c] for c in image[key]) for image in source["images"]}
            for key in ("neg_category_ids", "not_exhaustive_category_ids")
        )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where}: not an LVIS file ({error!r}); categories need a frequency, and images neg_category_ids and "
            "not_exhaustive_category_ids."
        ) from error
    if unknown := set(frequency.values()) - set(FREQUENCIES):
        raise DataError(f"{where}: category frequencies {sorted(unknown)}, expected {', '.join(FREQUENCIES)}.")
    return FederatedLabels(frequency=frequency, absent=absent, not_exhaustive=partial)


def federated_of(records: Sequence[Record], categories: Sequence[Category]) -> FederatedLabels | None:
    """The labels that conversion stored in records and categories; None unless all of them come from LVIS."""
    frequency = {normalise_desc(c.name): c.frequency for c in categories if c.frequency}
    keys = ("absent", "not_exhaustive")
    if len(frequency) < len(categories) or not all(key in r.metadata for r in records for key in keys):
        return None
    absent, partial = (
        {r.metadata["image_id"]: frozenset(map(normalise_desc, r.metadata[key])) for r in records} for key in keys
    )
    return FederatedLabels(frequency=frequency, absent=absent, not_exhaustive=partial)


def check_federated(table: DetectionTable, labels: FederatedLabels) -> None:
    """Raise DataError unless the labels cover every image and category of the table."""
    if absent := sorted(set(table.image_ids_I.tolist()) - set(labels.absent)):
        raise DataError(
            f"Image id {absent[0]} is not in the LVIS annotations ({len(absent)} such images); use the annotation file "
            "of the split of the predictions."
        )
    unknown = sorted(c.name for c in table.index.categories if normalise_desc(c.name) not in labels.frequency)
    if unknown:
        raise DataError(f"Category {unknown[0]!r} is not in the LVIS annotations ({len(unknown)} such categories).")


def lvis_ap(table: DetectionTable, labels: FederatedLabels) -> dict[str, float | None]:
    """The `lvis` area: mAP, AP50, AP75, APs, APm, APl by size, APr, APc, APf by frequency, AR300; None if undefined."""
    from faster_coco_eval import COCO, COCOeval_faster

    best = table.keep_predictions(~_beyond_limit(table))
    with contextlib.redirect_stdout(io.StringIO()):
        truth, detections = COCO(), COCO()
        truth.dataset, detections.dataset = _with_labels(ground_truth_dataset(best), labels), detection_dataset(best)
        truth.createIndex()
        detections.createIndex()
        evaluator = COCOeval_faster(truth, detections, iouType="bbox", lvis_style=True)
        evaluator.params.maxDets = [MAX_DETECTIONS]
        set_area_ranges(evaluator)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    values = {name: float(evaluator.all_stats[place]) for name, place in _STATS.items()}
    return {name: None if value < 0 else value for name, value in values.items()}


def _with_labels(dataset: dict[str, Any], labels: FederatedLabels) -> dict[str, Any]:
    ids = {normalise_desc(c["name"]): c["id"] for c in dataset["categories"]}
    for category in dataset["categories"]:
        category["frequency"] = labels.frequency[normalise_desc(category["name"])]
    for image in dataset["images"]:
        image["neg_category_ids"] = [ids[n] for n in labels.absent[image["id"]] if n in ids]
        image["not_exhaustive_category_ids"] = [ids[n] for n in labels.not_exhaustive[image["id"]] if n in ids]
    return dataset


def match_federated(table: DetectionTable, labels: FederatedLabels, pairs: Pairs) -> list[CategoryMatches]:
    """Matches under LVIS's rules, from which `weighted_ap` computes the same AP under any image weights."""
    present = _cells(table, table.gt_image_G, table.gt_category_G)
    absent = _labelled_cells(table, labels.absent)
    partial = _labelled_cells(table, labels.not_exhaustive)
    cell_P = _cells(table, table.pred_image_P, table.pred_category_P)
    rules = Rules(
        max_per_group=None,
        # The limit comes first: a detection that does not count still takes one of the 300 places.
        dropped_P=_beyond_limit(table) | ~np.isin(cell_P, np.concatenate([present, absent])),
        ignored_if_wrong_P=np.isin(cell_P, partial),
    )
    return match_categories(table, pairs, rules)


def frequency_rows(table: DetectionTable, labels: FederatedLabels) -> dict[str, list[int]]:
    """The rows of the categories of each frequency, by the name of their AP."""
    of_row = [labels.frequency[normalise_desc(c.name)] for c in table.index.categories]
    return {f"AP{f}": [row for row, frequency in enumerate(of_row) if frequency == f] for f in FREQUENCIES}


def _beyond_limit(table: DetectionTable) -> Bools:
    order = np.lexsort((-table.pred_score_P, table.pred_image_P))  # stable: ties stay in generation order
    n_I = table.n_pred_I
    beyond_P = np.empty(len(order), dtype=bool)
    beyond_P[order] = np.arange(len(order)) - np.repeat(np.cumsum(n_I) - n_I, n_I) >= MAX_DETECTIONS
    return beyond_P


def _cells(table: DetectionTable, image_N: Ints, category_N: Ints) -> Ints:
    """One integer per (image, category)."""
    return image_N * len(table.index) + category_N


def _labelled_cells(table: DetectionTable, names_of: Mapping[int, Iterable[str]]) -> Ints:
    rows = {normalise_desc(c.name): row for row, c in enumerate(table.index.categories)}
    cells = [
        image * len(table.index) + rows[name]
        for image, image_id in enumerate(table.image_ids_I.tolist())
        for name in names_of[image_id]
        if name in rows
    ]
    return np.array(cells, dtype=np.int64)
