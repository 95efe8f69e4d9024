"""Looking at a model in training: what is left, what a resumed run keeps, and a training that does not notice."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coordexp.errors import Interrupted
from coordexp.models.loading import load_checkpoint
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, read_results
from coordexp.rollout.decode import EMITTED
from coordexp.rollout.engine import DecodeSettings
from coordexp.rollout.records import write_rollouts
from coordexp.rollout.stages import make_reader, predict_samples
from coordexp.training.looks import count_answers, judge_answer
from coordexp.training.monitor import CURVE_COLUMNS, Monitor, make_monitor, undisturbed
from coordexp.training.stage1 import train_stage1
from coordexp.training.stage2 import train_stage2
from coordexp.training.step import TeacherTask
from helpers import Workspace, World, new_checkpoint, teacher_rollouts

STAGES = {"stage1": train_stage1, "stage2": train_stage2}


def every(space: Workspace, steps: int) -> Workspace:
    """The workspace with a look every so many steps."""
    monitor = space.profile.monitor.model_copy(update={"every_steps": steps})
    return replace(space, profile=space.profile.model_copy(update={"monitor": monitor}))


@pytest.fixture
def ready(workspace: Workspace, world: World) -> Workspace:
    checkpoint = load_checkpoint(workspace.paths.run("stage1"))
    workspace.paths.run("rollout").mkdir()
    write_rollouts(workspace.paths.run("rollout") / "rollouts.jsonl", teacher_rollouts(checkpoint, world).values())
    return workspace


def rows(folder: Path, name: str) -> list[dict]:
    """The lines of a log without what never repeats."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds" and not k.startswith("time/")} for line in lines
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_training_computes_the_same_with_and_without_looks(ready: Workspace, stage: str) -> None:
    out, curve = ready.paths.run(stage), ready.paths.curve(f"{stage}-monitor")
    summary = STAGES[stage](ready.params, every(ready, 0).profile, ready.paths)
    unwatched, losses = load_file(out / "model.safetensors"), rows(out, "train_log.jsonl")
    assert summary["monitor_seconds"] == 0
    assert rows(out, "monitor.jsonl") == []
    assert curve.read_text() == "\t".join(["step", *CURVE_COLUMNS]) + "\n"

    summary = STAGES[stage](ready.params, every(ready, 1).profile, ready.paths)
    assert rows(out, "train_log.jsonl") == losses
    assert all(torch.equal(value, unwatched[name]) for name, value in load_file(out / "model.safetensors").items())
    assert [row["step"] for row in rows(out, "monitor.jsonl")] == [1, 2, 3, 4]
    assert summary["monitor_seconds"] > 0
    assert json.loads((out / "run_metadata.json").read_text())["monitor_seconds"] == summary["monitor_seconds"]


def test_a_look_asks_the_weights_of_its_step_and_leaves_answers_picture_and_curve(ready: Workspace) -> None:
    space = every(ready, 3)  # and after the last of four steps
    train_stage1(space)
    out = space.paths.run("stage1")
    looks = rows(out, "monitor.jsonl")
    assert [row["step"] for row in looks] == [3, 4]
    assert all(row["images"] == space.profile.monitor.images for row in looks)
    header, *lines = (line.split("\t") for line in space.paths.curve("stage1-monitor").read_text().splitlines())
    assert [dict(zip(header, line, strict=True)) for line in lines] == [
        {name: "" if row[name] is None else str(row[name]) for name in ("step", *CURVE_COLUMNS)} for row in looks
    ]
    for row in looks:
        with Image.open(out / "monitor" / f"step_{row['step']:06d}.jpg") as picture:
            assert picture.width > 300
    left = list(read_results(out / "monitor_answers" / "step_000004.jsonl"))

    checkpoint = load_checkpoint(out)
    monitor = make_monitor(space, "stage1", checkpoint, 4)
    again = predict_samples(
        checkpoint,
        make_reader(checkpoint, "json", EMITTED, {}),
        monitor._viewer.samples,
        space.paths.raw,
        monitor._viewer.decode,
        2,
    )
    assert [r.raw_text for r in left] == [r.raw_text for r in again]
    assert monitor._viewer.decode.temperature == 0


