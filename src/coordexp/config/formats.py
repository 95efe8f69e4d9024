"""Names of the source formats, apart from the profile: `coordexp --help` lists them without loading pydantic."""

from __future__ import annotations

from typing import Literal

# Their readers are in records/manifest.py:READERS.
Format = Literal["coco", "lvis", "objects365", "refcoco", "visual_genome", "yolo", "voc", "jsonl"]
