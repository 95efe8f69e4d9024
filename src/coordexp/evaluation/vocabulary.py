"""Open-vocabulary metrics: AP by tier of category names and kind of prompt, and the rejection of absent names.

The `vocabulary` area of the metrics, for results with probes (`records.mixing.PROBES`). AP is split by prompt: all
objects (the main line of the image), a list of names, one name. Each part is evaluated against the objects that its
prompt names. `vocabulary_blind` has the same metrics with predictions shuffled across images, as a blind control.

Legend: I images, G annotated objects, P predictions, M located objects, K categories, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from coordexp.config.schema import EvalParams
from coordexp.evaluation.average_precision import mean_ap, unweighted_ap
from coordexp.evaluation.bootstrap import resample_weights, resampled_ap
from coordexp.evaluation.matched import Matched
from coordexp.evaluation.registry import ASKED, OPEN_TIERS, TIERS
from coordexp.evaluation.table import Bools, DetectionTable, Floats, Ints, build_table
from coordexp.geometry.bins import box_scale
from coordexp.geometry.boxes import as_boxes
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult, Prediction

Values = dict[str, float | None]
PROBE_OF = {"everything": "", "list": "list", "one": "one"}
REFUSED = ("easy", "hard")
ANY = float(np.finfo(np.float64).min)  # a confidence threshold that every box passes
REJECTED_AT = 0.8  # recall of the objects prompted with one name, at which the threshold is set
_LOCATED_IOU = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The lines with one kind of prompt, matched; `weights_BI` are resamples of their images."""

    lines: Sequence[ImageResult]  # by image id, like the table
    matched: Matched
    weights_BI: Ints

    @property
    def table(self) -> DetectionTable:
        return self.matched.table

    def rows(self, tier: str) -> list[int]:
        return self.table.index.rows(TIERS[tier])

    def tier_G(self, tier: str) -> Bools:
        return np.isin(self.table.gt_category_G, self.rows(tier)) & ~self.table.gt_crowd_G


def vocabulary_metrics(
    results: Sequence[ImageResult], categories: Sequence[Category], params: EvalParams, seed: int
) -> tuple[dict[str, Values], dict[str, Floats], list[dict[str, Any]]]:
    """The areas `vocabulary` and `vocabulary_blind`, the resamples (B,) of the former, and the table `by_tier`."""
    parts = _parts(results, categories, params, seed)
    values, samples = _metrics(results, parts, params, seed)
    blind = [line for probe in sorted({r.probe for r in results}) for line in dealt(results, probe)]
    once = params.model_copy(update={"bootstrap_resamples": 1})
    blind_values, _ = _metrics(blind, _parts(blind, categories, once, seed), once, seed)
    areas = {"vocabulary": values, "vocabulary_blind": blind_values}
    return areas, {f"vocabulary.{key}": s for key, s in samples.items()}, _by_tier(parts)


def dealt(results: Sequence[ImageResult], probe: str) -> list[ImageResult]:
    """Shuffle predictions across images: each line of one kind gets those of the previous line, at equal positions."""
    lines = sorted((r for r in results if r.probe == probe), key=lambda r: r.image_id)
    return [_with_answer(line, other) for line, other in zip(lines, [*lines[-1:], *lines[:-1]], strict=True)]


def _with_answer(line: ImageResult, other: ImageResult) -> ImageResult:
    boxes_N4 = as_boxes([p.bbox_xyxy_px for p in other.pred]) / box_scale(other.width, other.height)
    moved_N4 = (boxes_N4 * box_scale(line.width, line.height)).tolist()
    pred = [replace(p, bbox_xyxy_px=(x1, y1, x2, y2)) for p, (x1, y1, x2, y2) in zip(other.pred, moved_N4, strict=True)]
    return replace(line, pred=tuple(pred), parse=other.parse)


def _parts(
    results: Sequence[ImageResult], categories: Sequence[Category], params: EvalParams, seed: int
) -> dict[str, _Part]:
    found = {}
    for asked in ASKED:
        lines = sorted((r for r in results if r.probe == PROBE_OF[asked]), key=lambda r: r.image_id)
        if lines:
            matched = Matched.of(build_table(lines, categories, params), params)
            found[asked] = _Part(lines, matched, resample_weights(len(lines), params.bootstrap_resamples, seed))
    return found


