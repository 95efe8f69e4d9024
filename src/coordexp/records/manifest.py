"""The manifest of data sets on disk: the facts of every image file, collected once, so that images are never copied.

    data/<profile>/raw/manifest.json   the sets: format, root, annotation files with their hashes, hash of the list of
                                       shards (empty: the images are files), counts, problems; and the hash of the
                                       other file. A root below this folder is relative to it.
    data/<profile>/raw/images.parquet  one row per image: name, bytes, sha256, size, mode, orientation, problem

Records refer to an image as `<set>/<path below the set's root>`; `record_source` finds its bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coordexp.config.profile import AUTO_SPLIT, NO_SPLIT, DatasetConfig
from coordexp.errors import DataError
from coordexp.infra.artefacts import verified
from coordexp.infra.files import replacing, repository_root
from coordexp.infra.provenance import file_hash, write_json
from coordexp.records.images import MANIFEST, ImageFacts, image_roots, inspect_image, manifest_of, unsafe_name
from coordexp.records.shards import shards_hash
from coordexp.records.sources import (
    coco,
    conversations,
    cvat,
    hub,
    jsonl,
    labelme,
    lvis,
    refcoco,
    tables,
    visual_genome,
    voc,
    yolo,
)
from coordexp.records.sources.base import Parsed, Reader, Reading, SourceImage, SplitFiles
from coordexp.records.sources.files import GLOB, annotation_files, is_readable

READERS: dict[str, Reader] = {
    "coco": coco.read,
    "lvis": lvis.read,
    "objects365": coco.read_objects365,
    "open_images": tables.read_open_images,
    "refcoco": refcoco.read,
    "visual_genome": visual_genome.read,
    "yolo": yolo.read,
    "voc": voc.read,
    "labelme": labelme.read,
    "cvat": cvat.read,
    "csv": tables.read,
    "hub": hub.read,
    "conversations": conversations.read,
    "jsonl": jsonl.read,
}
# Formats whose annotations are in more files than the one that the key of a split names.
READ_FROM: dict[str, Callable[[SplitFiles], list[Path]]] = {
    "open_images": tables.open_images_read_from,
    "refcoco": refcoco.read_from,
    "visual_genome": visual_genome.read_from,
    "yolo": yolo.read_from,
    "voc": voc.read_from,
}
IMAGES = "images.parquet"
ANNOTATION_SUFFIXES = (".json", ".xml", ".parquet")  # files matched by a folder or glob pattern of annotations
SPLITS = ("train", "val")

Facts = dict[str, dict[str, ImageFacts]]  # set -> file name -> facts
Watch = Callable[[Iterable[ImageFacts], int], Iterable[ImageFacts]]


def write_manifest(folder: Path, sets: Mapping[str, DatasetConfig], decode: bool, workers: int) -> dict[str, Any]:
    """Inspect every annotated image, write both files, and return the content of manifest.json.

    Raises:
        DataError: a root or an annotation file is missing, or does not have the format set in the profile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {}
    facts: Facts = {}
    for name, config in sets.items():
        dataset = located(name, config)
        readings = (open_split(dataset, split, polygons=False) for split in own_splits(dataset))
        names = set().union(*(reading.image_names(workers) for reading in readings if reading))
        facts[name] = inspect_all(Path(dataset.root), names, decode, workers)
        root = _relative_to(folder, Path(dataset.root))
        keys = config.model_dump(exclude_defaults=True) | {"root": str(root)}
        described[name] = keys | _summary(dataset, facts[name].values())
    with replacing(folder / IMAGES) as temporary:
        pq.write_table(_table(facts), temporary, compression="zstd")
    manifest = {"sets": described, "images_hash": file_hash(folder / IMAGES)}
    write_json(folder / MANIFEST, manifest)
    image_roots.cache_clear()
    return manifest


def located(name: str, dataset: DatasetConfig) -> DatasetConfig:
    """The data set with its root as an absolute path.

    A relative root starts at the user's repository, also in the temporary copy of an experiment. Raises DataError if it
    is not a folder.
    """
    path = (repository_root() / Path(dataset.root).expanduser()).absolute()
    if not path.is_dir():
        raise DataError(
            f"source.sets.{name}.root: {path} is not a folder; expected the data set. Set the key to its location, or "
            f"create a link: ln -s /path/to/data {dataset.root}"
        )
    return dataset.model_copy(update={"root": str(path)})


def _relative_to(folder: Path, root: Path) -> Path:
    """The root relative to the manifest's folder if it is inside: both are then copied, cached and moved together."""
    return root.relative_to(folder.absolute()) if root.is_relative_to(folder.absolute()) else root


def own_splits(dataset: DatasetConfig) -> list[str]:
    """The splits with their own annotations."""
    return [split for split in SPLITS if getattr(dataset, split) not in (NO_SPLIT, AUTO_SPLIT)]


def open_split(dataset: DatasetConfig, split: str, polygons: bool = True) -> Reading | None:
    """Read one split of a `located` set; None if the set does not have this split.

    If val is taken from train, this is all of train; `of_split` selects the images of val.
    """
    if getattr(dataset, split) == NO_SPLIT:
        return None
    source = "train" if getattr(dataset, split) == AUTO_SPLIT else split
    reading = READERS[dataset.format](replace(split_files(dataset, source), polygons=polygons))
    return reading.with_boxes(dataset.boxes)


