"""From parameters to objects: which weights reach which stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordexp.config.loading import load_params
from coordexp.config.schema import Params
from coordexp.errors import CheckpointError
from coordexp.models.detection_config import BASE
from coordexp.training import builders
from coordexp.training.rollout_pool import match_schedule
from coordexp.training.step import Criterion
from helpers import new_checkpoint


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


def params_with(repository: Path, **changes) -> Params:
    tree = load_params(repository / "params.yaml").model_dump()
    for name, value in changes.items():
        if isinstance(value, dict):
            tree[name] |= value
        else:
            tree[name] = value
    return Params.model_validate(tree)


def test_targets_narrow_and_temperature_falls_over_their_fractions(repository, checkpoint):
    ramps = {"sigma_from": 6.0, "sigma_fraction": 0.5, "temperature_from": 3.0, "temperature_fraction": 0.2}
    params = params_with(repository, sigma=2.0, truncate=8, temperature=1.0, anneal=ramps)
    criterion = Criterion.stage1(params, builders.first_coord_id(checkpoint), 8)
    steps = [criterion.at(step).params for step in range(8)]
    assert [p.sigma for p in steps] == [6.0, 5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0]
    assert [p.truncate for p in steps] == [24, 20, 16, 12, 8, 8, 8, 8]  # as many sigmas as at the end
    assert [p.temperature for p in steps] == [3.0, 2.0, *[1.0] * 6]
    assert Criterion.stage2(params, builders.first_coord_id(checkpoint), 8).at(1).params.sigma == 5.0


def test_without_ramps_every_step_has_the_same_criterion(repository, checkpoint):
    criterion = Criterion.stage2(params_with(repository), builders.first_coord_id(checkpoint), 10)
    assert criterion.at(0) is criterion


def test_the_curriculum_relaxes_the_threshold_and_adds_names(repository):
    matching = {"gate_threshold": 0.2, "lambda_sem": 1.0}
    stage2 = {"curriculum_fraction": 0.5, "gate_from": 0.6, "lambda_sem_from": 0.0}
    schedule = match_schedule(params_with(repository, matching=matching, stage2=stage2), 8)
    assert [schedule(s).gate_threshold for s in range(6)] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.2])
    assert [schedule(s).lambda_sem for s in range(6)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    off = match_schedule(params_with(repository, matching=matching), 8)
    assert (off(0).gate_threshold, off(0).lambda_sem) == (0.2, 1.0)


def test_a_checkpoint_without_coordinate_tokens_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match="norm1000"):
        builders.first_coord_id(replace(checkpoint, detection=BASE))
