"""The options by which `evaluate`, `compare`, `report` and `browse` read prediction files of one data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.config.formats import Form, NameMapping
from coordexp.errors import ConfigError

if TYPE_CHECKING:
    from coordexp.config.schema import EvalParams
    from coordexp.evaluation.lvis import FederatedLabels
    from coordexp.records.categories import Category
    from coordexp.records.gt_vs_pred import ImageResult

TruthFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="COCO or LVIS instances, records, gt_vs_pred, or a YOLO data.yaml."),
]
PredictionFiles = Annotated[
    list[Path] | None, typer.Option(exists=True, help="With --truth: files of any detectors; more may follow.")
]
FormOption = Annotated[
    Form | None,
    typer.Option("--form", help="Format of the predictions  [default: recognized, except raw answers]"),
]
LabelsFile = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help='JSON {"their label": "ours"} for labels that differ.')
]
CategoriesFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="categories.json of the data set  [default: the annotated names]"),
]
MappingOption = Annotated[NameMapping, typer.Option("--mapping", help="How descriptions map to categories.")]


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read prediction files: joined with `truth`, or, without it, as gt_vs_pred files with annotations."""

    truth: Path | None = None
    form: Form | None = None
    labels: Path | None = None
    categories: Path | None = None
    annotations: Path | None = None  # to check the images of gt_vs_pred files; LVIS also adds its labels
    mapping: NameMapping = "normalised"

    @property
    def params(self) -> EvalParams:
        """The standard protocol with this mapping of names."""
        from coordexp.evaluation.protocol import STANDARD

        return STANDARD.model_copy(update={"mapping": self.mapping})


@dataclass(frozen=True, slots=True)
class Sides:
    """The results of each file, the common categories, and notes for the reader."""

    results: list[list[ImageResult]]
    categories: Sequence[Category]
    federated: FederatedLabels | None
    notes: tuple[str, ...]


def read_sides(files: Sequence[Path], reading: Reading) -> Sides:
    """Read files of one data set; without a list of categories, the annotated names of all files are the categories.

    Raises:
        ConfigError: options for foreign predictions without annotations.
        DataError: as `read_truth`, `read_predictions` and `read_results`.
    """
    from coordexp.evaluation.categories import annotated_categories
    from coordexp.evaluation.foreign.predictions import read_labels, read_predictions
    from coordexp.evaluation.foreign.truth import read_truth
    from coordexp.evaluation.table import check_known_images
    from coordexp.records.categories import read_categories
    from coordexp.records.gt_vs_pred import read_results

    notes: list[str] = []
    if not reading.truth and (reading.form or reading.labels):
        raise ConfigError("--form and --labels apply only with --truth; add --truth ANNOTATIONS.")
    if reading.truth:
        truth = read_truth(reading.truth)
        labels = read_labels(reading.labels) if reading.labels else None
        read = [read_predictions(file, truth, reading.form, labels) for file in files]
        results, federated = [one.results for one in read], truth.federated
        notes += [note for one in read for note in one.notes]
        categories: Sequence[Category] = truth.categories
    else:
        results, federated = [list(read_results(file)) for file in files], None
        categories = annotated_categories(chain(*results))
    if reading.annotations:
        listed = read_truth(reading.annotations)
        federated = listed.federated
        for rows in results:
            check_known_images(rows, set(listed.sizes_wh_px), str(reading.annotations))
            if len(rows) < len(listed.images):
                notes.append(f"{len(rows)} of the {len(listed.images)} annotated images are evaluated.")
    if reading.categories:
        categories = read_categories(reading.categories)
    return Sides(results, categories, federated, tuple(notes))
