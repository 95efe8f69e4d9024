"""The names of the source formats; the readers are in records/sources/registry.py."""

from __future__ import annotations

from typing import Literal

Format = Literal["coco", "lvis", "objects365", "refcoco", "visual_genome", "yolo", "voc", "jsonl"]
