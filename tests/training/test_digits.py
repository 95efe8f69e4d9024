"""Plain numbers instead of coordinate tokens: every training and decoding stage runs, and only text is trained."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from coordexp.config.loading import read_yaml
from coordexp.config.presets import read_preset, with_changes
from coordexp.evaluation.evaluator import evaluate
from coordexp.packing.collator import teacher_segment
from coordexp.records.categories import Category
from coordexp.rollout.scoring import read_decoded, scored
from coordexp.rollout.stages import decode_split, run_rollouts
from coordexp.text.codecs import Role
from coordexp.training.stage1 import train_stage1
from coordexp.training.stage2 import train_stage2
from helpers import Workspace, build_workspace, build_world


@pytest.fixture
def digits(tmp_path, repository, monkeypatch) -> Workspace:
    """The smoke workspace under the preset, with samples in its codec."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "world").mkdir()
    space = build_workspace(tmp_path, build_world(tmp_path / "world", "digits"))
    params = with_changes(read_yaml(repository / "params.yaml"), read_preset("raw_digits", repository), "raw_digits")
    return replace(space, params=params).set(decode__max_new_tokens=24)


def rows(space: Workspace, stage: str) -> list[dict]:
    lines = (space.paths.run(stage) / "train_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_numbers_are_text_and_nothing_is_a_coordinate(tmp_path):
    sample = build_world(tmp_path, "digits").samples[0]
    segment = teacher_segment(sample)
    assert (segment.answer_roles == Role.NUMBER).sum() >= 4 * len(sample.descs)
    assert (segment.text_weights == 1).all()
    assert segment.box_tokens.shape == (0, 4)


def test_the_graph_runs_on_text_alone(digits):
    train_stage1(digits)
    assert {k for row in rows(digits, "stage1") for k in row if k.startswith("loss/")} == {"loss/total", "loss/text_ce"}
    run_rollouts(digits)
    train_stage2(digits)
    assert {row["channel"] for row in rows(digits, "stage2")} == {"A"}
    decode_split(digits, "stage2", digits.paths.run("stage2"), digits.paths.decoded("stage2"))
    results = [scored(answer, digits.params.decode) for answer in read_decoded(digits.paths.decoded("stage2"))]
    assert len(results) == 6
    names = sorted({gt.desc for result in results for gt in result.gt})
    categories = [Category(i, name) for i, name in enumerate(names, 1)]
    params = digits.params
    metrics = evaluate(results, categories, params.eval, params.matching, params.seed).metrics
    assert 0 <= metrics["parse"]["parse_rate"] <= 1
