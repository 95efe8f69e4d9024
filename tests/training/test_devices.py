"""The device of each stage's model on a machine with an accelerator, tested without one.

torch's `meta` device replaces the GPU: it holds a whole model and computes only shapes, so every run is stopped before
its first forward. Tensors that a forward creates are tested separately.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import masking_utils

from coordexp import stage
from coordexp.config.loading import load_profile
from coordexp.detector import Detector
from coordexp.errors import ConfigError
from coordexp.experiments.monitor import open_monitor
from coordexp.infra import device
from coordexp.infra.device import (
    DEVICE_VARIABLE,
    GROUPED,
    VARIABLE_LENGTH,
    choose_device,
    compute_dtype,
    factor_dtype,
    inference_plan,
    measured_rates,
    training_plan,
    without_autocast,
)
from coordexp.infra.provenance import write_json
from coordexp.losses import vocabulary_terms
from coordexp.models.adapters import apply_tuning
from coordexp.models.attention import packed
from coordexp.packing.collator import teacher_segment
from coordexp.packing.samples import SampleStore
from coordexp.records.categories import Category
from coordexp.rollout import opening, stages
from coordexp.rollout.engine import Generation
from coordexp.rollout.vllm_command import ServerCommand
from coordexp.training import launch, session, stage1, stage2
from coordexp.training.distributed import world as process_world
from coordexp.training.step import step_counts, term_sums
from helpers import REPOSITORY, SPRITES, Workspace, World, criterion_of, new_checkpoint
from source_tree import ROOT
from toyworld import pretrain

ACCELERATOR = torch.device("meta")
PROFILE = load_profile(REPOSITORY / "configs" / "smoke.yaml")


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

    monkeypatch.setattr(session, "train", stop)
    monkeypatch.setattr(pretrain, "train", stop)
    monkeypatch.setattr(opening, "HfEngine", stop)
    monkeypatch.setattr(stages.HfEngine, "_answers", lambda engine, *_: stop(engine._checkpoint))
    return models


def decode(space: Workspace) -> object:
    return stages.decode_split(space, "stage1", space.paths.run("stage1"), space.paths.decoded("stage1"))


def predict(space: Workspace) -> object:
    return Detector.from_checkpoint(space.paths.run("stage1")).predict([torch.zeros(40, 40, 3).byte().numpy()])


def monitor(space: Workspace) -> object:
    space.paths.records.mkdir(parents=True, exist_ok=True)
    write_json(space.paths.records / "categories.json", [Category(1, "cat").to_json()])
    return open_monitor(space, "stage2", 1, space.paths.root / "monitor").evaluate(1)


def rollout(space: Workspace) -> object:
    return stages.run_rollouts(space)


def train_base(space: Workspace) -> object:
    """One phase without samples: none is looked at before the first step."""
    phase = {"steps": 1, "settle": True, "samples_per_step": 1, "task_shares": {}}
    weights = {"desc": 3.0, "localiser": 0.5, "localiser_sigma": 10.0}
    options = {"pack_tokens": 320, "lr": 0.002, "warmup_steps": 0, "decay_fraction": 0.25, "weights": weights}
    tower: dict[str, Any] = {"lr": 0.002, "phases": {}}
    params = {"seed": 3, "sprites": str(SPRITES), "phases": {"few": phase}, "tower": tower, "train": options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "prepare_base_samples", lambda *_: None)
        patch.setattr(pretrain, "make_dev_evaluation", lambda *_: None)
        patch.setattr(pretrain, "train_tower", lambda *_: [])
        patch.setattr(pretrain, "TextTask", lambda *_: None)
        return pretrain.pretrain(space.paths.root, space.paths.root / "base", params)


TRAINING = {
    "stage1": stage1.train_stage1,
    "stage1-control": stage1.train_control,
    "stage2": stage2.train_stage2,
    "base": train_base,
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
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {ACCELERATOR}
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


def test_the_rank_chooses_the_gpu_and_the_environment_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == choose_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device() == choose_device("cuda") == torch.device("cuda", 3)
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    assert choose_device() == torch.device("cpu")
    assert choose_device("cuda") == torch.device("cuda", 3)  # a command's own flag has the last word
    monkeypatch.setenv(DEVICE_VARIABLE, "gpu")
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used"):
        choose_device()


@pytest.mark.parametrize(("chosen", "processes"), [("auto", 4), ("cuda", 4), ("cpu", 1)])
def test_there_is_a_process_for_each_gpu_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch, chosen: str, processes: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv(DEVICE_VARIABLE, chosen)
    started: list[int] = []
    launcher = lambda config, _: lambda *_: started.append(config.max_nodes * config.nproc_per_node)  # noqa: E731
    monkeypatch.setattr(launch, "elastic_launch", launcher)
    assert launch.run_in_processes(0) == (processes > 1)
    assert started == [processes] * (processes > 1)


def test_a_stage_takes_a_device_and_hands_it_to_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "auto")

    def read(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(stage.RunConfig, "read", read)
    with pytest.raises(Stopped):
        stage.stage_main(lambda _: None, ["--device", "cpu"])
    assert os.environ[DEVICE_VARIABLE] == "cpu"


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("plan", "trained", "frozen", "compute", "precision", "kernel"),
    [
        (training_plan("bf16", torch.device("cuda")), FP32, BF16, BF16, "high", VARIABLE_LENGTH),
        (training_plan("fp32", torch.device("cuda")), FP32, FP32, FP32, "highest", GROUPED),
        (training_plan("bf16", torch.device("cpu")), FP32, FP32, BF16, "highest", GROUPED),
        (inference_plan(torch.device("cuda")), BF16, BF16, BF16, "high", VARIABLE_LENGTH),
        (inference_plan(torch.device("cpu")), FP32, FP32, FP32, "highest", GROUPED),
    ],
    ids=str,
)
def test_one_plan_says_all(plan, trained, frozen, compute, precision, kernel) -> None:
    assert (plan.trained, plan.frozen, plan.compute) == (trained, frozen, compute)
    assert (plan.matmul_precision, plan.attention) == (precision, kernel)
    assert plan.fuses_optimizer == (plan.device.type == "cuda")
    for word in (str(plan.device), kernel, "TF32" if precision == "high" else "float32"):
        assert word in str(plan)


def test_what_was_chosen_is_logged_and_set(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    with caplog.at_level(logging.INFO):
        inference_plan(torch.device("cpu")).adopt()
        assert chosen == []  # a CPU is left alone: it has narrower products of its own
        training_plan("fp32", torch.device("cuda")).adopt()
    assert chosen == ["highest"]
    assert [record.message.split(" ")[1] for record in caplog.records] == ["cpu", "cuda"]


def test_on_the_cpu_answers_are_float32_whatever_surrounds_them() -> None:
    model = torch.nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16), inference_plan(torch.device("cpu")).autocast(model):
        assert model(torch.ones(1, 2)).dtype == torch.float32


def test_products_are_bfloat16_unless_all_weights_are() -> None:
    plan, model = training_plan("bf16", torch.device("cpu")), torch.nn.Linear(2, 2)
    with plan.autocast(model):
        assert compute_dtype(torch.ones(1)) == BF16
        assert factor_dtype(torch.ones(1)) == FP32  # a CPU multiplies floats where the result is one
        with without_autocast(torch.ones(1)):
            assert compute_dtype(torch.ones(1)) == FP32
    with plan.autocast(model.bfloat16()):
        assert not torch.is_autocast_enabled("cpu")


def test_doctor_measures_in_no_more_than_three_seconds() -> None:
    started = time.process_time()
    rates = measured_rates(inference_plan(torch.device("cpu")))
    assert time.process_time() - started < 3
    assert min(rates.bf16_flops, rates.float32_flops, rates.copied_bytes) > 1e8
    assert str(rates).startswith("measured: ")


def test_number_formats_and_devices_are_chosen_nowhere_else() -> None:
    words = re.compile(r"autocast\(\w*[\"']|torch\.autocast|autocast_(dtype|enabled)|set_float32_matmul_precision")
    found = {path.name for path in (ROOT / "src").rglob("*.py") if words.search(path.read_text(encoding="utf-8"))}
    assert found == {"device.py"}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_forward_and_its_backward_make_nothing_on_the_cpu(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Text with its attention, the head, and every term; a tensor from elsewhere would not go with the others."""
    if method == "lora":
        pytest.importorskip("peft")
    checkpoint = new_checkpoint()
    segments = [teacher_segment(sample) for sample in world.samples[:3]]
    batch, counts = world.collator(checkpoint)(segments).to(ACCELERATOR), step_counts(segments)
    tuning = PROFILE.tuning.model_copy(update={"method": method, "rank": 4, "activations": "recompute"})
    apply_tuning(checkpoint.model, tuning, checkpoint.coord)
    model = checkpoint.model.to(ACCELERATOR)
    # Both ask for numbers, which this device has none of.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    monkeypatch.setattr(vocabulary_terms, "_common_factor", lambda *_: 1.0)
    embeds_BTD = model.get_input_embeddings()(batch.input_ids)
    with packed():
        hidden = model.model.language_model(
            inputs_embeds=embeds_BTD,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            segments=batch.segments,
        ).last_hidden_state.flatten(0, 1)
    sums, _ = term_sums(model, criterion_of(checkpoint), batch, hidden, hidden, counts)
    torch.stack(list(sums.values())).sum().backward()
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "visual" not in n]
    assert {p.grad.device for p in trained} == {ACCELERATOR}


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
