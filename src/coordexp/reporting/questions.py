"""The short page of an answered question, and the list of answered questions: `reports/answers/`.

<id>.md    the answer in words, its rule, the measurement, the cost; made from
<id>.json  every number
<id>.png   the intervals that the rule reads
README.md  all questions with their answers

On a profile other than its own a question is only tried: the same files are in a folder named after that profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd

from coordexp.config.question import load_question, question_names
from coordexp.errors import DataError
from coordexp.evaluation.effect import FEWEST_SEEDS, LEVEL, Verdict
from coordexp.infra.files import write_text
from coordexp.infra.foreign import Gate
from coordexp.infra.printable import printable
from coordexp.reporting.compared import compared_markdown, compared_values
from coordexp.reporting.markdown import MISSING, escape, number, table, with_interval
from coordexp.reporting.style import COARSE_DPI, INK, WIDTH_IN, figure_style, new_figure, save_figure

ANSWERS = Path("reports/answers")
INDEX = ANSWERS / "README.md"
KEPT_NUMBERS = Gate("what `coordexp answer` writes", DataError, "Ask the question again.")
COLOURS_KEPT = 16  # of a figure: three, and what smooths their edges
ALIKE = 0.1  # budgets that differ by a larger fraction are reported
# What the interval of a claim shows -> the short answer to it.
SHORT = {"confirmed": "yes", "refuted": "no"}
BUDGETS = {
    "tokens": "equal training tokens",
    "compute": "equal compute: training tokens, plus a third per token that rollouts read or generated",
    "decoding": "no training",
    "none": "no budget",
}
_SIGNS = {"higher": ">", "lower": "<"}
Numbers = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """One answered question; `answer` is a sentence, `page` a path from the repository."""

    name: str
    question: str
    answer: str
    profile: str
    page: Path
    decided: int  # rules
    rules: int
    arms: Mapping[str, Any]  # those that ran, by name


def stored_answers(root: Path = Path()) -> list[Answered]:
    """The questions that `reports/answers/` answers, by name; raises DataError if a file of numbers is damaged."""
    found = []
    for path in sorted((root / ANSWERS).glob("*.json")):
        numbers = KEPT_NUMBERS.read_object(path)
        try:
            row = Answered(
                numbers["name"], numbers["question"], answer_sentence(numbers), numbers["profile"],
                ANSWERS / f"{path.stem}.md", sum(claim["judgement"] in SHORT for claim in numbers["claims"]),
                len(numbers["claims"]), numbers["arms"],
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            KEPT_NUMBERS.refuse(str(path), f"no answer: {error!r}", error)
        found.append(row)
    return found


def index_markdown(root: Path) -> str:
    """The page that lists all questions: those with an answer, then the others."""
    answered = stored_answers(root)
    rows = [
        [f"[{escape(a.question)}]({a.page.name})", escape(a.answer), f"{a.decided} of {a.rules}", f"`{a.profile}`"]
        for a in answered
    ]
    decided, rules = sum(a.decided for a in answered), sum(a.rules for a in answered)
    others = [name for name in question_names(root) if name not in {a.name for a in answered}]
    lines = [
        "# Questions and answers",
        "<!-- Written by `coordexp answer` and by `python -m coordexp.reporting.reference`. -->",
        "Each question has arms, a budget, and rules that were fixed before the numbers of its page were known "
        "([how](../../docs/ab_test.md)); a page says where an earlier study was. The answer is that of the first rule; "
        "the page has the others, the intervals and the cost. *Not shown* means that the 95 % interval does not decide "
        "it.",
        table(["question", "answer", "rules decided", "profile"], rows, "llrl") if rows else "None is answered yet.",
    ]
    if rows:
        lines.append(
            f"{decided} of {rules} rules are decided. They are not corrected for multiple comparisons: without any "
            f"true effect, about {rules * LEVEL:.0f} would be decided by chance."
        )
    lines += compared_markdown(compared_values({a.name: a.arms for a in answered}, root), root)
    if others:
        lines += ["## Not answered yet", "`coordexp answer NAME --dry-run` estimates the cost of one."]
        lines += ["\n".join(f"- `{name}`: {escape(load_question(name, root).question)}" for name in others)]
    return "\n\n".join(lines) + "\n"


def write_answer(numbers: Numbers, folder: Path, command: str) -> Path:
    """Write the page and the figure of a question from its numbers; returns the path of the page."""
    draw_claims(numbers["claims"], folder / f"{numbers['name']}.png")
    path = folder / f"{numbers['name']}.md"
    write_text(path, answer_markdown(numbers, command))
    return path


def answer_sentence(numbers: Numbers) -> str:
    """The answer of the first claim of the question."""
    claims = numbers["claims"]
    if not claims:
        return "measured, without a rule"
    first = numbers.get("first_claim", claims[0]["claim"])  # a page of an earlier version has all claims
    given = [claim for claim in claims if claim["claim"] == first]
    return claim_sentence(given[0]) if given else "Not answered: the arms of its first rule were left out."


def claim_sentence(claim: Numbers) -> str:
    """The answer of one claim in words."""
    match claim["judgement"]:
        case "confirmed":
            return claim["yes"] or f"Yes: {claim['text']}."
        case "refuted":
            return claim["no"] or f"No: refuted that {claim['text']}."
        case "no effect":
            return f"No effect: {claim['text']}: both sides are the same in every resample."
        case "not shown":
            return claim["open"] or f"Not shown: {claim['text']}."
        case other:
            return f"Not answered ({other}): {claim['text']}."


def answer_markdown(numbers: Numbers, command: str) -> str:
    """The whole page; every number in it is one of `numbers`."""
    lines = [f"# {escape(numbers['question'])}"]
    lines += [f"**{escape(answer_sentence(numbers))}**"] if numbers["claims"] else []
    rows = [
        [escape(c["text"]), rule_words(c), f"{c['n_images']} {c['split']}", _values(c), measured(c), _short(c)]
        for c in numbers["claims"]
    ]
    header = ["claim", "rule, fixed in advance", "images", "arm / baseline", "difference, 95 % interval", "answer"]
    lines += [table(header, rows, "lllrrl"), _legend(numbers)] if rows else []
    lines += [
        f"Asked by: {escape(numbers['source'])}. {_what_ran(numbers)} {_budget(numbers)}".strip(),
        f"{_cost(numbers)} `{command}` writes this page and runs what is missing. All numbers: "
        f"[details/{numbers['name']}.md](details/{numbers['name']}.md).",
    ]
    lines += [escape(numbers["note"])] if numbers["note"] else []
    if any("delta" in claim for claim in numbers["claims"]):
        lines.append(f"![Intervals of the claims]({numbers['name']}.png)")
    return "\n\n".join(lines) + "\n"


def _legend(numbers: Numbers) -> str:
    """What the metrics of the claims are, why some are not evaluated, and that several claims are not one test."""
    claims = numbers["claims"]
    told = {claim["metric"]: f"`{claim['metric']}` ({claim['unit']}): {claim['meaning']}." for claim in claims}
    lines = [*told.values()]
    faulty = {run: words for effect in numbers["effects"] for run, words in effect["faults"].items()}
    if any(claim["judgement"] == Verdict.NOT_JUDGED.value for claim in claims):
        lines += [f"Not evaluated because of `{escape(run)}`: {', '.join(words)}." for run, words in faulty.items()]
    if len(claims) > 1:
        lines.append(f"The {len(claims)} rules are not corrected for multiple comparisons.")
    return "\n".join(f"- {line}" for line in lines)


def rule_words(claim: Numbers) -> str:
    """The rule of a claim in short."""
    ours, metric = f"`{claim['arm']}`", f"`{claim['metric']}`"
    if claim["expected"] == "same":
        theirs = f"`{claim['baseline']}`" if claim["baseline"] else f"{claim['than']:g}"
        return f"{metric} of {ours} within {claim['margin']:g} of {theirs}"
    sign = _SIGNS[claim["expected"]]
    return f"{metric}: {ours} {sign} " + (f"`{claim['baseline']}`" if claim["baseline"] else f"{claim['than']:g}")


def measured(found: Numbers) -> str:
    """A difference with its interval, in the digits of the interval."""
    return with_interval(found["delta"], (found["lo"], found["hi"]), sign=True) if "delta" in found else MISSING


def _short(claim: Numbers) -> str:
    return f"**{SHORT.get(claim['judgement'], claim['judgement'])}**"


def _values(claim: Numbers) -> str:
    return " / ".join(number(value) for value in claim["values"])


def _what_ran(numbers: Numbers) -> str:
    return (
        f"Profile `{numbers['profile']}`, commit `{numbers['commit'][:12]}`. {seeds_sentence(numbers)}"
        f"{_left_out(numbers)}"
    )


def trains(numbers: Numbers) -> bool:
    """Whether arms differ in training: otherwise all have the log of one run."""
    return str(numbers["budget"]) != "decoding"


def seeds_sentence(numbers: Numbers) -> str:
    """What was repeated, and so what the intervals contain."""
    seeds, keys, planned = numbers["seeds"], numbers["seed_keys"], numbers.get("planned_seeds", numbers["seeds"])
    if not trains(numbers):
        return "One checkpoint: the intervals contain the variation of the images, not that of training."
    text = f"{seeds} seed{'s' if seeds > 1 else ''}" + (f" of {planned} planned" if planned > seeds else "")
    text += f", varying {' and '.join(f'`{key}`' for key in keys)}"
    if keys == ["stage2.seed"]:
        text += ": the intervals are given one checkpoint of stage 1"
    if seeds < FEWEST_SEEDS and numbers["claims"]:
        text += f"; no rule about training is decided by fewer than {FEWEST_SEEDS} seeds"
    return f"{text}."


def _left_out(numbers: Numbers) -> str:
    """The arms and rules that the call left out; a page of an earlier version does not say."""
    text = ""
    if arms := numbers.get("left_out"):
        text += f" Arms left out: {', '.join(f'`{arm}`' for arm in arms)}."
    if claims := numbers.get("left_out_claims"):
        text += f" Claims left out with them: {'; '.join(map(escape, claims))}."
    return text


def _budget(numbers: Numbers) -> str:
    """The budget that both sides share, and by how much sides differ."""
    budget, words = numbers["budget"], BUDGETS[numbers["budget"]].capitalize()
    if budget not in ("tokens", "compute"):
        return f"{words}." if budget == "decoding" else ""
    pairs = {(claim["arm"], claim["baseline"]) for claim in numbers["claims"]}
    ratios = {pair: unlike_budget(numbers, *pair, budget) for pair in sorted(pairs)}
    unlike = [f"`{arm}` took {ratio:.2f} times that of `{base}`" for (arm, base), ratio in ratios.items() if ratio]
    return words + (f", but {', '.join(unlike)}." if unlike else ".")


def unlike_budget(numbers: Numbers, arm: str, baseline: str, budget: str) -> float | None:
    """How many times the baseline's `tokens` or `compute` an arm took; None if alike, unknown, or not to be equal."""
    runs = pd.DataFrame(numbers["runs"])
    means = runs.groupby("arm")[budget].mean()
    if baseline == "stage1-control" and "control" in runs:  # each run has its own
        spent = runs.groupby("arm")["control"].mean()[arm]
    else:
        spent = means.get(baseline)
    if not spent or continues(numbers.get("arms", {}), arm, baseline):  # `coordexp run` has no arms
        return None
    ratio = float(means[arm] / spent)
    return ratio if abs(ratio - 1) > ALIKE else None


