"""The eval callback: its files, resuming, and no effect on training."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coordexp.config.paths import CONTEXT_ROWS
from coordexp.errors import Interrupted
from coordexp.infra.provenance import read_run_record
from coordexp.models.loading import load_checkpoint
from coordexp.records.gt_vs_pred import read_results
from coordexp.rollout.engine import greedy
from coordexp.training.eval_callback import BOUNDED, CURVE_COLUMNS, make_eval_callback, undisturbed
from coordexp.training.stage1 import train_stage1
from coordexp.training.stage2 import train_stage2
from coordexp.training.step import TeacherTask
from helpers import Workspace, World, new_checkpoint, put_rollouts, teacher_rollouts

STAGES = {"stage1": train_stage1, "stage2": train_stage2}


def every(space: Workspace, steps: int) -> Workspace:
    """The workspace with an evaluation every so many steps."""
    monitor = space.profile.monitor.model_copy(update={"every_steps": steps})
    return replace(space, profile=space.profile.model_copy(update={"monitor": monitor}))


@pytest.fixture
def ready(workspace: Workspace, world: World) -> Workspace:
    checkpoint = load_checkpoint(workspace.paths.run("stage1"))
    put_rollouts(workspace.paths, teacher_rollouts(checkpoint, world))
    return workspace


def rows(folder: Path, name: str) -> list[dict]:
    """The lines of a log without what never repeats."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds" and not k.startswith("time/")} for line in lines
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_training_computes_the_same_with_and_without_the_callback(ready: Workspace, stage: str) -> None:
    out, curve = ready.paths.run(stage), ready.paths.curve(f"{stage}-monitor")
    STAGES[stage](every(ready, 0))
    undisturbed_weights, losses = load_file(out / "model.safetensors"), rows(out, "train_log.jsonl")
    assert rows(out, "monitor.jsonl") == rows(out, CONTEXT_ROWS) == []
    assert curve.read_text() == "\t".join(["step", *CURVE_COLUMNS]) + "\n"

    STAGES[stage](every(ready, 1))
    assert rows(out, "train_log.jsonl") == losses
    assert all(
        torch.equal(value, undisturbed_weights[name]) for name, value in load_file(out / "model.safetensors").items()
    )
    assert [row["step"] for row in rows(out, "monitor.jsonl")] == [1, 2, 3, 4]
    assert read_run_record(ready.paths.run_record(stage))["monitor_seconds"] > 0


def test_an_evaluation_uses_the_current_weights_and_writes_answers_figure_and_curve(ready: Workspace) -> None:
    space = every(ready, 3)  # and after the last of four steps
    train_stage1(space)
    out = space.paths.run("stage1")
    found = rows(out, "monitor.jsonl")
    assert [row["step"] for row in found] == [3, 4]
    assert all(row["images"] == space.profile.monitor.images for row in found)
    header, *lines = (line.split("\t") for line in space.paths.curve("stage1-monitor").read_text().splitlines())
    assert header == ["step", *CURVE_COLUMNS]
    drawn = [dict(zip(header, line, strict=True)) for line in lines]
    for point, row in zip(drawn, found, strict=True):
        logged = {name: value for name, value in row.items() if name in header}
        assert {name: point[name] for name in logged} == {k: "" if v is None else str(v) for k, v in logged.items()}
        for name in BOUNDED:
            known = [float(point[n]) for n in (f"{name}_lo", name, f"{name}_hi") if point[n]]
            assert len(known) in (0, 3)
            assert known == sorted(known)
    for row in found:
        with Image.open(out / "monitor" / f"step_{row['step']:06d}.jpg") as picture:
            assert picture.width > 300
    again = make_eval_callback(space, "stage1", load_checkpoint(out), 4)
    again.folder = again.curve.parent
    again.evaluate(4)
    answers = [list(read_results(f / "monitor_answers" / "step_000004.jsonl")) for f in (out, again.folder)]
    assert [r.raw_text for r in answers[0]] == [r.raw_text for r in answers[1]]
    assert again.request.params.temperature == 0


