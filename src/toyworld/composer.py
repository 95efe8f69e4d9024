"""The composer: one scene from (seed, split, index), so that any image can be reproduced alone.

Rules of the ground truth:
* a box is the full (amodal) extent of the sprite, which always lies inside the image;
* a placement is rejected if it leaves less than `MIN_VISIBLE` of any object's pixels visible, or if two boxes would
  have an IoU above `max_iou`;
* objects are listed in reading order (y1, x1);
* a noun never occurs both plain and tinted in one scene, because it is undefined whether "cat" includes a red cat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.config.profile import RowsConfig, ScenesConfig
from coordexp.geometry.boxes import as_boxes, pairwise_iou, reading_order
from toyworld.backgrounds import add_distractors, make_background
from toyworld.sprites import Label, SpriteCatalog

SIDE_STEP_PX = 32
MIN_VISIBLE = 0.6
PLACEMENT_TRIES = 12
SPLIT_CODES = {"train": 0, "val": 1}
LABEL_TRIES = 8
UNWRITTEN_FRACTION = 0.4  # of the objects in a scene that shows labels which training text never contains


@dataclass(frozen=True, slots=True)
class PlacedObject:
    """One object of a scene, box in integer pixels."""

    desc: str
    bbox_xyxy_px: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """Pixels (H, W, 3) uint8 RGB and the objects in reading order."""

    pixels: NDArray[np.uint8]
    objects: tuple[PlacedObject, ...]


class _Canvas:
    """Pixels under construction, and the visible pixels of each object placed so far."""

    def __init__(self, pixels: NDArray[np.float32], max_iou: float) -> None:
        self.pixels = pixels
        self.max_iou = max_iou
        self.visible: list[NDArray[np.bool_]] = []
        self.full_pixels: list[int] = []
        self.objects: list[PlacedObject] = []

    def try_place(self, sprite: NDArray[np.float32], left: int, top: int, desc: str) -> bool:
        """Paste the sprite unless it breaks the overlap or visibility rule; True if placed."""
        h, w = sprite.shape[:2]
        box = (left, top, left + w, top + h)
        boxes = as_boxes([o.bbox_xyxy_px for o in self.objects])
        if self.objects and pairwise_iou(as_boxes([box]), boxes).max() > self.max_iou:
            return False
        opaque = np.zeros(self.pixels.shape[:2], dtype=bool)
        opaque[top : top + h, left : left + w] = sprite[..., 3] > 0.5
        remaining = [seen & ~opaque for seen in self.visible]
        if any(
            left_over.sum() < MIN_VISIBLE * full for left_over, full in zip(remaining, self.full_pixels, strict=True)
        ):
            return False
        view = self.pixels[top : top + h, left : left + w]
        view += sprite[..., 3:] * (sprite[..., :3] - view)
        self.visible = [*remaining, opaque]
        self.full_pixels.append(int(opaque.sum()))
        self.objects.append(PlacedObject(desc, box))
        return True


def compose_scene(
    source: ScenesConfig, catalog: SpriteCatalog, seed: int, split: str, index: int, unwritten: float = 0.0
) -> Scene:
    """Compose the scene of (seed, split, index); the same arguments give the same bytes.

    `unwritten` is the fraction of training scenes that show labels of the tier `phrase`. The caller must keep these
    labels out of the training text.
    """
    rng = np.random.default_rng([seed, SPLIT_CODES[split], index])
    is_val = split == "val"
    width, height = (_draw_side(rng, source) for _ in range(2))
    canvas = _Canvas(make_background(rng, width, height, is_val), source.max_iou)
    add_distractors(rng, canvas.pixels, int(rng.integers(source.distractors + 1)), is_val)
    labels = _Labels(rng, source, catalog, is_val, not is_val and unwritten > 0 and rng.random() < unwritten)
    wanted = _draw_count(rng, source)
    for _ in range(source.rows.most):
        left = wanted - len(canvas.objects)
        if rng.random() < source.crowd_fraction and left > 1:
            _place_row(rng, source.rows, labels, canvas, min(left, source.rows.objects))
    while wanted > len(canvas.objects):
        side = _draw_size(rng, source, min(width, height))
        if not _place_anywhere(rng, labels, canvas, side):
            break  # the scene is full
    pixels = np.clip(canvas.pixels + rng.normal(0, 2.0, canvas.pixels.shape), 0, 255).astype(np.uint8)
    order = reading_order(as_boxes([o.bbox_xyxy_px for o in canvas.objects]))
    return Scene(pixels, tuple(canvas.objects[i] for i in order))


def _draw_side(rng: np.random.Generator, source: ScenesConfig) -> int:
    """Sample a multiple of 32 px; smaller ones are more probable (weights 1/n), which keeps scenes cheap on a CPU."""
    sides = np.arange(source.min_side_px, source.max_side_px + 1, SIDE_STEP_PX)
    weights = 1.0 / np.arange(1, len(sides) + 1)
    return int(rng.choice(sides, p=weights / weights.sum()))


def _draw_count(rng: np.random.Generator, source: ScenesConfig) -> int:
    """Sample min_objects..max_objects with geometric weights (mean about 3.8 for 1..12 and a decay of 0.8)."""
    counts = np.arange(source.min_objects, source.max_objects + 1)
    weights = source.count_decay**counts
    return int(rng.choice(counts, p=weights / weights.sum()))


def _draw_size(rng: np.random.Generator, source: ScenesConfig, side_px: int) -> int:
    """Sample the longer side of an object: log-uniform between the fractions, in a minority of cases below them."""
    low, high = source.smallest_fraction, source.largest_fraction
    if rng.random() < source.small_fraction:
        low, high = low * 2 / 3, low
    return max(8, round(side_px * float(np.exp(rng.uniform(np.log(low), np.log(high))))))


class _Labels:
    """The labels of the objects in one scene, and their pixels."""

    def __init__(
        self, rng: np.random.Generator, source: ScenesConfig, catalog: SpriteCatalog, is_val: bool, unwritten: bool
    ) -> None:
        self._rng = rng
        self._catalog = catalog
        self._plain = [label for label in catalog.tiers["train"] if label.color is None]
        self._pairs = [label for label in catalog.tiers["train"] if label.color is not None]
        self._plain_fraction = source.plain_fraction
        fractions = source.held_out.model_dump() if is_val else {"phrase": UNWRITTEN_FRACTION if unwritten else 0.0}
        self._held_out = [(labels, fractions.get(tier, 0.0)) for tier, labels in catalog.tiers.items()]
        self._used: dict[str, Label] = {}  # by noun

    def draw(self) -> Label:
        """Sample a label that is compatible with the previous ones."""
        for _ in range(LABEL_TRIES):
            label = self._draw()
            before = self._used.setdefault(label.noun, label)
            if (before.color is None) == (label.color is None):
                return label
        return before

    def _draw(self) -> Label:
        at = self._rng.random()
        for labels, fraction in self._held_out:
            if at < fraction:
                return self._one_of(labels)
            at -= fraction
        return self._one_of(self._plain if self._rng.random() < self._plain_fraction else self._pairs)

    def _one_of(self, labels: Sequence[Label]) -> Label:
        return labels[int(self._rng.integers(len(labels)))]

    def render(self, label: Label, side_px: int) -> NDArray[np.float32]:
        """One of the noun's sprites in the label's color, float RGBA."""
        group = self._catalog.sprites[label.noun]
        sprite = group[self._rng.integers(len(group))]
        pixels = sprite.render(side_px, bool(self._rng.random() < 0.5), self._catalog.color_of(label))
        pixels[..., :3] = np.clip(pixels[..., :3] * self._rng.uniform(0.8, 1.15), 0, 255)
        return pixels


def _place_anywhere(rng: np.random.Generator, labels: _Labels, canvas: _Canvas, side_px: int) -> bool:
    label = labels.draw()
    pixels = labels.render(label, side_px)
    height, width = canvas.pixels.shape[:2]
    h, w = pixels.shape[:2]
    for _ in range(PLACEMENT_TRIES):
        left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        if canvas.try_place(pixels, left, top, label.name):
            return True
    return False


def _place_row(rng: np.random.Generator, rows: RowsConfig, labels: _Labels, canvas: _Canvas, count: int) -> None:
    """Put up to `count` objects of one label side by side."""
    height, width = canvas.pixels.shape[:2]
    label = labels.draw()
    side = int(min(width, height) * rng.uniform(rows.smallest_fraction, rows.largest_fraction))
    left, top = rng.uniform(0, 0.35 * width), rng.uniform(0, height - side)
    for _ in range(count):
        pixels = labels.render(label, max(8, round(side * rng.uniform(0.85, 1.15))))
        h, w = pixels.shape[:2]
        y = int(np.clip(top + rng.normal(0, 0.12 * side), 0, height - h))
        if left + w > width:
            break
        canvas.try_place(pixels, int(left), y, label.name)
        left += w * rng.uniform(rows.closest, rows.farthest)
