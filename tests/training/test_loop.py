"""The training loop: resumed equals uninterrupted, clean stops, nonfinite losses, and the log."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from coordexp.errors import Interrupted, TrainingError
from coordexp.training import recorder
from coordexp.training.checkpoint import StateSaver, load_state
from coordexp.training.loop import MicroBatch, train
from coordexp.training.schedule import cosine_schedule
from coordexp.training.step import TeacherTask
from helpers import criterion_of, new_checkpoint, optim

STEPS = 8
OPTIM = optim(optimizer="muon", steps=STEPS, lr=0.05, weight_decay=0.01)


class Small(nn.Module):
    """A matrix for Muon, rows and a bias for AdamW, and dropout that draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(6, 8)
        self.dropout = nn.Dropout(0.3)
        self.hidden = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.hidden(self.dropout(self.embed_tokens(ids))).square().mean()


class SmallTask:
    """Two micro-batches a step; `on_step` runs before each step."""

    def __init__(self, model: nn.Module, on_step=lambda step: None) -> None:
        self.model, self.on_step = model, on_step

    def micro_batches(self, step: int):
        self.on_step(step)
        for half in range(2):
            ids = torch.randint(0, 6, (3, 2), generator=torch.Generator().manual_seed(2 * step + half))
            loss = self.model(ids) / 2
            yield MicroBatch(loss, {f"loss/half{half}": float(loss.detach()), "samples": 3})

    def items(self, step: int):
        return {"images": [step]}


def run(folder: Path, on_step=lambda step: None, save_every_seconds: float = 1e9, **changes) -> nn.Module:
    """Train a new small model in this folder, resuming from whatever lies there."""
    model = Small()
    torch.manual_seed(1)
    train_small(SmallTask(model, on_step), folder, save_every_seconds, **changes)
    return model


def train_small(task: SmallTask, folder: Path, save_every_seconds: float = 1e9, **changes) -> None:
    block = OPTIM.model_copy(update=changes)
    state, log = folder / "state", folder / "log.jsonl"
    train(task.model, task, block, state, log, save_every_seconds=save_every_seconds)


def raise_at(wanted: int, what):
    def on_step(step: int) -> None:
        if step == wanted:
            what()

    return on_step


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise RuntimeError("power cut")


