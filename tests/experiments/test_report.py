"""The report of an A/B test from hand-made numbers: correct wording, and only numbers from the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from coordexp.experiments.report import report_markdown, verdict_sentence, write_report
from coordexp.infra.logs import read_log
from coordexp.reporting.questions import answer_markdown

KEYS = ("coco.AP50", "coco.AP75", "f1.full_50", "f1.full_mean", "set.dup_pairs_90")


def numbers(delta: float, lo: float, hi: float, verdict: str, seeds: int = 2) -> dict[str, Any]:
    found = {"delta": delta, "lo": lo, "hi": hi, "p_superior": 0.9, "smallest": 0.0217, "se_images": 0.004}
    found |= {"se_seeds": 0.003 if seeds > 1 else None, "verdict": verdict}
    metrics = {"coco.mAP": found, **{key: {"verdict": "not defined"} for key in KEYS}}
    runs = [
        {
            **{"arm": arm, "seed": s, "experiment": f"ab-x-{n}-s{s}", "seconds": 101.0 + n, "tokens": 5000 + 1000 * n},
            **{"coco.mAP": (0.31, 0.33)[s], "f1.full_50": (0.6, None)[s]},
        }
        for n, arm in enumerate(("w=1", "w=2"))
        for s in range(seeds)
    ]
    return {
        "name": "x",
        "question": "A/B test x",
        "budget": "tokens",
        "profile": "tiny",
        "commit": "0123456789abcdef",
        "seeds": seeds,
        "seed_keys": ["stage2.seed"],
        "n_images": 500,
        "level": 0.05,
        "arms": {arm: {"checkpoint": "stage2"} for arm in ("w=1", "w=2")},
        "runs": runs,
        "effects": [{"arm": "w=2", "baseline": "w=1", "faults": {}, "metrics": metrics}],
        "claims": [],
    }


@pytest.mark.parametrize("verdict", ["better", "worse", "no difference shown"])
def test_the_verdict_comes_first_with_the_minimum_detectable_effect(verdict: str) -> None:
    tree = numbers(0.012, -0.001, 0.025, verdict)
    sentence = verdict_sentence(tree["effects"][0], tree)
    assert sentence.startswith(f"`w=2` against `w=1`: **{verdict}**: `coco.mAP` +0.012 [-0.001, +0.025]")
    assert ("minimum detectable effect is 0.0217" in sentence) == verdict.startswith("no difference")
    assert sentence in report_markdown(tree).splitlines()[2]


def test_a_single_seed_is_reported_to_exclude_training_noise() -> None:
    tree = numbers(0.012, 0.001, 0.025, "better", seeds=1)
    assert "does not include training noise" in verdict_sentence(tree["effects"][0], tree)
    assert "Two seeds can agree by chance" in verdict_sentence(tree["effects"][0], tree | {"seeds": 2})
    assert "by chance" not in verdict_sentence(tree["effects"][0], tree | {"seeds": 3})


def test_identical_runs_report_no_detectable_effect() -> None:
    tree = numbers(0.0, 0.0, 0.0, "the same in every resample and seed")
    sentence = verdict_sentence(tree["effects"][0], tree)
    assert "the change has no effect on val" in sentence
    assert "minimum detectable effect" not in sentence


def test_an_undefined_metric_gives_no_verdict() -> None:
    tree = numbers(0.0, -0.1, 0.1, "better")
    tree["effects"][0]["metrics"]["coco.mAP"] = {"verdict": "not defined"}
    assert "not defined" in verdict_sentence(tree["effects"][0], tree)


def test_a_question_that_compares_no_arms_shows_no_empty_table() -> None:
    tree = numbers(0.0, -0.1, 0.1, "better") | {"effects": []}
    text = report_markdown(tree)
    assert "## Values and cost" in text
    assert [word for word in ("## Effects", "Bonferroni") if word in text] == []
    assert "\n\n\n" not in text


def test_the_text_is_well_formed_and_the_figure_overlays_the_arms(tmp_path: Path) -> None:
    tree = numbers(0.012, -0.001, 0.025, "better")
    claim = {"text": "more | is more", "source": "us", "arm": "w=2", "baseline": "w=1", "expected": "higher"}
    tree["claims"] = [
        claim | {"margin": 0.0, "metric": "coco.mAP", "delta": 0.1, "lo": 0.05, "hi": 0.2, "judgement": "x"}
    ]
    logs = {}
    for n, arm in enumerate(tree["arms"]):
        rows = [{"step": s, "raw/softce": 5 - 0.1 * s + n, "raw/text_ce": 1.0} for s in range(20)]
        log = tmp_path / f"{n}.jsonl"
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        logs[arm] = [read_log(log)] * 2
    text = write_report(tree, logs, tmp_path / "out").read_text(encoding="utf-8")
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert html.count("<table>") == 6
    assert "<p>|" not in html
    assert "more | is more</td>" in html
    assert "| `w=2` | 0.3200 | n/a |\n" in text  # F1 is undefined for one seed
    assert "| `w=2` | 102 | 6,000 |\n" in text
    assert "It took 1.20 times the tokens of training." in verdict_sentence(tree["effects"][0], tree)
    tree["runs"][0]["seconds"] = None  # of a run that came from the cache
    assert "| `w=1` | not measured | 5,000 |" in report_markdown(tree)
    with Image.open(tmp_path / "out" / "x.png") as picture:
        assert picture.width > picture.height


CLAIM = {
    "claim": "c", "text": "it is nearer", "arm": "w=2", "baseline": "stage1-control", "expected": "higher",
    "margin": 0.0, "metric": "coord.p_gt_mean", "unit": "0..1", "meaning": "probability", "split": "dev",
    "n_images": 48, "than": 0.0, "values": [0.3, 0.2], "delta": 0.1, "lo": 0.05, "hi": 0.2,
    "judgement": "confirmed", "yes": "", "no": "", "open": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "2 seeds of 3 planned, varying `stage2.seed`: the intervals are given one checkpoint of stage 1; no rule"),
        ({"seeds": 3}, "3 seeds, varying `stage2.seed`: the intervals are given one checkpoint of stage 1. Equal"),
        ({"seeds": 3, "seed_keys": ["stage1.seed", "stage2.seed"]}, "varying `stage1.seed` and `stage2.seed`. Equal"),
        (
            {"budget": "decoding"},
            "One checkpoint: the intervals contain the variation of the images, not that of training",
        ),
        ({}, "Equal training tokens, but `w=2` took 1.50 times that of `stage1-control`."),
        ({}, "| 48 dev | 0.3000 / 0.2000 |"),
        ({"left_out_claims": ["it | is better"]}, r"Claims left out with them: it \| is better."),
    ],
)
def test_the_page_of_a_question_says_what_its_intervals_cover(changes: dict[str, Any], words: str) -> None:
    tree = numbers(0.0, -0.1, 0.1, "better") | {"claims": [CLAIM], "planned_seeds": 3, "source": "us", "note": ""}
    for run in tree["runs"]:
        run["control"] = 4000
    assert words in answer_markdown(tree | changes, "coordexp answer x")


@pytest.mark.parametrize(
    ("baseline", "budget", "words"),
    [
        ("stage1-control", "tokens", ". It took 1.50 times the tokens of training."),
        ("stage1-control", "compute", ". It took 2.00 times the compute of training."),
        ("w=1", "tokens", "(500 images, 3 seeds)."),  # it continues the other side, stage 1
    ],
)
def test_a_verdict_says_what_an_unequal_budget_was(baseline: str, budget: str, words: str) -> None:
    tree = numbers(0.01, 0.005, 0.015, "better") | {"budget": budget, "seeds": 3}
    tree["arms"]["w=1"]["checkpoint"] = "stage1"
    for run in tree["runs"]:
        run |= {"compute": run["tokens"] + 2000, "control": 4000}
    row = tree["effects"][0] | {"baseline": baseline}
    assert verdict_sentence(row, tree).endswith(words)


def test_arms_with_looping_answers_get_no_verdict() -> None:
    tree = numbers(0.012, 0.001, 0.025, "not evaluated")
    row = tree["effects"][0]
    row["faults"] = {"ab-x-s0": ["30 % of the answers loop"]}
    told = {"planned_seeds": 2, "source": "us", "note": ""}
    for judgement, count in (("not evaluated", 1), ("confirmed", 0)):
        page = answer_markdown(tree | told | {"claims": [CLAIM | {"judgement": judgement}]}, "coordexp answer x")
        assert page.count("- Not evaluated because of `ab-x-s0`: 30 % of the answers loop.") == count
    sentence = verdict_sentence(row, tree)
    assert "**not evaluated**" in sentence
    assert sentence.endswith("because of faulty answers in ab-x-s0: 30 % of the answers loop.")
