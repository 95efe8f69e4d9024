"""The smoke profile's whole graph in a temporary clone: it runs, is reproducible, and an A/B reruns only its part."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from coordexp.config.loading import read_yaml
from coordexp.config.paths import CHECKPOINTS
from coordexp.reporting.questions import INDEX
from smoke_clone import STAGES, Clone

pytestmark = pytest.mark.slow

AFTER_STAGE_2 = {"stage2", "decode@stage2", "coco-eval", "report"}
MADE = ("data/smoke/raw/manifest.json", "runs/smoke/stage1/model.safetensors", "reports/smoke/headline.json")


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


def unchanged(output: str) -> set[str]:
    return set(re.findall(r"Stage '([^':]+)' didn't change, skipping", output))  # a colon: of another dvc.yaml


def test_every_stage_runs_and_a_report_is_written(finished: Clone, reproduced: str) -> None:
    assert ran(reproduced) == set(STAGES)
    reports = finished.root / "reports" / "smoke"
    assert (reports / "progress.md").read_text().strip()
    assert any((reports / "gallery").iterdir())
    metrics = json.loads((finished.root / "runs" / "smoke" / "eval" / "metrics.json").read_text())
    assert metrics.keys() >= set(CHECKPOINTS)


def test_a_second_run_changes_nothing(clone: Clone) -> None:
    output = clone.succeed("dvc", "repro")
    assert ran(output) == set()
    assert unchanged(output) == set(STAGES)
    assert clone.succeed("git", "status", "--porcelain") == ""
    assert clone.run("dvc", "status", "--quiet").returncode == 0


def test_a_stage_2_weight_does_not_retrain_stage_1(finished: Clone, experimented: Clone) -> None:
    output = (experimented.root.parent / "output").read_text(encoding="utf-8")
    assert ran(output) == {"check", *AFTER_STAGE_2}
    before, after = (read_yaml(clone.root / "dvc.lock")["stages"] for clone in (finished, experimented))
    assert {name for name in STAGES if before[name] != after[name]} == {"check", *AFTER_STAGE_2}
    assert re.search(r"params\.yaml +softce_weight +1\.0 +0\.2", experimented.succeed("dvc", "params", "diff"))
    table = experimented.succeed("dvc", "metrics", "diff", "--all")
    assert len(table.strip().splitlines()) <= 1 + 15
    assert re.search(r"reports/smoke/headline\.json +stage2\.eval\.", table)


WRONG = {
    "softce_weight=high": "softce_weight: found 'high' (text), expected a number >= 0.",
    "+softce_wt=0.2": "softce_wt: unknown key, set to 0.2 (a number). Did you mean 'softce_weight'?",
    "+custom.coord_loss.weight=1": "custom.coord_loss: removed.",
    "configs/smoke.yaml:stage1.steps=0": "stage1.steps: found 0 (an integer), expected an integer >= 1.",
}


def test_an_invalid_parameter_stops_before_anything_is_removed(clone: Clone) -> None:
    files = set()
    for assignment, words in WRONG.items():
        file = assignment.rpartition(":")[0] or "params.yaml"
        again = () if file in files else (("repro",),)  # it finds what the other left
        files.add(file)
        for command in (("exp", "run", "--set-param", assignment), *again):
            done = clone.run("dvc", *command)
            assert done.returncode != 0, done.stdout[-3000:]
            assert words in done.stdout
            assert ran(done.stdout) == {"check"}
            assert clone.succeed("git", "status", "--porcelain").split() == ["M", file]
            assert [path for path in MADE if not (clone.root / path).is_file()] == []
        clone.succeed("git", "checkout", "--quiet", "--force", "HEAD")
    assert clone.run("dvc", "status", "--quiet").returncode == 0


def test_a_comment_reruns_only_check_and_code_the_importing_stages(clone: Clone) -> None:
    gallery = clone.root / "src" / "coordexp" / "reporting" / "gallery.py"
    text = gallery.read_text()
    for edit, expected in (("# a comment\n", {"check"}), ("EDITED = 1\n", {"check", "report"})):
        gallery.write_text(text + edit)
        assert ran(clone.succeed("dvc", "repro")) == expected


def test_a_stage_started_past_check_refuses_other_parameters(clone: Clone) -> None:
    params = clone.root / "params.yaml"
    params.write_text(params.read_text().replace("mapping: normalised", "mapping: exact"))
    done = clone.run("dvc", "repro", "--force", "--single-item", "report")
    assert done.returncode != 0
    assert "inputs/smoke/report.json: eval.mapping is 'normalised' in this file, but now it is 'exact'." in done.stdout


def test_an_ab_test_runs_in_one_command_and_reuses_results(experimented: Clone, tmp_path: Path) -> None:
    """One run is that of the commit; DVC has the stages of the other. Repetitions: tests/experiments/test_runs.py."""
    clone = experimented.copy(tmp_path).without_experiments()
    command = ("-m", "coordexp.cli", "ab", "-S", "softce_weight=1.0,0.2", "--seeds", "1", "--name", "softce")
    first = clone.succeed("env", "PYTHONPATH=src", "python", *command)
    assert "`softce_weight=0.2` against `softce_weight=1.0`:" in first
    assert first.count(": exists") == 2
    report = clone.root / "reports" / "ab"
    numbers = json.loads((report / "softce.json").read_text())
    assert list(numbers["arms"]) == ["softce_weight=1.0", "softce_weight=0.2"]
    names = {run["experiment"] for run in numbers["runs"]} - {"main"}
    assert len(names) == 1
    assert names <= set(clone.succeed("dvc", "exp", "list", "--name-only").split())
    assert clone.succeed("git", "status", "--porcelain", "--untracked-files=no") == ""
    before = (report / "softce.md").read_bytes()
    second = clone.succeed("env", "PYTHONPATH=src", "python", *command)
    assert second.count(": exists") == 2 * 2  # in the plan, and at its turn
    assert names <= set(clone.succeed("dvc", "exp", "list", "--name-only").split())
    assert (report / "softce.md").read_bytes() == before


QUESTION = """\
question: What does the smoke profile say?
seeds: 1
arms:
  as_committed: {}
  argmax: {changes: [decode.box=argmax], baseline: as_committed}
