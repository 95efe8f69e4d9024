"""Answers that are truncated, loop or do not parse, and the rate from which a checkpoint gets no verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordexp.evaluation.parse import FAULTS, faults_of
from coordexp.records.gt_vs_pred import ImageResult, ParseReport
from evaluation.builders import box, image, pred, run, shifted


def answer(image_id: int, preds: list, parse: ParseReport | None = None, finish_reason: str = "stop") -> ImageResult:
    return replace(image(image_id, [("cat", box(0, 0))], preds, parse), finish_reason=finish_reason)


def rates(*results: ImageResult) -> list[float]:
    parse = run(results).metrics["parse"]
    return [parse[key.removeprefix("parse.")] for key in FAULTS]


def many(n: int, dx: float) -> list:
    """n times one name, each box dx px right of the one before."""
    return [pred("cat", shifted(box(0, 0), i * dx, 0)) for i in range(n)]


@pytest.mark.parametrize(
    ("preds", "loops"),
    [
        (many(1, 0), False),
        (many(2, 0), False),  # a duplicate is none yet
        (many(6, 0), True),
        (many(20, 1), True),  # the box creeps
        (many(6, 50), False),  # a row of cats
        ([pred(name, box(i % 2, 0)) for i, name in enumerate(["cat", "dog"] * 4)], True),  # a cycle
        ([pred(f"cat {i}", box(0, 0)) for i in range(6)], False),  # every time another name
        ([pred("cat", box(i % 6, i // 6)) for i in range(30)] + [pred("cat", box(i, 0)) for i in range(4)], False),
    ],
)
def test_an_answer_loops_if_it_mostly_repeats_objects(preds: list, loops: bool) -> None:
    assert rates(answer(1, preds))[1] == loops


def test_truncated_and_unreadable_answers_are_counted() -> None:
    babble = answer(1, [], ParseReport(container_found=False, n_valid=0), "length")
    cut = answer(2, many(1, 0), ParseReport(container_found=True, n_valid=1, truncated=True), "length")
    lost = answer(3, many(1, 0), ParseReport(container_found=True, n_valid=1, dropped={"malformed": 1}))
    useless = answer(4, [], ParseReport(container_found=True, n_valid=0, dropped={"bbox_invalid": 2}))
    one_bad_box = answer(5, many(1, 0), ParseReport(container_found=True, n_valid=1, dropped={"bbox_invalid": 1}))
    nothing_there = answer(6, [])
    assert rates(babble, cut, lost, useless, one_bad_box, nothing_there) == pytest.approx([2 / 6, 0, 3 / 6])


def test_one_faulty_answer_in_twenty_is_tolerated_and_two_are_not() -> None:
    good = [answer(i, many(1, 0)) for i in range(18)]
    bad = [answer(i, many(9, 0), finish_reason="length") for i in (18, 19)]
    assert faults_of(run([*good, bad[0], answer(19, many(1, 0))]).metrics) == []
    assert faults_of(run([*good, *bad]).metrics) == [
        "10 % of the answers are truncated at the token budget (`max_new_tokens`)",
        "10 % of the answers loop, repeating the same objects",
    ]
