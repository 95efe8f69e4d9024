"""The data of the page in FiftyOne's app: one sample per image, one field of boxes per run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from coordexp.config.schema import EvalParams
from coordexp.errors import ConfigError
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.records.images import WHOLE_PICTURE, read_record_rgb, record_source, split_view
from coordexp.reporting.page import page_data

if TYPE_CHECKING:
    from types import ModuleType

TRUTH = "annotation"
RESERVED = {TRUTH, "id", "image_id", "filepath", "tags", "metadata", "created_at", "last_modified_at"}
# Key in the data of the page -> field of a sample.
COUNTS = {"f1": "f1", "fp": "false", "miss": "missed", "dup": "duplicate_pairs", "parse": "parses"}
ABOUT = ("cause", "bins", "logprob", "sd")  # of a prediction, in addition to label, box and score


def browse_answers(
    results: Mapping[str, Sequence[ImageResult]],
    categories: Sequence[Category],
    image_root: Path,
    params: EvalParams,
    limit: int,
    name: str,
    port: int,
) -> None:
    """Open the app on runs of the same images, by their labels, and wait until it is closed.

    Images that are not separate files are written to a temporary folder in the meantime.

    Raises:
        ConfigError: FiftyOne or its database is not installed, or it already has a data set of this name.
        DataError: runs on different images, or an image that does not exist.
    """
    fiftyone = _fiftyone()
    try:
        taken = name in fiftyone.list_datasets()
    except fiftyone.core.config.FiftyOneConfigError as error:
        raise ConfigError(f"FiftyOne cannot reach its database: {str(error).strip()}") from error
    if taken:
        raise ConfigError(f"--name {name}: FiftyOne already has this data set. Choose another name, or delete it.")
    data = page_data(results, categories, params, limit)
    with TemporaryDirectory(prefix="coordexp-") as folder:
        rows = [(_picture(image_root, row["image"], row["id"], Path(folder)), row) for row in data["images"]]
        dataset = fiftyone.Dataset(name)
        try:
            dataset.add_samples([_sample(fiftyone, file, row, data["labels"]) for file, row in rows])
            dataset.info["totals"] = dict(zip(data["labels"], data["totals"], strict=True))
            dataset.save()
            fiftyone.launch_app(dataset, port=port).wait(-1)
        finally:
            dataset.delete()


def _fiftyone() -> ModuleType:
    try:
        import fiftyone
    except ImportError as error:
        raise ConfigError(
            "`coordexp browse` opens FiftyOne, which is not installed: pip install 'coordexp[browse]'. Without it, "
            "`coordexp report --html page.html` writes a page with the same fields."
        ) from error
    return fiftyone


def _picture(image_root: Path, image: str, image_id: int, folder: Path) -> str:
    """The file of an image; an image from an archive, or a view of one, is written first."""
    name, view = split_view(image)
    source = record_source(image_root, name)
    if isinstance(source, Path) and source.is_file() and view is WHOLE_PICTURE:
        return str(source.resolve())
    file = folder / f"{image_id}.png"
    read_record_rgb(image_root, image).save(file)
    return str(file)


def _sample(fiftyone: ModuleType, file: str, row: Mapping[str, Any], labels: Sequence[str]) -> Any:
    sample = fiftyone.Sample(filepath=file)
    sample["image_id"] = row["id"]
    runs = dict(zip(field_names(labels), row["runs"], strict=True))
    found = {field: {p["object"] for p in run["pred"] if p["cause"] == "right"} for field, run in runs.items()}
    objects = [
        _object(fiftyone, g, row, iscrowd=g["crowd"], found_by=[field for field in runs if n in found[field]])
        for n, g in enumerate(row["gt"])
    ]
    sample[TRUTH] = fiftyone.Detections(detections=objects)
    for field, run in runs.items():
        sample[field] = fiftyone.Detections(detections=[_prediction(fiftyone, p, row) for p in run["pred"]])
        for key, words in COUNTS.items():
            sample[f"{field}_{words}"] = run[key]
    return sample


def _prediction(fiftyone: ModuleType, pred: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    about = {key: pred[key] for key in ABOUT if key in pred}
    if pred["object"] is not None:
        about["belongs_to"] = row["gt"][pred["object"]]["desc"]
    return _object(fiftyone, pred, row, confidence=pred["score"], **about)


def _object(fiftyone: ModuleType, box: Mapping[str, Any], row: Mapping[str, Any], **about: Any) -> Any:
    """One box in FiftyOne's format: [x, y, width, height] in fractions of the image."""
    (x1, y1, x2, y2), w, h = box["box"], row["w"], row["h"]
    return fiftyone.Detection(label=box["desc"], bounding_box=[x1 / w, y1 / h, (x2 - x1) / w, (y2 - y1) / h], **about)


def field_names(labels: Sequence[str]) -> list[str]:
    """Distinct names of fields that FiftyOne accepts, from the labels of runs."""
    found: list[str] = []
    for label in labels:
        name = re.sub(r"\W+", "_", label, flags=re.ASCII).strip("_")
        name = name if name[:1].isalpha() and name not in RESERVED else f"run_{name}".rstrip("_")
        found.append(name if name not in found else f"{name}_{len(found) + 1}")
    return found
