"""The detail page of a question: verdicts, claims, effects, values and cost, results by seed, and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from coordexp.config.question import METRICS, PRIMARY
from coordexp.evaluation.effect import FEWEST_SEEDS, Verdict
from coordexp.infra.files import write_text
from coordexp.infra.logs import logged, smoothed
from coordexp.reporting.markdown import MISSING, escape, number, table
from coordexp.reporting.questions import measured, seeds_sentence, trains, unlike_budget
from coordexp.reporting.style import COARSE_DPI, figure_style, new_figure, save_figure

# The palette of Okabe and Ito (2008), with gray for the first arm.
COLOURS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# A page of each question is kept in git: noisy lines in all colors take a sixth of a megabyte.
COLOURS_KEPT = 16  # besides those of the lines
PANELS = {
    "raw/softce": "softCE, unweighted (nats)",
    "coord_diag/expected_bin_mae": "mean error of E[k] (bins)",
    "raw/text_ce": "text CE, unweighted (nats)",
}
RULE = (
    f"The rule was fixed before the numbers below were known: the verdict depends on `{PRIMARY}`. An arm is **better** "
    "or **worse** than its baseline if the interval of the paired difference, over images and training seeds, excludes "
    "0. Otherwise **no difference** is **shown** with this budget. The intervals of {arms} hold jointly with 95 % "
    "confidence (Bonferroni: {each:.4g} % each, so they are wider than those of the claims). The minimum detectable "
    "effect is the true difference that this budget would have found with 80 % probability. The other metrics are "
    "context and do not affect the verdict."
)
CLAIM_RULE = (
    "A claim is **confirmed** if its 95 % interval lies entirely on the claimed side of 0 (or within the margin, for a "
    "claim of no change), **refuted** if it lies entirely on the other side (or outside the margin), and otherwise "
    "**not shown**. Fewer than {fewest} seeds decide no claim about training. The claims are not corrected for "
    "multiple comparisons: of 20 claims without a true effect, one is expected to be confirmed or refuted by chance."
)
COSTS = ("seconds", "tokens", "compute")
Numbers = Mapping[str, Any]


def write_report(numbers: Numbers, logs: Mapping[str, Sequence[pd.DataFrame]], out_dir: Path) -> Path:
    """Write `<name>.md` and `<name>.png` from the numbers of `run_study`; returns the path of the text.

    Args:
        logs: arm -> the training logs of its checkpoint, one per seed.
    """
    figure = out_dir / f"{numbers['name']}.png"
    if trains(numbers):
        draw_curves(logs, {name: arm["checkpoint"] for name, arm in numbers["arms"].items()}, figure)
    else:
        figure.unlink(missing_ok=True)
    path = out_dir / f"{numbers['name']}.md"
    write_text(path, report_markdown(numbers))
    return path


def report_markdown(numbers: Numbers) -> str:
    """The whole page; all of its numbers are from `numbers`."""
    effects = numbers["effects"]
    rule = CLAIM_RULE.format(fewest=FEWEST_SEEDS)
    claims = ["## Claims", rule, _claims_table(numbers["claims"])] if numbers["claims"] else []
    joint = {"arms": "all arms" if len(effects) > 1 else "the one arm", "each": 100 * (1 - numbers["level"])}
    parts = [
        f"# {escape(numbers['question'])}",
        *(["\n".join(f"- {verdict_sentence(row, numbers)}" for row in effects)] if effects else []),
        _what_ran(numbers),
        *([RULE.format(**joint)] if effects else []),
        *claims,
        *(_effects_section(numbers) if effects else []),
        "## Values and cost",
        _arms_table(numbers, False),
        *(_training_section(numbers) if trains(numbers) else []),
        "## By seed",
        _seeds_table(numbers),
    ]
    return "\n\n".join(parts) + "\n"


def _training_section(numbers: Numbers) -> list[str]:
    return [
        "Values are means over seeds. Training diagnostics are means over the last tenth of the steps:",
        _arms_table(numbers, True),
        "Seconds and tokens are those of the training stages that the arms change, per seed. Seconds are measured only "
        "when a stage runs, so a stage from the cache has none, and other work on the machine lengthens them. Compute "
        "is the number of training tokens, plus a third of the tokens that rollouts read or generated.",
        f"![Losses by arm]({numbers['name']}.png)",
        "Thin lines are single seeds; thick lines are their mean, smoothed over a twentieth of the steps. Losses are "
        "unweighted. They compare arms only where targets, images and contexts are the same: a wider soft target has a "
        "higher entropy, and channel B trains on other images and answers than channel A.",
    ]


def verdict_sentence(row: Numbers, numbers: Numbers) -> str:
    """The verdict on one arm in a sentence."""
    found = row["metrics"][PRIMARY]
    subject = f"`{row['arm']}` against `{row['baseline']}`"
    if "delta" not in found:
        return f"{subject}: **{found['verdict']}**."
    seeds = numbers["seeds"]
    covered = f"{numbers['n_images']} images, {seeds} seeds" if seeds > 1 else f"{numbers['n_images']} images, one seed"
    text = f"{subject}: **{found['verdict']}**: `{PRIMARY}` {measured(found)} ({covered})"
    if found["verdict"] == Verdict.IDENTICAL.value:
        return f"{subject}: **{found['verdict']}** (`{PRIMARY}`, {covered}): the change has no effect on val."
    if found["verdict"] == Verdict.NO_DIFFERENCE.value:
        text += f"; the minimum detectable effect is {number(found['smallest'])}"
    if found["verdict"] == Verdict.NOT_JUDGED.value:
        why = "; ".join(f"{run}: {', '.join(words)}" for run, words in row["faults"].items())
        return f"{text}, because of faulty answers in {why}."
    if seeds == 1:
        text += ". With one seed the interval does not include training noise; a repetition may give another result"
    elif seeds < FEWEST_SEEDS:
        text += f". Two seeds can agree by chance, and then the interval is too narrow; {FEWEST_SEEDS} are safer"
    return f"{text}{_spent(row, numbers)}."


def _spent(row: Numbers, numbers: Numbers) -> str:
    """A remark if the two sides trained on different numbers of tokens, or compute if the question compares that."""
    budget = "compute" if numbers.get("budget") == "compute" else "tokens"
    ratio = unlike_budget(numbers, row["arm"], row["baseline"], budget)
    return f". It took {ratio:.2f} times the {budget} of training" if ratio else ""


def _what_ran(numbers: Numbers) -> str:
    checkpoints = dict.fromkeys(f"`{arm['checkpoint']}`" for arm in numbers["arms"].values())
    text = (
        f"Profile `{numbers['profile']}`, commit `{numbers['commit'][:12]}`, checkpoint {', '.join(checkpoints)}, "
        f"{numbers['n_images']} val images. {seeds_sentence(numbers)}"
    )
    if trains(numbers):
        text += (
            " With equal seeds, all arms see the same data in the same order. A baseline that is a checkpoint belongs "
            "to the arm's own run: `stage1-control` is stage 1 continued with the budget of that run's stage 2."
        )
    return text


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


def _effects_section(numbers: Numbers) -> list[str]:
    """Of the arms that are compared; a question may have none."""
    return [
        "## Effects",
        _effects_table(numbers),
        "`SE images` and `SE seeds` are the two parts of the standard error: more images reduce the first, more seeds "
        "the second.",
        _context_table(numbers),
    ]


def _effects_table(numbers: Numbers) -> str:
    rows = []
    for row in numbers["effects"]:
        found = row["metrics"][PRIMARY]
        errors = [number(found.get(name)) for name in ("se_images", "se_seeds", "smallest")]
        rows.append([f"`{row['arm']}`", f"`{row['baseline']}`", measured(found), *errors, f"**{found['verdict']}**"])
    header = ["arm", "baseline", f"`{PRIMARY}`", "SE images", "SE seeds", "detectable", "verdict"]
    return table(header, rows, "llrrrrl")


def _context_table(numbers: Numbers) -> str:
    keys = [key for key in METRICS if key != PRIMARY]
    rows = [[f"`{row['arm']}`", *(measured(row["metrics"][key]) for key in keys)] for row in numbers["effects"]]
    return table(["context, 95 % intervals", *(f"`{key}`" for key in keys)], rows)


def _arms_table(numbers: Numbers, of_training: bool) -> str:
    """Means over seeds of metrics, or of training values; undefined if the value of any seed is undefined."""
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
    header = ["experiment (for `dvc exp apply`)", "arm", "seed", f"`{PRIMARY}`"]
    return table(header, rows, "llrr")


def draw_curves(logs: Mapping[str, Sequence[pd.DataFrame]], stages: Mapping[str, str], path: Path) -> None:
    """Draw one row of panels per stage, with one color per arm; only panels that all arms log."""
    shown = [c for c in PANELS if all(len(logged(log, c)) for runs in logs.values() for log in runs)] or [*PANELS][:1]
    rows = list(dict.fromkeys(stages.values()))
    with figure_style():
        figure = new_figure(3.4 * len(shown) + 1.5, 3.2 * len(rows), COARSE_DPI)
        for axes, stage in zip(figure.subplots(len(rows), len(shown), squeeze=False), rows, strict=True):
            arms = {name: runs for name, runs in logs.items() if stages[name] == stage}
            for ax, column in zip(axes, shown, strict=True):
                styles = cycle(product(("-", "--"), COLOURS))  # more arms than colors: dashed
                for (name, runs), (dashes, colour) in zip(arms.items(), styles, strict=False):
                    _draw_arm(ax, name, runs, column, colour, dashes)
                ax.set(title=PANELS[column], xlabel=f"optimizer step of {stage}")
            axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        save_figure(figure, path, COLOURS_KEPT)


def _draw_arm(ax: Axes, name: str, runs: Sequence[pd.DataFrame], column: str, colour: str, dashes: str) -> None:
    series = [logged(log, column) for log in runs]
    for values in series:
        ax.plot(values.index, _smooth(values), color=colour, alpha=0.3, linewidth=0.8)
    if len({tuple(values.index) for values in series}) == 1:
        ax.plot(series[0].index, _smooth(sum(series) / len(series)), color=colour, linestyle=dashes, label=name)


def _smooth(values: Any) -> Any:
    return smoothed(values, max(3, round(0.05 * len(values))))
