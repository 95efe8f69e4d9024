"""`coordexp evaluate` and `coordexp compare`: the metrics of any detector, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordexp.errors import ConfigError
from coordexp.evaluation.foreign.reading import (
    CategoriesFile,
    FormOption,
    LabelsFile,
    MappingOption,
    PredictionFiles,
    Reading,
    TruthFile,
    read_sides,
)
from coordexp.experiments.command import Checkpoint, compare_revisions
from coordexp.infra.printable import note

if TYPE_CHECKING:
    from coordexp.evaluation.effect import Effect
    from coordexp.evaluation.evaluator import Evaluation


def evaluate(
    results: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="A gt_vs_pred.jsonl, as decoding writes it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Output file for all metrics, as JSON.")] = Path("metrics.json"),
    truth: TruthFile = None,
    predictions: Annotated[
        Path | None,
        typer.Option(exists=True, help="Predictions of any detector: a file, or a folder of YOLO text files."),
    ] = None,
    form: FormOption = None,
    labels: LabelsFile = None,
    categories: CategoriesFile = None,
    annotations: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="COCO or LVIS JSON to check the images; LVIS adds its AP."),
    ] = None,
    mapping: MappingOption = "normalised",
    tables: Annotated[Path | None, typer.Option(help="Folder for tables by class, size, score and image.")] = None,
) -> None:
    """Evaluate predictions: a gt_vs_pred.jsonl, or --truth with --predictions of any detector.

    Computes AP, F1, error types, blind controls, parsing, duplicates, calibration, and 95% intervals. Prints a short
    table and writes all metrics to --out.
    """
    from coordexp.evaluation.evaluator import rounded
    from coordexp.evaluation.registry import view
    from coordexp.infra.provenance import write_json

    files = [path for path in (results, predictions) if path]
    if len(files) != 1 or (predictions and not truth) or (truth and annotations):
        raise ConfigError(
            "expected either a gt_vs_pred.jsonl (optionally with --annotations), or --truth ANNOTATIONS with "
            "--predictions FILE."
        )
    reading = Reading(truth, form, labels, categories, annotations, mapping)
    (evaluation,) = evaluations = _evaluate(files, reading)
    _print_warnings(files, evaluations)
    write_json(out, rounded(evaluation.metrics, 12))
    if tables:
        from coordexp.evaluation.suite import write_tables

        write_tables(evaluation, tables)
    counts = evaluation.metrics["coco"]
    print(f"{counts['n_images']} images, {counts['n_gt']} objects, {counts['n_pred']} predictions")
    intervals = evaluation.metrics["interval"]
    shown = [key for key in view("printed", evaluation.params) if key.split(".")[0] in evaluation.metrics]
    rows = [[key, _number(evaluation.value(key)), _interval(intervals.get(key))] for key in shown]
    _print_table(rows, ["metric", "value", "95% interval"])
    print(f"all metrics: {out}")


def compare(
    sides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="A B ...",
            help="Prediction files, the first one is the reference; or two experiments, branches, commits or "
            "`workspace`, the older first.",
        ),
    ] = None,
    truth: TruthFile = None,
    predictions: PredictionFiles = None,
    form: FormOption = None,
    labels: LabelsFile = None,
    categories: CategoriesFile = None,
    mapping: MappingOption = "normalised",
    images: Annotated[int, typer.Option(min=0, help="For two files: number of most changed images to list.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="For files: plot the differences into this PNG.")] = None,
    checkpoint: Checkpoint = "stage2",
    out: Annotated[Path | None, typer.Option(help="For revisions: write the result here, as Markdown.")] = None,
) -> None:
    """Compare predictions: is one set better than the other, or is the difference noise?

    For files, prints the paired differences from the first on the same images, with 95% bootstrap intervals. For two
    revisions, the older first as in `git diff`, shows what B changed relative to A, by their predictions in DVC's
    cache.
    """
    names = [*map(str, predictions or ()), *(sides or ())]
    if len(names) < 2:
        raise ConfigError(f"found {len(names)} to compare, expected two or more files, or two revisions.")
    files = [Path(name) for name in names]
    if not truth and not any(file.exists() for file in files):
        if len(names) > 2:
            raise ConfigError(f"found {len(names)} revisions, expected two. For more, use `coordexp ab`.")
        compare_revisions(names[0], names[1], checkpoint, out)
        return
    if missing := [file for file in files if not file.exists()]:
        raise ConfigError(f"{missing[0]}: no such file. Expected prediction files, or two revisions.")
    evaluations = _evaluate(files, Reading(truth, form, labels, categories, None, mapping))
    _show_comparison(files, evaluations, images, plot)


def _evaluate(files: Sequence[Path], reading: Reading) -> list[Evaluation]:
    """Evaluate files of one data set."""
    from coordexp.evaluation.evaluator import evaluate as evaluate_results
    from coordexp.evaluation.protocol import STANDARD_MATCHING, STANDARD_SEED

    sides = read_sides(files, reading)
    for remark in sides.notes:
        note(f"note: {remark}")
    return [
        evaluate_results(rows, sides.categories, reading.params, STANDARD_MATCHING, STANDARD_SEED, sides.federated)
        for rows in sides.results
    ]


def _print_warnings(files: Sequence[Path], evaluations: Sequence[Evaluation]) -> None:
    """Print the faults that make scores meaningless, before the scores."""
    from coordexp.evaluation.blind import MARGIN, learned_nothing
    from coordexp.evaluation.parse import faults_of

    for file, evaluation in zip(files, evaluations, strict=True):
        if faults := faults_of(evaluation.metrics):
            print(f"{file}: the scores are not meaningful: {', '.join(faults)}.")
        if why := learned_nothing(evaluation.value(MARGIN), evaluation.metrics["interval"][MARGIN]):
            print(f"{file} shows no learning: {why} (a blind control does not see the image).")


def _show_comparison(files: Sequence[Path], evaluations: Sequence[Evaluation], images: int, plot: Path | None) -> None:
    from coordexp.evaluation.comparison import paired_effect
    from coordexp.evaluation.registry import view

    first, *others = evaluations
    keys = view("compared", first.params)
    effects = [{key: paired_effect([other], [first], key) for key in keys} for other in others]
    _print_warnings(files, evaluations)
    letters = [chr(ord("A") + n) if n < 26 else f"#{n + 1}" for n in range(len(files))]
    print("\n".join(f"{letter}: {file}" for letter, file in zip(letters, files, strict=True)))
    print(f"{first.table.n_images} images, {int(first.table.n_gt_I.sum())} objects")
    rows = []
    for key in keys:
        row = [key, _number(first.value(key))]
        for other, found in zip(others, effects, strict=True):
            row += [_number(other.value(key)), *_difference(found[key])]
        rows.append(row)
    headers = ["metric", "A"]
    for letter in letters[1:]:
        headers += [letter, f"{letter} - A", "95% interval", "verdict"]
    _print_table(rows, headers)
    if len(evaluations) == 2:
        _show_changed(others[0], first, images)
    if plot:
        from coordexp.evaluation.foreign.predictions import labels_of
        from coordexp.reporting.forest import write_forest

        reference, *names = labels_of(files)
        panels = {f"{name} - {reference}": found for name, found in zip(names, effects, strict=True)}
        write_forest(plot, panels, keys)
        print(f"plot of the differences: {plot}")


def _difference(effect: Effect | None) -> list[str]:
    if effect is None:
        return ["", "", "not defined"]
    return [f"{effect.delta:+.4f}", f"{effect.lo:+.4f} .. {effect.hi:+.4f}", effect.verdict.value]


def _show_changed(b: Evaluation, a: Evaluation, images: int) -> None:
    from coordexp.evaluation.comparison import most_changed_images

    changed = [row for row in most_changed_images(b, a, images) if row["delta"]]
    if changed:
        print("\nmost changed images (F1 of boxes and names, IoU 0.5)")
        shown = [
            [row["image"], _number(row["f1_full_50_b"]), _number(row["f1_full_50_a"]), f"{row['delta']:+.4f}"]
            for row in changed
        ]
        _print_table(shown, ["image", "A", "B", "B - A"])


def _number(value: float | None) -> str:
    return "undefined" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.4f} .. {bounds[1]:.4f}"


def _print_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
    from tabulate import tabulate

    print(tabulate(rows, headers, tablefmt="simple", disable_numparse=True))
