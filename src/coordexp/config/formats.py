"""Names of the source formats, apart from the profile: `coordexp --help` lists them without loading pydantic."""

from __future__ import annotations

from typing import Literal

# Their readers are in records/manifest.py:READERS.
Format = Literal[
    "coco", "lvis", "objects365", "open_images", "refcoco", "visual_genome", "yolo", "voc", "labelme", "cvat", "csv",
    "hub", "conversations", "jsonl",
]  # fmt: skip
# What the four numbers of a box are, where a file does not hold what its format says.
BoxForm = Literal["format", "pixels", "fractions", "thousandths", "corners", "from_0"]
