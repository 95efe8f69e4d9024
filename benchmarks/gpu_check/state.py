"""The cost of saving states in a run, and the speed of pretraining the embedded base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.gpu_check.run import Check, Moment, moment, seconds_between
from benchmarks.gpu_check.shapes import profile_of
from ruamel.yaml import YAML
from torch import Tensor, nn

from coordexp.training.loop import Callback, MicroBatch, train

STATE_PARAMETERS = 417_000_000  # with AdamW's moments 5 GB
BASE_PARAMS = Path("pipelines/base/params.yaml")
PRETRAIN_STEPS, SCENES = 12, 2000
CPU = torch.device("cpu")


def saving(check: Check) -> None:
    """How long the next step waits when the loop saves after every step; and how long its copy alone would take."""
    numbers = check.pick(STATE_PARAMETERS, 40_000)
    side = int(numbers**0.5)
    model = nn.Linear(side, side, bias=False, device=check.device)
    waits = _Waits(model, check.device)
    optim = profile_of("2b").stage1.model_copy(update={"steps": 4, "warmup_steps": 0, "log_every": 4})
    with TemporaryDirectory(dir=check.out) as folder:
        where = Path(folder)
        train(model, waits, optim, where, where / "log.jsonl", save_every_seconds=0.0, callback=waits)
        size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) / 1e9
    check.add("a step waits for a save", max(waits.seconds()), "s", f"the longest; {size:.3g} GB on disk")
    source = torch.ones(3 * side * side, device=check.device)
    target = torch.empty(source.shape, pin_memory=not check.small)
    check.add("to pinned memory", check.seconds_of(lambda: target.copy_(source, non_blocking=True)), "s")


class _Waits(Callback):
    """A task of one product; marks when a step has ended and when the next one begins."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._marks: list[Moment] = []

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """One product."""
        if step:
            self._marks.append(moment(self._device))
        states: Tensor = torch.ones(1, self._model.in_features, device=self._device)  # type: ignore[arg-type]
        yield MicroBatch(self._model(states).float().mean(), {})

    def items(self, step: int) -> dict[str, Any]:
        """Nothing that a message could name."""
        return {}

    def on_step_end(self, done_steps: int) -> None:
        """The step is done; a save may follow."""
        self._marks.append(moment(self._device))

    def seconds(self) -> list[float]:
        """Between the end of a step and the beginning of the next."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=False)
        return [seconds_between(first, last) for first, last in pairs]


def pretraining(check: Check) -> None:
    """Scenes a second of the loops that make models/tiny-base: at their own batch, and at one that could fill a GPU."""
    from pipelines.base import scenes

    from toyworld.pretrain import pretrain

    params: dict[str, Any] = YAML(typ="safe").load(BASE_PARAMS.read_text(encoding="utf-8"))
    (name, phase), steps = list(params["phases"].items())[-1], check.pick(PRETRAIN_STEPS, 2)
    caps = {"train_images": check.pick(SCENES, 16), "val_images": check.pick(16, 2), "bootstrap_resamples": 20}
    caps["warmup_steps"] = 1
    with TemporaryDirectory() as folder, patch.object(scenes, "HOME", Path(folder)):
        home = Path(folder)
        tower = params["tower"] | {"phases": {name: {"steps": steps, "samples_per_step": 1}}}
        short = _capped(params | {"phases": {name: phase | {"steps": steps}}, "tower": tower}, caps)
        YAML(typ="safe").dump(short, home / "params.yaml")
        first = moment(CPU)
        scenes.main()
        seconds = seconds_between(first, moment(CPU))
        check.add("composing", caps["train_images"] / seconds, "scenes/s", "all processor cores")
        for label in (64, 1024):
            with check.part(f"{label} scenes a step"):
                state, batch = home / f"state-{label}", check.pick(label, 4)
                state.mkdir()
                for part in (short, short["tower"]):
                    part["phases"][name]["samples_per_step"] = batch
                pretrain(home, state, short)
                for what, where in (("tower", state / "tower"), ("text", state)):
                    lines = (where / "train_log.jsonl").read_text("utf-8").splitlines()
                    step_s = [json.loads(line)["time/step_s"] for line in lines]
                    rate = batch / median(step_s[len(step_s) // 4 :])
                    check.add(f"{what}, {label} scenes a step", rate, "scenes/s", "decoding of pictures included")


def _capped(tree: Any, caps: Mapping[str, int]) -> Any:
    """Parameters with the numbers under these keys, at any depth, no larger than said."""
    if not isinstance(tree, dict):
        return tree
    return {k: min(v, caps[k]) if k in caps else _capped(v, caps) for k, v in tree.items()}
