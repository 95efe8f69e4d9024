"""Names of formats that commands offer, apart from what reads them: `coordexp --help` must not wait for that."""

from __future__ import annotations

from typing import Literal

# Their readers are in records/manifest.py:READERS.
Format = Literal[
    "coco", "lvis", "objects365", "open_images", "refcoco", "visual_genome", "yolo", "voc", "labelme", "cvat", "csv",
    "hub", "conversations", "jsonl",
]  # fmt: skip
# What the four numbers of a box are, where a file does not hold what its format says.
BoxForm = Literal["format", "pixels", "fractions", "thousandths", "corners", "from_0"]

# Raw answers of other vision-language models; evaluation/foreign/answers.py shows them.
Family = Literal["qwen3-vl", "qwen2.5-vl", "rex-omni", "gemini", "paligemma", "florence-2"]
# Predictions of any detector; evaluation/foreign/predictions.py reads them.
Form = Literal["coco", "lines", "gt_vs_pred", "yolo", "csv", Family]
# From a description to its category.
NameMapping = Literal["exact", "normalised", "semantic"]
