"""The report of an A/B test: verdict first, then effects, cost, values by seed, curves overlaid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from coordexp.evaluation.effect import Verdict
from coordexp.experiments.protocol import PRIMARY, RULE
from coordexp.infra.files import write_text
from coordexp.infra.logs import logged, read_log, smoothed
from coordexp.reporting.markdown import MISSING, number, signed, table
from coordexp.reporting.style import figure_style, new_figure, save_figure

# Okabe and Ito 2008, the reference in grey.
COLOURS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PANELS = {
    "raw/softce": "softCE, unweighted (nats)",
    "coord_diag/expected_bin_mae": "mean error of E[k] (bins)",
    "raw/text_ce": "text CE, unweighted (nats)",
}
Numbers = Mapping[str, Any]


def write_ab_report(numbers: Numbers, runs_folder: Path, out_dir: Path) -> Path:
    """Write `<name>.md` and `<name>.png` from the numbers of `run_ab`; returns the path of the text."""
    name = numbers["name"]
    logs = {
        arm["arm"]: [read_log(runs_folder / folder / "stage2" / "train_log.jsonl") for folder in arm["folders"]]
        for arm in numbers["arms"]
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    draw_curves(logs, out_dir / f"{name}.png")
    path = out_dir / f"{name}.md"
    write_text(path, ab_markdown(numbers))
    return path


def ab_markdown(numbers: Numbers) -> str:
    """The whole text; every number in it is one of `numbers`."""
    reference = numbers["arms"][0]["arm"]
    n_arms = len(numbers["effects"])
    arms = "all arms" if n_arms > 1 else "the one arm"
    parts = [
        f"# A/B test `{numbers['name']}`",
        "\n".join(f"- {verdict_sentence(row, numbers)}" for row in numbers["effects"]),
        _what_ran(numbers),
        RULE.format(arms=arms),
        f"## Effects against `{reference}`",
        _effects_table(numbers),
        "`SE images` and `SE seeds` are the two parts of the standard error: more images shrink the first, more seeds "
        "the second.",
        "## Values and cost",
        _arms_table(numbers),
        "Seconds and tokens are those of the training that the arm changes, for one seed, as measured when it ran; a "
        "run that came from the cache keeps its own.",
        f"![Losses of stage 2 by arm]({numbers['name']}.png)",
        "Thin: one seed. Thick: their mean, smoothed over a twentieth of the steps. Losses are unweighted, so that "
        "arms with different weights can be compared.",
        "## By seed",
        _seeds_table(numbers),
    ]
    return "\n\n".join(parts) + "\n"


def verdict_sentence(row: Numbers, numbers: Numbers) -> str:
    """One arm in words."""
    reference, found = numbers["arms"][0]["arm"], row["metrics"][PRIMARY]
    subject = f"`{row['arm']}` against `{reference}`"
    if found is None:
        return f"{subject}: **{Verdict.UNDEFINED.value}**."
    bounds = f"{signed(found['delta'])} [{signed(found['lo'])}, {signed(found['hi'])}]"
    seeds = numbers["seeds"]
    covered = f"{numbers['n_images']} images, {seeds} seeds" if seeds > 1 else f"{numbers['n_images']} images, one seed"
    text = f"{subject}: **{found['verdict']}**: `{PRIMARY}` {bounds} ({covered})"
    if found["verdict"] == Verdict.IDENTICAL.value:
        return f"{subject}: **{found['verdict']}** (`{PRIMARY}`, {covered}), so nothing can be told from it."
    if found["verdict"] == Verdict.NO_DIFFERENCE.value:
        text += f"; the smallest effect it could have shown is {number(found['smallest'])}"
    if found["verdict"] == Verdict.NOT_JUDGED.value:
        why = "; ".join(f"{run}: {', '.join(words)}" for run, words in row["faults"].items())
        return f"{text}, because of the answers of {why}."
    if seeds == 1:
        text += ". With one seed the interval knows nothing of training noise; a repetition may say otherwise"
    return f"{text}."


def _what_ran(numbers: Numbers) -> str:
    keys = " and ".join(f"`{key}`" for key in numbers["seed_keys"])
    repeated = f"{numbers['seeds']} repetitions of each arm by {keys}" if keys else "nothing is trained again"
    return (
        f"Profile `{numbers['profile']}`, commit `{numbers['commit'][:12]}`, checkpoint `{numbers['checkpoint']}`, "
        f"{numbers['n_images']} images; {repeated}. Arms with one seed see the same data in the same order."
    )


def _effects_table(numbers: Numbers) -> str:
    rows = []
    for row in numbers["effects"]:
        for key, found in row["metrics"].items():
            if found is None:
                rows.append([f"`{row['arm']}`", f"`{key}`", *[MISSING] * 5, Verdict.UNDEFINED.value])
                continue
            bounds = f"[{signed(found['lo'])}, {signed(found['hi'])}]"
            errors = [number(found[name]) for name in ("se_images", "se_seeds", "smallest")]
            verdict = f"**{found['verdict']}**" if key == PRIMARY else "context"
            rows.append([f"`{row['arm']}`", f"`{key}`", signed(found["delta"]), bounds, *errors, verdict])
    header = ["arm", "metric", "delta", "interval", "SE images", "SE seeds", "could have shown", "verdict"]
    return table(header, rows, "llrrrrrl")


def _arms_table(numbers: Numbers) -> str:
    keys = list(numbers["arms"][0]["values"])
    rows = []
    for arm in numbers["arms"]:
        means = [_mean_text(arm["values"][key]) for key in keys]
        cost = [_mean_text(arm["seconds"], 0), _mean_text(arm["tokens"], 0)]
        rows.append([f"`{arm['arm']}`", *means, *cost])
    return table(["arm, mean over seeds", *(f"`{key}`" for key in keys), "seconds", "tokens"], rows)


def _mean_text(values: Sequence[float | None], digits: int = 4) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):,.{digits}f}" if known and len(known) == len(values) else MISSING


def _seeds_table(numbers: Numbers) -> str:
    rows = [
        [f"`{name}`", f"`{arm['arm']}`", str(seed), number(arm["values"][PRIMARY][seed])]
        for arm in numbers["arms"]
        for seed, name in enumerate(arm["experiments"])
    ]
    return table(
        ["experiment (`dvc exp apply` puts it into the workspace)", "arm", "seed", f"`{PRIMARY}`"], rows, "llrr"
    )


def draw_curves(logs: Mapping[str, Sequence[pd.DataFrame]], path: Path) -> None:
    """Every arm in its colour, in the panels that all arms log."""
    shown = [c for c in PANELS if all(len(logged(log, c)) for runs in logs.values() for log in runs)]
    with figure_style():
        figure = new_figure(3.4 * max(1, len(shown)), 3.2)
        for ax, column in zip(figure.subplots(1, max(1, len(shown)), squeeze=False).flat, shown, strict=False):
            for (name, runs), colour in zip(logs.items(), cycle(COLOURS), strict=False):
                _draw_arm(ax, name, runs, column, colour)
            ax.set(title=PANELS[column], xlabel="optimizer step")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(3, max(1, len(labels))))
        save_figure(figure, path)


def _draw_arm(ax: Axes, name: str, runs: Sequence[pd.DataFrame], column: str, colour: str) -> None:
    series = [logged(log, column) for log in runs]
    for values in series:
        ax.plot(values.index, _smooth(values), color=colour, alpha=0.3, linewidth=0.8)
    if len({tuple(values.index) for values in series}) == 1:
        ax.plot(series[0].index, _smooth(sum(series) / len(series)), color=colour, label=name)


def _smooth(values: Any) -> Any:
    return smoothed(values, max(3, round(0.05 * len(values))))
