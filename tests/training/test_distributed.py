"""Runs in several processes: the same trace as in one process, and all end when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from coordexp.errors import TrainingError
from coordexp.losses.coord_terms import CoordDiagnostics, CoordSlots, slot_diagnostics
from coordexp.records.gt_vs_pred import read_results
from coordexp.training import distributed
from coordexp.training.distributed import Meeting, World, gathered_row, merge_rows, shared_out, showing_life
from helpers import PARAMS, Workspace
from stage_runs import ENDS_WITHIN_S, assert_alike, run_stage, trace

# Stage -> keys of `launch`. Of three processes, one finds no row left in some steps.
SPREADS = {
    "stage1": [{"processes": 1, "rows_per_forward": 1}, {"processes": 3, "rows_per_forward": 1}],
    "stage1-control": [{"processes": 2, "sharding": "fsdp2"}],
    "stage2": [
        {"processes": 2},
        {"processes": 3, "rows_per_forward": 1},
        {"processes": 3, "rows_per_forward": 1, "sharding": "fsdp2"},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", SPREADS)
def test_the_trace_is_that_of_one_process(ready, stage):
    code, output = run_stage(ready, stage, {"processes": 1})
    assert code == 0, output
    alone, weights = trace(ready, stage), load_file(ready.paths.run(stage) / "model.safetensors")
    evaluated = evaluations(ready, stage)
    assert evaluated
    if stage == "stage2":
        assert {row["channel"] for row in alone} == {"A", "B"}
    for launch in SPREADS[stage]:
        code, output = run_stage(ready, stage, launch)
        assert code == 0, output
        assert_alike(trace(ready, stage), alone)
        assert evaluations(ready, stage) == ([] if "sharding" in launch else evaluated)
        for name, value in load_file(ready.paths.run(stage) / "model.safetensors").items():
            torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=2e-5)


def evaluations(ready: Workspace, stage: str) -> list[dict[str, Any]]:
    """What the eval callback counted, and which images it answered in which order."""
    folder = ready.paths.run(stage)
    rows = [json.loads(line) for line in (folder / "monitor.jsonl").read_text().splitlines()]
    answers = [read_results(path) for path in sorted((folder / "monitor_answers").glob("*.jsonl"))]
    return [
        row | {"answers": [(r.image_id, r.raw_text) for r in found]} for row, found in zip(rows, answers, strict=True)
    ]


@pytest.mark.slow
def test_fresh_rollouts_are_those_of_one_process(ready):
    params = {"stage2": {"refresh_steps": 1, "b_ratio": 1.0}, "decode": {"max_new_tokens": 12}}
    traces = []
    for processes in (1, 2):
        code, output = run_stage(ready, "stage2", {"processes": processes}, params=params)
        assert code == 0, output
        traces.append(trace(ready, "stage2"))
    assert any(row.get("rollout/generated_tokens") for row in traces[0])
    assert_alike(traces[1], traces[0])


RAISES = (
    "from coordexp.training.step import TeacherTask as T\n"
    "def fail(self, step):\n    raise ZeroDivisionError('on purpose')\n"
    "if os.environ.get('RANK') == '1': T.micro_batches = fail"
)
IS_NAN = (
    "from coordexp.training import step as t\nkept = t.micro_batch\n"
    "def broken(*args):\n    made = kept(*args)\n    made.loss.data.fill_(float('nan'))\n    return made\n"
    "if os.environ.get('RANK') == '1': t.micro_batch = broken"
)
DIES = "if os.environ.get('RANK') == '1': os._exit(3)"
IS_STOPPED = (
    "import signal\nfrom coordexp.training.step import TeacherTask as T\nkept = T.micro_batches\n"
    "def stop(self, step):\n    step == 1 and os.kill(os.getpid(), signal.SIGTERM)\n"
    "    return kept(self, step)\n"
    "if os.environ.get('RANK') == '1': T.micro_batches = stop"
)
# One process cannot generate its part of the fresh rollouts, and the other one waits for it.
CANNOT_GENERATE = (
    "from coordexp.errors import TrainingError\nfrom coordexp.rollout.hf_engine import HfEngine\n"
    "def fail(self, samples, settings):\n    raise TrainingError('the engine is gone')\n"
    "if os.environ.get('RANK') == '1': HfEngine.generate = fail"
)
FAULTS = {
    "exception": (RAISES, {}, 1, "ZeroDivisionError: on purpose"),
    "nan": (IS_NAN, {}, 1, "failed-process-1.json"),
    "dead": (DIES, {}, 1, "process 1 of 2 ended with 3"),
    "signal": (IS_STOPPED, {}, 75, "after step 2 of 4"),
    "exception, sharded": (RAISES, {"sharding": "fsdp2"}, 1, "ZeroDivisionError: on purpose"),
    "nan, sharded": (IS_NAN, {"sharding": "fsdp2"}, 1, "failed-process-1.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_when_one_process_fails_all_end(ready, fault):
    before, launch, code, words = FAULTS[fault]
    started = time.monotonic()
    found, output = run_stage(ready, "stage1", {"processes": 2, **launch}, before=before)
    assert time.monotonic() - started < ENDS_WITHIN_S
    assert (found, words in output) == (code, True), output[-4000:]


JOINS = (
    "from coordexp.infra.signals import interrupted_by_signals\nfrom coordexp.training.distributed import world\n"
    "with interrupted_by_signals(): world()"
)


@pytest.mark.slow
def test_a_signal_ends_a_process_that_waits_for_others_to_join(repository: Path) -> None:
    """Otherwise the launcher would wait until it kills it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": address[0],
        "MASTER_PORT": f"{address[1]}",
    }
    environment = os.environ | ranks | {"PYTHONPATH": str(repository / "src")}
    with subprocess.Popen([sys.executable, "-c", JOINS], env=environment) as process:
        try:
            while not _listens(address):  # process 0 does, and then waits for process 1
                assert process.poll() is None
                time.sleep(0.05)
            process.terminate()
            assert process.wait(ENDS_WITHIN_S / 4) == -signal.SIGTERM
        finally:
            process.kill()


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as visitor:
        return visitor.connect_ex(address) == 0