def of_split(
    reading: Reading, dataset: DatasetConfig, split: str, facts: Mapping[str, ImageFacts], val_fraction: float
) -> Reading:
    """The images of a split if val is taken from train; the selection depends only on the content of each image."""
    if dataset.val != AUTO_SPLIT:
        return reading
    chosen = _chosen_for_val(facts, val_fraction)

    def parse(entry: Any) -> Parsed:
        found = reading.parse(entry)
        if isinstance(found, SourceImage):
            return found if (content_of(found.file_name, facts) in chosen) == (split == "val") else None
        return found if split == "train" else None

    # Problems of the annotations as a whole are counted once, in train.
    return replace(reading, parse=parse, problems=reading.problems if split == "train" else [])


def content_of(name: object, facts: Mapping[str, ImageFacts]) -> str:
    """Hash of the content of an image; empty if it cannot be read."""
    return facts[name].sha256 if isinstance(name, str) and name in facts else ""


def _chosen_for_val(facts: Mapping[str, ImageFacts], fraction: float) -> set[str]:
    """The contents with hashes below the fraction; at least one, and never all."""
    contents = sorted({f.sha256 for f in facts.values() if not f.problem}, key=_hash_fraction)
    below = sum(_hash_fraction(content) < fraction for content in contents)
    return set(contents[: min(max(below, 1), len(contents) - 1)])


def _hash_fraction(content: str) -> float:
    return int.from_bytes(hashlib.sha256(f"val:{content}".encode()).digest()[:8], "big") / 2**64


def split_files(dataset: DatasetConfig, split: str) -> SplitFiles:
    """The location of one split. Raises DataError for a path that leaves the root of the set."""
    annotations, images = getattr(dataset, split), getattr(dataset, f"{split}_images")
    for key, path in ((split, annotations), (f"{split}_images", images)):
        if reason := unsafe_name(path):
            raise DataError(f"{dataset.root}: {key} is {path!r}, which {reason}.")
    return SplitFiles(Path(dataset.root), annotations, images, split)


def inspect_all(
    root: Path, names: Collection[str], decode: bool, workers: int, watch: Watch = lambda found, total: found
) -> dict[str, ImageFacts]:
    """Facts of every named image, sorted by name; `watch` wraps the iteration, for example to show progress.

    Decoding and hashing release the GIL, so threads are enough.
    """
    with ThreadPoolExecutor(max_workers=workers) as pool:
        found = pool.map(lambda name: inspect_image(root, name, decode), sorted(names))
        return {facts.name: facts for facts in watch(found, len(names))}


def _summary(dataset: DatasetConfig, facts: Iterable[ImageFacts]) -> dict[str, Any]:
    known = list(facts)
    return {
        "annotation_hashes": {split: _annotation_hash(dataset, split) for split in own_splits(dataset)},
        "shards_hash": shards_hash(Path(dataset.root)),
        "images": len(known),
        "bytes": sum(f.n_bytes for f in known),
        "problems": dict(sorted(Counter(f.problem for f in known if f.problem).items())),
    }


def _annotation_hash(dataset: DatasetConfig, split: str) -> str:
    """Hash of the annotation file, or of all files with annotations of the split; empty if there are none."""
    files = split_files(dataset, split)
    if not files.path.exists() and not GLOB.search(files.path.name):
        return ""
    more = READ_FROM.get(dataset.format)
    found = more(files) if more else annotation_files(files.path, ANNOTATION_SUFFIXES)
    there = sorted({path for path in found if is_readable(path)})
    if there == [files.path]:
        return file_hash(files.path)
    named = "".join(f"{os.path.relpath(path, dataset.root)}:{file_hash(path)};" for path in there)
    return hashlib.sha256(named.encode()).hexdigest() if named else ""


def _has_more(dataset: DatasetConfig, path: Path) -> bool:
    return dataset.format in READ_FROM or not path.is_file()


def _table(facts: Facts) -> pa.Table:
    rows = [{"set": name} | asdict(f) for name, by_name in facts.items() for f in by_name.values()]
    kinds = {int: pa.int64(), str: pa.string(), "int": pa.int64(), "str": pa.string()}
    schema = pa.schema([("set", pa.string()), *((f.name, kinds[f.type]) for f in fields(ImageFacts))])
    return pa.Table.from_pylist(rows, schema=schema)


def read_manifest(folder: Path) -> tuple[dict[str, DatasetConfig], Facts]:
    """The sets of a manifest, `located`, and the facts of their images by set and name.

    Raises:
        DataError: the folder has no manifest, or an annotation file or the shards changed since it was written.
    """
    described = manifest_of(folder).get("sets")
    if described is None:
        raise DataError(f"{folder / MANIFEST}: has no data sets; run the raw stage of this profile.")
    sets: dict[str, DatasetConfig] = {}
    for name, row in described.items():
        keys = {key: row[key] for key in DatasetConfig.model_fields if key in row}
        keys["root"] = str(image_roots(folder)[name])
        sets[name] = DatasetConfig.model_validate(keys)
        for split, digest in row["annotation_hashes"].items():
            path, found = split_files(sets[name], split).path, _annotation_hash(sets[name], split)
            if found != digest:
                what = f"{path}, or an annotation file that belongs to it" if _has_more(sets[name], path) else path
                raise DataError(
                    f"{what}: {'changed' if found else 'deleted'} since the raw stage inspected set {name!r}; "
                    "run it again: dvc repro --force --single-item raw, then dvc repro."
                )
    return sets, {name: {} for name in sets} | read_facts(folder)


def read_facts(folder: Path) -> Facts:
    """The facts of a manifest's images by set and name, as the raw stage recorded them."""
    facts: Facts = {}
    for row in pq.read_table(verified(folder / IMAGES)).to_pylist():
        name = row.pop("set")
        facts.setdefault(name, {})[row["name"]] = ImageFacts(**row)
    return facts
