"""The ablation of the objective as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordexp.config.ablation import DUPLICATES, MAIN_METRIC
from coordexp.reporting.markdown import escape, interval, number, signed, table

_INTRO = """\
Written by `make ablation`. Each arm changes one thing against its baseline and is trained with the baseline's number of
tokens on the same data in the same order; {seeds} seed(s): {names}. Stage-1 arms start from the initial checkpoint and
take {stage1_steps} steps. Stage-2 arms and the control start from one stage-1 checkpoint a seed and spend the tokens
that the default stage 2 takes in {stage2_steps} steps; what its rollouts cost comes on top and is not given to the
control."""
_RULE = """\
The rule, fixed before any run: an arm is better or worse if the 95 % interval of its difference in mAP on val excludes
0, and otherwise no difference is shown; `could show` is the difference that this budget would have found with 80 %
probability. Intervals are over images and seeds, paired in both (docs/concepts.md); with one seed they are over images
alone. No correction is made for the number of arms: of 20 that do nothing, one is expected to look like something.
Choices are made on dev, numbers are on val."""
_COLUMNS = {
    MAIN_METRIC: "mAP",
    "coco.AP75": "AP75",
    "f1.full_50": "F1@.5",
    DUPLICATES: "duplicates/image",
    "bin_mae": "bin MAE",
}


def ablation_markdown(report: Mapping[str, Any]) -> str:
    """The page, from what pipelines/ablation.py writes as JSON."""
    budget = report["budget"]
    seeds = ", ".join(str(seed) for seed in budget["seeds"])
    intro = _INTRO.format(seeds=len(budget["seeds"]), names=seeds, **{k: budget[k] for k in _BUDGET_SHOWN})
    parts = ["# Ablation of the objective", intro, _RULE]
    for title, stages in (("Stage 1", ("stage1",)), ("Stage 2 and the control", ("control", "stage2"))):
        rows = [row for row in report["arms"] if row["stage"] in stages]
        if rows:
            parts += [f"## {title}", _means(rows), "Differences to the baseline, on val:", _differences(rows)]
    parts += ["## Chosen on dev", _chosen(report["chosen_on_dev"])]
    if report["claims"]:
        parts += ["## Published claims", _claims(report["claims"])]
    return "\n\n".join(parts) + "\n"


_BUDGET_SHOWN = ("stage1_steps", "stage2_steps")


def _means(rows: list[Mapping[str, Any]]) -> str:
    changes = {row["name"]: row["changes"] for row in rows}
    body = []
    for row in rows:
        stated = _stated(row["changes"], {} if row["name"] == row["baseline"] else changes.get(row["baseline"], {}))
        shown = [number(row["val"][column]) for column in _COLUMNS]
        body.append([f"`{row['name']}`", *shown, number(row["dev"][MAIN_METRIC]), escape(stated)])
    header = ["arm", *_COLUMNS.values(), "mAP on dev", "what it states"]
    return table(header, body, "l" + "r" * (len(_COLUMNS) + 1) + "l")


def _stated(changes: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """What an arm has otherwise than its baseline; all of it where the baseline states nothing."""
    if not changes:
        return "as committed"
    return ", ".join(f"{key} {value}" for key, value in changes.items() if baseline.get(key) != value)


def _differences(rows: list[Mapping[str, Any]]) -> str:
    metrics = [column for column in _COLUMNS if column != "bin_mae"]
    body = []
    for row in rows:
        if row["difference"]:
            cells = [_measured(row["difference"][metric]) for metric in metrics]
            reach = number(row["difference"][MAIN_METRIC]["smallest"])
            body.append([f"`{row['name']}`", f"`{row['baseline']}`", *cells, reach, row["verdict"]])
    header = ["arm", "baseline", *(_COLUMNS[m] for m in metrics), "could show (mAP)", "verdict"]
    return table(header, body, "ll" + "r" * (len(metrics) + 1) + "l")


def _measured(found: Mapping[str, float]) -> str:
    return f"{signed(found['delta'])} {interval([found['lo'], found['hi']])}"


def _chosen(chosen: Mapping[str, str]) -> str:
    return "; ".join(f"{stage}: `{name}`" for stage, name in chosen.items()) + "."


def _claims(claims: list[Mapping[str, Any]]) -> str:
    body = []
    for claim in claims:
        pair = f"`{claim['arm']}` - `{claim['baseline']}`"
        measured = f"{_COLUMNS[claim['metric']]} {_measured(claim['difference'])}"
        body.append([escape(claim["text"]), escape(claim["source"]), pair, measured, claim["judgement"]])
    return table(["claim", "source", "compared", "measured", "our numbers"], body, "lllll")
