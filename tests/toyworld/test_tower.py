"""Patch targets: the words that each patch learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordexp.packing.pixels import patchify
from coordexp.packing.samples import Sample
from helpers import catalog, tiny_pixels
from toyworld.tower import UNNAMED, PatchTargets

WORDS = catalog().words


@pytest.fixture
def sample() -> Sample:
    """128 x 96 px: a large red cat and, in front of it, a dog smaller than a patch; a blue thing without a noun."""
    boxes = np.array([[0, 0, 64, 64], [18, 34, 26, 42], [96, 0, 128, 96]], np.float32)
    return Sample(
        1, "a.png", 128, 96, 128, 96, 12, np.array([0]), np.array([0]), np.array([0]), np.array([0]),
        ("red cat", "dog", "blue"), boxes, (False,) * 3,
    )  # fmt: skip


def patch_of(sample: Sample, x: int, y: int) -> int:
    """The number of the patch at a pixel, found by what patchify makes of a picture that is white there alone."""
    pixels = np.zeros((sample.height, sample.width, 3), np.uint8)
    pixels[y, x] = 255
    return int(patchify(pixels, tiny_pixels()).max(axis=1).argmax())


def test_each_patch_has_the_words_of_the_object_in_front(sample: Sample) -> None:
    targets = PatchTargets(catalog(), tiny_pixels()).of(sample)
    colors, nouns = WORDS[:8], WORDS[8:]
    red, blue, cat, dog = colors.index("red"), colors.index("blue"), nouns.index("cat"), nouns.index("dog")
    for x, y, expected in (
        (5, 5, (red, cat)),
        (60, 60, (red, cat)),
        (22, 38, (UNNAMED, dog)),  # has no color, and its patch is where its center is
        (40, 38, (red, cat)),
        (80, 50, (UNNAMED, UNNAMED)),
        (127, 95, (blue, UNNAMED)),
    ):
        assert tuple(targets[patch_of(sample, x, y)]) == expected, (x, y)


def test_a_resized_image_has_the_same_words(sample: Sample) -> None:
    targets = PatchTargets(catalog(), tiny_pixels())
    twice = replace(sample, width=256, height=192, boxes_xyxy_px=sample.boxes_xyxy_px * 2)
    assert (targets.of(twice) == targets.of(sample)).all()
