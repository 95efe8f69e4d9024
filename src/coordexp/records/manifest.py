"""The manifest of data sets on disk: what each image file is, found once, so that images are never copied.

    data/<profile>/raw/manifest.json   the sets: format, root, annotation files with their hashes, counts, problems;
                                       and the hash of the other file
    data/<profile>/raw/images.parquet  a row for each image: name, bytes, sha256, size, mode, orientation, problem

Records name an image `<set>/<path below the set's root>`; `image_path` leads from there to the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coordexp.config.profile import NO_SPLIT, DatasetConfig
from coordexp.errors import DataError
from coordexp.infra.files import replacing, repository_root
from coordexp.infra.provenance import file_hash, write_json
from coordexp.records.images import (
    MANIFEST,
    ImageFacts,
    image_roots,
    inspect_image,
    manifest_of,
    unsafe_name,
)
from coordexp.records.sources.base import Reading, SplitFiles
from coordexp.records.sources.registry import READERS

IMAGES = "images.parquet"
SPLITS = ("train", "val")

Facts = dict[str, dict[str, ImageFacts]]  # set -> file name -> facts
Watch = Callable[[Iterable[ImageFacts], int], Iterable[ImageFacts]]


def write_manifest(folder: Path, sets: Mapping[str, DatasetConfig], decode: bool, workers: int) -> dict[str, Any]:
    """Look at every image that the annotations name, write both files, and return the content of manifest.json.

    Raises:
        DataError: a root or an annotation file is missing, or is not of the format that the profile says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {}
    facts: Facts = {}
    for name, config in sets.items():
        root = dataset_root(config.root, name)
        described[name] = config.model_dump() | {"root": str(root)}
        names = {str(image) for split in SPLITS for image in _image_names(described[name], split)}
        facts[name] = inspect_all(root, names, decode, workers)
        described[name] |= _summary(described[name], facts[name].values())
    with replacing(folder / IMAGES) as temporary:
        pq.write_table(_table(facts), temporary, compression="zstd")
    manifest = {"sets": described, "images_hash": file_hash(folder / IMAGES)}
    write_json(folder / MANIFEST, manifest)
    image_roots.cache_clear()
    return manifest


def dataset_root(root: str, name: str) -> Path:
    """The absolute folder of a set. A relative one starts at the repository, also in a temporary experiment's copy."""
    path = (repository_root() / Path(root).expanduser()).absolute()
    if not path.is_dir():
        raise DataError(
            f"source.sets.{name}.root: {path} is no folder; expected the data set. Set the key to where it lies, or "
            f"link it there: ln -s /where/it/lies {root}"
        )
    return path


def _image_names(described: Mapping[str, Any], split: str) -> Iterable[object]:
    reading = open_split(described, split, polygons=False)
    return (image.file_name for image in reading.images) if reading else ()


def open_split(described: Mapping[str, Any], split: str, polygons: bool = True) -> Reading | None:
    """Read one split of a set as manifest.json describes it; None if the set has no such split."""
    if described[split] == NO_SPLIT:
        return None
    files = replace(split_files(described, split), polygons=polygons)
    return READERS[described["format"]](files)


def split_files(described: Mapping[str, Any], split: str) -> SplitFiles:
    """Where one split lies. Raises DataError for a path that leaves the root of the set."""
    for key in (split, f"{split}_images"):
        if reason := unsafe_name(described[key]):
            raise DataError(f"{described['root']}: {key} is {described[key]!r}, which {reason}.")
    return SplitFiles(Path(described["root"]), described[split], described[f"{split}_images"], split)


def inspect_all(
    root: Path, names: Collection[str], decode: bool, workers: int, watch: Watch = lambda found, total: found
) -> dict[str, ImageFacts]:
    """Facts of every named image, sorted by name; `watch` passes them on, and may show how far it is of how many.

    Decoding and hashing release the interpreter lock.
    """
    with ThreadPoolExecutor(max_workers=workers) as pool:
        found = pool.map(lambda name: inspect_image(root, name, decode), sorted(names))
        return {facts.name: facts for facts in watch(found, len(names))}


def _summary(described: Mapping[str, Any], facts: Iterable[ImageFacts]) -> dict[str, Any]:
    known = list(facts)
    hashes = {}
    for split in SPLITS:
        if described[split] != NO_SPLIT:
            path = split_files(described, split).path
            hashes[split] = file_hash(path)
    return {
        "annotation_hashes": hashes,
        "images": len(known),
        "bytes": sum(f.n_bytes for f in known),
        "problems": dict(sorted(Counter(f.problem for f in known if f.problem).items())),
    }


def _table(facts: Facts) -> pa.Table:
    rows = [{"set": name} | asdict(f) for name, by_name in facts.items() for f in by_name.values()]
    kinds = {int: pa.int64(), str: pa.string(), "int": pa.int64(), "str": pa.string()}
    schema = pa.schema([("set", pa.string()), *((f.name, kinds[f.type]) for f in fields(ImageFacts))])
    return pa.Table.from_pylist(rows, schema=schema)


def read_manifest(folder: Path) -> tuple[dict[str, Any], Facts]:
    """manifest.json and the facts by set and name.

    Raises:
        DataError: the folder holds no manifest of data sets, or an annotation file changed since.
    """
    manifest = manifest_of(folder)
    if "sets" not in manifest:
        raise DataError(f"{folder / MANIFEST}: describes no data sets; run the raw stage of this profile.")
    for name, described in manifest["sets"].items():
        for split, digest in described["annotation_hashes"].items():
            path = split_files(described, split).path
            if not path.is_file() or file_hash(path) != digest:
                raise DataError(
                    f"{path}: {'changed' if path.is_file() else 'gone'} since the raw stage looked at set {name!r}; "
                    "run it again: dvc repro --force --single-item raw, then dvc repro."
                )
    facts: Facts = {name: {} for name in manifest["sets"]}
    for row in pq.read_table(folder / IMAGES).to_pylist():
        name = row.pop("set")
        facts[name][row["name"]] = ImageFacts(**row)
    return manifest, facts
