"""Where each stage's model lives on a machine with an accelerator, found out without one.

torch's `meta` device stands in for the GPU: it takes a whole model and computes nothing, so every run is stopped before
its first forward.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coordexp.detector import Detector
from coordexp.errors import ConfigError
from coordexp.experiments.monitor import open_monitor
from coordexp.infra import device
from coordexp.infra.device import choose_device, inference_autocast, inference_dtype
from coordexp.infra.provenance import write_json
from coordexp.models.loading import Checkpoint
from coordexp.packing.samples import SampleStore
from coordexp.records.categories import Category
from coordexp.rollout import opening, stages
from coordexp.rollout.engine import Generation
from coordexp.rollout.vllm_command import ServerCommand
from coordexp.training import stage1, stage2
from coordexp.training.distributed import world as process_world
from helpers import Workspace, World

ACCELERATOR = torch.device("meta")


class Stopped(Exception):
    """Raised where the first forward would be."""


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a device that is not the CPU."""
    monkeypatch.setattr(device, "_accelerator", lambda: ACCELERATOR)
    process_world.cache_clear()
    yield
    process_world.cache_clear()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The models that a forward was about to run on."""
    models: list[torch.nn.Module] = []

    def stop(first: object, *_: object, **__: object) -> None:
        models.append(getattr(first, "model", first))  # a checkpoint, or a model
        raise Stopped

    def stop_session(_session: object, checkpoint: Checkpoint, *_: object) -> None:
        stop(checkpoint)

    for module in (stage1, stage2):
        monkeypatch.setattr(module, "run_session", stop_session)
    monkeypatch.setattr(opening, "HfEngine", stop)
    monkeypatch.setattr(stages.HfEngine, "_run", lambda engine, *_: stop(engine._checkpoint))
    return models


def decode(space: Workspace) -> object:
    return stages.decode_val(space, "stage1", space.paths.run("stage1"), space.paths.decoded("stage1"))


def predict(space: Workspace) -> object:
    return Detector.from_checkpoint(space.paths.run("stage1")).predict([torch.zeros(40, 40, 3).byte().numpy()])


def monitor(space: Workspace) -> object:
    space.paths.records.mkdir(parents=True, exist_ok=True)
    write_json(space.paths.records / "categories.json", [Category(1, "cat").to_json()])
    return open_monitor(space, "stage2", 1, space.paths.root / "monitor").evaluate(1)


def rollout(space: Workspace) -> object:
    return stages.run_rollouts(space)


TRAINING = {
    "stage1": lambda space: stage1.train_stage1(space),
    "stage1-control": lambda space: stage1.train_control(space),
    "stage2": lambda space: stage2.train_stage2(space),
}
INFERENCE = {"rollout": rollout, "decode": decode, "predict": predict, "monitor": monitor}


@pytest.mark.parametrize("name", [*TRAINING, *INFERENCE])
def test_every_model_is_moved_to_the_accelerator(
    name: str,
    ready: Workspace,
    accelerator: None,
    seen: list[torch.nn.Module],
) -> None:
    with pytest.raises(Stopped):
        (TRAINING | INFERENCE)[name](ready)
    (model,) = seen
    assert {parameter.device for parameter in model.parameters()} == {ACCELERATOR}
    wanted = torch.float32 if name in TRAINING else torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}


def test_without_an_accelerator_answers_are_float32_on_the_cpu(ready: Workspace, seen: list[torch.nn.Module]) -> None:
    for run in INFERENCE.values():
        with pytest.raises(Stopped):
            run(ready)
    assert {(p.device.type, p.dtype) for model in seen for p in model.parameters()} == {("cpu", torch.float32)}


def test_a_device_that_is_asked_for_is_taken(ready: Workspace, accelerator: None) -> None:
    chosen = Detector.from_checkpoint(ready.paths.run("stage1"), device="cpu")._checkpoint.model
    assert (chosen.device.type, chosen.dtype) == ("cpu", torch.float32)
    assert choose_device() == ACCELERATOR


@pytest.mark.parametrize("wanted", ["cuda:99", "gpu", "", "cpu:x"])
def test_a_device_that_is_not_there_is_named(wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{wanted}' cannot be used .* Expected auto, cpu"):
        choose_device(wanted)


def test_the_rank_chooses_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device() == torch.device("cuda", 3)
    assert inference_dtype(choose_device()) == torch.bfloat16


def test_on_the_cpu_answers_are_float32_whatever_surrounds_them() -> None:
    model = torch.nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16), inference_autocast(model):
        assert model(torch.ones(1, 2)).dtype == torch.float32


def test_a_server_of_ours_leaves_before_the_model_is_loaded(
    ready: Workspace,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both at once would not fit on one GPU."""
    happened: list[str] = []

    @contextmanager
    def servers(commands: list[ServerCommand]) -> Iterator[list[SimpleNamespace]]:
        argv = commands[0].argv
        happened.append(f"serve {Path(argv[argv.index('--model') + 1]).name}")
        yield [SimpleNamespace(url="http://127.0.0.1:9")]
        happened.append("stop")

    class Engine:
        def __init__(self, *_: object, **__: object) -> None: ...

        def generate(self, samples: list[object], _settings: object) -> list[Generation]:
            happened.append("generate")
            return [Generation(SampleStore(ready.paths.norm1000 / "val.parquet")[0].answer_ids, "stop")] * len(samples)

    def noted(name: str, wrapped: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            happened.append(name)
            return wrapped(*arguments)

        return call

    monkeypatch.setattr(opening, "vllm_servers", servers)
    monkeypatch.setattr(opening, "VllmEngine", Engine)
    monkeypatch.setattr(stages, "place_for_inference", noted("load", stages.place_for_inference))
    monkeypatch.setattr(stages, "rescore", noted("rescore", stages.rescore))
    python = {"vllm_python": sys.executable}  # whose torch is asked for GPUs
    served = ready.profile.rollout.model_copy(update={"engine": "vllm", "servers": ("start",), **python})
    profile = ready.profile.model_copy(update={"rollout": served})
    served_run = dataclasses.replace(ready, profile=profile)
    decode(served_run)
    assert happened == ["serve stage1", "generate", "stop", "load", "rescore"]
    happened.clear()
    stages.run_rollouts(served_run)
    assert happened == ["serve stage1", "generate", "stop"]
