"""Estimate the training time on this machine from a few real steps of stage 1 on the user's own images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from coordexp.config.paths import TRAIN_LOG, model_folder
from coordexp.config.profile import DatasetsConfig
from coordexp.config.run import RunConfig
from coordexp.infra.logs import read_rows
from coordexp.models.adapters import apply_tuning
from coordexp.models.expand import add_coordinate_tokens
from coordexp.models.loading import load_checkpoint
from coordexp.packing.planner import plan_packs
from coordexp.packing.samples import Sample, SampleSource, SampleStore, SampleWriter
from coordexp.records.manifest import located
from coordexp.training.builders import make_encoder, own_slice
from coordexp.training.distributed import world
from coordexp.training.loop import Callback, train
from coordexp.training.schedule import step_items
from coordexp.training.step import Criterion, TeacherTask

MAX_SECONDS = 12.0  # maximum time for the steps, after loading the model
MAX_STEPS = 6


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds and number of tokens of a step of stage 1."""

    seconds: float
    tokens: int


class _EnoughError(Exception):
    """Enough steps were measured."""


class _Clock(Callback):
    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path

    def on_step_end(self, done_steps: int) -> None:
        """Stop if the next step would exceed the time."""
        seconds = [row["time/step_s"] for row in read_rows(self._log_path)]
        if sum(seconds) + min(seconds) > MAX_SECONDS:
            raise _EnoughError


def timed_step(run: RunConfig, samples: Sequence[Sample]) -> StepTime:
    """Take some steps of stage 1 on these samples, in a temporary folder.

    Raises:
        CheckpointError: the model cannot be loaded.
        DataError: an image cannot be read, or a sample is longer than a pack.
    """
    profile, model = run.profile, run.profile.model
    checkpoint = load_checkpoint(model_folder(model.path), model.min_pixels, model.max_pixels)
    vocabulary = add_coordinate_tokens(checkpoint.model, checkpoint.tokenizer, model.coord_init, run.params.seed)
    detection = checkpoint.detection.model_copy(update={"coordinates": vocabulary, **run.params.text.model_dump()})
    checkpoint = replace(checkpoint, detection=detection)
    checkpoint.model.to(world().device)  # type: ignore[arg-type]  # an untyped decorator
    apply_tuning(checkpoint.model, profile.tuning, vocabulary)
    steps = {"steps": MAX_STEPS, "warmup_steps": 1, "log_every": MAX_STEPS, "grad_monitor_every": 0}
    optim = profile.stage1.model_copy(update=steps)
    lengths = np.array([sample.length for sample in samples])
    packs = plan_packs(lengths, profile.packing.pack_tokens, run.params.seed).packs
    with TemporaryDirectory(prefix="coordexp-timing-") as name:
        folder = Path(name)
        with SampleWriter(folder / "samples.parquet", with_areas=any(s.areas_px2 for s in samples)) as writer:
            for sample in samples:
                writer.add(sample)
        source = SampleSource(SampleStore(folder / "samples.parquet"), make_encoder(checkpoint), "top_left", 0)
        collator = checkpoint.collator(_images(run, folder), profile.packing.pack_tokens)
        chosen = step_items(len(packs), optim.packs_per_step, MAX_STEPS, run.params.seed, "stage1/order")
        by_step = [[packs[i] for i in items] for items in chosen]
        criterion = Criterion.stage1(run.params, vocabulary.first_id, MAX_STEPS)
        task = TeacherTask(checkpoint.model, criterion, source, collator, by_step, own_slice(profile), 0)
        log_path = folder / TRAIN_LOG
        with suppress(_EnoughError):
            train(checkpoint.model, task, optim, folder, log_path, save_every_seconds=1e9, callback=_Clock(log_path))
        rows = read_rows(log_path)
    settled = rows[1:] or rows  # the first step also includes one-time setup
    return StepTime(float(np.median([r["time/step_s"] for r in settled])), int(np.mean([r["tokens"] for r in settled])))


def _images(run: RunConfig, folder: Path) -> Path:
    """A folder relative to which the image names of the records are valid."""
    source = run.profile.source
    if not isinstance(source, DatasetsConfig):
        return run.paths.raw
    for name, dataset in source.sets.items():
        (folder / name).symlink_to(located(name, dataset).root, target_is_directory=True)
    return folder


def training_seconds(run: RunConfig, step: StepTime, mean_tokens: float) -> float:
    """Seconds of stage 1, stage 2 and the control, in proportion to the tokens in forward passes.

    A fraction `b_ratio` of stage 2's steps trains on rollouts, with two forward passes; the control gets the tokens of
    stage 2.
    """
    stage2 = run.profile.stage2.steps * run.profile.stage2.samples_per_step * mean_tokens
    forwards = 1 + run.params.stage2.b_ratio * (run.params.stage2.passes == "two")
    tokens = run.profile.stage1.steps * step.tokens + 2 * forwards * stage2
    return tokens * step.seconds / max(1, step.tokens)
