"""A few images of every data set of a profile as sets of their own: what a check runs on instead of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from coordexp.config.profile import NO_SPLIT, DatasetConfig, RecordsConfig
from coordexp.records.convert import policies_of
from coordexp.records.manifest import SPLITS, dataset_root, inspect_all, open_split
from coordexp.records.policy import to_records
from coordexp.records.schema import write_records
from coordexp.records.sources.base import Reading, SourceImage

IMAGES = "images"  # a link to the root of the set


def write_sample(
    sets: Mapping[str, DatasetConfig], policies: RecordsConfig, folder: Path, count: int
) -> dict[str, DatasetConfig]:
    """Write `count` records of each split of each set below `folder`, chosen by a hash of the image's name.

    Returns the sets to put in the place of the given ones, in the format `jsonl`; images that cannot be used are left
    out. Raises DataError like the raw stage, for annotations that are missing or of another format.
    """
    return {name: _sample_set(name, config, policies, folder / name, count) for name, config in sets.items()}


def _sample_set(name: str, config: DatasetConfig, policies: RecordsConfig, folder: Path, count: int) -> DatasetConfig:
    root = dataset_root(config.root, name)
    described = config.model_dump() | {"root": str(root)}
    folder.mkdir(parents=True)
    (folder / IMAGES).symlink_to(root, target_is_directory=True)
    files = dict.fromkeys(SPLITS, NO_SPLIT)
    for split in SPLITS:
        if (reading := open_split(described, split)) is None:
            continue
        chosen = sorted(reading.images, key=_digest)[:count]
        facts = inspect_all(root, {str(image.file_name) for image in chosen}, decode=True, workers=4)
        found = to_records(Reading(chosen, reading.categories, []), policies_of(policies, split), facts)
        files[split] = f"{split}.jsonl"
        write_records(folder / files[split], found.records)
    changes = {"format": "jsonl", "root": str(folder), "train_images": IMAGES, "val_images": IMAGES}
    return config.model_copy(update=changes | files)


def _digest(image: SourceImage) -> str:
    return hashlib.sha256(f"{image.file_name}:{image.key}".encode()).hexdigest()
