"""Distance of names by shared words, and that it decides between equal boxes."""

from __future__ import annotations

import numpy as np
import pytest

from coordexp.matching.assign import match
from coordexp.matching.names import name_distance
from coordexp.matching.settings import MatchSettings

BOX = [0.1, 0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("cat", "cat", 0.0),
        ("Traffic_Light", "traffic light", 0.0),
        ("black cat", "cat", 0.5),
        ("black cat", "cat black", 0.0),
        ("red old car", "old blue car", 0.5),
        ("cat", "dog", 1.0),
        ("_", "dog", 1.0),
        ("", "", 0.0),
    ],
)
def test_distances_by_hand(a, b, expected):
    assert name_distance([a], [b]).tolist() == [[expected]]
    assert name_distance([b], [a]).tolist() == [[expected]]


def test_every_pair_and_empty_sides():
    np.testing.assert_array_equal(name_distance(["cat", "dog"], ["dog", "cat", "cup"]), [[1, 0, 1], [0, 1, 1]])
    assert name_distance([], ["cat"]).shape == (0, 1)
    assert name_distance(["cat"], []).shape == (1, 0)


@pytest.mark.parametrize(("lambda_sem", "pairs"), [(0.0, [[0, 0], [1, 1]]), (0.1, [[0, 1], [1, 0]])])
def test_names_decide_between_boxes_that_are_alike(lambda_sem, pairs):
    settings = MatchSettings(lambda_sem=lambda_sem)
    distances = name_distance(["dog", "cat"], ["cat", "dog"])
    assert match([BOX, BOX], [BOX, BOX], settings, distances).pairs.tolist() == pairs