def log_rows(folder: Path) -> list[dict]:
    """The log without its timings."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return weights(run(folder)), log_rows(folder)


@pytest.mark.parametrize("stops", [[0], [3], [STEPS - 2], [1, 5]])
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, stops):
    for step in stops:
        with pytest.raises(Interrupted, match=f"after step {step + 1} of {STEPS}"):
            run(tmp_path, on_step=raise_at(step, terminate))
        assert len(log_rows(tmp_path)) == load_state(tmp_path / "state").step == step + 1
    assert torch.equal(weights(run(tmp_path)), uninterrupted[0])
    assert log_rows(tmp_path) == uninterrupted[1]


def test_a_crash_loses_only_the_steps_since_the_last_save(tmp_path, uninterrupted):
    """State of step 3 and a log that went on to step 6: the steps between run again and appear once."""
    with pytest.raises(Interrupted):
        run(tmp_path, on_step=raise_at(2, terminate))
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, on_step=raise_at(6, crash))
    assert len(log_rows(tmp_path)) == 6
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "loss/to')  # the write that the crash cut
    assert torch.equal(weights(run(tmp_path)), uninterrupted[0])
    assert log_rows(tmp_path) == uninterrupted[1]


def test_the_log_on_disk_is_never_behind_the_state(tmp_path, monkeypatch):
    """A process that is killed right after a save must find every row before the saved step again."""
    behind = []
    original = StateSaver.save

    def checking(self, step, *args):
        original(self, step, *args)
        self.wait()
        behind.append(step - len(log_rows(tmp_path)))

    monkeypatch.setattr(recorder, "SAVING_FRACTION", math.inf)
    monkeypatch.setattr(StateSaver, "save", checking)
    run(tmp_path, save_every_seconds=0.0, log_every=100)
    assert behind == [0] * STEPS


def test_a_log_without_state_starts_over(tmp_path, uninterrupted):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss/total": 7}\n{"step": 1, "loss/total": 7}\n')
    run(tmp_path)
    assert log_rows(tmp_path) == uninterrupted[1]


def test_a_finished_run_does_not_train_again(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setattr(recorder, "SAVING_FRACTION", math.inf)
    run(tmp_path, save_every_seconds=0.0)
    again = run(tmp_path, on_step=lambda step: pytest.fail(f"step {step} ran again"))
    assert torch.equal(weights(again), uninterrupted[0])
    assert log_rows(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_stop_cleanly_and_restore_the_handlers(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"signal {int(number)}"):
        run(tmp_path, on_step=raise_at(1, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is before
    assert load_state(tmp_path / "state").step == 2


def test_a_signal_in_the_last_step_lets_it_finish(tmp_path, uninterrupted):
    assert torch.equal(weights(run(tmp_path, on_step=raise_at(STEPS - 1, terminate))), uninterrupted[0])


class Spoiled(SmallTask):
    """Its second micro-batch of step 2 is not finite, in the loss itself or only in its gradient."""

    def __init__(self, model: nn.Module, spoil) -> None:
        super().__init__(model)
        self.spoil = spoil

    def micro_batches(self, step: int):
        for half, micro in enumerate(super().micro_batches(step)):
            yield replace(micro, loss=self.spoil(micro.loss)) if (step, half) == (2, 1) else micro


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda loss: loss * math.nan, "the loss is nan; terms: .*loss/half1"),
        (lambda loss: loss * math.inf, "the loss is inf; terms: .*loss/half1"),
        (lambda loss: loss + (loss - loss.detach()).abs().sqrt(), "the gradient norm is nan"),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_nonfinite_steps_stop_and_can_be_replayed(tmp_path, uninterrupted, spoil, words):
    model, state = Small(), tmp_path / "state"
    torch.manual_seed(1)
    with pytest.raises(TrainingError, match=f"step 2: {words}"):
        train_small(Spoiled(model, spoil), tmp_path)
    assert [row["step"] for row in log_rows(tmp_path)] == [0, 1]
    assert torch.isfinite(weights(model)).all()
    kept = json.loads((state / "failed-process-0.json").read_text())
    assert (kept["step"], kept["items"]) == (2, {"images": [2]})
    assert load_state(state).step == 2
    assert torch.isfinite(weights(run(tmp_path))).all()  # with what spoiled it mended, the run goes on
    assert [row["step"] for row in log_rows(tmp_path)] == list(range(STEPS))


def test_rows_of_the_log(uninterrupted):
    rows = uninterrupted[1]
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert row["loss/total"] == pytest.approx(row["loss/half0"] + row["loss/half1"], abs=2e-6)
        assert row["lr"] == pytest.approx(0.05 * cosine_schedule(STEPS, 2)(row["step"]), abs=1e-6)
        assert row["grad_norm"] > 0


def test_gradients_are_clipped_to_the_limit(tmp_path):
    one = {"steps": 1, "warmup_steps": 0, "optimizer": "adamw", "weight_decay": 0.0}
    free = run(tmp_path / "free", **one, max_grad_norm=1e9)
    tight = run(tmp_path / "tight", **one, max_grad_norm=1e-12)
    start = weights(Small())
    # AdamW's first step has size lr whatever the gradient, until the gradient vanishes beside its eps of 1e-8.
    assert (weights(free) - start).abs().max() > 100 * (weights(tight) - start).abs().max()


def test_progress_is_logged_every_so_many_steps(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="coordexp.training.loop"):
        run(tmp_path)
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [line.split(" ")[1] for line in lines] == ["3/8", "6/8", "8/8"]
    assert "total" in lines[0]
    assert "eta" in lines[0]


def train_tiny(world, folder: Path, stop_after: int | None = None) -> torch.Tensor:
    """Four steps of stage 1 on the tiny model, in bf16 as in a real run."""
    checkpoint = new_checkpoint()
    task = TeacherTask(
        checkpoint.model,
        criterion_of(checkpoint),
        world.source(checkpoint),
        world.collator(checkpoint),
        [[[0, 1]], [[2], [3, 4]], [[5]], [[1]]],
    )
    if stop_after is not None:
        original = task.micro_batches

        def stopping(step: int):
            if step == stop_after:
                terminate()
            return original(step)

        task.micro_batches = stopping  # type: ignore[method-assign]
    block = optim(optimizer="muon", steps=4, warmup_steps=1, lr=1e-3, weight_decay=0.01, precision="bf16")
    train(checkpoint.model, task, block, folder / "state", folder / "log.jsonl", save_every_seconds=1e9)
    return weights(checkpoint.model)


def test_resumed_equals_uninterrupted_on_the_tiny_model(world, tmp_path):
    straight = train_tiny(world, tmp_path / "straight")
    with pytest.raises(Interrupted):
        train_tiny(world, tmp_path / "stopped", stop_after=1)
    assert torch.equal(train_tiny(world, tmp_path / "stopped"), straight)
    rows = log_rows(tmp_path / "stopped")
    assert rows == log_rows(tmp_path / "straight")
    assert [row["samples"] for row in rows] == [2, 3, 1, 1]
    assert all("loss/softce" in row and "coord_diag/expected_bin_mae" in row for row in rows)
