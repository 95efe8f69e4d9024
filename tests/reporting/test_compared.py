"""The list of answers says which values of each parameter are compared, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coordexp.config.presets import read_preset
from coordexp.reporting.compared import compared_markdown, compared_values


def arm(*changes: str, presets: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"presets": [*presets], "changes": [*changes]}


def test_values_are_compared_where_arms_of_one_question_differ(repository: Path) -> None:
    answered = {
        "first": {"usual": arm(), "wide": arm("sigma=4.0", "configs/${profile}.yaml:stage2.steps=3")},
        "second": {name: arm("sigma=4.00", f"target={name}") for name in ("gaussian", "triangular")},
        "third": {"soft": arm(), "hard": arm(presets=("pure_ce",)), "again": arm("anneal.temperature_from=2.0")},
    }
    found = compared_values(answered, repository)
    assert found["sigma"] == {"2": ["first"], "4": ["first", "second"]}
    assert found["target"] == {"gaussian": ["second"], "triangular": ["second"]}
    assert found["anneal.temperature_from"] == {"2": ["third"]}
    assert read_preset("pure_ce", repository)["coord_ce_weight"] == 1.0
    assert found["coord_ce_weight"] == {"0": ["third"], "1": ["third"]}
    assert "gate_weight" not in found, "the preset states the committed value"

    text = "\n".join(compared_markdown(found, repository))
    assert "| `sigma` | **2**, 4 | [first](first.md), [second](second.md) |" in text
    [missing] = [line for line in text.splitlines() if line.startswith("Not compared yet: ")]
    assert "`target: two_bin`" in missing
    assert "`matching.gate`" in missing
    assert "`sigma`" not in missing
    assert "`profile`" not in missing, "it has a reason"


def test_without_answers_every_key_is_missing(repository: Path) -> None:
    text = "\n".join(compared_markdown(compared_values({}, repository), repository))
    assert "None yet." in text
    assert "`softce_weight`, `w1_weight`" in text
