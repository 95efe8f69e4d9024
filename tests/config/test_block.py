"""The words in which messages and documents describe what a field accepts."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from coordexp.config.block import Block, Fraction, IouList, Text, Weight, expectation, field_specs
from coordexp.config.profile import Profile
from coordexp.config.schema import Params


class Inner(Block):
    """A nested block."""

    fraction: Fraction = Field(description="a fraction")


class Example(Block):
    """One field of every kind."""

    weight: Weight
    steps: int = Field(ge=1, le=9)
    side: int = Field(ge=32, multiple_of=32)
    rate: float = Field(gt=0, lt=1)
    most: float = Field(le=2)
    name: Text
    choice: Literal["a", "b"]
    ious: IouList
    inner: Inner


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weight", "a number >= 0"),
        ("steps", "an integer in [1, 9]"),
        ("side", "an integer >= 32, a multiple of 32"),
        ("rate", "a number in (0, 1)"),
        ("most", "a number <= 2"),
        ("name", "non-empty text"),
        ("choice", "one of a, b"),
        ("ious", "a non-empty list, each item a number in (0, 1)"),
        ("inner", "a block with the keys fraction"),
    ],
)
def test_expectation_describes_type_and_range(name: str, words: str) -> None:
    assert expectation(Example.model_fields[name]) == words


def test_field_specs_use_dotted_keys_for_nested_blocks() -> None:
    specs = list(field_specs(Example))
    assert [spec.key for spec in specs][-2:] == ["ious", "inner.fraction"]
    assert specs[-1].description == "a fraction"


@pytest.mark.parametrize("block", [Params, Profile])
def test_every_parameter_has_a_one_line_description(block: type[Block]) -> None:
    for spec in field_specs(block):
        assert 5 < len(spec.description) <= 90, spec.key
        assert "\n" not in spec.description, spec.key
