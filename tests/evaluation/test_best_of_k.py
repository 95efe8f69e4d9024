"""Voting and the oracle over K samples, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordexp.errors import DataError
from coordexp.evaluation.best_of_k import oracle_k, vote
from coordexp.records.gt_vs_pred import Box, GroundTruth, ImageResult, ParseReport, Prediction

CAT, DOG, FAR = (10.0, 10.0, 30.0, 30.0), (50.0, 50.0, 90.0, 90.0), (0.0, 80.0, 10.0, 90.0)


def line(*preds: tuple[str, Box, float], image_id: int = 1) -> ImageResult:
    gt = (GroundTruth("cat", CAT), GroundTruth("dog", DOG), GroundTruth("crowd", FAR, iscrowd=True))
    pred = tuple(Prediction(desc, box, (0, 0, 1, 1), score=score) for desc, box, score in preds)
    return ImageResult(image_id, "1.png", 100, 100, gt, pred, "", ParseReport(True, len(pred)), "stop", 1)


def test_the_oracle_takes_each_object_from_the_sample_that_found_it() -> None:
    found = oracle_k([[line(("cat", CAT, 0.5))], [line(("Dog", DOG, 0.5))], [line(("cat", DOG, 0.5))]])
    assert (found.n_gt_I.tolist(), found.any_I.tolist()) == ([2], [2])
    assert found.one_I == pytest.approx([(1 + 1 + 0) / 3])


def test_an_object_is_found_once_even_if_named_twice() -> None:
    assert oracle_k([[line(("cat", CAT, 0.5), ("cat", CAT, 0.5))]]).any_I.tolist() == [1]


def test_an_image_without_objects_has_none_to_find() -> None:
    empty = replace(line(("cat", CAT, 0.5)), gt=())
    found = oracle_k([[empty], [empty]])
    assert (found.n_gt_I.tolist(), found.one_I.tolist(), found.any_I.tolist()) == ([0], [0], [0])


def test_voting_keeps_what_enough_samples_agree_on() -> None:
    near = (12.0, 10.0, 32.0, 30.0)
    nearer = (14.0, 10.0, 34.0, 30.0)
    runs = [
        [line(("cat", CAT, 0.9), ("dog", FAR, 0.9))],
        [line(("Cat", near, 0.6))],
        [line(("cat", nearer, 0.3), ("dog", DOG, 0.9))],
    ]
    (result,) = vote(runs, min_support=2)
    (cat,) = result.pred
    assert (cat.desc, cat.bbox_xyxy_px) == ("cat", near)  # the median of the three
    assert cat.score == pytest.approx(0.6)
    assert [p.score for p in vote(runs, min_support=1)[0].pred] == pytest.approx([0.6, 0.3, 0.3])


def test_two_copies_in_one_sample_are_two_objects() -> None:
    runs = [[line(("cat", CAT, 0.9), ("cat", CAT, 0.9))], [line(("cat", CAT, 0.9))]]
    assert len(vote(runs, 2)[0].pred) == 1
    assert len(vote(runs, 1)[0].pred) == 2


def test_order_of_images_does_not_matter_but_their_identity_does() -> None:
    a, b = line(("cat", CAT, 0.9), image_id=1), line(image_id=2)
    assert [r.image_id for r in vote([[b, a], [a, b]], 1)] == [1, 2]
    with pytest.raises(DataError, match="different images"):
        vote([[a], [b]], 1)


@pytest.mark.parametrize("support", [0, 3])
def test_support_is_bounded_by_the_samples(support: int) -> None:
    with pytest.raises(DataError, match="expected 1 to 2"):
        vote([[line()], [line()]], support)