def _metrics(
    results: Sequence[ImageResult], parts: Mapping[str, _Part], params: EvalParams, seed: int
) -> tuple[Values, dict[str, Floats]]:
    none = np.full(params.bootstrap_resamples, np.nan)
    values: Values = {}
    samples: dict[str, Floats] = {}
    for asked in ASKED:
        part = parts.get(asked)
        ap_KT = None if part is None else unweighted_ap(part.matched.by_score, part.table.n_images)
        resampled = {} if part is None else resampled_ap(
            part.matched.by_score, part.weights_BI, {tier: part.rows(tier) for tier in TIERS}
        )  # fmt: skip
        for tier in TIERS:
            key = f"{asked}_{tier}_AP50"
            rows = [] if part is None else part.rows(tier)
            values[key] = mean_ap(ap_KT[rows, :1]) if ap_KT is not None and rows else None
            samples[key] = resampled.get(f"{tier}.AP50", none)
    values["list_strict_to_seen"] = _ratio(values["list_strict_AP50"], values["list_seen_AP50"])
    seen_B = samples["list_seen_AP50"]
    samples["list_strict_to_seen"] = np.divide(
        samples["list_strict_AP50"], seen_B, out=np.full_like(seen_B, np.nan), where=seen_B > 0
    )
    for tier in OPEN_TIERS:
        key = f"list_{tier}_exact_rival"
        values[key], samples[key] = _exact(parts["list"], tier, none) if "list" in parts else (None, none)
    values["one_recall"], samples["one_recall"] = _recall(parts["one"]) if "one" in parts else (None, none)
    least = {"refused": (ANY, np.full_like(none, ANY)), "rejected": (None, none)}
    if "one" in parts:
        least["rejected"] = _least_confidence(parts["one"])
    for probe, (key, (at, at_B)) in product(REFUSED, least.items()):
        absent = [r for r in results if r.probe == probe]
        values[f"{key}_{probe}"], samples[f"{key}_{probe}"] = _silent(absent, at, at_B, seed)
    return values, samples


def _silent(
    absent: Sequence[ImageResult], least: float | None, least_B: Floats, seed: int
) -> tuple[float | None, Floats]:
    """The fraction of prompts with absent names that are answered, but without a box above this confidence."""
    if not absent or least is None:
        return None, np.full_like(least_B, np.nan)
    is_answer_I = np.array([r.parse is None or r.parse.ok for r in absent])
    confidence_I = np.array([max(map(_confidence, r.pred), default=-np.inf) for r in absent])
    weights_BI = resample_weights(len(absent), len(least_B), seed)
    silent_B = (weights_BI * (is_answer_I & (confidence_I < least_B[:, None]))).sum(axis=1) / len(absent)
    return float((is_answer_I & (confidence_I < least)).mean()), np.where(np.isnan(least_B), np.nan, silent_B)


def _confidence(prediction: Prediction) -> float:
    """The confidence in a name: its log-probability, or the score of a detector without one."""
    if prediction.desc_logprob is not None:
        return prediction.desc_logprob
    return -np.inf if prediction.score is None else prediction.score


