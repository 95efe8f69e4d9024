"""Which answers to questions for names count as right, and which are shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coordexp.drawing.panels import BAR_PX
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.reporting.asked import choose_asked, write_asked

CATEGORIES = [Category(1, "cat"), Category(2, "red cat", "strict"), Category(3, "blue cat", "phrase")]
BOX, NEAR, FAR = (4.0, 4.0, 20.0, 20.0), (5.0, 4.0, 20.0, 20.0), (30.0, 30.0, 40.0, 40.0)


def answered(number: int, probe: str, asked: str, *found: tuple[str, tuple[float, float, float, float]]) -> ImageResult:
    """To a question about a picture with a red cat in BOX; names are separated by commas."""
    pred = tuple(Prediction(name, box, score=0.5) for name, box in found)
    parse = ParseReport(container_found=True, n_valid=len(pred))
    truth = (GroundTruth("red cat", BOX), GroundTruth("blue cat", FAR))
    return ImageResult(number, "a.png", 48, 48, truth, pred, parse=parse, probe=probe, asked=tuple(asked.split(", ")))


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ([("red cat", NEAR)], 1),
        ([], 0),
        ([("red cat", FAR)], 0),
        ([("cat", NEAR)], 0),
        ([("red cat", NEAR), ("red cat", FAR)], 0),
    ],
)
def test_a_correct_answer_has_every_object_of_the_name_and_no_other_box(found, right) -> None:
    (kind,) = choose_asked([answered(1, "one", "red cat", *found)], CATEGORIES, 17)
    assert (kind.n_right, kind.n_all, kind.shown is not None) == (right, 1, bool(right))


def test_only_unseen_and_absent_categories_count() -> None:
    results = [
        answered(1, "one", "blue cat", ("blue cat", FAR)),
        answered(2, "easy", "cat"),
        answered(3, "list", "red cat", ("red cat", BOX)),
    ]
    assert choose_asked(results, CATEGORIES, 17) == []
    (kind,) = choose_asked(
        [*results, answered(4, "hard", "cat"), answered(5, "hard", "cat", ("cat", BOX))], CATEGORIES, 17
    )
    assert (kind.n_right, kind.n_all) == (1, 2)
    assert kind.shown == answered(4, "hard", "cat")


def test_the_preferred_images_do_not_depend_on_other_answers() -> None:
    right = [answered(n, "hard", "cat") for n in range(20)]
    (every,) = choose_asked(right, CATEGORIES, 17)
    wrong = [answered(n, "hard", "cat", ("cat", BOX)) for n in range(0, 20, 2) if n != every.shown.image_id]
    (some,) = choose_asked(
        [*wrong, *(r for r in right if r.image_id not in {w.image_id for w in wrong})], CATEGORIES, 17
    )
    assert some.shown == every.shown


def test_the_picture_is_small_enough_for_git(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    asked = choose_asked([answered(1, "one", "red cat", ("red cat", BOX)), answered(2, "hard", "cat")], CATEGORIES, 17)
    write_asked(asked, tmp_path, tmp_path / "asked.png")
    assert (tmp_path / "asked.png").stat().st_size < 60_000


def test_a_long_prompt_ends_inside_the_picture(tmp_path: Path) -> None:
    """The name of one more category would reach beyond the panel, and the picture would cut it off."""
    Image.new("RGB", (120, 120)).save(tmp_path / "a.png")
    names = ["purple umbrella", "yellow elephant", "cat"]
    for n in range(1, 4):
        (kind,) = choose_asked([answered(1, "hard", ", ".join(names[:n]))], CATEGORIES, 17)
        write_asked([kind], tmp_path, tmp_path / "asked.png")
        with Image.open(tmp_path / "asked.png") as picture:
            title = np.asarray(picture.convert("L"))[:BAR_PX]
        assert (title < 128).any()
        assert (title[:, -1] > 200).all()
