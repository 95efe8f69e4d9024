"""Names of the formats that commands offer, separate from their readers, whose import would slow `coordexp --help`."""

from __future__ import annotations

from typing import Literal

# Their readers are in records/manifest.py:READERS.
Format = Literal[
    "coco", "lvis", "objects365", "open_images", "refcoco", "visual_genome", "yolo", "voc", "labelme", "cvat", "csv",
    "hub", "conversations", "jsonl",
]  # fmt: skip
# What the four numbers of a box are, where a file deviates from its format.
BoxForm = Literal["format", "pixels", "fractions", "thousandths", "corners", "from_0"]

# Raw answers of other vision-language models; evaluation/foreign/answers.py has examples.
Family = Literal["qwen3-vl", "qwen2.5-vl", "rex-omni", "gemini", "paligemma", "florence-2"]
# Predictions of any detector; evaluation/foreign/predictions.py reads them.
Form = Literal["coco", "lines", "gt_vs_pred", "yolo", "csv", Family]
# How a description is mapped to a category.
NameMapping = Literal["exact", "normalised", "semantic"]