@pytest.mark.slow
def test_a_failing_rollout_ends_all_processes(ready):
    params = {"stage2": {"refresh_steps": 1, "b_ratio": 1.0}}
    code, output = run_stage(ready, "stage2", {"processes": 2}, params=params, before=CANNOT_GENERATE)
    assert (code, "error: step 1: the engine is gone" in output) == (1, True), output[-4000:]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """The store of three processes, of which this is process 0."""
    store = dist.HashStore()
    monkeypatch.setattr(distributed, "_board", lambda: store)
    monkeypatch.setattr(distributed, "world", lambda: World(0, 3, torch.device("cpu")))
    monkeypatch.setattr(distributed, "SILENCE_S", 0.5)
    monkeypatch.setattr(distributed, "BEAT_EVERY_S", 0.1)
    return store


def as_process(rank: int, meeting: Meeting, word: str) -> tuple[str, str]:
    return meeting._key(rank), word


def test_waiting_returns_the_strings_of_the_other_processes(store) -> None:
    meeting = Meeting("work")
    with meeting:
        meeting.come("0")
    later = threading.Timer(0.2, lambda: store.set(*as_process(2, meeting, "+2")))
    store.set(*as_process(1, meeting, "+1"))
    later.start()
    assert meeting.wait() == ["0", "1", "2"]


def test_a_failed_process_is_not_waited_for(store) -> None:
    meeting, other = Meeting("work"), Meeting("more work")
    with pytest.raises(ZeroDivisionError), meeting:
        raise ZeroDivisionError
    store.set(*as_process(1, meeting, "+"))
    store.set(*as_process(2, meeting, "+"))
    with pytest.raises(TrainingError, match="work: process 0 of 3 failed"):
        meeting.wait()
    assert other._number == meeting._number + 1


def test_only_a_process_without_heartbeats_is_given_up(store) -> None:
    meeting, ended = Meeting("work"), threading.Event()
    meeting.come()
    store.set(*as_process(1, meeting, "+"))

    def live() -> None:
        for beat in range(20):
            store.set("beat/2", str(beat))
            if ended.wait(0.1):
                return

    alive = threading.Thread(target=live)
    started = time.monotonic()
    alive.start()
    with pytest.raises(TrainingError, match=r"work: process 2 of 3 has sent no heartbeat for 0 s"):
        meeting.wait()
    ended.set()
    alive.join()
    assert time.monotonic() - started > 2.0


def test_forwards_send_heartbeats(store) -> None:
    model = torch.nn.Identity()
    with showing_life(model):
        model(torch.ones(1))
    assert distributed._last_beat(0)
    first = distributed._last_beat(0)
    model(torch.ones(1))
    assert distributed._last_beat(0) == first


def test_distributed_work_returns_in_order(store, monkeypatch: pytest.MonkeyPatch) -> None:
    items = list("abcdefgh")
    parts = [[letter.upper() for letter in items[rank::3]] for rank in range(3)]
    monkeypatch.setattr(distributed, "gather", lambda own: [own, *parts[1:]])
    monkeypatch.setattr(Meeting, "wait", lambda self: [])

    def upper(own):
        assert own == items[0::3]
        return [letter.upper() for letter in own]

    assert shared_out("letters", items, upper, torch.nn.Identity()) == list("ABCDEFGH")


def slots_with_errors(errors_bins: list[float]) -> CoordDiagnostics:
    """Diagnostics of as many slots, certain of bins that are off by so much."""
    logits_NK = torch.zeros(len(errors_bins), 1000)
    logits_NK[:, 500] = 100.0
    targets_N = 500 - torch.tensor(errors_bins)
    return slot_diagnostics(CoordSlots(logits_NK, torch.zeros(len(errors_bins)), targets_N, PARAMS))


def test_rows_of_parts_by_hand():
    parts = [
        {"channel": "A", "loss/total": 1.0, "raw/w1": 0.5, "tokens": 10, "samples": 1, "stage2_ab/matched_total": 3},
        {"channel": "A", "loss/total": 2.0, "raw/w1": 0.25, "tokens": 5, "samples": 2, "stage2_ab/matched_total": 3},
        {"channel": "A", "loss/total": 0.0, "raw/w1": 0.0, "tokens": 0, "samples": 0},
    ]
    row = {"channel": "A", "loss/total": 3.0, "raw/w1": 0.75, "tokens": 15, "samples": 3, "stage2_ab/matched_total": 3}
    assert merge_rows(parts) == row


def test_diagnostics_of_parts_are_those_of_all_slots_percentiles_included():
    """Parts of very unequal size and error, whose mean of percentiles would be far off."""
    errors = [[1.0], [40.0, 41.0, 60.0], [2.0 + i / 10 for i in range(16)], []]
    whole = slots_with_errors([e for part in errors for e in part]).summary()
    merged = gathered_row(merge_rows([{"coord_diag": slots_with_errors(part)} for part in errors]))
    assert merged == pytest.approx({f"coord_diag/{name}": value for name, value in whole.items()}, rel=1e-6)
    assert merged["coord_diag/coord_tokens"] == 20
    assert merged["coord_diag/expected_bin_abs_err_p90"] == pytest.approx(40, abs=1.5)
