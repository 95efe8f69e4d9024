"""Estimate the hours of a run: training, rollouts and evaluation, from rates measured on this machine.

A rate comes from an earlier run of the profile (its run records), or else from a trial: some seconds of decoding with
an existing checkpoint. If neither is possible, the hours of decoding are reported as unknown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from coordexp.config.paths import CHECKPOINTS, RUN_METADATA
from coordexp.config.profile import Profile
from coordexp.config.run import RunConfig
from coordexp.doctor.needs import count_parameters
from coordexp.errors import CoordExpError
from coordexp.infra.device import choose_device
from coordexp.infra.provenance import read_run_record
from coordexp.models.loading import load_for_inference
from coordexp.packing.samples import SampleStore
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.stages import decode_request

ASSUMED_FLOPS = 4e14  # per second
TRIAL_SECONDS = 8.0
FIRST_TRIAL_IMAGES = 4
# A larger model takes too long for a trial, to load or (on a CPU) to generate.
TRIAL_PARAMETERS = {"cpu": 300_000_000, "cuda": 9_000_000_000}
TRAINED = tuple(name for name in CHECKPOINTS if name != "base")


@dataclass(frozen=True, slots=True)
class Rate:
    """Images decoded per second, and the source of the measurement."""

    images_per_second: float
    seen: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """Numbers of images that a run decodes, by purpose."""

    rollouts: int
    fresh: int
    evaluation: int
    callback: int


def hour_lines(run: RunConfig, flops: Mapping[str, float], train_records: int, val_records: int) -> Iterator[str]:
    """The plan in words, from the FLOPs of each training stage; a trial takes TRIAL_SECONDS plus loading a model."""
    profile = run.profile
    steps = f"training: {profile.stage1.steps} steps of stage 1, {profile.stage2.steps} of stage 2 and of the control"
    total, (speed, seen) = sum(flops.values()), _training_speed(run, flops)
    yield f"{steps}; {total:.2g} floating-point operations, {total / speed / 3600:.2g} hours {seen}"
    images = images_to_decode(run, train_records, val_records)
    used = round(run.params.stage2.b_ratio * profile.stage2.steps * profile.stage2.samples_per_step)
    listed = [f"{images.rollouts:,} rollouts" + f" (stage 2 uses at most {used:,})" * (used < images.rollouts)]
    listed += [f"about {images.fresh:,} fresh ones"] * bool(images.fresh)
    listed += [f"{len(CHECKPOINTS)} checkpoints on {images.evaluation // len(CHECKPOINTS):,} val images"]
    listed += [f"{images.callback:,} answers of the eval callback"] * bool(images.callback)
    words = f"decoding ({profile.rollout.engine}): {', '.join(listed)}"
    rate = decoding_rate(run)
    if rate is None:
        yield (
            f"{words}; hours unknown: no run of this profile has recorded a rate here, and no checkpoint can be tried "
            "within seconds. Run doctor again after the rollout stage"
        )
        return
    hours = [n / rate.images_per_second / 3600 for n in (images.rollouts + images.fresh, images.evaluation)]
    yield (
        f"{words}; {hours[0]:.2g} hours of rollouts and {hours[1]:.2g} of evaluation at "
        f"{rate.images_per_second:.3g} images per second ({rate.seen})"
    )


def images_to_decode(run: RunConfig, train_records: int, val_records: int) -> Decoded:
    """Numbers of images that the stages will decode; fresh rollouts are counted as if all their images differed."""
    profile, stage2 = run.profile, run.params.stage2
    fresh_steps = max(0, profile.stage2.steps - stage2.refresh_steps) if stage2.refresh_steps else 0
    return Decoded(
        rollouts=min(profile.rollout.images, train_records),
        fresh=round(fresh_steps * stage2.b_ratio * profile.stage2.samples_per_step) * stage2.refresh_samples,
        evaluation=len(CHECKPOINTS) * min(profile.eval.images or val_records, val_records),
        callback=profile.monitor.images * _evaluations(profile),
    )


def _evaluations(profile: Profile) -> int:
    every = profile.monitor.every_steps
    stages = (profile.stage1.steps, profile.stage2.steps, profile.stage2.steps)
    return sum(-(-steps // every) for steps in stages) if every else 0


def _training_speed(run: RunConfig, flops: Mapping[str, float]) -> tuple[float, str]:
    """FLOP/s measured in a training stage that ran here, or else an assumption; and a description in words."""
    planned = {"stage1": run.profile.stage1.steps, "stage2": run.profile.stage2.steps}
    for stage, steps in planned.items():
        path = run.paths.run_record(stage)
        seconds = read_run_record(path).get("step_seconds")
        done = read_run_record(run.paths.run(stage) / RUN_METADATA).get("steps")  # the present plan may differ
        if _is_positive(seconds) and _is_positive(done):
            return flops[stage] * done / steps / seconds, f"as measured here ({path})"
    return ASSUMED_FLOPS, (
        f"on one device at {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s (an assumption: 40 % of an H100's bf16 peak)"
    )


def decoding_rate(run: RunConfig) -> Rate | None:
    """Decoding rate of this machine, from an earlier run with the same engine or from a trial; None without either."""
    engine = run.profile.rollout.engine
    for stage in ("rollout", *(f"decode@{name}" for name in reversed(TRAINED))):
        path = run.paths.run_record(stage)
        record = read_run_record(path)
        images, seconds = record.get("images"), record.get("generate_seconds")
        if record.get("engine") == engine and _is_positive(images) and _is_positive(seconds):
            return Rate(images / seconds, f"measured here: {path}")
    folder = next((run.paths.run(name) for name in TRAINED if run.paths.run(name).is_dir()), None)
    samples = run.paths.norm1000 / "train.parquet"
    if engine != "hf" or folder is None or not samples.is_file():
        return None
    try:
        return _trial(run, folder, samples)
    except CoordExpError:  # a fault of a folder or an image, which other checks report
        return None


def _trial(run: RunConfig, folder: Path, samples: Path) -> Rate | None:
    if count_parameters(folder) > TRIAL_PARAMETERS.get(choose_device().type, 0):
        return None
    checkpoint, store, batch = load_for_inference(folder), SampleStore(samples), run.profile.rollout.batch_images
    engine = HfEngine(checkpoint, run.paths.raw, batch)
    request = decode_request(run, checkpoint.codec)
    n_images, rate = min(FIRST_TRIAL_IMAGES, len(store)), 0.0
    # Twice: the first few images warm up, and tell how many fit into the time.
    for _ in range(2):
        started = time.monotonic()
        engine.generate([store[i] for i in range(n_images)], request)
        rate = n_images / (time.monotonic() - started)
        where = f"tried now: {n_images} training images with {folder}"
        n_images = max(1, min(round(rate * TRIAL_SECONDS), 2 * batch, len(store)))
    return Rate(rate, where)


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and value > 0
