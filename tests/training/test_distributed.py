"""Several processes on one run: the trace of one process, and an end for all when one of them fails."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import load_file

from coordexp.errors import ConfigError, Interrupted, TrainingError
from coordexp.training.distributed import merge_rows
from coordexp.training.launch import _error_of
from stage_runs import ENDS_WITHIN_S, assert_alike, run_stage, trace

# Stage -> numbers of processes and rows in one forward. Of three processes, one finds no row left in some steps.
SPREADS = {"stage1": [(1, 1), (3, 1)], "stage1-control": [(2, 0)], "stage2": [(2, 0), (3, 1)]}


@pytest.mark.slow
@pytest.mark.parametrize("stage", SPREADS)
def test_the_trace_is_that_of_one_process(ready, stage):
    code, output = run_stage(ready, stage, {"processes": 1})
    assert code == 0, output
    alone, weights = trace(ready, stage), load_file(ready.paths.run(stage) / "model.safetensors")
    if stage == "stage2":
        assert {row["channel"] for row in alone} == {"A", "B"}
    for processes, rows_per_forward in SPREADS[stage]:
        launch = {"processes": processes, "rows_per_forward": rows_per_forward}
        code, output = run_stage(ready, stage, launch)
        assert code == 0, output
        assert_alike(trace(ready, stage), alone)
        for name, value in load_file(ready.paths.run(stage) / "model.safetensors").items():
            torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=2e-5)


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
    found, output = run_stage(ready, "stage1", {"processes": 2}, before=before)
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
