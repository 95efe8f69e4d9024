"""Looking at a training run from outside: right answers, replaced lines, an end, and a run that does not notice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from coordexp.errors import DataError, Interrupted
from coordexp.experiments.monitor import COLUMNS, Look, Monitor, find_state, watch, write_look
from coordexp.infra.provenance import write_json
from coordexp.packing.samples import SampleStore
from coordexp.records.gt_vs_pred import read_results
from coordexp.training.checkpoint import save_state
from coordexp.training.stage1 import train_stage1
from coordexp.training.step import TeacherTask
from helpers import Workspace


@pytest.fixture
def ready(workspace: Workspace) -> Workspace:
    """With a dev split and its categories."""
    shutil.copy(workspace.paths.norm1000 / "train.parquet", workspace.paths.norm1000 / "dev.parquet")
    store = SampleStore(workspace.paths.norm1000 / "dev.parquet")
    names = sorted({desc for i in range(len(store)) for desc in store[i].descs})
    rows = [{"id": n, "name": name, "split": "train"} for n, name in enumerate(names, 1)]
    write_json(workspace.paths.records / "categories.json", rows)
    return workspace.set(decode__max_new_tokens=8)


def monitor_of(space: Workspace, images: int = 2) -> Monitor:
    return Monitor(space, "stage1", images)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, space: Workspace, step: int) -> None:
    """Run stage 1 and stop it there, so that it leaves a state."""
    original = TeacherTask.micro_batches

    def micro_batches(self, at):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, at)

    monkeypatch.setattr(TeacherTask, "micro_batches", micro_batches)
    with pytest.raises(Interrupted):
        train_stage1(space)
    monkeypatch.setattr(TeacherTask, "micro_batches", original)


def test_a_run_is_watched_to_its_end_and_does_not_notice(ready, tmp_path, monkeypatch) -> None:
    train_stage1(ready)
    undisturbed = (ready.paths.run("stage1") / "model.safetensors").read_bytes()
    interrupt_after(monkeypatch, ready, 1)
    state, out = find_state(tmp_path, "stage1"), tmp_path / "out"
    before = (state / "state.pt").read_bytes()
    looks: list[Look] = []
    followed: list[Path] = []
    for look in watch(monitor_of(ready), state, out, 0.01, followed.append):
        looks.append(look)
        assert (state / "state.pt").read_bytes() == before
        train_stage1(ready)  # resumes, ends, and removes its state
    assert [look.step for look in looks] == [2]
    assert set(followed) == {state}
    assert (ready.paths.run("stage1") / "model.safetensors").read_bytes() == undisturbed
    results = list(read_results(out / "step_000002.jsonl"))
    assert len(results) == 2
    header, line = (out / "curve.tsv").read_text().splitlines()
    assert header.split("\t") == ["step", *COLUMNS]
    assert line.split("\t")[0] == "2"


def test_each_look_uses_the_weights_of_its_state_on_the_same_images(ready, tmp_path) -> None:
    monitor, model = monitor_of(ready), torch.nn.Linear(1, 1)
    assert monitor.look(tmp_path / "nowhere") is None
    own = monitor._checkpoint.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_state(tmp_path / "a", 3, own, optimizer)
    first, again = monitor.look(tmp_path / "a"), monitor.look(tmp_path / "a")
    with torch.no_grad():
        for weight in own.parameters():
            weight.mul_(1.5)
    save_state(tmp_path / "b", 4, own, optimizer)
    other = monitor.look(tmp_path / "b")
    assert first is not None
    assert again is not None
    assert other is not None
    assert (first.step, other.step) == (3, 4)
    assert [r.raw_text for r in first.results] == [r.raw_text for r in again.results]
    assert [r.image_id for r in first.results] == [r.image_id for r in other.results]
    assert [r.raw_text for r in first.results] != [r.raw_text for r in other.results]


def test_a_step_that_is_looked_at_again_replaces_its_line(tmp_path: Path) -> None:
    for step, value in ((20, 0.5), (10, 0.25), (20, 0.75), (30, None)):
        write_look(Look(step, {"coco.mAP": value}, []), tmp_path)
    lines = (tmp_path / "curve.tsv").read_text().splitlines()
    assert lines == ["step\tcoco.mAP", "10\t0.2500", "20\t0.7500", "30\t"]


def test_the_newest_state_of_the_stage_is_found_and_the_control_is_another_stage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no state of stage1"):
        find_state(tmp_path, "stage1")
    for age, name in enumerate(("stage1-control-cccc", "stage1-bbbb", "stage1-aaaa")):
        file = tmp_path / ".resume" / name / "state.pt"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({}))
        os.utime(file, (1000 - age, 1000 - age))
    assert find_state(tmp_path, "stage1").name == "stage1-bbbb"
    assert find_state(tmp_path, "stage1-control").name == "stage1-control-cccc"
