"""Whole training steps with the fused objective: losses, logs and gradients are those of the plain one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from coordexp.config.profile import TuningConfig
from coordexp.losses.head_sweep import HeadSweep
from coordexp.models.adapters import apply_tuning
from coordexp.training import fused_batch
from coordexp.training.objective_step import Objective
from coordexp.training.rollout_pool import RolloutPool
from coordexp.training.soft_context import SoftContext
from coordexp.training.stage1 import train_stage1
from coordexp.training.stage2_task import Stage2Task, StepPlan
from coordexp.training.teacher_task import TeacherTask
from helpers import ALL_WEIGHTS, MATCHING, PARAMS, changed, new_checkpoint, objective, teacher_rollouts

ALL = tuple(range(6))
WEIGHTS = replace(ALL_WEIGHTS, entropy=0.1, duplicate_unlikelihood=0.5)


def untied(checkpoint):
    model = checkpoint.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 0.01)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    return checkpoint


def teacher(world, checkpoint, goal: Objective, **options) -> TeacherTask:
    source = world.source(checkpoint)
    return TeacherTask(checkpoint.model, goal, source, world.collator(checkpoint), [[ALL[:4], ALL[4:]]], **options)


def stage2(world, checkpoint, goal: Objective, channel: str) -> Stage2Task:
    """Every option at once: two forwards with an anchor in channel A, duplicates pushed down in channel B."""
    first_id = checkpoint.coord.first_id
    return Stage2Task(
        checkpoint.model,
        goal,
        SoftContext(n_iter=2, embed_mode="expectation", grad_mode="unroll", temperature=1.0, first_coord_id=first_id),
        world.source(checkpoint),
        RolloutPool(teacher_rollouts(checkpoint, world), lambda _: MATCHING),
        world.encoder(checkpoint),
        changed(PARAMS.stage2, passes="two", missed="append", eos_weight=2.0, duplicate_unlikelihood_weight=0.5),
        world.collator(checkpoint),
        [StepPlan(channel, ALL)],
        a1_coord_weight=0.5,
    )


def step(checkpoint, task):
    """Logs, loss and the gradient of every trained parameter of one step."""
    checkpoint.model.zero_grad()
    (micro,) = task.micro_batches(0)
    micro.loss.backward()
    found = {name: p.grad.clone() for name, p in checkpoint.model.named_parameters() if p.grad is not None}
    logged = {name: value for name, value in micro.logs.items() if not name.startswith("time/")}
    numbers = {name: value for name, value in logged.items() if not isinstance(value, str)}
    return numbers, float(micro.loss.detach()), found


def assert_same_step(checkpoint, make_task, goal: Objective) -> None:
    logs, loss, plain = step(checkpoint, make_task(goal))
    fused_logs, fused_loss, fused = step(checkpoint, make_task(replace(goal, fused=True)))
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert fused_logs == pytest.approx(logs, rel=1e-4, abs=1e-5)
    assert fused.keys() == plain.keys()
    whole = torch.cat([g.flatten() for g in plain.values()]).norm()
    for name, gradient in plain.items():
        assert (fused[name] - gradient).norm() <= 1e-5 * whole, name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("made", [new_checkpoint, lambda: untied(new_checkpoint())], ids=["tied", "untied"])
def test_a_teacher_forced_step(world, made, temperature):
    checkpoint = made()
    goal = replace(objective(checkpoint, WEIGHTS), temperature=temperature)
    assert_same_step(checkpoint, lambda g: teacher(world, checkpoint, g), goal)


@pytest.mark.parametrize("channel", "AB")
def test_a_step_of_stage_2(world, channel):
    checkpoint = new_checkpoint()
    goal = objective(checkpoint, WEIGHTS)
    assert_same_step(checkpoint, lambda g: stage2(world, checkpoint, g, channel), goal)


@pytest.mark.parametrize("made", [new_checkpoint, lambda: untied(new_checkpoint())], ids=["tied", "untied"])
@pytest.mark.parametrize("changes", [{"method": "lora"}, {"method": "full", "language": "freeze"}])
def test_a_step_in_which_the_head_trains_its_coordinate_rows_alone(world, made, changes):
    if changes["method"] == "lora":
        pytest.importorskip("peft")
    checkpoint = made()
    keys = {"vision": "train", "projector": "train", "language": "train", "rank": 4, "alpha": 8.0, "dropout": 0.0}
    apply_tuning(checkpoint.model, TuningConfig(**(keys | {"activations": "keep"} | changes)), checkpoint.coord)
    assert_same_step(checkpoint, lambda g: teacher(world, checkpoint, g), objective(checkpoint, WEIGHTS))


def test_the_gradients_of_single_terms(world):
    """The monitor asks for them one by one, and the step keeps its own."""
    checkpoint = new_checkpoint()
    goal = objective(checkpoint, ALL_WEIGHTS)
    assert_same_step(checkpoint, lambda g: teacher(world, checkpoint, g, grad_monitor_every=1), goal)


def test_a_step_runs_through_the_head_once(world, monkeypatch):
    """Denominators are known before the forward, so the gradient found on the way is the one asked for."""
    checkpoint = new_checkpoint()
    task = teacher(world, checkpoint, replace(objective(checkpoint, WEIGHTS), fused=True))
    runs, original = [], HeadSweep.run
    monkeypatch.setattr(HeadSweep, "run", lambda *given: runs.append(1) or original(*given))
    step(checkpoint, task)
    assert len(runs) == 1


def test_a_stage_logs_the_same_losses(workspace, monkeypatch):
    """From the parameters on: the builders decide by the vocabulary, and the loop runs under its own precision."""
    rows = []
    for smallest in (fused_batch.LARGE_VOCABULARY, 1):
        monkeypatch.setattr(fused_batch, "LARGE_VOCABULARY", smallest)
        train_stage1(workspace)
        lines = (workspace.paths.run("stage1") / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        rows.append([{k: v for k, v in step.items() if not k.startswith("time/")} for step in steps])
    plain, fused = rows
    assert len(plain) > 1
    assert fused[0] == pytest.approx(plain[0], rel=1e-3, abs=1e-4)
    for ours, theirs in zip(fused[1:], plain[1:], strict=True):  # rounding to bf16 makes two runs of it
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-2)


def test_a_vocabulary_of_the_size_of_qwens_is_fused_and_the_embedded_one_is_not():
    checkpoint = new_checkpoint()
    assert not fused_batch.fused_pays(checkpoint.model)
    untied(checkpoint).model.lm_head.weight = torch.nn.Parameter(torch.empty(152_936, 1))
    assert fused_batch.fused_pays(checkpoint.model)
