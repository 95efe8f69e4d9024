"""A run folder as the stages leave it: composed scenes, predictions of known quality, logs of a plausible shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coordexp.config.loading import load_params, load_profile
from coordexp.config.paths import CHECKPOINTS, ProfilePaths
from coordexp.config.profile import ScenesConfig
from coordexp.config.run import RunConfig
from coordexp.evaluation.suite import evaluate_run
from coordexp.geometry.bins import NUM_BINS, encode_boxes
from coordexp.infra.artefacts import write_sealed
from coordexp.losses.coord_terms import COORD_METRICS, SHAPE_METRICS
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction, read_results, write_results
from coordexp.records.mixing import SetNames, probes
from coordexp.records.schema import ObjectRecord, Record, write_records
from coordexp.reporting.inputs import ReportInputs
from coordexp.reporting.report import PAGE, Content
from coordexp.reporting.training import target_entropy_nats
from coordexp.rollout.scoring import Decoded, write_decoded
from coordexp.training.dev_answers import count_answers, judge_answer
from toyworld.composer import compose_scene
from toyworld.sprites import SpriteCatalog, load_catalog

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Quality:
    """How a checkpoint errs: spread of a corner in shares of the box side, and rates per object."""

    spread: float
    missed: float
    repeated: float
    misnamed: float
    invented: float


QUALITIES = {
    "base": Quality(spread=0.16, missed=0.35, repeated=0.06, misnamed=0.25, invented=0.15),
    "stage1": Quality(spread=0.08, missed=0.22, repeated=0.10, misnamed=0.14, invented=0.08),
    "stage1-control": Quality(spread=0.075, missed=0.21, repeated=0.09, misnamed=0.13, invented=0.08),
    "stage2": Quality(spread=0.06, missed=0.16, repeated=0.05, misnamed=0.11, invented=0.05),
}


def changed(block: Any, **values: Any) -> Any:
    """A frozen block with some values changed; `eval__bootstrap_resamples` is the one of the block `eval`."""
    for key, value in values.items():
        name, _, inner = key.partition("__")
        value = changed(getattr(block, name), **{inner: value}) if inner else value
        block = block.model_copy(update={name: value})
    return block


def run_config(root: Path, resamples: int, gallery_images: int) -> RunConfig:
    """The repository's default profile under `root`, with a cheaper bootstrap."""
    params = changed(load_params(REPOSITORY / "params.yaml"), eval__bootstrap_resamples=resamples)
    profile = changed(load_profile(REPOSITORY / "configs" / "tiny.yaml"), report__gallery_images=gallery_images)
    return RunConfig(params=params, profile=profile, paths=ProfilePaths("tiny", root))


def synthetic_inputs(root: Path, resamples: int = 100, gallery_images: int = 8) -> ReportInputs:
    """What `build_run` writes, where it is."""
    return ReportInputs.of(run_config(root, resamples, gallery_images))


def build_run(
    root: Path,
    images: int,
    resamples: int = 100,
    gallery_images: int = 8,
    steps: int = 60,
    change: Callable[[Record], Record] = lambda record: record,
    answered: Callable[[str, list[ImageResult]], list[ImageResult]] = lambda _checkpoint, results: results,
) -> ReportInputs:
    """Write every file a report reads under `root` and say where they are.

    `change` is applied to every record of val, `answered` to the answers of each checkpoint.
    """
    inputs = synthetic_inputs(root, resamples, gallery_images)
    paths = inputs.run.paths
    catalog = load_catalog(REPOSITORY / "data" / "sprites")
    source = composed_source()
    own = [change(_record(paths.raw, source, catalog, index)) for index in range(images)]
    names = SetNames.of((i.name for i in catalog.labels), (i.name for i in catalog.tiers["train"]))
    config = inputs.run.profile.records
    asked = [_only_asked(probe) for record in own for probe in probes(record, names, config, seed=5)]
    records = [
        replace(record, metadata={**record.metadata, "image_id": n}) for n, record in enumerate([*own, *asked], 1)
    ]
    categories = [Category(number, label.name, label.tier) for number, label in enumerate(catalog.labels, 1)]
    write_json(inputs.categories, [{"id": c.id, "name": c.name, "split": c.split} for c in categories])
    write_records(paths.records / "val.jsonl", records)
    for n, name in enumerate(CHECKPOINTS):
        results = answered(name, _predict(records, catalog, name, 10 + n))
        paths.evaluation(name).mkdir(parents=True)
        write_results(paths.evaluation(name) / "gt_vs_pred.jsonl", results)
        write_json(paths.evaluation(name) / "decode.json", {"codec": "json", "images": images, "tokens": 9})
        if name == CHECKPOINTS[-1]:
            write_decoded(paths.decoded(name), [_decoded(result) for result in results], {"codec": "json"})
    evaluate_run(inputs.run.params, paths)
    _write_small_files(inputs)
    _write_logs(inputs, steps, has_objects=any(_objects(record) for record in records))
    return inputs


