"""Several processes on one run: the trace of one process, and an end for all when one of them fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from coordexp.config.loading import read_yaml
from coordexp.errors import ConfigError, Interrupted, TrainingError
from coordexp.models.loading import load_checkpoint
from coordexp.rollout.records import write_rollouts
from coordexp.training.distributed import merge_rows
from coordexp.training.launch import _error_of
from helpers import MAX_PIXELS, MIN_PIXELS, Workspace, teacher_rollouts

REPOSITORY = Path(__file__).parents[2]
ENDS_WITHIN_S = 240.0
ENTRIES = {"stage1": "stage1", "stage1-control": "stage1_control", "stage2": "stage2"}
# Stage -> numbers of processes and rows in one forward. Of three processes, one finds no row left in some steps.
SPREADS = {"stage1": [(1, 1), (3, 1)], "stage1-control": [(2, 0)], "stage2": [(2, 0), (3, 1)]}


@pytest.fixture
def ready(workspace: Workspace, world) -> Workspace:
    """With rollouts (one of which does not parse) and stage 2's compute on file, so that each stage can run."""
    checkpoint = load_checkpoint(workspace.paths.run("stage1"), MIN_PIXELS, MAX_PIXELS)
    workspace.paths.run("rollout").mkdir()
    write_rollouts(workspace.paths.run("rollout") / "rollouts.jsonl", teacher_rollouts(checkpoint, world).values())
    workspace.paths.run("stage2-compute.json").write_text('{"steps": 4, "tokens": 2000}')
    return workspace


def run(ready: Workspace, stage: str, processes: int, rows_per_forward: int = 0, before: str = "") -> tuple[int, str]:
    """Run the entry of a stage as DVC does, in the workspace; `before` is code that each process runs first."""
    root = ready.paths.root
    profile = read_yaml(REPOSITORY / "configs" / "smoke.yaml")
    profile["model"] |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    profile["launch"] |= {"processes": processes, "rows_per_forward": rows_per_forward}
    for part in ("stage1", "stage2"):
        # Muon orthogonalises in bfloat16, which turns the last digit of a gradient into the third of an update.
        profile[part] |= {"precision": "fp32", "optimizer": "adamw", "lr": 1e-4}
    (root / "configs").mkdir(exist_ok=True)
    YAML().dump(profile, root / "configs" / "smoke.yaml")
    (root / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    (root / "entry.py").write_text(
        f"import os\nimport sys\nfrom pipelines.{ENTRIES[stage]} import run\n"
        f"from coordexp.config.process import stage_main\n{before}\nsys.exit(stage_main(run))\n"
    )
    done = subprocess.run(
        [sys.executable, "entry.py", "--profile", "smoke"],
        cwd=root,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}",
            "DVC_ROOT": str(root),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ENDS_WITHIN_S,
        check=False,
    )
    return done.returncode, done.stdout


def trace(ready: Workspace, stage: str) -> list[dict]:
    lines = (ready.paths.run(stage) / "train_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("stage", SPREADS)
def test_the_trace_is_that_of_one_process(ready, stage):
    code, output = run(ready, stage, 1)
    assert code == 0, output
    alone, weights = trace(ready, stage), load_file(ready.paths.run(stage) / "model.safetensors")
    if stage == "stage2":
        assert {row["channel"] for row in alone} == {"A", "B"}
    for processes, rows_per_forward in SPREADS[stage]:
        code, output = run(ready, stage, processes, rows_per_forward)
        assert code == 0, output
        assert_alike(trace(ready, stage), alone)
        for name, value in load_file(ready.paths.run(stage) / "model.safetensors").items():
            torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=2e-5)


def assert_alike(found: list[dict], expected: list[dict]) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            if isinstance(value, str):
                assert row[name] == value
            elif not name.endswith("_p90"):  # an average of quantiles is none
                assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (wanted["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "code", "words"),
    [
        (
            "from coordexp.training.teacher_task import TeacherTask as T\n"
            "def fail(self, step):\n    raise ZeroDivisionError('on purpose')\n"
            "if os.environ.get('RANK') == '1': T.micro_batches = fail",
            1,
            "ZeroDivisionError: on purpose",
        ),
        (
            "from coordexp.training import teacher_task as t\nkept = t.to_micro_batch\n"
            "def broken(*args):\n    made = kept(*args)\n    made.loss.data.fill_(float('nan'))\n    return made\n"
            "if os.environ.get('RANK') == '1': t.to_micro_batch = broken",
            1,
            "failed-process-1.json",
        ),
        ("if os.environ.get('RANK') == '1': os._exit(3)", 1, "process 1 of 2 ended with 3"),
        (
            "import signal\nfrom coordexp.training.teacher_task import TeacherTask as T\nkept = T.micro_batches\n"
            "def stop(self, step):\n    step == 1 and os.kill(os.getpid(), signal.SIGTERM)\n"
            "    return kept(self, step)\n"
            "if os.environ.get('RANK') == '1': T.micro_batches = stop",
            75,
            "after step 2 of 4",
        ),
    ],
    ids=["exception", "nan", "dead", "signal"],
)
def test_when_one_process_fails_all_end(ready, before, code, words):
    started = time.monotonic()
    found, output = run(ready, "stage1", 2, before=before)
    assert time.monotonic() - started < ENDS_WITHIN_S
    assert (found, words in output) == (code, True), output[-4000:]


@pytest.mark.parametrize(
    ("codes", "kind"),
    [
        ({0: 75, 1: 75}, Interrupted),
        ({0: 75, 1: -15}, Interrupted),
        ({0: -15, 1: 1}, TrainingError),
        ({0: 2, 1: 2}, ConfigError),
        ({0: -9, 1: -15}, TrainingError),
        ({0: 75, 1: 1}, TrainingError),
    ],
)
def test_what_exit_codes_amount_to(codes, kind):
    assert type(_error_of(codes, 2)) is kind


def test_rows_of_parts_by_hand():
    parts = [
        {"channel": "A", "loss/total": 1.0, "raw/w1": 0.5, "tokens": 10, "samples": 1, "coord_diag/mae": 4.0,
         "coord_diag/coord_tokens": 1.0, "stage2_ab/matched_total": 3},
        {"channel": "A", "loss/total": 2.0, "raw/w1": 0.25, "tokens": 5, "samples": 2, "coord_diag/mae": 8.0,
         "coord_diag/coord_tokens": 3.0, "stage2_ab/matched_total": 3},
        {"channel": "A", "loss/total": 0.0, "raw/w1": 0.0, "tokens": 0, "samples": 0, "coord_diag/coord_tokens": 0.0},
    ]  # fmt: skip
    assert merge_rows(parts) == {
        "channel": "A", "loss/total": 3.0, "raw/w1": 0.75, "tokens": 15, "samples": 3, "coord_diag/mae": 7.0,
        "coord_diag/coord_tokens": 4.0, "stage2_ab/matched_total": 3,
    }  # fmt: skip
