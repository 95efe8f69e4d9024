"""From an annotation file as large as COCO's train2017 to tokenized samples, compared with loading it by pycocotools.

    PYTHONPATH=src python -m benchmarks.convert_coco [--images 118287]

Runs the stage `convert`, then the part of `norm1000` that processes records, with the real Qwen tokenizer and the image
sizes of the production profile, each in its own process. There are no images: the checks of the raw stage (size, hash,
decoding) are replaced by the annotated size, and the expansion of the model in norm1000 is skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import cache
from itertools import repeat
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from unittest.mock import patch

from benchmarks.coco_like import TRAIN_IMAGES, VAL_IMAGES, scenes, write_instances
from benchmarks.harness import ChildRun, Figure, Row, measured, run_child
from ruamel.yaml import YAML
from tests.qwen import qwen3_tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks import harness
from coordexp.config.loading import load_profile, profile_tree
from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import DatasetsConfig
from coordexp.geometry.bins import COORD_TOKENS
from coordexp.packing.pixels import PixelSpec
from coordexp.packing.prepare import SamplePreparer, have_areas, write_split
from coordexp.records.images import ImageFacts
from coordexp.records.manifest import write_manifest
from coordexp.records.schema import read_records
from coordexp.text.codecs import get_codec

PROFILE = "coco-qwen3vl-4b"
SECONDS, MEMORY_GIB = 60.0, 4.0
SPLITS = {"train": (17, "instances_train2017.json"), "val": (18, "instances_val2017.json")}  # seed and file


def make_source(folder: Path, n_images: dict[str, int]) -> int:
    """A folder with the production profile's data set, parameters and manifest; returns the boxes of train."""
    (folder / "configs").mkdir()
    (folder / "coco" / "annotations").mkdir(parents=True)
    copyfile("params.yaml", folder / "params.yaml")
    profile = profile_tree(Path(f"configs/{PROFILE}.yaml"))
    profile["source"]["sets"]["coco"]["root"] = str(folder / "coco")
    profile["records"]["dev_images"] = min(profile["records"]["dev_images"], n_images["train"] // 4)
    with (folder / "configs" / f"{PROFILE}.yaml").open("w") as out:
        YAML(typ="safe").dump(profile, out)
    boxes, sizes = {}, {}
    for split, (seed, name) in SPLITS.items():
        boxes[split] = write_instances(folder / "coco" / "annotations" / name, n_images[split], seed)
        sizes |= {f"{split}2017/{i:012d}.jpg": wh for i, wh in enumerate(scenes(n_images[split], seed).sizes_wh_I2, 1)}

    def annotated(_root: Path, names: Iterable[str], **_options: object) -> dict[str, ImageFacts]:
        return {n: ImageFacts(n, 1, n, int(sizes[n][0]), int(sizes[n][1]), "RGB") for n in sorted(names)}

    source = load_profile(folder / "configs" / f"{PROFILE}.yaml").source
    assert isinstance(source, DatasetsConfig)
    with patch("coordexp.records.manifest.inspect_all", lambda root, names, *_: annotated(root, names)):
        write_manifest(ProfilePaths(PROFILE, folder).raw, source.sets, decode=False, workers=1)
    return boxes["train"]


def sample_preparer(folder: Path) -> SamplePreparer:
    """What makes samples of records, as norm1000 has it for a real model."""
    profile = load_profile(folder / "configs" / f"{PROFILE}.yaml")
    pixels = PixelSpec(16, 2, 2, profile.model.min_pixels, profile.model.max_pixels)
    return SamplePreparer(_tokenizer(), get_codec("json"), pixels)


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = qwen3_tokenizer()
    tokenizer.add_tokens(list(COORD_TOKENS), special_tokens=True)
    return tokenizer


def tokenise(folder: Path) -> None:
    """What norm1000 does with the records; runs in a process of its own."""
    preparer, paths = sample_preparer(folder), ProfilePaths(PROFILE, folder)
    for split in ("train", "dev", "val"):
        path, out = paths.records / f"{split}.jsonl", paths.norm1000 / f"{split}.parquet"
        with_areas = have_areas(read_records(path))
        print(split, write_split(preparer, read_records(path), repeat("detect"), out, with_areas))


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Seconds and peak memory of both stages, and of pycocotools."""
    if arguments.tokenise:
        tokenise(arguments.tokenise)
        raise SystemExit(0)
    n_images = {"train": 400, "val": 40} if arguments.quick else {"train": arguments.images, "val": VAL_IMAGES}
    with TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        n_boxes = make_source(folder, n_images)
        annotations = folder / "coco" / "annotations" / SPLITS["train"][1]
        loading = run_child([sys.executable, "-c", f"from pycocotools.coco import COCO; COCO({str(annotations)!r})"])
        stage = ["--profile", PROFILE, "--params", str(folder / "params.yaml"), "--out", name]
        convert = run_child([sys.executable, "-m", "pipelines.convert", *stage])
        norm1000 = run_child([sys.executable, "-m", "benchmarks.convert_coco", "--tokenise", name])
    return table_rows(f"{n_images['train']:,} images, {n_boxes:,} boxes", loading, convert, norm1000)


def table_rows(what: str, loading: ChildRun, convert: ChildRun, norm1000: ChildRun) -> list[Row]:
    """The three processes as figures."""
    seconds = Figure([convert.seconds + norm1000.seconds], [convert.cpu_seconds + norm1000.cpu_seconds])
    beside_loading = Figure([seconds.value / loading.seconds], [seconds.by_cpu.value / loading.cpu_seconds])
    peak = max(convert.peak_gib, norm1000.peak_gib)
    parts = f"convert {convert.seconds:.1f} s, norm1000 {norm1000.seconds:.1f} s; {what}; no pictures read"
    beside = f"pycocotools: {loading.seconds:.1f} s to load train, {loading.peak_gib:.1f} GiB"
    return [
        measured("convert + norm1000: time", seconds, "s", f"once; {parts}", at_most=SECONDS),
        measured("convert + norm1000: peak memory", peak, "GiB", beside, at_most=MEMORY_GIB),
        measured("convert + norm1000: beside loading", beside_loading, "x", beside),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """How many images, and where to put half a gigabyte."""
    parser.add_argument("--images", type=int, default=TRAIN_IMAGES)
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--tokenise", type=Path, help=argparse.SUPPRESS)  # the child process


if __name__ == "__main__":
    harness.script("convert_coco", __doc__, measure, options)