def _least_confidence(part: _Part) -> tuple[float | None, Floats]:
    """The highest confidence threshold that keeps a recall of REJECTED_AT for one-name prompts; also per resample.

    None or NaN if the recall is lower at every threshold. Like a false-positive rate at a fixed true-positive rate
    (FPR@TPR), it makes models with different confidence scales comparable.
    """
    matches, wanted_G = part.matched.by_iou, np.any([part.tier_G(tier) for tier in OPEN_TIERS], axis=0)
    confidence_P = np.array([_confidence(p) for line in part.lines for p in line.pred])
    found = np.flatnonzero(matches.at(_LOCATED_IOU) & matches.same_name_M & wanted_G[matches.gt_M])
    order = found[np.argsort(-confidence_P[matches.pred_M[found]], kind="stable")]
    confidence_F, image_F = confidence_P[matches.pred_M[order]], matches.image_M[order]
    whole_I = np.bincount(part.table.gt_image_G[wanted_G], minlength=part.table.n_images)
    weights_BI = np.concatenate([np.ones((1, part.table.n_images), part.weights_BI.dtype), part.weights_BI])
    enough_BF = weights_BI[:, image_F].cumsum(axis=1) >= REJECTED_AT * (weights_BI @ whole_I)[:, None]
    least_B = np.array([confidence_F[enough.argmax()] if enough.any() else np.nan for enough in enough_BF])
    return (None if np.isnan(least_B[0]) else float(least_B[0])), least_B[1:]


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _exact(part: _Part, tier: str, none: Floats) -> tuple[float | None, Floats]:
    """Of the located objects of a tier with a rival name in their prompt, the fraction with the correct name."""
    matches = part.matched.by_iou
    rival_G = _has_rival(part) & part.tier_G(tier)
    judged_M = matches.at(_LOCATED_IOU) & rival_G[matches.gt_M]
    return _fraction(part, matches.image_M[judged_M], matches.image_M[judged_M & matches.same_name_M])


def _recall(part: _Part) -> tuple[float | None, Floats]:
    """Of the objects prompted with one name, without the control tiers, the fraction found under that name."""
    matches = part.matched.by_iou
    wanted_G = np.any([part.tier_G(tier) for tier in OPEN_TIERS], axis=0)
    found_M = matches.at(_LOCATED_IOU) & matches.same_name_M & wanted_G[matches.gt_M]
    return _fraction(part, part.table.gt_image_G[wanted_G], matches.image_M[found_M])


def _fraction(part: _Part, whole_N: Ints, hits_N: Ints) -> tuple[float | None, Floats]:
    """The fraction of hits, from the images of all items and of the hits; also in each resample."""
    whole_I, hits_I = (np.bincount(n, minlength=part.table.n_images) for n in (whole_N, hits_N))
    whole_B, hits_B = part.weights_BI @ whole_I, part.weights_BI @ hits_I
    samples = np.divide(hits_B, whole_B, out=np.full(len(whole_B), np.nan), where=whole_B > 0)
    return (float(hits_I.sum() / whole_I.sum()) if whole_I.any() else None), samples


def _has_rival(part: _Part) -> Bools:
    """(G,) whether the prompt of an object lists another name that begins with the same word."""
    table, rival = part.table, []
    for image, category in zip(table.gt_image_G.tolist(), table.gt_category_G.tolist(), strict=True):
        name = table.index.categories[category].name
        first = name.split()[0]
        others = (other.split() for other in part.lines[image].asked if other != name)
        rival.append(" " in name and any(len(words) > 1 and words[0] == first for words in others))
    return np.array(rival, dtype=bool)


def _by_tier(parts: Mapping[str, _Part]) -> list[dict[str, Any]]:
    """For each prompt kind and tier: objects, fraction located, and of these the fractions with agreeing words."""
    rows = []
    for asked, part in parts.items():
        matches = part.matched.by_iou
        names = [category.name.split() for category in part.table.index.categories]
        answers = [pred.desc.split() or [""] for line in part.lines for pred in line.pred]
        for tier in TIERS:
            tier_G = part.tier_G(tier)
            located = np.flatnonzero(matches.at(_LOCATED_IOU) & tier_G[matches.gt_M])
            pairs = [(names[part.table.gt_category_G[matches.gt_M[m]]], answers[matches.pred_M[m]]) for m in located]
            n_gt, n_located = int(tier_G.sum()), len(located)
            agree: dict[str, list[bool]] = {
                "first_word": [truth[0] == found[0] for truth, found in pairs],
                "last_word": [truth[-1] == found[-1] for truth, found in pairs],
                "exact": matches.same_name_M[located].tolist(),
            }
            rows.append(
                {"asked": asked, "tier": tier, "n_gt": n_gt, "located": n_located / n_gt if n_gt else None}
                | {key: float(np.mean(hits)) if n_located else None for key, hits in agree.items()}
            )
    return rows
