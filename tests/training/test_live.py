"""Trackers of a training run: their data, resumed runs, and no effect on training."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coordexp.errors import ConfigError, Interrupted
from coordexp.infra import TRACK_VARIABLE
from coordexp.training.live import open_trackers
from coordexp.training.stage1 import train_stage1
from coordexp.training.step import TeacherTask
from helpers import Workspace

STEPS = [0, 1, 2, 3]


@pytest.fixture
def evaluated(ready: Workspace) -> Workspace:
    """With an evaluation after every second step."""
    monitor = ready.profile.monitor.model_copy(update={"every_steps": 2})
    return replace(ready, profile=ready.profile.model_copy(update={"monitor": monitor}))


class Hosted(ModuleType):
    """The calls of W&B and trackio that are made."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[tuple[str, str]] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.Image = Path

    def init(self, project: str, name: str) -> SimpleNamespace:
        self.runs.append((project, name))
        return SimpleNamespace(log=lambda values, step: self.rows.append((step, values)), finish=self._finish)

    def _finish(self) -> None:
        self.finished += 1


def folder(space: Workspace) -> Path:
    return space.paths.root / "runs" / "live" / space.params.profile / "stage1"


def test_every_tracker_gets_every_step_without_changing_training(
    evaluated: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted = {name: Hosted(name) for name in ("trackio", "wandb")}
    for name, module in hosted.items():
        monkeypatch.setitem(sys.modules, name, module)
    weights = evaluated.paths.run("stage1") / "model.safetensors"
    train_stage1(evaluated)
    without = weights.read_bytes()
    assert not folder(evaluated).exists()
    monkeypatch.setenv(TRACK_VARIABLE, "dvclive, tensorboard,trackio,wandb")
    train_stage1(evaluated)
    assert weights.read_bytes() == without

    title = f"{evaluated.params.profile}/stage1"
    for module in hosted.values():
        assert module.runs == [("coordexp", title)]
        assert [step for step, row in module.rows if "train/loss/total" in row] == STEPS
        assert [step for step, row in module.rows if "eval/f1_boxes" in row] == [2, 4]
        assert [row["eval"].name for _, row in module.rows if "eval" in row] == ["step_000002.jpg", "step_000004.jpg"]
        assert module.finished == 1
    live = folder(evaluated) / "dvclive"
    table = pd.read_csv(live / "plots" / "metrics" / "train" / "loss" / "total.tsv", sep="\t")
    assert table["step"].tolist() == STEPS
    assert sorted(path.name for path in (live / "plots" / "images" / "eval").iterdir()) == ["2.jpg", "4.jpg"]
    assert (live / "metrics.json").is_file()
    assert not (evaluated.paths.root / "dvc.yaml").exists()
    read = EventAccumulator(str(folder(evaluated) / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss/total")] == STEPS
    assert [image.step for image in read.Images("eval")] == [2, 4]


def test_a_resumed_run_is_tracked_completely_and_once(evaluated: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACK_VARIABLE, "dvclive,tensorboard,wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb := Hosted("wandb"))
    original = TeacherTask.micro_batches

    def micro_batches(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(TeacherTask, "micro_batches", micro_batches)
    with pytest.raises(Interrupted):
        train_stage1(evaluated)
    monkeypatch.setattr(TeacherTask, "micro_batches", original)
    assert wandb.finished == 1
    train_stage1(evaluated)
    assert [step for step, row in wandb.rows if "train/loss/total" in row] == [0, 1, 2, *STEPS]  # of two runs
    table = pd.read_csv(folder(evaluated) / "dvclive/plots/metrics/train/loss/total.tsv", sep="\t")
    assert table["step"].tolist() == STEPS
    read = EventAccumulator(str(folder(evaluated) / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss/total")] == STEPS
    assert [image.step for image in read.Images("eval")] == [2, 4]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dvcliv", "unknown tracker 'dvcliv'.*Did you mean 'dvclive'"),
        ("trackio", "trackio is not installed.*pip install trackio"),
    ],
)
def test_an_unavailable_tracker_is_reported(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=words):
        open_trackers([name], tmp_path, "x")
