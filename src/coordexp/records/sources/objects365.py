"""Objects365 v2: COCO's layout, with file names that are not where the downloaded patches unpack to.

`zhiyuan_objv2_train.json` says `images/v1/patch8/objects365_v1_00420917.jpg`; the archive `patch8.tar.gz` unpacks to
`patch8/objects365_v1_00420917.jpg`. So the last two parts of the name count, below the image folder of the set.
"""

from __future__ import annotations

from coordexp.records.sources.base import Reading, SplitFiles
from coordexp.records.sources.coco import instances_reading, load_instances


def read(files: SplitFiles) -> Reading:
    """Objects365 v2; the image folder is the one that holds `patch0`, `patch1`, ..."""
    instances = load_instances(files.path, polygons=files.polygons)
    return instances_reading(instances, lambda image: files.image_name(patch_path(image["file_name"])))


def patch_path(file_name: str) -> str:
    """ "images/v2/patch43/objects365_v2_00908726.jpg" -> "patch43/objects365_v2_00908726.jpg"."""
    parts = file_name.split("/")
    return "/".join(parts[-2:]) if len(parts) >= 2 and parts[-2].startswith("patch") else file_name
