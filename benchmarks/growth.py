"""How CPU time grows with the data: each stage's work on n, 2 n and 4 n, and the exponent between n and 4 n.

    PYTHONPATH=src python -m benchmarks.growth [--only convert,page]

With an exponent of 1, time doubles with the data; with 2, it quadruples. The sizes alternate, so that a ratio compares
equal conditions of the machine; time is processor time, including threads and child processes. Objects that are made
once, such as a tokenizer, are made before the clock starts. A second exponent removes the constant part: time = a + b
n^k gives 2^k = (t(4 n) - t(2 n)) / (t(2 n) - t(n)), which is noisier. Images are omitted: each is drawn or read alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from math import ceil, log
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import numpy as np
from benchmarks.coco_like import names, scenes
from benchmarks.convert_coco import PROFILE, make_source, sample_preparer
from benchmarks.harness import Figure, Row, measured, side_by_side, timed
from benchmarks.packing_plan import PACK_TOKENS, coco_lengths
from pipelines import convert
from tests.reporting.synthetic import build_run, synthetic_inputs

from benchmarks import coco_like, harness
from coordexp.config.paths import CHECKPOINTS, GT_VS_PRED, ProfilePaths
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.protocol import STANDARD, STANDARD_MATCHING, STANDARD_SEED
from coordexp.evaluation.suite import evaluate_run
from coordexp.matching.matcher import match_images
from coordexp.packing.planner import plan_packs
from coordexp.packing.prepare import have_areas, write_split
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult, read_results, write_results
from coordexp.records.schema import Record, read_records, write_records
from coordexp.reporting.page import page_data, render_page
from coordexp.reporting.report import Content
from coordexp.stage import stage_main

LIMIT = 1.2
FEW_RESAMPLES = {"bootstrap_resamples": 100}  # their time grows with the images, too, but starts high
LEAST_SECONDS = 0.1  # of a measurement: what is shorter is run as often as it takes
PAIRS = "every prediction of a picture is compared with every object of it"
CATEGORIES = [Category(number, name, "train") for number, name in enumerate(names(), 1)]
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Work:
    """What is run on `n`, twice and four times as many; `make` prepares one size in a folder. `why` a higher limit."""

    name: str
    n: int
    of: str
    make: Callable[[Path, int], Run]
    limit: float = LIMIT
    why: str = ""


def converting(folder: Path, n: int) -> Run:
    """The stage `convert` on n annotated images."""
    make_source(folder, {"train": n, "val": n // 10})
    arguments = ["--profile", PROFILE, "--params", str(folder / "params.yaml"), "--out", str(folder)]

    def run() -> None:
        assert stage_main(convert.run, arguments) == 0

    return run


def tokenising(folder: Path, n: int) -> Run:
    """What the stage `norm1000` does with n records."""
    converting(folder, n)()
    path, preparer = ProfilePaths(PROFILE, folder).records / "train.jsonl", sample_preparer(folder)
    out, areas = folder / "train.parquet", have_areas(read_records(path))
    return lambda: write_split(preparer, read_records(path), repeat("detect"), out, areas)


def planning(_: Path, n: int) -> Run:
    """The plan of n samples."""
    lengths = coco_lengths(n)
    return lambda: plan_packs(lengths, PACK_TOKENS, seed=17)


def matching(n_images: int, objects: int | None) -> Run:
    """Predictions near the objects of so many images."""
    made, rng = scenes(n_images, objects=objects), np.random.default_rng(5)
    truth = np.split(made.boxes_G4 / 640, np.cumsum(made.counts_I)[:-1])
    found = [np.clip(boxes + rng.normal(0, 0.01, boxes.shape), 0, 1) for boxes in truth]
    found = [np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4) for boxes in found]
    return lambda: match_images(found, truth, STANDARD_MATCHING)


def evaluating(folder: Path, n_images: int, per_image: int) -> Run:
    """All metrics and intervals of so many images with so many objects and predictions each."""
    results, params = answers(folder, n_images, per_image, per_image), STANDARD.model_copy(update=FEW_RESAMPLES)
    return lambda: evaluate(results, CATEGORIES, params, STANDARD_MATCHING, STANDARD_SEED)


def answers(folder: Path, n_images: int, predictions: int, objects: int | None = None) -> list[ImageResult]:
    """Judged images in memory."""
    path = folder / GT_VS_PRED
    coco_like.write_results(path, n_images, predictions, objects=objects)
    return list(read_results(path))


def reporting(folder: Path, n: int) -> Run:
    """The pages of a report of n images, a few over and over; it draws as many figures and pictures of any number."""
    template = folder.with_name("template")
    if not template.exists():
        build_run(template, images=10)
    copytree(template, folder, dirs_exist_ok=True)
    inputs = synthetic_inputs(folder)
    asked = inputs.run.paths.records / "val.jsonl"
    records = list(read_records(asked))
    write_records(asked, [numbered(records[i % len(records)], i + 1) for i in range(n)])
    for checkpoint in CHECKPOINTS:
        path = inputs.evaluations / checkpoint / GT_VS_PRED
        few = list(read_results(path))
        write_results(path, [replace(few[i % len(few)], image_id=i + 1) for i in range(n)])
    evaluate_run(inputs.run.params, inputs.run.paths)
    return lambda: Content.of(inputs).texts()


def numbered(record: Record, image_id: int) -> Record:
    """The same picture as another one."""
    return replace(record, metadata={**record.metadata, "image_id": image_id})


def browsing(folder: Path, n: int) -> Run:
    """The page of n images without their pictures."""
    results = {"run": answers(folder, n, 8)}
    return lambda: render_page(page_data(results, CATEGORIES, STANDARD, limit=n))


WORKS = (
    Work("convert", 2_000, "images", converting),
    Work("norm1000", 1_000, "records", tokenising),
    Work("pack", 30_000, "samples", planning),
    Work("match, images", 2_000, "images of COCO", lambda _, n: matching(n, None)),
    Work("match, few objects", 30, "objects in each of 40 images", lambda _, n: matching(40, n), 2.0, PAIRS),
    Work("match, many objects", 150, "objects of an image", lambda _, n: matching(1, n), 2.0, PAIRS),
    Work("evaluate, images of 100 objects", 25, "images", lambda folder, n: evaluating(folder, n, 100)),
    Work("evaluate, images of 300 objects", 10, "images", lambda folder, n: evaluating(folder, n, 300)),
    Work("evaluate, objects", 75, "objects in each of 10 images", lambda folder, n: evaluating(folder, 10, n)),
    Work("report", 1_000, "images", reporting),
    Work("page", 500, "images", browsing),
)


def grown(work: Work, scale: float, rounds: int) -> Row:
    """The exponent of one work."""
    sizes = [max(2, round(work.n * scale)) * factor for factor in (1, 2, 4)]
    with TemporaryDirectory() as name:
        folders = [Path(name) / str(size) for size in sizes]
        for folder in folders:
            folder.mkdir()
        runs = [work.make(folder, size) for folder, size in zip(folders, sizes, strict=True)]
        times = 1
        if rounds > 1:  # else the times mean nothing
            runs[0]()  # imports, caches
            times = ceil(LEAST_SECONDS / max(timed(runs[0])[1], 1e-6))
        each = zip(sizes, runs, strict=True)
        repeated = {str(size): lambda run=run: [run() for _ in range(times)] for size, run in each}
        found = side_by_side(repeated, rounds, warm_up=False)
    seconds = [found.of(str(size)).by_cpu.map(lambda s: s / times) for size in sizes]
    small, large = seconds[0].rounds, seconds[2].rounds
    grows = Figure([log(c / a) / log(4) for a, c in zip(small, large, strict=True)])
    return measured(f"growth: {work.name}", grows, "", told(work, sizes, seconds), at_most=work.limit)


def told(work: Work, sizes: Sequence[int], seconds: Sequence[Figure]) -> str:
    """The times behind an exponent, the exponent of what is not constant, and why it may be higher."""
    small, middle, large = (figure.value for figure in seconds)
    rises = [middle - small, large - middle]
    apart = f"; {log(rises[1] / rises[0]) / log(2):.2f} of what grows" if min(rises) > 0 else ""
    why = f"; {work.why}" if work.why else ""
    shown = ", ".join(f"{figure.value:.3g}" for figure in seconds)
    return f"{shown} CPU s of {', '.join(f'{n:,}' for n in sizes)} {work.of}{apart}{why}"


def measure(arguments: argparse.Namespace) -> list[Row]:
    """An exponent for each work."""
    only = arguments.only.split(",") if arguments.only else []
    chosen = [work for work in WORKS if not only or any(work.name.startswith(name) for name in only)]
    scale, rounds = (0.02, 1) if arguments.quick else (arguments.scale, 3)
    return [grown(work, scale, rounds) for work in chosen]


def options(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how large it is."""
    parser.add_argument("--only", help=f"beginnings of names, by commas: {', '.join(work.name for work in WORKS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes")


if __name__ == "__main__":
    harness.script("growth", __doc__, measure, options)
