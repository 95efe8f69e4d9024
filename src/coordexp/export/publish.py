"""Export a trained checkpoint as a folder to publish: weights, a generated model card, and COCO results.

The card's `pipeline_tag` is image-text-to-text, because transformers loads the model this way. Object detection is only
a tag: the `object-detection` pipeline expects a head that returns boxes, and this model writes them as text.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from coordexp.config.paths import GT_VS_PRED, RUN_METADATA, ProfilePaths
from coordexp.config.profile import DatasetsConfig
from coordexp.config.run import RunConfig
from coordexp.errors import CheckpointError, DataError
from coordexp.evaluation.categories import normalise_desc
from coordexp.infra.artefacts import HASHES, sealing, verified
from coordexp.infra.files import write_text
from coordexp.infra.foreign import Gate
from coordexp.infra.provenance import read_run_record, weight_files, write_json
from coordexp.models.detection_config import DetectionConfig, write_detection_config
from coordexp.models.loading import ModelFormat, load_format
from coordexp.records.categories import Category, read_categories
from coordexp.records.gt_vs_pred import ImageResult, own_lines, read_results
from coordexp.records.manifest import located, open_split
from coordexp.records.prediction_log import read_rows
from coordexp.records.schema import read_records
from coordexp.reporting.markdown import number, table
from coordexp.text.prompts import question

CARD, RESULTS = "README.md", "coco_results.json"
READOUT = {"box", "score"}
PUBLISHED = Gate("JSON of a finished run", DataError, "Run the graph up to coco-eval first: dvc repro.")
_SHOWN = {
    "coco.mAP": "AP (COCO, .50:.95)",
    "coco.AP50": "AP at IoU .50",
    "coco.AP75": "AP at IoU .75",
    "coco.APs": "AP of small objects",
    "coco.APm": "AP of medium objects",
    "coco.APl": "AP of large objects",
    "f1.full_50": "F1 at IoU .50, box and name",
    "held_out.AP50": "AP50 of held-out categories",
    "set.dup_pairs_90": "duplicate pairs per image (IoU .90)",
    "parse.parse_rate": "fraction of answers that parse completely",
}


@dataclass(frozen=True, slots=True)
class Exported:
    """The written files, the numbers of results and of predictions without a category, and notes for the user."""

    files: tuple[str, ...]
    results: int
    unmapped: int
    notes: tuple[str, ...] = ()


def publish(
    run: RunConfig,
    checkpoint: str,
    out: Path,
    predictions: Path | None,
    image_info: Path | None,
    license_id: str | None = None,
    repository: str | None = None,
) -> list[str]:
    """Run `export`, or with predictions only `write_server_results`; returns lines for the user.

    With a `repository` ("user/name"), the folder is then uploaded to the Hugging Face Hub.
    """
    if (predictions is None) != (image_info is None):
        raise DataError("--predictions and --image-info belong together; pass both or neither.")
    if predictions and image_info:
        written, unmapped = write_server_results(predictions, image_info, run.paths, out)
        return [f"{out}: {written} results; {unmapped} predictions match no category"]
    done = export(run, checkpoint, out, license_id)
    said = [
        f"{out}: {', '.join(done.files)}",
        f"{RESULTS}: {done.results} results; {done.unmapped} predictions match no category",
        *(f"note: {note}" for note in done.notes),
    ]
    return [*said, f"uploaded: {push(out, repository)}"] if repository else said


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the Hub with the user's login; returns the URL of the commit.

    `HF_ENDPOINT` in the environment sets another server.

    Raises:
        DataError: the server cannot be reached or refuses the upload; the folder is not changed.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="coordexp")
    try:
        api.create_repo(repository, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
    except (HTTPError, OSError, HFValidationError, OfflineModeIsEnabled) as error:
        raise DataError(
            f"{folder} is written, but {repository} could not be uploaded: {str(error).strip().splitlines()[0]} "
            "Log in with `hf auth login`, then run `hf upload` on the folder, or export again."
        ) from error
    return str(commit.commit_url)


def export(run: RunConfig, checkpoint: str, out: Path, license_id: str | None = None) -> Exported:
    """Export a checkpoint of a run (stage1, stage1-control or stage2) to `out`, which must be new or empty.

    Its default readout becomes the readout of the run's evaluation.

    Raises:
        CheckpointError: the checkpoint does not exist, or is an adapter that was not merged.
        DataError: the folder is not empty, or the run was not evaluated.
    """
    source = run.paths.run(checkpoint)
    if not weight_files(source) or (source / "adapter_config.json").is_file():
        raise CheckpointError(f"{source}: no merged checkpoint; run the stage that writes it: dvc repro.")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: not empty; expected a new folder.")
    metrics = PUBLISHED.read_json(run.paths.metrics)
    predictions = run.paths.evaluation(checkpoint) / GT_VS_PRED
    categories = read_categories(run.paths.records / "categories.json")
    answers = list(own_lines(read_results(predictions)))
    results, unmapped = coco_results(((r.image_id, _objects(r)) for r in answers), categories)
    form = load_format(source)
    by_set, notes = _results_by_set(run, answers)
    detection = form.detection.model_copy(update=run.params.decode.model_dump(include=READOUT))
    with sealing(out):
        _copy_checkpoint(source, out, detection)
        write_json(out / RESULTS, results)
        for name, of_set in by_set.items():
            write_json(out / f"coco_results-{name}.json", of_set)
        write_text(out / CARD, _card(_facts(run, checkpoint, form, metrics, license_id)))
    return Exported(tuple(sorted(file.name for file in out.iterdir())), len(results), unmapped, tuple(notes))


def _copy_checkpoint(source: Path, out: Path, detection: DetectionConfig) -> None:
    """Copy the files instead of linking them: editing the export must not edit DVC's cache."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix != ".jsonl" and file.name != HASHES:  # without training logs
            shutil.copyfile(verified(file), out / file.name)
    write_detection_config(out, detection)