def test_a_resumed_run_has_every_look_once(ready: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    space = every(ready, 1)
    train_stage1(space)
    out, curve = space.paths.run("stage1"), space.paths.curve("stage1-monitor")
    straight, drawn = rows(out, "monitor.jsonl"), curve.read_text()
    original = TeacherTask.micro_batches

    def micro_batches(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(TeacherTask, "micro_batches", micro_batches)
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        train_stage1(space)
    assert len(curve.read_text().splitlines()) == 3
    curve.unlink()  # DVC removes the outputs of a stage that it starts again
    monkeypatch.setattr(TeacherTask, "micro_batches", original)
    train_stage1(space)
    assert rows(out, "monitor.jsonl") == straight
    assert curve.read_text() == drawn
    assert sorted(p.stem for p in (out / "monitor").iterdir()) == [f"step_00000{n}" for n in (1, 2, 3, 4)]


def test_looks_after_the_saved_state_are_forgotten(tmp_path: Path) -> None:
    """A crash after a look and before the next save: its steps run again, with another look at their end."""
    monitor = Monitor(None, 1, 9, tmp_path / "curve.tsv")  # type: ignore[arg-type]  # asks nothing here
    monitor.open(tmp_path)
    row = dict.fromkeys(CURVE_COLUMNS, 0.5)
    monitor._write([{"step": n, **row, "seconds": 1.5} for n in (2, 4, 6)])
    for n in (2, 4, 6):
        for folder, suffix in (("monitor", "jpg"), ("monitor_answers", "jsonl")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"step_{n:06d}.{suffix}").write_text("x")
    monitor.resume(4)
    assert [r["step"] for r in monitor.rows()] == [2, 4]
    assert monitor.seconds() == 3.0
    assert [line.split("\t")[0] for line in (tmp_path / "curve.tsv").read_text().splitlines()] == ["step", "2", "4"]
    left = sorted(path.name for path in tmp_path.glob("monitor*/*"))
    assert left == ["step_000002.jpg", "step_000002.jsonl", "step_000004.jpg", "step_000004.jsonl"]


def test_generators_and_mode_are_put_back() -> None:
    model = torch.nn.Dropout(0.5).train()
    torch.manual_seed(3)
    expected = model(torch.ones(64))
    torch.manual_seed(3)
    with undisturbed(model):
        assert not model.training
        torch.manual_seed(99)
        torch.rand(10)
    assert model.training
    assert torch.equal(model(torch.ones(64)), expected)
    with pytest.raises(KeyError), undisturbed(model):
        raise KeyError
    assert model.training


def test_every_stage_looks_at_the_same_images_and_runaways_are_cut(ready: Workspace) -> None:
    checkpoint = new_checkpoint()
    monitors = [make_monitor(ready, stage, checkpoint, 4) for stage in STAGES]
    chosen = [[sample.image_id for sample in m._viewer.samples] for m in monitors]
    assert chosen[0] == chosen[1]
    longest = max(len(sample.answer_ids) for sample in monitors[0]._viewer.samples)
    assert monitors[0]._viewer.decode == DecodeSettings(
        max_new_tokens=2 * longest, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=0
    )


def test_looks_at_images_without_objects_are_undefined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    crowd = GroundTruth("crowd", (0.0, 0.0, 9.0, 9.0), iscrowd=True)
    answer = ImageResult(1, "a.png", 10, 10, (crowd,), (), "", ParseReport(True, 0), "stop", 3)
    monkeypatch.setattr(Monitor, "_look", lambda *_: count_answers([judge_answer(answer)]))
    monitor = Monitor(None, every_steps=1, steps=1, curve=tmp_path / "curve.tsv")
    monitor.open(tmp_path)
    with caplog.at_level("INFO"):
        monitor.after(1)
    assert "F1 undefined, precision undefined, recall undefined" in caplog.text
    assert '"f1": null' in (tmp_path / "monitor.jsonl").read_text()
    header, line = ((tmp_path / "curve.tsv").read_text()).splitlines()
    cells = dict(zip(header.split("\t"), line.split("\t"), strict=True))
    assert [cells[name] for name in ("f1", "precision", "recall", "predictions")] == ["", "", "", "0"]
