"""Page one: the decision that a run supports under a rule fixed in advance, its evidence, and its figures.

Git holds only these figures. They are small and have stable names, because every experiment commits them again; DVC
stores all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from coordexp.config.paths import CHECKPOINTS, COMPARISONS
from coordexp.evaluation.effect import Verdict
from coordexp.reporting.answers import Answer
from coordexp.reporting.checklist import Check
from coordexp.reporting.forest import NAMES, write_forest
from coordexp.reporting.gallery import RULES, GalleryPick, write_example
from coordexp.reporting.inputs import TRAINED, ReportData, bounds_of, metric
from coordexp.reporting.markdown import MISSING, decimals, number, table, with_interval
from coordexp.reporting.outcomes import Outcomes
from coordexp.reporting.verdicts import checkpoint_faults, compared, nothing_learned, verdict_of, warnings

MAX_FILES, MAX_BYTES = 8, 350_000  # of the figures in git
MAX_LINES = 80
DIFFERENCES = "differences.png"
EXAMPLES = {  # rule of the gallery -> its first image
    "random": "random.png",
    "most misses": "most_missed.png",
    "most duplicates": "most_duplicates.png",
    "biggest change": "biggest_change.png",
}
_COLOURS = 8  # of the forest plot: lines and text need few
_ROWS = {
    "coco.mAP": "mAP",
    "coco.AP75": "AP75",
    "f1.full_50": "F1, IoU .50",
    "held_out.mAP": "mAP, held-out categories",
    "blind.margin_AP50": "AP50 above the best blind control",
}
_SUBJECTS = {"stage1": "stage 1", "stage2": "stage 2", "stage1-control": "the control", "base": "the base model"}


def decision(data: ReportData) -> list[str]:
    """The decision, warnings that outrank every number, and the three comparisons behind it, one sentence each."""
    return [_decided(data), *warnings(data.metrics), *(headline(data, name) for name in COMPARISONS)]


def _decided(data: ReportData) -> str:
    """Which checkpoint to use, by the verdicts on mAP."""
    if all(nothing_learned(data.metrics, name) for name in TRAINED):
        return "**Nothing was learned**, so there is no decision to make: fix the data or the training first."
    learned = verdict_of(compared(data, "stage1_vs_base")["coco.mAP"])
    if learned == Verdict.UNDEFINED:
        return "**No decision**: mAP is not defined on this data."
    if unsound := [name for name in ("stage1", "stage2") if checkpoint_faults(data.metrics, name)]:
        return f"**No decision**: {' and '.join(unsound)} cannot be evaluated until its answers end and parse."
    if learned not in (Verdict.BETTER, Verdict.NOT_JUDGED):
        return (
            "**Nothing was learned**: stage 1 is not shown to be better than the base model. Train it before stage 2."
        )
    over_control, over_stage1 = (
        verdict_of(compared(data, name)["coco.mAP"]) for name in ("stage2_vs_control", "stage2_vs_stage1")
    )
    if choice := _CHOICES.get((over_control, over_stage1)):
        return f"{choice} {ONE_SEED}"
    return "**No decision**: one side of a comparison is not evaluated."


ONE_SEED = (
    "This is about these checkpoints, of one training seed: the intervals below do not contain training noise, and "
    "another seed may reverse a verdict. `coordexp answer headline` repeats both trainings ([answers](../answers/))."
)
_B, _W, _N = Verdict.BETTER, Verdict.WORSE, Verdict.NO_DIFFERENCE
_CHOICES = {  # stage 2 against the control, and against stage 1
    (_B, _B): "**Use stage 2**: it beats both stage 1 and the control of equal compute.",
    (_B, _N): "**Keep stage 1**: stage 2 beats the control of equal compute, but is not shown to beat stage 1.",
    (_B, _W): "**Keep stage 1**: stage 2 is worse than stage 1, though better than the control of equal compute.",
    (_N, _B): "**Continue training; no benefit of stage 2 itself is shown**: it beats stage 1, but not the control.",
    (_N, _N): "**Keep stage 1**: stage 2 is shown to beat neither stage 1 nor the control of equal compute.",
    (_N, _W): "**Keep stage 1**: stage 2 is worse, and not shown to be better than the control of equal compute.",
    (_W, _B): "**Continue stage 1 instead of stage 2**: the control of equal compute gains more.",
    (_W, _N): "**Continue stage 1 instead of stage 2**: the control is better, and stage 2 is not shown to gain.",
    (_W, _W): "**Drop stage 2**: it is worse than both stage 1 and the control of equal compute.",
}


def headline(data: ReportData, comparison: str) -> str:
    """One comparison in words, with its numbers."""
    new, old = COMPARISONS[comparison]
    subject, other = _SUBJECTS[new].capitalize(), _SUBJECTS[old]
    differences = compared(data, comparison)
    found, of_f1 = differences["coco.mAP"], verdict_of(differences["f1.full_50"])
    values = " against ".join(_rounded(data, name, "coco.mAP") for name in (new, old))
    if found is None:
        return f"{subject} against {other}: mAP is not defined on this data ({values})."
    match found.verdict:
        case Verdict.NO_DIFFERENCE:
            claim = f"**No difference shown** between {subject.lower()} and {other}"
        case Verdict.NOT_JUDGED:
            claim = f"{subject} against {other} is **not evaluated**"
        case verdict:
            claim = f"{subject} is **{verdict.value}** than {other}"
    shows = found.verdict == Verdict.NO_DIFFERENCE and found.half_width > 0
    reach = f"; minimum detectable difference about {found.reach}" if shows else ""
    in_f1 = "" if of_f1 == Verdict.NOT_JUDGED else f" F1: {of_f1.value}."
    return f"{claim}: mAP {values}, difference {found}{reach}.{in_f1}"


def _rounded(data: ReportData, checkpoint: str, key: str) -> str:
    """The value alone, with the digits of its interval."""
    value, bounds = metric(data.metrics, checkpoint, key), bounds_of(data.metrics, checkpoint, key)
    return number(value) if value is None or bounds is None else f"{value:.{decimals(bounds)}f}"


def main_table(data: ReportData) -> str:
    """Five metrics of every checkpoint with their intervals."""
    rows = [
        [
            words,
            *(
                with_interval(metric(data.metrics, name, key), bounds_of(data.metrics, name, key))
                for name in CHECKPOINTS
            ),
        ]
        for key, words in _ROWS.items()
    ]
    return table(["on val, ↑", *CHECKPOINTS], rows)


def error_budget(data: ReportData) -> str:
    """AP50 gained if an oracle corrected one error type alone, costliest for stage 2 first; in the digits of AP50."""
    ordered = sorted(_CAUSES, key=lambda name: -(metric(data.metrics, "stage2", f"errors.{name}_cost") or 0.0))
    rows = [
        [
            _CAUSES[name],
            *(_cost(data, checkpoint, name) for checkpoint in TRAINED),
            number(metric(data.metrics, "stage2", f"errors.{name}")),
        ]
        for name in ordered
    ]
    return table(["error type", *TRAINED, "stage2, count"], rows)


_CAUSES = {
    "classification": "classification (correct box, wrong name)",
    "localization": "localization (correct name, IoU under .5)",
    "both": "both (wrong name, IoU under .5)",
    "duplicate": "duplicate",
    "background": "background",
    "missed": "missed objects",
}


def _cost(data: ReportData, checkpoint: str, cause: str) -> str:
    value = metric(data.metrics, checkpoint, f"errors.{cause}_cost")
    bounds = bounds_of(data.metrics, checkpoint, "coco.AP50")
    return MISSING if value is None else f"{value:.{decimals(bounds) if bounds else 2}f}"


def standing_lines(answers: Sequence[Answer]) -> list[str]:
    """The standing questions in two lines: answered, and not shown."""
    shown = [f"{a.question} **{a.answer}**" for a in answers if a.shown]
    others = [a.question.rstrip("?") for a in answers if not a.shown]
    lines = [f"Shown: {' · '.join(shown)}."] if shown else []
    return lines + ([f"Not shown: {' · '.join(others)}."] if others else [])


def checks_line(checks: Sequence[Check]) -> str:
    """The number of checks that hold, and those that do not."""
    failed = [check.claim for check in checks if check.passed is False]
    untold = [check.claim for check in checks if check.passed is None]
    parts = [f"{sum(check.passed is True for check in checks)} of {len(checks)} checks hold"]
    parts += [f"**{len(failed)} failed**: {'; '.join(failed)}"] if failed else []
    parts += [f"{len(untold)} cannot be determined from the files: {'; '.join(untold)}"] if untold else []
    return "; ".join(parts)


def examples(picks: Sequence[GalleryPick]) -> dict[str, GalleryPick]:
    """The first pick of each rule that page one shows."""
    assert set(EXAMPLES) == set(RULES)
    return {rule: pick for rule in EXAMPLES for pick in reversed(picks) if pick.rule == rule}


def write_pictures(
    data: ReportData, outcomes: Mapping[str, Outcomes], picks: Sequence[GalleryPick], image_root: Path, folder: Path
) -> None:
    """Draw the forest plot and the examples of page one into `folder`."""
    panels = {f"{new} - {old}": compared(data, name) for name, (new, old) in COMPARISONS.items()}
    write_forest(folder / DIFFERENCES, panels, list(NAMES), _COLOURS)
    for pick in examples(picks).values():
        write_example(pick, outcomes, image_root, folder / EXAMPLES[pick.rule])