def composed_source() -> ScenesConfig:
    """The scenes of the default profile."""
    source = load_profile(REPOSITORY / "configs" / "tiny.yaml").source
    assert isinstance(source, ScenesConfig)
    return source


def _record(raw: Path, source: ScenesConfig, catalog: SpriteCatalog, index: int) -> Record:
    scene = compose_scene(source, catalog, 5, "val", index)
    name = f"images/val/{index:06d}.jpg"
    (raw / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.pixels).save(raw / name, quality=92)
    height, width = scene.pixels.shape[:2]
    objects = tuple(ObjectRecord(o.desc, tuple(float(v) for v in o.bbox_xyxy_px)) for o in scene.objects)
    return Record(name, width, height, objects, metadata={"image_id": index + 1})


def _only_asked(record: Record) -> Record:
    names = record.metadata["prompt"]["names"]
    return replace(record, objects=tuple(o for o in record.objects if o.desc in names))


def _predict(records: list[Record], catalog: SpriteCatalog, checkpoint: str, seed: int) -> list[ImageResult]:
    quality = QUALITIES[checkpoint]
    return [
        _answer(n, record, catalog, quality, np.random.default_rng([seed, n]), checkpoint)
        for n, record in enumerate(records, 1)
    ]


def _answer(
    image_id: int, record: Record, catalog: SpriteCatalog, quality: Quality, rng: np.random.Generator, checkpoint: str
) -> ImageResult:
    found: list[tuple[str, np.ndarray, float]] = []
    seen = [label.name for label in catalog.tiers["train"]]
    for obj in record.objects or (ObjectRecord(seen[0], (8.0, 8.0, 40.0, 40.0)),):
        if rng.random() < quality.missed:
            continue
        box = np.array(obj.bbox_xyxy_px)
        side = np.tile(box[2:] - box[:2], 2)
        for _ in range(1 + (rng.random() < quality.repeated) * int(rng.integers(1, 4))):
            noise = rng.normal(0, quality.spread, 4)
            name = seen[rng.integers(len(seen))] if rng.random() < quality.misnamed else obj.desc
            found.append(
                (name, box + noise * side * (0.2 if found and found[-1][0] == name else 1), -np.abs(noise).mean() * 8)
            )
        if rng.random() < quality.invented:
            corner = rng.uniform(0, 0.6, 2) * (record.width, record.height)
            extra = np.concatenate([corner, corner + rng.uniform(12, 50, 2)])
            found.append((seen[rng.integers(len(seen))], extra, -2.5))
    pred = tuple(
        _prediction(name, box, float(np.exp(score + rng.normal(0, 0.25) - 0.2)), record) for name, box, score in found
    )
    broken = rng.random() < 0.02
    return ImageResult(
        image_id=image_id,
        image=record.image,
        width=record.width,
        height=record.height,
        gt=tuple(GroundTruth(o.desc, o.bbox_xyxy_px, bool(o.metadata.get("iscrowd"))) for o in record.objects),
        pred=pred,
        raw_text=_text(pred),
        parse=ParseReport(True, len(pred), {"bbox_invalid": 1} if broken else {}),
        finish_reason="stop",
        n_generated_tokens=20 * len(pred),
        identity={"model": checkpoint, "prompt": "digits" if checkpoint == "base" else "coord", "decode": "greedy"},
        probe=(probe := record.metadata.get("probe", "")),
        asked=tuple(record.metadata["prompt"]["names"]) if probe else (),
    )


def _text(pred: tuple[Prediction, ...]) -> str:
    def box(p: Prediction) -> list[str]:
        return [f"<|coord_{k}|>" for k in p.bins or ()]

    return json.dumps({"objects": [{"desc": p.desc, "bbox_2d": box(p)} for p in pred]}) + "<|im_end|>"


def _objects(record: Record) -> list[ObjectRecord]:
    return [o for o in record.objects if not o.metadata.get("iscrowd")]


def _prediction(name: str, box: np.ndarray, score: float, record: Record) -> Prediction:
    low, high = np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:])
    limit = np.array([record.width, record.height])
    inside = np.concatenate([np.clip(low, 0, limit - 1), np.clip(high, 1, limit)])
    bins = encode_boxes(inside, record.width, record.height).tolist()
    box = tuple(inside.tolist())
    spread = tuple(float(3 + (7 * k) % 40) for k in bins)
    return Prediction(
        name,
        box,
        tuple(bins),
        score=round(min(score, 1.0), 6),
        coord_sd_bins=spread,
        boxes_xyxy_px={"argmax": box, "expectation": box, "median": box},
    )


