"""The source formats by name."""

from __future__ import annotations

from coordexp.records.sources import coco, jsonl, lvis, objects365, refcoco, visual_genome, voc, yolo
from coordexp.records.sources.base import Reader

READERS: dict[str, Reader] = {
    "coco": coco.read,
    "lvis": lvis.read,
    "objects365": objects365.read,
    "refcoco": refcoco.read,
    "visual_genome": visual_genome.read,
    "yolo": yolo.read,
    "voc": voc.read,
    "jsonl": jsonl.read,
}
