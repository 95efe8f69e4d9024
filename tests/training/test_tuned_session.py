"""Training stages with adapters and with frozen parts: they write plain checkpoints, and they resume."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from coordexp.errors import Interrupted
from coordexp.models.loading import load_checkpoint
from coordexp.training.stage1 import train_stage1
from coordexp.training.stage2 import train_stage2
from coordexp.training.step import TeacherTask
from helpers import Workspace, put_rollouts, teacher_rollouts


def tuned(space: Workspace, **changes) -> Workspace:
    tuning = space.profile.tuning.model_copy(update=changes)
    return replace(space, profile=space.profile.model_copy(update={"tuning": tuning}))


def train(space: Workspace) -> dict[str, torch.Tensor]:
    train_stage1(space)
    return load_file(space.paths.run("stage1") / "model.safetensors")


@pytest.mark.parametrize("changes", [{"method": "lora", "rank": 4}, {"vision": "freeze", "activations": "recompute"}])
def test_a_stage_with_adapters_writes_plain_weights(workspace, changes):
    if "method" in changes:
        pytest.importorskip("peft")
    start = load_file(workspace.paths.norm1000 / "init" / "model.safetensors")
    trained = train(tuned(workspace, **changes))
    assert trained.keys() == start.keys()
    load_checkpoint(workspace.paths.run("stage1"))
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert any("language_model.layers" in name for name in moved)
    if changes.get("vision") == "freeze":
        assert not any(name.startswith("model.visual.blocks") for name in moved)


def test_an_interrupted_run_with_adapters_resumes(workspace, monkeypatch):
    pytest.importorskip("peft")
    space = tuned(workspace, method="lora", rank=4)
    expected = train(space)
    original, seen = TeacherTask.micro_batches, []

    def stopping(self, step):
        seen.append(step)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(TeacherTask, "micro_batches", stopping)
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        train(space)
    resumed = train(space)
    assert seen == [0, 1, 2, 3]
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


def test_soft_context_sees_the_rows_in_training(workspace, world):
    """Stage 2 reads the embedding table itself, of which adapters train only some rows."""
    pytest.importorskip("peft")
    space = tuned(workspace.set(stage2__n_softctx_iter=2), method="lora", rank=4)
    start = load_file(space.paths.run("stage1") / "model.safetensors")
    checkpoint = load_checkpoint(space.paths.run("stage1"))
    put_rollouts(space.paths, teacher_rollouts(checkpoint, world))
    train_stage2(space)
    trained = load_file(space.paths.run("stage2") / "model.safetensors")
    assert trained.keys() == start.keys()
    name = "model.language_model.embed_tokens.weight"
    assert checkpoint.coord is not None
    first, end = checkpoint.coord.first_id, checkpoint.coord.end_id
    assert not torch.equal(trained[name][first:end], start[name][first:end])
    assert torch.equal(trained[name][:first], start[name][:first])
