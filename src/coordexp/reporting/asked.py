"""Two answers to prompts with category names, selected by rule: one unseen in training, one absent from the image.

Both are sampled from the correct answers by the seed, so that all runs prefer the same images. The caption gives the
number of correct answers, so that a panel is an example and not a claim.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from coordexp.drawing.boxes import draw_detections, font, readable_scale
from coordexp.drawing.panels import CAUSES, FONT_PX, GAP_PX, RIGHT, RIGHT_SIGN, side_by_side
from coordexp.geometry.boxes import pairwise_iou
from coordexp.infra.files import write_bytes
from coordexp.records.categories import Category, Split
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.records.images import read_record_rgb
from coordexp.reporting.gallery import image_ranks, reduced, with_palette
from coordexp.reporting.markdown import escape

ASKED = "asked.png"
FOUND_IOU = 0.5
PANEL_PX = 224  # longer side of an image before enlargement
COLOURS = 128  # so that git holds it
TITLE_NAMES = 2


@dataclass(frozen=True, slots=True)
class Asked:
    """One kind of prompt, its first image with a correct answer, and the number of correct answers."""

    title: str
    n_right: int
    n_all: int
    shown: ImageResult | None

    @property
    def caption(self) -> str:
        """The numbers behind the example."""
        chosen = "" if self.shown is None else f"; shown, sampled from these: “{escape(', '.join(self.shown.asked))}”"
        return f"**{self.title}**: {self.n_right} of {self.n_all} prompts answered correctly{chosen}"


def choose_asked(results: Sequence[ImageResult], categories: Sequence[Category], seed: int) -> list[Asked]:
    """The two kinds of prompt; empty if the results contain neither."""
    tiers: Mapping[str, Split | None] = {category.name: category.split for category in categories}
    unseen = [r for r in results if r.probe == "one" and tiers.get(r.asked[0]) == "strict"]
    absent = [r for r in results if r.probe == "hard"]
    asked = [
        _chosen("Category unseen in text and images of all training, prompted with alone", unseen, _all_found, seed),
        _chosen("Categories absent from the image, each sharing a word with a present one", absent, _is_silent, seed),
    ]
    return [kind for kind in asked if kind.n_all]


def _chosen(title: str, results: Sequence[ImageResult], is_right: Callable[[ImageResult], bool], seed: int) -> Asked:
    right = [result for result in results if is_right(result)]
    rank = image_ranks(sorted(result.image_id for result in results), seed)
    first = min(right, key=lambda result: rank[result.image_id], default=None)
    return Asked(title, len(right), len(results), first)


def _all_found(result: ImageResult) -> bool:
    """Whether each object of the prompted category has one box of that name, and there is no other box."""
    true = [g.bbox_xyxy_px for g in result.gt if g.desc in result.asked and not g.iscrowd]
    if len(true) != len(result.pred) or any(p.desc not in result.asked for p in result.pred):
        return False
    ious = pairwise_iou(np.array(true), np.array([p.bbox_xyxy_px for p in result.pred]))
    return bool((ious.max(axis=1) >= FOUND_IOU).all() and (ious.max(axis=0) >= FOUND_IOU).all())


def _is_silent(result: ImageResult) -> bool:
    return not result.pred and result.parse is not None and result.parse.ok


def write_asked(asked: Sequence[Asked], image_root: Path, path: Path) -> None:
    """Draw the answers side by side, small enough for git; no file if none is correct."""
    panels = [(kind.shown, _panel(kind.shown, image_root)) for kind in asked if kind.shown]
    if not panels:
        return
    out = io.BytesIO()
    width = panels[0][1].width
    picture = with_palette(side_by_side([(_title(shown, width), panel) for shown, panel in panels], CAUSES[:1]))
    picture.save(out, "PNG", optimize=True)
    write_bytes(path, out.getvalue())


def _title(result: ImageResult, width_px: int) -> str:
    """The prompt, with as many of its names as fit, at least one."""
    for n in range(min(TITLE_NAMES, len(result.asked)), 0, -1):
        more = f" and {len(result.asked) - n} more" if len(result.asked) > n else ""
        title = f"prompt: {', '.join(result.asked[:n])}{more}{'' if result.pred else ' → none'}"
        if font(FONT_PX).getlength(title) <= width_px - GAP_PX:
            break
    return title


def _panel(result: ImageResult, image_root: Path) -> Image.Image:
    image = read_record_rgb(image_root, result.image)
    shrink = min(1.0, PANEL_PX / max(image.size))
    image = image.resize((round(image.width * shrink), round(image.height * shrink)), Image.Resampling.LANCZOS)
    image = reduced(image, COLOURS).convert("RGB")
    boxes = np.array([p.bbox_xyxy_px for p in result.pred]).reshape(-1, 4) * shrink
    labels, scores = [RIGHT_SIGN + p.desc for p in result.pred], [p.score for p in result.pred]
    return draw_detections(image, boxes, labels, scores, [RIGHT] * len(labels), readable_scale(*image.size), FONT_PX)
