"""Open-vocabulary metrics by tier and prompt, against answers with known values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordexp.evaluation.registry import metric_specs, view
from coordexp.evaluation.vocabulary import dealt
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ParseReport, own_lines
from evaluation.builders import box, image, pred, run

NAMES = {"red cat": "train", "red dog": "strict", "blue cat": "phrase", "red cow": "plain_only", "red owl": "never"}
CATEGORIES = [Category(n, name, split) for n, (name, split) in enumerate(NAMES.items(), 1)]
OBJECTS = [(name, box(n, 0)) for n, name in enumerate(NAMES)]
TIER_OF = dict(zip(NAMES, ("seen", "strict", "phrase", "plain_only", "never"), strict=True))


def lines(image_id: int, answered: dict[str, str] | None = None) -> list:
    """The line of an image with one object of each tier, and its probes; `answered` renames what is predicted."""
    renamed = answered or {}

    def answer(asked: list[str]) -> list:
        return [pred(renamed.get(name, name), at) for name, at in OBJECTS if name in asked]

    def probe(number: int, kind: str, asked: list[str], there: list[str]):
        gt = [o for o in OBJECTS if o[0] in there]
        return replace(image(10 * image_id + number, gt, answer(there)), probe=kind, asked=tuple(asked))

    everything = list(NAMES)
    return [
        image(10 * image_id, OBJECTS, answer(everything)),
        probe(1, "list", [*everything, "blue owl"], everything),
        probe(2, "one", ["red dog"], ["red dog"]),
        probe(3, "easy", ["green hat"], []),
        probe(4, "hard", ["red hat"], []),
    ]


def evaluated(*answers: dict[str, str]):
    found = [line for n, renamed in enumerate(answers, 1) for line in lines(n, renamed)]
    return run(found, CATEGORIES), found


def test_correct_answers_reach_every_maximum():
    evaluation, _ = evaluated({}, {})
    values = evaluation.metrics["vocabulary"]
    for asked in ("everything", "list"):
        assert [values[f"{asked}_{tier}_AP50"] for tier in TIER_OF.values()] == [pytest.approx(1)] * 5
    assert values["one_strict_AP50"] == pytest.approx(1)
    assert values["one_seen_AP50"] is None  # nobody asked for one
    assert (values["one_recall"], values["refused_easy"], values["refused_hard"]) == (1, 1, 1)
    assert values["list_strict_to_seen"] == pytest.approx(1)
    assert evaluation.metrics["interval"]["vocabulary.list_strict_AP50"] == [pytest.approx(1)] * 2


def test_answering_a_tier_with_a_seen_name_lowers_its_ap_and_exactness():
    evaluation, _ = evaluated({"red dog": "red cat"}, {"red dog": "red cat"})
    values = evaluation.metrics["vocabulary"]
    assert values["list_strict_AP50"] == 0
    assert values["list_phrase_AP50"] == pytest.approx(1)
    assert values["list_seen_AP50"] < 1  # two red cats for one
    assert (values["list_strict_exact_rival"], values["list_seen_exact_rival"]) == (0, 1)
    assert values["one_recall"] == 0
    rows = {(row["asked"], row["tier"]): row for row in evaluation.details["by_tier"]}
    strict = rows["list", "strict"]
    assert (strict["located"], strict["first_word"], strict["last_word"], strict["exact"]) == (1, 1, 0, 0)


def test_a_name_without_a_rival_in_its_prompt_is_not_counted():
    _, found = evaluated({}, {})
    alone = [replace(r, asked=("red dog",)) if r.probe == "list" else r for r in found]
    assert run(alone, CATEGORIES).metrics["vocabulary"]["list_strict_exact_rival"] is None


@pytest.mark.parametrize(
    ("preds", "parse", "expected"),
    [
        ([], None, 1.0),
        ([pred("red cat", box(0, 0))], None, 0.0),
        ([], ParseReport(container_found=False, n_valid=0, truncated=True), 0.0),
    ],
)
def test_only_a_valid_empty_answer_is_a_refusal(preds, parse, expected):
    _, found = evaluated({}, {})
    changed = [replace(image(r.image_id, [], preds, parse), probe="hard") if r.probe == "hard" else r for r in found]
    assert run(changed, CATEGORIES).metrics["vocabulary"]["refused_hard"] == expected


def test_rejection_uses_the_confidence_at_80_percent_recall():
    at = box(0, 0)

    def probe(number: int, kind: str, name: str, log_probability: float | None):
        preds = [] if log_probability is None else [replace(pred(name, at), desc_logprob=log_probability)]
        gt = [(name, at)] if kind == "one" else []
        return replace(image(number, gt, preds), probe=kind, asked=(name,))

    found = [probe(n, "one", "red dog", -0.1 * n) for n in range(1, 10)]  # nine of ten, less and less sure
    found += [probe(10, "one", "red dog", None)]
    found += [probe(20 + n, "hard", "red cat", sure) for n, sure in enumerate((-0.05, -0.8, -0.81, -2.0, None))]
    found += [image(n, [("red cat", at)], [pred("red cat", at)]) for n in range(30, 35)]
    values = run(found, CATEGORIES).metrics["vocabulary"]
    assert (values["one_recall"], values["refused_hard"]) == (pytest.approx(0.9), pytest.approx(0.2))
    assert values["rejected_hard"] == pytest.approx(3 / 5)  # -0.8 is the eighth
    assert values["rejected_easy"] is None
    fewer = [replace(line, pred=()) if line.image_id in (1, 2) else line for line in found]
    assert run(fewer, CATEGORIES).metrics["vocabulary"]["rejected_hard"] is None  # no confidence finds four in five


def test_all_other_areas_are_about_the_lines_of_the_images_themselves():
    evaluation, found = evaluated({}, {"red dog": "red cat"})
    alone = run(own_lines(found), CATEGORIES)
    assert "vocabulary" not in alone.metrics
    probed = {area: values for area, values in evaluation.metrics.items() if "vocabulary" not in area}
    kept = {key: v for key, v in probed["interval"].items() if "vocabulary" not in key}
    assert probed | {"interval": kept} == alone.metrics
    assert evaluation.per_image == alone.per_image


def test_shuffled_answers_come_from_the_previous_line_at_the_same_position():
    first, second = (image(n, [], [pred("red cat", box(n, 0))], size=(400 * n, 400)) for n in (1, 2))
    ((of_second,), (of_first,)) = [r.pred for r in dealt([second, first], "")]
    x1, y1, x2, y2 = box(2, 0)
    assert of_second.bbox_xyxy_px == (x1 / 2, y1, x2 / 2, y2)
    x1, y1, x2, y2 = box(1, 0)
    assert of_first.bbox_xyxy_px == pytest.approx((2 * x1, y1, 2 * x2, y2))


def test_every_number_is_declared():
    evaluation, _ = evaluated({}, {})
    specs = metric_specs(evaluation.params, vocabulary=True)
    found = {f"{area}.{key}" for area in ("vocabulary", "vocabulary_blind") for key in evaluation.metrics[area]}
    assert found == {key for key in specs if key.startswith("vocabulary")}
    assert set(view("vocabulary", evaluation.params)) == {key for key in found if key.startswith("vocabulary.")}