claims:
  together: {text: F1 and mAP rise together, source: a test, arm: as_committed, metric: trajectory.f1_with_map,
             expected: higher}
  robust: {text: order does not matter, source: a test, arm: as_committed, metric: order.agreement, than: 0.9,
           expected: higher}
  drift: {text: the second forward drifts, source: a test, arm: as_committed, metric: context.drift, expected: higher}
  tight: {text: boxes overlap, source: a test, arm: argmax, baseline: as_committed, metric: geometry.iou,
          expected: lower}
"""


def test_a_question_about_existing_runs_trains_nothing(clone: Clone) -> None:
    """Saved steps and the checkpoint itself are evaluated in this process; the page states what is not evaluated."""
    (clone.root / "configs" / "questions" / "smoke.yaml").write_text(QUESTION)
    clone.commit("a question")
    command = ("env", "PYTHONPATH=src", "python", "-m", "coordexp.cli", "answer", "smoke")
    assert "as_committed, seed 0: exists as main" in clone.succeed(*command, "--dry-run")
    output = clone.succeed(*command)
    assert "stage2: step" not in output
    numbers = json.loads((clone.root / "reports" / "answers" / "smoke.json").read_text())
    assert {run["experiment"] for run in numbers["runs"]} == {"main"}
    by_name = {claim["claim"]: claim for claim in numbers["claims"]}
    assert "delta" not in by_name["drift"]  # one forward has no second
    assert by_name["tight"]["values"][0] is not None or by_name["tight"]["judgement"] == "not defined"
    page = (clone.root / "reports" / "answers" / "smoke.md").read_text()
    assert page.startswith("# What does the smoke profile say?")
    assert clone.succeed(*command).count(": exists") == 2 * 2
    assert "smoke: What does the smoke profile say?" in clone.succeed(*command[:-1], "--list")
    kept = clone.succeed(*command[:-2], "monitor", "stage2", "--kept")
    assert "reports/smoke/trajectory/stage2.md" in kept
    assert "0 files damaged" in clone.succeed(*command[:-2], "verify")  # also of what was let go of
    assert clone.succeed("git", "status", "--porcelain", "--untracked-files=no").split() == ["M", str(INDEX)]


def test_on_a_clone_an_evaluation_setting_runs_evaluation_and_report_only(other: Clone) -> None:
    assert not (other.root / "runs").exists()
    params = other.root / "params.yaml"
    params.write_text(params.read_text().replace("mapping: normalised", "mapping: exact"))
    output = other.succeed("dvc", "repro", "--pull", "--allow-missing")
    assert ran(output) == {"check", "coco-eval", "report"}
    assert not (other.root / "data" / "smoke" / "norm1000").exists(), "what no stage needed was not fetched"


def test_a_clone_pulls_the_checkpoints(other: Clone) -> None:
    other.succeed("dvc", "pull", "--allow-missing")
    assert (other.root / "runs" / "smoke" / "stage1" / "model.safetensors").is_file()
    assert other.run("dvc", "status", "--quiet").returncode == 0


def test_an_experiment_can_be_pushed_and_pulled(published: Path, other: Clone, tmp_path: Path) -> None:
    clone = replace(other, root=published / "clone", home=published / "home").copy(tmp_path / "first")
    clone.succeed("dvc", "exp", "run", "--temp", "--name", "traveller", "--set-param", "eval.mapping=exact")
    clone.succeed("dvc", "exp", "push", "origin", "traveller")
    other.succeed("dvc", "exp", "pull", "origin", "traveller")
    other.succeed("dvc", "exp", "apply", "traveller")
    assert read_yaml(other.root / "params.yaml")["eval"]["mapping"] == "exact"
    assert (other.root / "reports" / "smoke" / "progress.md").read_text()
