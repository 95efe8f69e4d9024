"""`coordexp report` and `coordexp browse`: browse predictions on a page or in FiftyOne."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.config.paths import GT_VS_PRED, ProfilePaths
from coordexp.errors import ConfigError
from coordexp.evaluation.foreign.reading import (
    FormOption,
    LabelsFile,
    MappingOption,
    PredictionFiles,
    Reading,
    TruthFile,
    read_sides,
)
from coordexp.infra.printable import note

if TYPE_CHECKING:
    from coordexp.records.categories import Category
    from coordexp.records.gt_vs_pred import ImageResult

DEFAULT_RUNS = ("stage2", "stage1-control")

ResultFiles = Annotated[
    list[Path] | None,
    typer.Argument(
        exists=True,
        help="Up to six gt_vs_pred.jsonl of the same images  [default: stage2 and stage1-control of the profile]; "
        "with --truth: predictions of any detectors",
    ),
]
ImageFolder = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder of images  [default: the profile's]")
]
ProfileName = Annotated[str | None, typer.Option(help="Name in configs/  [default: `profile` of params.yaml]")]
Limit = Annotated[int, typer.Option(min=1, help="Maximum number of images; those with the lowest F1 are kept.")]


def report(
    html: Annotated[Path, typer.Option(help="The page to write: one file that opens in any browser.")],
    results: ResultFiles = None,
    truth: TruthFile = None,
    predictions: PredictionFiles = None,
    form: FormOption = None,
    labels: LabelsFile = None,
    mapping: MappingOption = "normalised",
    images: ImageFolder = None,
    profile: ProfileName = None,
    limit: Limit = 500,
    side: Annotated[int, typer.Option(min=32, help="Longer side of the images, in pixels.")] = 256,
) -> None:
    """Write a page to browse predictions: sortable table, boxes, scores, coordinates, filters, up to six runs.

    For the predictions of the profile, the page also shows commit, time and machine of each stage that left a record.
    """
    from coordexp.reporting.page import PageSettings, write_page
    from coordexp.reporting.provenance import run_records

    reading = Reading(truth, form, labels, mapping=mapping)
    answers = _answers(predictions or [], results or [], reading, images, profile)
    records = [] if predictions or results else run_records(answers.paths)
    bounds = PageSettings(images=limit, side_px=side)
    size = write_page(answers.runs, answers.categories, answers.images, html, reading.params, bounds, records)
    print(f"{html}: {size / 1e6:.1f} MB")


def browse(
    results: ResultFiles = None,
    truth: TruthFile = None,
    predictions: PredictionFiles = None,
    form: FormOption = None,
    labels: LabelsFile = None,
    mapping: MappingOption = "normalised",
    images: ImageFolder = None,
    profile: ProfileName = None,
    limit: Limit = 5000,
    name: Annotated[str, typer.Option(help="Name of the data set in FiftyOne while the app is open.")] = "coordexp",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the app.")] = 5151,
) -> None:
    """Browse predictions in FiftyOne, with the fields of the page: error type, score, bins, F1, counts, duplicates.

    The extra `browse` installs FiftyOne.
    """
    from coordexp.reporting.fiftyone_app import browse_answers

    reading = Reading(truth, form, labels, mapping=mapping)
    answers = _answers(predictions or [], results or [], reading, images, profile)
    browse_answers(answers.runs, answers.categories, answers.images, reading.params, limit, name, port)


@dataclass(frozen=True, slots=True)
class _Answers:
    """Runs on the same images by their labels, and the folder of the images."""

    runs: Mapping[str, Sequence[ImageResult]]
    categories: Sequence[Category]
    images: Path
    paths: ProfilePaths


def _answers(
    predictions: Sequence[Path], results: Sequence[Path], reading: Reading, images: Path | None, profile: str | None
) -> _Answers:
    """The files, read as `evaluate` reads them; without files, the predictions of the profile with its categories."""
    from coordexp.config.loading import load_params
    from coordexp.evaluation.foreign.predictions import labels_of
    from coordexp.records.categories import read_categories

    files = [*predictions, *results]
    if (reading.truth or predictions) and not (reading.truth and files and images):
        raise ConfigError("expected --truth ANNOTATIONS, --predictions FILES and --images FOLDER together.")
    own = profile or (load_params(Path("params.yaml")).profile if not (files and images) else "")
    paths = ProfilePaths(own)
    given = files or [paths.evaluation(run) / GT_VS_PRED for run in DEFAULT_RUNS]
    sides, declared = read_sides(given, reading), paths.records / "categories.json"
    for remark in sides.notes:
        note(f"note: {remark}")
    categories = read_categories(declared) if not files and declared.is_file() else sides.categories
    return _Answers(dict(zip(labels_of(given), sides.results, strict=True)), categories, images or paths.raw, paths)
