"""The eval callback in a separate process: its results for each state, its end, and no effect on the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coordexp.errors import CheckpointError, DataError, Interrupted
from coordexp.experiments.monitor import find_state, follow, open_monitor, start_folder
from coordexp.infra.provenance import write_json
from coordexp.models.loading import load_checkpoint
from coordexp.packing.samples import SampleStore
from coordexp.records.gt_vs_pred import read_results
from coordexp.training.checkpoint import save_state
from coordexp.training.eval_callback import CURVE_COLUMNS
from coordexp.training.session import start_hash
from coordexp.training.stage1 import train_stage1
from coordexp.training.state_files import generation_name, generations
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
    monitor = workspace.profile.monitor.model_copy(update={"every_steps": 2})
    return replace(workspace, profile=workspace.profile.model_copy(update={"monitor": monitor}))


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


def contents(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for folder in generations(state) for path in folder.iterdir()}


def test_the_monitor_follows_a_run_without_changing_it(ready, tmp_path, monkeypatch) -> None:
    """And what is found is what training finds itself with the same weights."""
    train_stage1(ready)
    undisturbed = (ready.paths.run("stage1") / "model.safetensors").read_bytes()
    interrupt_after(monkeypatch, ready, 1)
    state, out = find_state(tmp_path, "stage1"), tmp_path / "out"
    before = contents(state)
    rows = []
    start = start_hash(start_folder(ready, "stage1"))
    callback = open_monitor(ready, "stage1", None, out)
    for row in follow(callback, state, start, 0.01):
        rows.append(row)
        assert contents(state) == before
        train_stage1(ready)  # resumes, ends, and removes its state
    assert [row["step"] for row in rows] == [2]
    assert (ready.paths.run("stage1") / "model.safetensors").read_bytes() == undisturbed
    header, line = (cells.split("\t") for cells in (out / "curve.tsv").read_text().splitlines())
    assert header == ["step", *CURVE_COLUMNS, "map", "map_50"]
    assert line[0] == "2"

    callback.checkpoint.model.load_state_dict(load_checkpoint(ready.paths.run("stage1")).model.state_dict())
    outside = callback.evaluate(4)
    *_, inside = (ready.paths.run("stage1") / "monitor.jsonl").read_text().splitlines()
    assert {k: v for k, v in json.loads(inside).items() if k != "seconds"} == {
        k: v for k, v in outside.items() if k not in ("seconds", "map", "map_50")
    }


@pytest.mark.parametrize("tuning", [{"method": "lora", "rank": 4}, {"vision": "freeze", "projector": "freeze"}])
def test_a_state_holds_exactly_the_trainable_weights(ready, tmp_path, monkeypatch, tuning) -> None:
    """Frozen weights come from the checkpoint that the run started from; a state of another one is refused."""
    changed = ready.profile.tuning.model_copy(update=tuning)
    space = replace(ready, profile=ready.profile.model_copy(update={"tuning": changed}))
    interrupt_after(monkeypatch, space, 1)
    state = find_state(tmp_path, "stage1")
    callback = open_monitor(space, "stage1", None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="started from weights with hash"):
        next(follow(callback, state, "elsewhere", 0.01))
    row = next(follow(callback, state, start_hash(start_folder(space, "stage1")), 0.01))
    (part,) = generations(state)[0].glob("part-*")
    trained = sum(weight.numel() for weight in callback.checkpoint.model.parameters() if weight.requires_grad)
    assert 8 * trained <= part.stat().st_size < 12 * trained + 2**18  # one moment or two
    train_stage1(space)  # goes on, first with the evaluation that was cut
    inside, *_ = map(json.loads, (space.paths.run("stage1") / "monitor.jsonl").read_text().splitlines())
    assert {k: v for k, v in inside.items() if k != "seconds"} == {
        k: v for k, v in row.items() if k not in ("seconds", "map", "map_50")
    }


def test_each_state_is_evaluated_with_its_weights_on_the_same_images(ready, tmp_path) -> None:
    callback, model = open_monitor(ready, "stage1", 2, tmp_path), torch.nn.Linear(1, 1)
    assert list(follow(callback, tmp_path / "nowhere", "", 0.01)) == []
    own, optimizer = callback.checkpoint.model, torch.optim.SGD(model.parameters(), lr=0.1)
    save_state(tmp_path / "a", 3, own, optimizer)
    with torch.no_grad():
        for weight in own.parameters():
            weight.mul_(1.5)
    save_state(tmp_path / "b", 4, own, optimizer)
    answers = []
    for name in ("a", "b", "a"):
        row = next(follow(callback, tmp_path / name, "", 0.01))
        answers.append(list(read_results(tmp_path / "monitor_answers" / f"step_{row['step']:06d}.jsonl")))
    first, other, again = ([r.raw_text for r in results] for results in answers)
    assert first == again != other
    assert len({tuple(r.image_id for r in results) for results in answers}) == 1


def test_the_newest_state_of_the_stage_is_found_and_the_control_is_another_stage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no saved state of stage1"):
        find_state(tmp_path, "stage1")
    for age, name in enumerate(("stage1-control-cccc", "stage1-bbbb", "stage1-aaaa")):
        saved = tmp_path / ".resume" / name / generation_name(1)
        saved.mkdir(parents=True)
        os.utime(saved, (1000 - age, 1000 - age))
    assert find_state(tmp_path, "stage1").name == "stage1-bbbb"
    assert find_state(tmp_path, "stage1-control").name == "stage1-control-cccc"
