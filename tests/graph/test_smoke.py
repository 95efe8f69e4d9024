"""The whole graph of the smoke profile in a temporary clone: it runs, it is reproducible, an A/B runs only its part."""

from __future__ import annotations

import json
import re

import pytest

from coordexp.config.loading import read_yaml
from coordexp.config.paths import CHECKPOINTS
from smoke_clone import STAGES, Clone

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smoke")]  # one worker: the clone is made once

AFTER_STAGE_2 = {"stage2", "coco-eval", "report"}


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


def unchanged(output: str) -> set[str]:
    return set(re.findall(r"Stage '([^':]+)' didn't change, skipping", output))  # a colon: of another dvc.yaml


def test_every_stage_runs_and_leaves_a_report(clone: Clone, reproduced: str) -> None:
    assert ran(reproduced) == set(STAGES)
    reports = clone.root / "reports" / "smoke"
    assert (reports / "progress.md").read_text().strip()
    assert any((reports / "gallery").iterdir())
    assert json.loads((reports / "metrics.json").read_text()).keys() >= set(CHECKPOINTS)


def test_a_second_run_changes_nothing(clone: Clone, reproduced: str) -> None:
    output = clone.succeed("dvc", "repro")
    assert ran(output) == set()
    assert unchanged(output) == set(STAGES)
    assert clone.succeed("git", "status", "--porcelain") == ""
    assert clone.run("dvc", "status", "--quiet").returncode == 0


def test_a_stage_2_weight_does_not_retrain_stage_1(clone: Clone, reproduced: str) -> None:
    before = read_yaml(clone.root / "dvc.lock")["stages"]
    output = clone.succeed("dvc", "exp", "run", "--set-param", "softce_weight=0.2")
    assert ran(output) == AFTER_STAGE_2
    after = read_yaml(clone.root / "dvc.lock")["stages"]
    assert {name for name in STAGES if before[name] != after[name]} == AFTER_STAGE_2
    table = clone.succeed("dvc", "metrics", "diff", "--all")
    assert re.search(r"reports/smoke/metrics\.json +stage2\.eval\.", table)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("softce_wt=0.2", "Could not override 'softce_wt'"),
        ("softce_weight=high", "softce_weight: found 'high' (text), expected a number >= 0."),
    ],
)
def test_a_wrong_parameter_stops_the_experiment(clone: Clone, reproduced: str, assignment: str, words: str) -> None:
    done = clone.run("dvc", "exp", "run", "--set-param", assignment)
    clone.succeed("git", "checkout", "--quiet", "--force", "HEAD")
    assert done.returncode != 0, done.stdout[-3000:]
    assert words in done.stdout
