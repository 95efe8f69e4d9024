"""`coordexp doctor --page`: one HTML file with statistics and with images as the model sees them.

Boxes are decoded from their bins and drawn on the image in the model's input size: any error visible here (shifted
boxes, unreadable objects, incorrect labels) is also in training.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from coordexp.config.run import RunConfig
from coordexp.doctor.shown import Preview
from coordexp.drawing.boxes import BoxStyle, draw_detections, name_style
from coordexp.errors import PictureError
from coordexp.geometry.bins import decode_norm, encode_boxes
from coordexp.infra.files import write_text
from coordexp.infra.printable import printable_lines
from coordexp.packing.samples import Sample
from coordexp.records.schema import Record

PICTURES = {"train": 24, "val": 8}
LABELS, LONGEST = 60, 8
SIDES_PX = (8, 16, 32, 64)  # boundaries of the size bands
CROWD = BoxStyle((120, 120, 120), dashed=True)


@dataclass(frozen=True, slots=True)
class Panel:
    """One image on the page; if it cannot be read, `uri` is empty and `caption` has the reason."""

    title: str
    caption: str
    uri: str
    question: str = ""
    answer: str = ""


def write_page(path: Path, run: RunConfig, lines: Sequence[str], records: Mapping[str, Sequence[Record]]) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        run: the profile.
        lines: the text of the diagnosis.
        records: the remaining records, by split.

    Raises:
        CheckpointError: the model folder is unusable, so the image size is unknown.
    """
    preview = Preview(run)
    samples = {split: preview.samples(of_split) for split, of_split in records.items()}
    measured = [sample for of_split in samples.values() for sample in of_split]
    panels = {
        split: [_panel(preview, sample) for sample in samples.get(split, ())[:count]]
        for split, count in PICTURES.items()
    }
    environment = Environment(
        loader=PackageLoader("coordexp.doctor"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: printable_lines(value) if isinstance(value, str) else value,
    )  # fmt: skip
    page = environment.get_template("page.html.jinja").render(
        profile=run.params.profile,
        lines=lines,
        panels=panels,
        labels=_labels(records),
        facts=_facts(measured, sum(map(len, records.values()))),
        longest=_longest(measured, run.params.decode.max_new_tokens),
    )
    write_text(path, page)


def _panel(preview: Preview, sample: Sample) -> Panel:
    size = f"{sample.width} x {sample.height} px, shown as {sample.resized_width} x {sample.resized_height}"
    caption = f"{size}, {sample.n_image_tokens} + {len(sample.answer_ids)} tokens"
    try:
        picture = preview.picture(sample)
    except PictureError as error:
        return Panel(sample.image, str(error), "")
    styles = [CROWD if crowd else name_style(d) for d, crowd in zip(sample.descs, sample.iscrowd, strict=True)]
    names = [f"{d} (crowd)" if crowd else d for d, crowd in zip(sample.descs, sample.iscrowd, strict=True)]
    drawn, out = draw_detections(picture, decoded_px(sample), names, styles=styles), io.BytesIO()
    drawn.save(out, "JPEG", quality=88)
    uri = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    question, answer = (str(preview.tokenizer.decode(ids)) for ids in (sample.prompt_ids, sample.answer_ids))
    return Panel(sample.image, caption, uri, question, answer)


def decoded_px(sample: Sample) -> NDArray[np.float64]:
    """(M, 4) the boxes of a sample after a round trip through bins, in pixels of the resized image."""
    bins = encode_boxes(sample.boxes_xyxy_px, sample.width, sample.height)
    return decode_norm(bins).reshape(-1, 4) * np.tile((sample.resized_width, sample.resized_height), 2)


def _labels(records: Mapping[str, Sequence[Record]]) -> list[tuple[str, int, int]]:
    """The most frequent labels, with their numbers of objects in train and val."""
    counts = {
        split: Counter(o.desc for r in of_split for o in r.objects if not o.metadata.get("iscrowd"))
        for split, of_split in records.items()
    }
    train, val = (counts.get(split, Counter[str]()) for split in ("train", "val"))
    names = sorted(train.keys() | val.keys(), key=lambda name: (-train[name] - val[name], name))
    shown = [(name, train[name], val[name]) for name in names[:LABELS]]
    rest = names[LABELS:]
    more = [(f"{len(rest)} more labels", sum(train[n] for n in rest), sum(val[n] for n in rest))] if rest else []
    return shown + more


def _facts(samples: Sequence[Sample], total: int) -> list[tuple[str, str]]:
    """Statistics of the samples as pairs of words and numbers."""
    if not samples:
        return [("records", "none")]
    counted = [np.array([not crowd for crowd in s.iscrowd], dtype=bool) for s in samples]
    boxes = np.concatenate([decoded_px(s)[keep] for s, keep in zip(samples, counted, strict=True)])
    sides = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    edges = (0, *SIDES_PX, np.inf)
    bands = [(low, high, int(((sides >= low) & (sides < high)).sum())) for low, high in pairwise(edges)]
    shown = [
        f"{count} ({100 * count / max(1, len(sides)):.0f} %) {f'under {high}' if not low else f'from {low}'} px"
        for low, high, count in bands
    ]
    return [
        ("records", f"{total:,}" + (f", {len(samples):,} of them measured" if len(samples) < total else "")),
        ("objects", f"{_spread([int(keep.sum()) for keep in counted])} per image; {len(sides):,} in total"),
        ("images, width", f"{_spread([s.width for s in samples])} px"),
        ("images, height", f"{_spread([s.height for s in samples])} px"),
        ("tokens per image", _spread([s.n_image_tokens for s in samples])),
        ("tokens per answer", _spread([len(s.answer_ids) for s in samples])),
        ("shorter side of objects, as the model sees them", "; ".join(shown)),
        ("boxes without area in bins", f"{int((sides <= 0).sum())}"),
    ]


def _spread(values: Iterable[int]) -> str:
    found = np.array(list(values))
    return f"{found.min():,} to {found.max():,}, median {np.median(found):,.0f}"


def _longest(samples: Sequence[Sample], max_new_tokens: int) -> list[tuple[str, int, int, bool]]:
    """Image, objects and tokens of the longest answers, and whether `decode.max_new_tokens` would truncate them."""
    ordered = sorted(samples, key=lambda s: -len(s.answer_ids))[:LONGEST]
    rows = ((s.image, len(s.descs) - sum(s.iscrowd), len(s.answer_ids)) for s in ordered)
    return [(image, objects, tokens, tokens > max_new_tokens) for image, objects, tokens in rows]