def _decoded(result: ImageResult) -> Decoded:
    """An answer with a normal distribution over the bins at each coordinate, of the mean and spread on file."""
    bins = np.array([p.bins for p in result.pred], np.float64).reshape(-1, 4, 1)
    spread = np.array([p.coord_sd_bins for p in result.pred], np.float64).reshape(-1, 4, 1)
    weights = np.exp(-0.5 * ((np.arange(NUM_BINS) - bins) / spread) ** 2)
    return Decoded(result, (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float16))


def _write_small_files(inputs: ReportInputs) -> None:
    write_sealed(
        inputs.rollout_summary,
        {
            "images": 1200,
            **{"precision": 0.7912, "recall": 0.7561, "f1": 0.7733, "matched_iou_mean": 0.8124},
            **{"parse_rate": 0.9942, "unusable": 1, "dropped": {"bbox_invalid": 9}},
        },
    )
    write_json(inputs.packing_stats, {"packs": 812, "samples": 4000, "tokens": 301223, "fill": 0.9662})
    write_json(inputs.drops, {"train": {"empty_box": 2}, "val": {}})
    for number, stage in enumerate(("stage1", "stage1-control", "stage2")):
        write_json(
            inputs.runs / stage / "run_metadata.json",
            {
                "stage": stage,
                "settings": {"seed": 17, "objective": {"softce_weight": 1.0}},
                "inputs": {"train.parquet": "00feed0000000001", "plan.parquet": "00beef0000000002"},
                "steps": 300 if stage == "stage1" else 150,
                "samples": 9600,
                "tokens": 1_000_000 + 1000 * number,
                "final_loss": 2.7183,
            },
        )
        write_record(inputs, stage, commit="0123456789abcdef", machine="x86_64", finished=f"2026-01-02T03:0{number}:00")


def everything_to_say(inputs: ReportInputs) -> str:
    """What `everything_said` would find in the report of these inputs, without drawing it."""
    texts = Content.of(inputs).texts()
    return "\n".join([texts.pop(PAGE), *texts.values()])


def everything_said(report: Path) -> str:
    """Page one and the pages of details."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (report, *sorted(report.parent.glob("details/*.md"))))


def write_record(inputs: ReportInputs, stage: str, commit: str, machine: str, finished: str) -> None:
    """The run record of a stage: what never repeats."""
    record = {
        "stage": stage,
        **{"wall_seconds": 210.5, "cpu_seconds": 400.1, "step_seconds": 200.1, "monitor_seconds": 4.4},
        "git": {"commit": commit, "dirty": False},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "hardware": {"machine": machine, "cpus": 2},
        "finished": finished,
    }
    write_json(inputs.run.paths.run_record(stage), record)


def _write_logs(inputs: ReportInputs, steps: int, *, has_objects: bool) -> None:
    rng = np.random.default_rng(3)
    tree = inputs.run.params.model_dump()
    floor = target_entropy_nats(tree["target"], tree["sigma"], tree["truncate"])
    write_rows(
        inputs.runs / "stage1" / "train_log.jsonl",
        [_row(rng, s, steps, floor, tree["stage1"], 5.0) for s in range(steps)],
    )
    control = [_row(rng, s, steps // 2, floor, tree["stage1"], 0.6) for s in range(steps // 2)]
    write_rows(inputs.runs / "stage1-control" / "train_log.jsonl", control)
    rows = []
    for step in range(steps // 2):
        channel = "B" if (step + 1) * 0.5 // 1 > step * 0.5 // 1 else "A"
        row = {"channel": channel, **_row(rng, step, steps // 2, floor, tree, 0.6 if channel == "A" else 0.9)}
        boxes = {"bbox_smoothl1": 0.05, "bbox_ciou": 0.3}
        for term, start in boxes.items():
            row[f"raw/{term}"] = start * (0.4 + 0.6 * np.exp(-step / steps * 6)) * rng.uniform(0.8, 1.2)
            row[f"loss/{term}"] = tree[f"{term}_weight"] * row[f"raw/{term}"]
        if channel == "B":
            row |= {"stage2_ab/matched_total": 90, "stage2_ab/fn_appended_total": 31, "stage2_ab/fallback_total": 0}
        row["loss/total"] += sum(row[f"loss/{term}"] for term in boxes)
        rows.append(row)
    write_rows(inputs.runs / "stage2" / "train_log.jsonl", rows if has_objects else [_without_slots(r) for r in rows])
    for stage, length in (("stage1", steps), ("stage1-control", steps // 2), ("stage2", steps // 2)):
        evaluations = [_evaluation(rng, n * length // 4) for n in range(1, 5)]
        if not has_objects:
            answers = read_results(inputs.evaluations / stage / "gt_vs_pred.jsonl")
            counts = count_answers([judge_answer(answer) for answer in answers])
            evaluations = [evaluations[0] | counts]
        write_rows(inputs.runs / stage / "monitor.jsonl", evaluations)
        errors = {"stage1": 20.0, "stage1-control": 18.0, "stage2": 19.0}
        n_objects = 3 if has_objects else 0
        readings = [
            context_rows(rng, row["step"], errors[stage] + 10 * (n == 0), n_objects)
            for n, row in enumerate(evaluations)
        ]
        write_rows(inputs.runs / stage / "context_errors.jsonl", [row for rows in readings for row in rows])


def _without_slots(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a step whose samples hold no object: the terms of coordinate slots are 0, and nothing is diagnosed."""
    kept = {k: v for k, v in row.items() if not k.startswith("coord_diag/")}
    zeros = {k: 0.0 for k in kept if k.startswith(("loss/", "raw/")) and not k.endswith(("/text_ce", "/total"))}
    return kept | zeros | {"loss/total": row["loss/text_ce"], "coord_diag/coord_tokens": 0.0}


