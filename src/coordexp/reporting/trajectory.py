"""A training stage by step: the full evaluation of its kept checkpoints on dev, and the worst images at every step.

    reports/<profile>/trajectory/<stage>.md            tables; made from
    reports/<profile>/trajectory/<stage>.json          every number
    reports/<profile>/trajectory/<stage>.png           mAP, F1 and counts by step
    reports/<profile>/trajectory/<stage>_worst.jpg     the worst images: annotations, and predictions after some steps

The worst images have the lowest F1 after the last step, more objects first. They are followed because means hide what a
single image shows: enumerated labels, duplicates, a broken order.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coordexp.config.run import RunConfig
from coordexp.drawing.panels import grid
from coordexp.evaluation.evaluator import Evaluation, rounded
from coordexp.evaluation.registry import view
from coordexp.evaluation.set_behaviour import find_duplicates, order_violations
from coordexp.infra.files import write_bytes, write_text
from coordexp.infra.logs import BIN_ERROR, logged
from coordexp.infra.provenance import write_json
from coordexp.records.gt_vs_pred import ImageResult, own_lines
from coordexp.reporting.markdown import escape, number, percent, table, with_interval
from coordexp.reporting.style import GREEN, RED, WIDTH_IN, figure_style, new_figure, save_figure
from coordexp.reporting.training import slot_correlations
from coordexp.training.dev_answers import answer_tile, judge_answer

Evaluated = Mapping[int, tuple[Sequence[ImageResult], Evaluation]]  # by step
WORST = 10
DRAWN, DRAWN_STEPS = 2, 4  # of the worst images, and of the steps; more would be too small on a page
DUPLICATE_IOUS = (0.9, 0.95)
LABELS = 4  # of a histogram that are shown
SCORES = ("coco.mAP", "coco.AP50", "f1.full_50", "f1.precision_50", "f1.recall_50", "rollout.matched_iou_mean")
COUNTS = ("coco.n_pred", "f1.tp_50", "f1.fp_50", "f1.fn_50", "rollout.gate_rejected")
NEAR_FRACTION = 0.05  # of the steps of a stage: values of its log at a step are means over this many before it
LOGGED = (BIN_ERROR, *(f"coord_diag/{n}" for n in ("expected_bin_abs_err_p90", "acc_top5", "p_gt_mean", "margin_mean")))
LOGGED += ("coord_diag/coord_vocab_mass_mean", "raw/gate", "loss/coord_reg")


def write_trajectory(run: RunConfig, stage: str, evaluated: Evaluated, log: pd.DataFrame) -> Path:
    """Write the four files; returns the path of the page."""
    folder = run.paths.reports / "trajectory"
    steps = [*evaluated]
    evaluations = [evaluation for _, evaluation in evaluated.values()]
    followed = follow_worst(evaluated)
    numbers = {
        "profile": run.params.profile,
        "stage": stage,
        "images": evaluations[0].table.n_images,
        "objects": int(evaluations[0].table.n_gt_I.sum()),
        "steps": [_step_row(step, evaluation) for step, (_, evaluation) in evaluated.items()],
        "worst": followed,
        "logged": [_logged_row(log, step) for step in evaluated],
        "slots": slot_correlations(log),
    }
    numbers = rounded(numbers)
    write_json(folder / f"{stage}.json", numbers)
    _draw_scores(steps, evaluations, folder / f"{stage}.png")
    _draw_worst(run, evaluated, [row["image_id"] for row in followed[:DRAWN]], folder / f"{stage}_worst.jpg")
    path = folder / f"{stage}.md"
    write_text(path, trajectory_markdown(numbers))
    return path


def _step_row(step: int, evaluation: Evaluation) -> dict[str, Any]:
    parse = [key for key in view("set", evaluation.params) if key.startswith("parse.")]
    keys = (*SCORES, *COUNTS, *view("set", evaluation.params))
    bounds = {key: evaluation.metrics["interval"].get(key) for key in ("coco.mAP", "f1.full_50")}
    return {"step": step, "interval": bounds, **{key: evaluation.value(key) for key in dict.fromkeys((*keys, *parse))}}


def _logged_row(log: pd.DataFrame, step: int) -> dict[str, Any]:
    """The coordinate diagnostics of the training log just before a step."""
    first = step - max(1, round(NEAR_FRACTION * len(log)))
    near = log[(log.index >= first) & (log.index < step)]
    return {"step": step, **{name: float(logged(near, name).mean()) for name in LOGGED if len(logged(near, name))}}


def follow_worst(evaluated: Evaluated) -> list[dict[str, Any]]:
    """The worst images after the last step, each with its answers after every step."""
    last = [*evaluated.values()][-1][1]
    order = sorted(last.per_image, key=lambda row: (row["f1_full_50"], -row["n_gt"], row["image_id"]))
    chosen = [row["image_id"] for row in order if row["n_gt"]][:WORST]
    by_step = {step: _image_rows(*both) for step, both in evaluated.items()}
    truths = {r.image_id: Counter(gt.desc for gt in r.gt if not gt.iscrowd) for r in [*evaluated.values()][-1][0]}
    return [
        {
            "image_id": image_id,
            "image": by_step[[*by_step][-1]][image_id]["image"],
            "annotated": dict(truths[image_id].most_common()),
            "steps": [{"step": step} | rows[image_id] for step, rows in by_step.items()],
        }
        for image_id in chosen
    ]


def _image_rows(results: Sequence[ImageResult], evaluation: Evaluation) -> dict[int, dict[str, Any]]:
    """By image id: counts, F1, duplicates, order and labels of one step."""
    pairs = find_duplicates(evaluation.table, min(DUPLICATE_IOUS))
    duplicates = {f"dup_pairs_{round(100 * u)}": pairs.per_image(u) for u in DUPLICATE_IOUS}
    violations_I, _ = order_violations(evaluation.table)
    labels = {r.image_id: dict(Counter(p.desc for p in r.pred).most_common()) for r in own_lines(results)}
    kept = ("image", "n_gt", "n_pred", "tp_50", "f1_full_50", "parse_ok", "truncated")
    return {
        row["image_id"]: {name: row[name] for name in kept}
        | {name: row["tp_50"] / row[n] if row[n] else None for name, n in (("precision", "n_pred"), ("recall", "n_gt"))}
        | {name: int(counts_I[i]) for name, counts_I in duplicates.items()}
        | {"order_violations": int(violations_I[i]), "labels": labels[row["image_id"]]}
        for i, row in enumerate(evaluation.per_image)
    }


def trajectory_markdown(numbers: Mapping[str, Any]) -> str:
    """The whole page; every number in it is one of `numbers`."""
    stage, rows = numbers["stage"], numbers["steps"]
    parse = [key for key in rows[0] if key.startswith("parse.") or key == "input.zero_area_boxes"]
    of_set = [key for key in rows[0] if key.startswith("set.")]
    parts = [
        f"# {escape(stage)} by step",
        f"Profile `{numbers['profile']}`: the checkpoints that the run kept, on all {numbers['images']} dev images "
        f"with {numbers['objects']} objects, decoded and evaluated like val. [All numbers]({stage}.json).",
        f"![mAP, F1 and counts by step]({stage}.png)",
        "## Scores and counts",
        _steps_table(rows, [*SCORES, *COUNTS], with_bounds=True),
        "Predictions rejected by the gate cannot be matched to any object.",
        "## Parsing and set metrics",
        _steps_table(rows, parse),
        _steps_table(rows, of_set),
        f"## The {len(numbers['worst'])} worst images at every step",
        "The images with the lowest F1 after the last step, more objects first. Duplicates are pairs of one label "
        "with an IoU of at least .90 or .95; order violations are neighbors in the answer whose (y1, x1) decreases.",
        *(_image_part(row) for row in numbers["worst"]),
        f"![The worst images after some of the steps]({stage}_worst.jpg)",
        "## Coordinates in the training log",
        f"Means over the last {percent(NEAR_FRACTION)} of the steps before each of these steps, on training images.",
        _logged_table(numbers["logged"]),
        "## Losses and the number of coordinate slots",
        table(["term, before weighting", "correlation with the slots of a step"],
              [[f"`{name}`", number(value)] for name, value in numbers["slots"].items()]),
        "A term that rises with the slots of a batch has a noisy curve even while the model improves.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _steps_table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], with_bounds: bool = False) -> str:
    def cell(row: Mapping[str, Any], key: str) -> str:
        return with_interval(row[key], row["interval"].get(key) if with_bounds else None)

    header = ["step", *(f"`{key.partition('.')[2]}`" for key in keys)]
    return table(header, [[str(row["step"]), *(cell(row, key) for key in keys)] for row in rows], "r" * len(header))


def _logged_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in LOGGED if any(name in row for row in rows)]
    cells = [[str(row["step"]), *(number(row.get(name)) for name in names)] for row in rows]
    return table(["step", *(f"`{name}`" for name in names)], cells, "r" * (1 + len(names)))


def _image_part(row: Mapping[str, Any]) -> str:
    header = ["step", "predicted", "true positives", "precision", "recall", "F1", "pairs at .90", "pairs at .95"]
    header += ["order violations", "answer", "labels"]
    keys = ("n_pred", "tp_50", "precision", "recall", "f1_full_50", "dup_pairs_90", "dup_pairs_95", "order_violations")
    rows = [
        [str(at["step"]), *(number(at[key]) for key in keys), _wholeness(at), _labels(at["labels"])]
        for at in row["steps"]
    ]
    annotated = _labels(row["annotated"])
    return f"`{escape(row['image'])}`, annotated: {annotated}\n\n{table(header, rows, 'r' * 9 + 'll')}"


def _wholeness(row: Mapping[str, Any]) -> str:
    return "truncated" if row["truncated"] else "complete" if row["parse_ok"] else "objects dropped"


def _labels(counts: Mapping[str, int]) -> str:
    shown = [f"{escape(name)} {n}" for name, n in [*counts.items()][:LABELS]]
    more = sum(counts.values()) - sum([*counts.values()][:LABELS])
    return ", ".join([*shown, *([f"{more} others"] if more else [])]) or "none"


def _draw_scores(steps: Sequence[int], evaluations: Sequence[Evaluation], path: Path) -> None:
    with figure_style():
        figure = new_figure(WIDTH_IN, 5.2)
        left, right = figure.subplots(2, 1)
        for key, colour in (("coco.mAP", "#0072B2"), ("f1.full_50", "#D55E00")):
            values = np.array([np.nan if (v := e.value(key)) is None else v for e in evaluations], np.float64)
            bounds = np.array([e.metrics["interval"][key] or (np.nan, np.nan) for e in evaluations], np.float64)
            left.plot(steps, values, color=colour, marker="o", markersize=3, label=key)
            left.fill_between(steps, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.2, linewidth=0)
        left.set(title="scores on dev, 95 % intervals over images", xlabel="optimizer step", ylim=(0, None))
        for key, colour, line in (("f1.tp_50", GREEN, "-"), ("f1.fp_50", RED, "--"), ("f1.fn_50", "#E69F00", ":")):
            label = {"tp": "true positives", "fp": "false positives", "fn": "false negatives"}[key[3:5]]
            right.plot(steps, [e.value(key) for e in evaluations], line, color=colour, label=label)
        right.set(title="objects and predictions, IoU .50", xlabel="optimizer step", ylim=(0, None))
        for ax in (left, right):
            ax.legend()
        save_figure(figure, path)


def _draw_worst(run: RunConfig, evaluated: Evaluated, image_ids: Sequence[int], path: Path) -> None:
    places = np.linspace(0, len(evaluated) - 1, min(DRAWN_STEPS, len(evaluated))).round().astype(int)
    steps = [[*evaluated][place] for place in places]
    tiles = []
    for image_id in image_ids:
        for step in steps:
            results, _ = evaluated[step]
            result = next(r for r in own_lines(results) if r.image_id == image_id)
            tiles.append(answer_tile(judge_answer(result), run.paths.raw, f"after step {step}"))
    if tiles:
        picture = io.BytesIO()
        grid(tiles, len(steps)).save(picture, "JPEG", quality=70)
        write_bytes(path, picture.getvalue())