def continues(arms: Numbers, arm: str, baseline: str) -> bool:
    """Whether one side continues the other, stage 1, so that their budgets cannot be equal."""
    stages = [arms[side]["checkpoint"] if side in arms else side for side in (arm, baseline)]
    return "stage1" in stages and stages[0] != stages[1]


def _cost(numbers: Numbers) -> str:
    runs = {run["experiment"]: run["seconds"] for run in numbers["runs"]}
    own = [seconds for name, seconds in runs.items() if seconds and name.startswith(f"ab-{numbers['name']}-")]
    words = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    if not own:
        return f"{words}, from the repository, other questions or the cache."
    return (
        f"{words}; {len(own)} of them were trained in full for this page, {np.median(own) / 60:.1f} min each (median)."
    )


def draw_claims(claims: Sequence[Numbers], path: Path) -> None:
    """The interval of every claim with its reference, one panel per metric; no file without a claim."""
    shown = [claim for claim in claims if "delta" in claim]
    if not shown:
        path.unlink(missing_ok=True)
        return
    by_metric: dict[str, list[Numbers]] = {}
    for claim in shown:
        by_metric.setdefault(claim["metric"], []).append(claim)
    labels = {metric: [_row_label(claim) for claim in group] for metric, group in by_metric.items()}
    lines = {metric: max(label.count("\n") + 1 for label in group) for metric, group in labels.items()}
    heights = [0.5 + (0.12 + 0.14 * lines[metric]) * len(group) for metric, group in by_metric.items()]
    with figure_style():
        figure = new_figure(WIDTH_IN, 0.6 + sum(heights), COARSE_DPI)
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (metric, group) in zip(panels, by_metric.items(), strict=True):
            delta, lo, hi = (np.array([claim[name] for claim in group]) for name in ("delta", "lo", "hi"))
            rows = np.arange(len(group))
            ax.errorbar(delta, rows, xerr=[np.maximum(0, delta - lo), np.maximum(0, hi - delta)],
                        color="#0072B2", marker="o", markersize=4, linestyle="", elinewidth=1.6)  # fmt: skip
            for row, claim in zip(rows, group, strict=True):
                if margin := claim["margin"]:  # of this row alone
                    ax.fill_betweenx([row - 0.4, row + 0.4], -margin, margin, color="#BBBBBB", alpha=0.3, linewidth=0)
                ax.annotate(SHORT.get(claim["judgement"], claim["judgement"]), (1.01, row), fontsize=8, va="center",
                            xycoords=("axes fraction", "data"))  # fmt: skip
            ax.axvline(0, color=INK, linewidth=0.8)
            ax.set_yticks(rows, labels[metric], fontsize=8)
            ax.set_ylim(len(group) - 0.5, -0.5)
            ax.locator_params(axis="x", nbins=6)  # labels such as -0.025 would touch
            ax.set_xlabel(f"difference in {metric} ({group[0]['unit']}), 95 % interval")
        save_figure(figure, path, COLOURS_KEPT)


def _row_label(claim: Numbers) -> str:
    """The claim, which the word at the right answers, and the difference that is drawn."""
    sides = f"{claim['arm']} - {claim['baseline'] or format(claim['than'], 'g')}"
    return "\n".join([*wrap(printable(claim["text"]), 46), f"({sides})"])