def coco_results(
    images: Iterable[tuple[int, Sequence[tuple[str, Sequence[float], float | None]]]], categories: Sequence[Category]
) -> tuple[list[dict[str, Any]], int]:
    """Results in COCO's list format for its evaluation server, and the number of predictions without a category.

    Args:
        images: image id, and description, box (xyxy pixels) and score of each prediction.
        categories: categories with the ids of the source.
    """
    ids = {normalise_desc(category.name): category.id for category in categories}
    results, unmapped = [], 0
    for image_id, predictions in images:
        for desc, (x1, y1, x2, y2), score in predictions:
            category_id = ids.get(normalise_desc(desc))
            if category_id is None:
                unmapped += 1
                continue
            box = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
            row = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": round(float(score or 0), 5)}
            results.append(row)
    return results, unmapped


def _objects(result: ImageResult) -> list[tuple[str, Sequence[float], float | None]]:
    return [(p.desc, p.bbox_xyxy_px, p.score) for p in result.pred]


def _results_by_set(
    run: RunConfig, answers: Sequence[ImageResult]
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """For a mixture of data sets: results by set with the ids of its own file, and notes on sets without results."""
    source, records = run.profile.source, run.paths.records / "val.jsonl"
    sets = source.sets if isinstance(source, DatasetsConfig) and len(source.sets) > 1 else {}
    if not sets or not records.is_file():
        return {}, [f"{records}: missing, so no results by set"] if sets else []
    own_ids = {record.image: record.metadata.get("source_image_id") for record in read_records(records)}
    found: dict[str, list[dict[str, Any]]] = {}
    notes = []
    for name, dataset in sets.items():
        rows = [(own_ids.get(r.image), _objects(r)) for r in answers if r.image.startswith(f"{name}/")]
        with_ids = [(image_id, objects) for image_id, objects in rows if image_id is not None]
        # Phrase sets have several records per image, which COCO's format cannot represent.
        if not rows or len(with_ids) < len(rows) or dataset.prompt == "phrase":
            continue
        try:
            reading = open_split(located(name, dataset), "val", polygons=False)
        except DataError as error:
            notes.append(f"no results of set {name}: {error}")
            continue
        if reading and reading.categories:
            found[name], _ = coco_results(with_ids, reading.categories)
    return found, notes


def write_server_results(predictions: Path, image_info: Path, paths: ProfilePaths, out: Path) -> tuple[int, int]:
    """Write results for an evaluation server; returns the numbers of results and of predictions without a category.

    Args:
        predictions: the log of `coordexp predict --out`, with `image` (matched by file name) and `objects`.
        image_info: COCO's image_info JSON of the split, with the image ids.
        paths: paths of the profile; its categories.json has the category ids if image_info has no categories.
        out: the JSON file to write.

    Raises:
        DataError: an image is not in image_info, the file does not have COCO's layout, or the server's category ids
            are unknown.
    """
    source = PUBLISHED.read_json(image_info)
    try:
        ids = {image["file_name"]: int(image["id"]) for image in source["images"]}
        declared = [Category(int(row["id"]), str(row["name"])) for row in source.get("categories", [])]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{image_info}: not COCO's image_info layout ({error!r}).") from error
    found = []
    for row in read_rows(predictions):
        name = Path(row["image"]).name
        if name not in ids:
            raise DataError(f"{row['image']}: no image in {image_info} has this file name.")
        found.append((ids[name], [(o["desc"], o["bbox_xyxy_px"], o["score"]) for o in row["objects"]]))
    results, unmapped = coco_results(found, declared or _ids_of_one_set(paths, image_info))
    write_json(out, results)
    return len(results), unmapped


def _ids_of_one_set(paths: ProfilePaths, image_info: Path) -> Sequence[Category]:
    """The profile's categories, if their ids come from its single data set."""
    categories = read_categories(paths.records / "categories.json")
    if [c.id for c in categories] == list(range(1, len(categories) + 1)) and len(categories) > 1:
        raise DataError(
            f"{image_info}: has no categories, and those in {paths.records / 'categories.json'} were numbered 1 to "
            f"{len(categories)} by this project. Add the server's own `categories` (id, name) to the file."
        )
    return categories


def _facts(
    run: RunConfig, checkpoint: str, form: ModelFormat, metrics: Mapping[str, Any], license_id: str | None
) -> dict[str, Any]:
    trained, base = metrics[checkpoint]["eval"], metrics["base"]["eval"]
    rows = []
    for key, words in _SHOWN.items():
        area, name = key.split(".")
        interval = trained["interval"].get(key)
        shown = number(trained[area][name]) + (f" [{number(interval[0])}, {number(interval[1])}]" if interval else "")
        rows.append([words, shown, number(base[area][name])])
    source = run.profile.source
    sets = source.sets if isinstance(source, DatasetsConfig) else {}
    return {
        "card_data": _card_data(run, checkpoint, trained, list(sets), license_id),
        "license": license_id,
        "base_model": Path(run.profile.model.path).name,  # without its location on this machine
        "profile": run.params.profile,
        "checkpoint": checkpoint,
        "codec": form.codec,
        "question": json.dumps(question(form.detection.prompt or {"kind": "open"}), ensure_ascii=False),
        "sets": [f"{name} ({config.format})" for name, config in sets.items()] or ["composed scenes of emoji sprites"],
        "tuning": run.profile.tuning.model_dump(),
        "pixels": form.pixels,
        "n_images": trained["coco"]["n_images"],
        "n_objects": trained["coco"]["n_gt"],
        "decode": run.params.decode.model_dump(),
        "truncated_rate": number(trained["parse"]["truncated_rate"]),
        "metrics": table(["metric on val", f"{checkpoint} (95 % interval)", "base model"], rows),
        "metadata": PUBLISHED.read_json(run.paths.run(checkpoint) / RUN_METADATA),
        "git": read_run_record(run.paths.run_record(checkpoint)).get("git", {"commit": None, "dirty": None}),
    }


def _card_data(
    run: RunConfig, checkpoint: str, trained: Mapping[str, Any], sets: Sequence[str], license_id: str | None
) -> str:
    """The metadata block of the card that the Hub reads, with the metrics as its model index."""
    from huggingface_hub import EvalResult, ModelCardData

    name, data = f"{run.params.profile} {checkpoint}", ", ".join(sets) or "composed scenes"
    values = [(words, trained[key.split(".")[0]][key.split(".")[1]]) for key, words in _SHOWN.items()]
    results = [
        EvalResult(
            task_type="object-detection", dataset_type="coco-layout", dataset_name=data, dataset_split="val",
            metric_type=words, metric_value=value,
        )
        for words, value in values
        if value is not None
    ]  # fmt: skip
    return ModelCardData(
        library_name="transformers", pipeline_tag="image-text-to-text", license=license_id,
        tags=["object-detection", "qwen3_vl", "coordexp"], model_name=name, eval_results=results or None,
        base_model=Path(run.profile.model.path).name, datasets=list(sets) or None,
    ).to_yaml()  # fmt: skip


def _card(facts: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("coordexp.reporting"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("model_card.md.jinja").render(facts)