def _evaluation(rng: np.random.Generator, step: int) -> dict[str, Any]:
    objects, predictions = 44, int(rng.integers(30, 60))
    right = int(rng.integers(5, 30))
    return {
        **{"step": step, "images": 16, "objects": objects, "predictions": predictions, "right": right},
        **{"false": predictions - right, "missed": objects - right},
        **{"precision": right / predictions, "recall": right / objects, "f1": 2 * right / (predictions + objects)},
        **{
            "f1_boxes": 0.8,
            "dup_pairs_90": int(rng.integers(0, 3)),
            "parse_rate": 0.9375,
            "truncated": 1,
        },
    }


def context_rows(rng: np.random.Generator, step: int, bins: float, objects: int) -> list[dict[str, Any]]:
    """What the eval callback reads of 16 images: some objects each, the first of which the own answer lacks."""
    rows: list[dict[str, Any]] = []
    for image_id in range(1, 17):
        first = (bins + rng.normal(0, 1, objects)).round(3).tolist()
        own = [round(error + 2 + rng.normal(0, 1), 3) if n else None for n, error in enumerate(first)]
        rows.append({"step": step, "image_id": image_id, "text_ce": 9.0 + rng.normal(0, 0.5), "text_tokens": 30})
        shapes = dict.fromkeys(COORD_METRICS, 0.5) | dict.fromkeys(SHAPE_METRICS, 0.25)
        rows[-1] |= {"A1": first, "coord_diag": {"A1": shapes if objects else {}}, "own": own}
    return rows


def _row(rng: np.random.Generator, step: int, steps: int, floor: float, weights: Any, start: float) -> dict[str, Any]:
    left = np.exp(-5 * step / steps) * rng.uniform(0.85, 1.15)
    kl = 0.25 + 0.7 * start * left
    raw = {
        "text_ce": 0.35 + 0.5 * start * left,
        "softce": floor + kl,
        "w1": 0.004 + 0.03 * start * left,
        "gate": 0.0005 + 1.4 * start * left**4,
    }
    row: dict[str, Any] = {"step": step, "lr": 0.003 * (1 - step / steps), "grad_norm": 1.0 + left, "time/step_s": 0.7}
    row |= {"tokens": 7000, "samples": 64}
    row |= {f"loss/{term}": value * weights.get(f"{term}_weight", 1.0) for term, value in raw.items()}
    row["loss/total"] = sum(v for k, v in row.items() if k.startswith("loss/"))
    row["loss/coord_reg"] = row["loss/total"] - row["loss/text_ce"]
    row |= {f"raw/{term}": value for term, value in raw.items()}
    diagnostics = {
        "p_gt_mean": 0.13 - 0.02 * start * left,
        "acc_top5": 0.8 - 0.1 * start * left,
        "expected_bin_mae": 6 + 28 * start * left,
        "coord_vocab_mass_mean": 1 - 0.0005 - 0.1 * start * left**4,
        "margin_mean": -0.1 - 0.1 * start * left,
        "w1_to_delta": 0.005 + 0.03 * start * left,
        "softce_kl": kl,
    }
    return row | {f"coord_diag/{name}": value for name, value in diagnostics.items()}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a training log with the six digits that the loop keeps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded_rows = [{k: round(float(v), 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rounded_rows), encoding="utf-8")
