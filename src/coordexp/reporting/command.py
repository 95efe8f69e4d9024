"""`coordexp report`: the page to browse predictions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.config.paths import GT_VS_PRED, ProfilePaths
from coordexp.errors import ConfigError

if TYPE_CHECKING:
    from coordexp.records.categories import Category
    from coordexp.records.gt_vs_pred import ImageResult

DEFAULT_RUNS = ("stage2", "stage1-control")


def report(
    html: Annotated[Path, typer.Option(help="The page to write: one file, to be opened in a browser or sent around.")],
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="Up to six gt_vs_pred.jsonl of the same images  [default: stage2 and stage1-control of the profile]; "
            "with --truth: predictions of any detectors",
        ),
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Annotations, as of `coordexp evaluate`.")
    ] = None,
    predictions: Annotated[
        list[Path] | None, typer.Option(exists=True, help="With --truth: files of any detectors; more may follow.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of images  [default: the profile's]")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Name in configs/  [default: `profile` of params.yaml]")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most images; those with the lowest F1 are kept.")] = 500,
    side: Annotated[int, typer.Option(min=32, help="Longer side of the pictures, in pixels.")] = 256,
) -> None:
    """Browse predictions: a sortable table, boxes, scores, coordinates, filters, two runs side by side.

    Of the profile's own answers it also shows commit, time and machine of each stage, where the run left a record.
    """
    from coordexp.config.loading import load_params
    from coordexp.reporting.page import PageSettings, write_page
    from coordexp.reporting.provenance import run_records

    files, bounds = [*(predictions or ()), *(results or ())], PageSettings(images=limit, side_px=side)
    if truth or predictions:
        if not truth or not files or not images:
            raise ConfigError("expected --truth ANNOTATIONS, --predictions FILES and --images FOLDER together.")
        runs, categories = _foreign(truth, files)
        size = write_page(runs, categories, images, html, page=bounds)
    else:
        paths = ProfilePaths(profile or load_params(Path("params.yaml")).profile if not (results and images) else "")
        runs, categories = _own(files or [paths.evaluation(run) / GT_VS_PRED for run in DEFAULT_RUNS], paths, not files)
        size = write_page(
            runs, categories, images or paths.raw, html, page=bounds, records=[] if files else run_records(paths)
        )
    print(f"{html}: {size / 1e6:.1f} MB")


Runs = Mapping[str, Sequence["ImageResult"]]


def _own(files: Sequence[Path], paths: ProfilePaths, of_profile: bool) -> tuple[Runs, Sequence[Category]]:
    """Evaluation files, and the categories of the profile or else the annotated names."""
    from coordexp.evaluation.categories import annotated_categories
    from coordexp.evaluation.foreign.predictions import labels_of
    from coordexp.records.categories import read_categories
    from coordexp.records.gt_vs_pred import read_results

    runs = {label: list(read_results(file)) for label, file in zip(labels_of(files), files, strict=True)}
    declared = paths.records / "categories.json"
    if of_profile and declared.is_file():
        return runs, read_categories(declared)
    return runs, annotated_categories(chain(*runs.values()))


def _foreign(truth_file: Path, files: Sequence[Path]) -> tuple[Runs, Sequence[Category]]:
    """Predictions of any detectors beside the annotations."""
    from coordexp.evaluation.foreign.predictions import labels_of, read_predictions
    from coordexp.evaluation.foreign.truth import read_truth

    truth = read_truth(truth_file)
    read = {label: read_predictions(file, truth) for label, file in zip(labels_of(files), files, strict=True)}
    for one in read.values():
        for note in one.notes:
            print(f"note: {note}", file=sys.stderr)
    return {label: one.results for label, one in read.items()}, truth.categories