def test_the_plot_template_draws_columns_that_the_curve_holds() -> None:
    template = (Path(__file__).parents[2] / ".dvc" / "plots" / "f1_interval.json").read_text(encoding="utf-8")
    fields = set(re.findall(r'"field": "(\w+)"', template))
    assert fields == {"f1_lo", "f1_hi"}
    assert fields <= set(CURVE_COLUMNS)
    assert "<DVC_METRIC_DATA>" in json.loads(template)["data"].values()


def test_a_resumed_run_repeats_no_evaluation(ready: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    space = every(ready, 1)
    train_stage1(space)
    out, curve = space.paths.run("stage1"), space.paths.curve("stage1-monitor")
    straight, drawn = rows(out, "monitor.jsonl"), curve.read_text()
    contexts = (out / CONTEXT_ROWS).read_bytes()
    assert len(contexts.splitlines()) == 4 * space.profile.monitor.images
    original = TeacherTask.micro_batches

    def micro_batches(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(TeacherTask, "micro_batches", micro_batches)
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        train_stage1(space)
    assert len(curve.read_text().splitlines()) == 2  # that of step 2 is made up for, before step 3
    curve.unlink()  # DVC removes the outputs of a stage that it starts again
    monkeypatch.setattr(TeacherTask, "micro_batches", original)
    train_stage1(space)
    assert rows(out, "monitor.jsonl") == straight
    assert curve.read_text() == drawn
    assert (out / CONTEXT_ROWS).read_bytes() == contexts
    assert sorted(p.stem for p in (out / "monitor").iterdir()) == [f"step_00000{n}" for n in (1, 2, 3, 4)]


def test_evaluations_after_the_saved_state_are_deleted(ready: Workspace) -> None:
    """A crash after an evaluation and before the next save: its steps run again, with another one at their end."""
    callback = make_eval_callback(ready, "stage1", new_checkpoint(), 9)
    callback.folder = ready.paths.root / "state"
    for step in (6, 2, 4, 4):
        callback.evaluate(step)
    assert [row["step"] for row in callback.rows()] == [2, 4, 6]
    callback.on_train_begin(4)
    assert [row["step"] for row in callback.rows()] == [2, 4]
    assert {row["step"] for row in rows(callback.folder, CONTEXT_ROWS)} == {2, 4}
    assert callback.seconds() == pytest.approx(sum(row["seconds"] for row in callback.rows()), abs=0.06)
    assert [line.split("\t")[0] for line in callback.curve.read_text().splitlines()] == ["step", "2", "4"]
    left = sorted(path.name for path in callback.folder.glob("monitor*/*"))
    assert left == ["step_000002.jpg", "step_000002.jsonl", "step_000004.jpg", "step_000004.jsonl"]


def test_generators_and_mode_are_restored() -> None:
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


def test_every_stage_uses_the_same_images_and_long_answers_are_truncated(ready: Workspace) -> None:
    checkpoint = new_checkpoint()
    callbacks = [make_eval_callback(ready, stage, checkpoint, 4) for stage in STAGES]
    chosen = [[sample.image_id for sample in callback.samples] for callback in callbacks]
    other_seed = make_eval_callback(ready.set(seed=ready.params.seed + 1), "stage1", checkpoint, 4)
    assert chosen[0] == chosen[1] == [sample.image_id for sample in other_seed.samples]
    longest = max(len(sample.answer_ids) for sample in callbacks[0].samples)
    assert callbacks[0].request.params == greedy(2 * longest, "argmax", "coord_logprob")


def test_without_objects_ratios_are_undefined(ready: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    callback = make_eval_callback(ready, "stage1", new_checkpoint(), 1)
    callback.samples = [replace(sample, iscrowd=(True,) * len(sample.descs)) for sample in callback.samples]
    callback.folder, callback.every_steps = ready.paths.root / "state", 1
    with caplog.at_level("INFO"):
        callback.on_step_end(1)
    assert "F1 undefined" in caplog.text
    assert "recall undefined" in caplog.text
    assert '"f1": null' in (callback.folder / "monitor.jsonl").read_text()
    header, line = (row.split("\t") for row in callback.curve.read_text().splitlines())
    cells = dict(zip(header, line, strict=True))
    assert (cells["f1"], cells["recall"]) == ("", "")
