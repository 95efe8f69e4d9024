"""The number of images that a run decodes, and the time from rates measured on this machine."""

from __future__ import annotations

import shutil

import pytest

from coordexp.config.paths import RUN_METADATA
from coordexp.config.run import RunConfig
from coordexp.doctor import hours
from coordexp.doctor.hours import decoding_rate, hour_lines, images_to_decode
from coordexp.infra.provenance import add_to_run_record
from helpers import Workspace, changed, workspace, world

__all__ = ["workspace", "world"]
FLOPS = {"stage1": 1e9, "stage2": 2e9, "stage1-control": 2e9}


def run_of(workspace: Workspace, **profile: object) -> RunConfig:
    return RunConfig(params=workspace.params, profile=changed(workspace.profile, **profile), paths=workspace.paths)


def test_images_by_hand(workspace: Workspace) -> None:
    """20 rollouts, but only 12 images; 5 of 7 val images for 4 checkpoints; the callback at 2, 4 / 2, 3 / 2, 3."""
    space = workspace.set(stage2__refresh_steps=1, stage2__b_ratio=0.5)
    run = run_of(
        space, rollout__images=20, eval__images=5, stage1__steps=4, stage2__steps=3, stage2__samples_per_step=4,
        monitor__every_steps=2, monitor__images=10,
    )  # fmt: skip
    found = images_to_decode(run, 12, 7)
    assert (found.rollouts, found.fresh, found.evaluation, found.callback) == (12, 4, 20, 60)


def test_rates_come_from_earlier_runs_here(workspace: Workspace) -> None:
    run = run_of(workspace, rollout__images=7200, eval__images=0)
    add_to_run_record(run.paths.run_record("stage1"), {"step_seconds": 100.0})
    half = {"steps": run.profile.stage1.steps / 2}  # of the present plan
    add_to_run_record(run.paths.run("stage1") / RUN_METADATA, half)
    add_to_run_record(run.paths.run_record("decode@stage2"), {"engine": "vllm", "images": 100, "generate_seconds": 1.0})
    add_to_run_record(run.paths.run_record("rollout"), {"engine": "hf", "images": 100, "generate_seconds": 50.0})
    training, decoding = hour_lines(run, FLOPS, 10_000, 1800)
    assert f"0.28 hours as measured here ({run.paths.run_record('stage1')})" in training
    assert "7,200 rollouts (stage 2 uses at most" in decoding
    assert "1 hours of rollouts and 1 of evaluation at 2 images per second" in decoding
    assert f"measured here: {run.paths.run_record('rollout')}" in decoding


@pytest.mark.parametrize("record", [{}, {"images": 0, "generate_seconds": 1.0}, {"images": "many"}, {"engine": "vllm"}])
def test_without_a_rate_the_hours_are_unknown(workspace: Workspace, record: dict) -> None:
    shutil.rmtree(workspace.paths.run("stage1"))
    add_to_run_record(workspace.paths.run_record("rollout"), {"engine": "hf"} | record)
    training, decoding = hour_lines(run_of(workspace), FLOPS, 100, 100)
    assert "an assumption" in training
    assert "hours unknown" in decoding


def test_an_existing_checkpoint_is_tried(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hours, "TRIAL_SECONDS", 0.5)
    run = run_of(workspace.set(decode__max_new_tokens=8))
    rate = decoding_rate(run)
    assert rate is not None
    assert rate.images_per_second > 0
    assert str(run.paths.run("stage1")) in rate.seen
    monkeypatch.setattr(hours, "TRIAL_PARAMETERS", {"cpu": 1000})
    assert decoding_rate(run) is None
