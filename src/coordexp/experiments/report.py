"""All numbers of a question: verdicts first, then claims, effects, values and cost, by seed, curves overlaid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from coordexp.config.question import METRICS, PRIMARY
from coordexp.evaluation.effect import Verdict
from coordexp.infra.files import write_text
from coordexp.infra.logs import logged, smoothed
from coordexp.reporting.markdown import MISSING, escape, number, table
from coordexp.reporting.questions import ALIKE, measured
from coordexp.reporting.style import figure_style, new_figure, save_figure

# Okabe and Ito 2008, the first arm in grey.
COLOURS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PANELS = {
    "raw/softce": "softCE, unweighted (nats)",
    "coord_diag/expected_bin_mae": "mean error of E[k] (bins)",
    "raw/text_ce": "text CE, unweighted (nats)",
}
RULE = (
    f"Fixed before any number was seen: `{PRIMARY}` decides. An arm is **better** or **worse** than its baseline when "
    "the interval of its paired difference, over images and training seeds, excludes 0; otherwise there is **no "
    "difference shown**: none that this budget could show. The intervals of {arms} hold together with 95 % confidence "
    "(Bonferroni). The smallest effect that could be shown is the true difference that this budget would have found "
    "with 80 % probability. The other metrics are context and decide nothing."
)
CLAIM_RULE = (
    "A claim is **confirmed** if its 95 % interval lies on the side that it says (or within the margin, if it says "
    "that nothing changes), **refuted** if it lies on the other (or outside of the margin), and otherwise **not "
    "shown**. Each claim stands alone: of 20 about nothing, one is expected to look like something."
)
COSTS = ("seconds", "tokens", "compute")
Numbers = Mapping[str, Any]


def write_report(numbers: Numbers, logs: Mapping[str, Sequence[pd.DataFrame]], out_dir: Path) -> Path:
    """Write `<name>.md` and `<name>.png` from the numbers of `run_study`; returns the path of the text.

    Args:
        logs: arm -> the training logs of its checkpoint, one a seed.
    """
    draw_curves(
        logs, {name: arm["checkpoint"] for name, arm in numbers["arms"].items()}, out_dir / f"{numbers['name']}.png"
    )
    path = out_dir / f"{numbers['name']}.md"
    write_text(path, report_markdown(numbers))
    return path


def report_markdown(numbers: Numbers) -> str:
    """The whole text; every number in it is one of `numbers`."""
    n_arms = len(numbers["effects"])
    claims = ["## Claims", CLAIM_RULE, _claims_table(numbers["claims"])] if numbers["claims"] else []
    parts = [
        f"# {escape(numbers['question'])}",
        "\n".join(f"- {verdict_sentence(row, numbers)}" for row in numbers["effects"]),
        _what_ran(numbers),
        RULE.format(arms="all arms" if n_arms > 1 else "the one arm"),
        *claims,
        "## Effects",
        _effects_table(numbers),
        "`SE images` and `SE seeds` are the two parts of the standard error: more images shrink the first, more seeds "
        "the second.",
        _context_table(numbers),
        "## Values and cost",
        _arms_table(numbers, False),
        "Means over seeds. Diagnostics of training are means over its last tenth:",
        _arms_table(numbers, True),
        "Seconds and tokens are those of the training that the arms change, for one seed; seconds are measured "
        "when it runs, so a stage from the cache has none. Compute is the tokens that were trained on, and a third for "
        "each token that rollouts read or wrote.",
        f"![Losses by arm]({numbers['name']}.png)",
        "Thin: one seed. Thick: their mean, smoothed over a twentieth of the steps. Losses are unweighted, so that "
        "arms with different weights can be compared.",
        "## By seed",
        _seeds_table(numbers),
    ]
    return "\n\n".join(parts) + "\n"


def verdict_sentence(row: Numbers, numbers: Numbers) -> str:
    """One arm in words."""
    found = row["metrics"][PRIMARY]
    subject = f"`{row['arm']}` against `{row['baseline']}`"
    if "delta" not in found:
        return f"{subject}: **{found['verdict']}**."
    seeds = numbers["seeds"]
    covered = f"{numbers['n_images']} images, {seeds} seeds" if seeds > 1 else f"{numbers['n_images']} images, one seed"
    text = f"{subject}: **{found['verdict']}**: `{PRIMARY}` {measured(found)} ({covered})"
    if found["verdict"] == Verdict.IDENTICAL.value:
        return f"{subject}: **{found['verdict']}** (`{PRIMARY}`, {covered}), so nothing can be told from it."
    if found["verdict"] == Verdict.NO_DIFFERENCE.value:
        text += f"; the smallest effect it could have shown is {number(found['smallest'])}"
    if found["verdict"] == Verdict.NOT_JUDGED.value:
        why = "; ".join(f"{run}: {', '.join(words)}" for run, words in row["faults"].items())
        return f"{text}, because of the answers of {why}."
    if seeds == 1 and numbers["seed_keys"]:
        text += ". With one seed the interval knows nothing of training noise; a repetition may say otherwise"
    return f"{text}{_unlike_tokens(row, numbers)}."


def _unlike_tokens(row: Numbers, numbers: Numbers) -> str:
    """What to know where the two sides trained on different numbers of tokens."""
    tokens = pd.DataFrame(numbers["runs"]).groupby("arm")["tokens"].mean()
    if row["baseline"] not in tokens or not tokens[row["baseline"]]:
        return ""
    ratio = tokens[row["arm"]] / tokens[row["baseline"]]
    return f". It trained on {ratio:.2f} times the tokens" if abs(ratio - 1) > ALIKE else ""


def _what_ran(numbers: Numbers) -> str:
    keys = " and ".join(f"`{key}`" for key in numbers["seed_keys"])
    repeated = f"{numbers['seeds']} repetitions of each arm by {keys}" if keys else "nothing is trained again"
    checkpoints = dict.fromkeys(f"`{arm['checkpoint']}`" for arm in numbers["arms"].values())
    return (
        f"Profile `{numbers['profile']}`, commit `{numbers['commit'][:12]}`, checkpoint {', '.join(checkpoints)}, "
        f"{numbers['n_images']} images; {repeated}. Arms with one seed see the same data in the same order. A baseline "
        "that is a checkpoint is that of the arm's own run: `stage1-control` is stage 1 continued for the tokens that "
        "the stage 2 of that run took."
    )


def _claims_table(claims: Sequence[Numbers]) -> str:
    rows = [
        [
            *(escape(claim[key]) for key in ("text", "source")),
            f"`{claim['arm']}` - " + (f"`{claim['baseline']}`" if claim["baseline"] else f"{claim['than']:g}"),
            claim["expected"] + (f" (±{claim['margin']:g})" if claim["margin"] else ""),
            f"`{claim['metric']}` {measured(claim)}",
            f"**{claim['judgement']}**",
        ]
        for claim in claims
    ]
    return table(["claim", "source", "compared", "expected", "measured", "our numbers"], rows, "llllll")


def _effects_table(numbers: Numbers) -> str:
    rows = []
    for row in numbers["effects"]:
        found = row["metrics"][PRIMARY]
        errors = [number(found.get(name)) for name in ("se_images", "se_seeds", "smallest")]
        rows.append([f"`{row['arm']}`", f"`{row['baseline']}`", measured(found), *errors, f"**{found['verdict']}**"])
    header = ["arm", "baseline", f"`{PRIMARY}`", "SE images", "SE seeds", "could have shown", "verdict"]
    return table(header, rows, "llrrrrl")


def _context_table(numbers: Numbers) -> str:
    keys = [key for key in METRICS if key != PRIMARY]
    rows = [[f"`{row['arm']}`", *(measured(row["metrics"][key]) for key in keys)] for row in numbers["effects"]]
    return table(["context, 95 % intervals", *(f"`{key}`" for key in keys)], rows)


def _arms_table(numbers: Numbers, of_training: bool) -> str:
    """Means over seeds, of answers or of training; one that is undefined for a seed has none."""
    frame = pd.DataFrame(numbers["runs"]).drop(columns=["experiment", "seed"])
    means = frame.groupby("arm", sort=False).agg(lambda column: pd.to_numeric(column).mean(skipna=False))
    logged_columns = [name for name in means if "/" in name]
    chosen = [*logged_columns, *COSTS] if of_training else [n for n in means if n not in (*logged_columns, *COSTS)]
    rows = [
        [f"`{arm}`", *(_cell(k, v) for k, v in row.items())]
        for arm, row in means[[name for name in chosen if name in means]].iterrows()
    ]
    heads = [f"`{key}`" if key not in COSTS else key for key in chosen if key in means]
    return table(["arm, mean over seeds", *heads], rows)


def _cell(key: str, value: float) -> str:
    digits = 0 if key in COSTS else 4
    if pd.isna(value):
        return "not measured" if key == "seconds" else MISSING
    return f"{value:,.{digits}f}"


def _seeds_table(numbers: Numbers) -> str:
    rows = [
        [f"`{run['experiment']}`", f"`{run['arm']}`", str(run["seed"]), number(run[PRIMARY])] for run in numbers["runs"]
    ]
    header = ["experiment (`dvc exp apply` puts it into the workspace)", "arm", "seed", f"`{PRIMARY}`"]
    return table(header, rows, "llrr")


def draw_curves(logs: Mapping[str, Sequence[pd.DataFrame]], stages: Mapping[str, str], path: Path) -> None:
    """One row of panels for each stage; every arm in its colour, in the panels that all arms log."""
    shown = [c for c in PANELS if all(len(logged(log, c)) for runs in logs.values() for log in runs)] or [*PANELS][:1]
    rows = list(dict.fromkeys(stages.values()))
    with figure_style():
        figure = new_figure(3.4 * len(shown) + 1.5, 3.2 * len(rows))
        for axes, stage in zip(figure.subplots(len(rows), len(shown), squeeze=False), rows, strict=True):
            arms = {name: runs for name, runs in logs.items() if stages[name] == stage}
            for ax, column in zip(axes, shown, strict=True):
                for (name, runs), colour in zip(arms.items(), cycle(COLOURS), strict=False):
                    _draw_arm(ax, name, runs, column, colour)
                ax.set(title=PANELS[column], xlabel=f"optimizer step of {stage}")
            axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        save_figure(figure, path)


def _draw_arm(ax: Axes, name: str, runs: Sequence[pd.DataFrame], column: str, colour: str) -> None:
    series = [logged(log, column) for log in runs]
    for values in series:
        ax.plot(values.index, _smooth(values), color=colour, alpha=0.3, linewidth=0.8)
    if len({tuple(values.index) for values in series}) == 1:
        ax.plot(series[0].index, _smooth(sum(series) / len(series)), color=colour, label=name)


def _smooth(values: Any) -> Any:
    return smoothed(values, max(3, round(0.05 * len(values))))
