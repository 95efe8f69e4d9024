"""From parameters to objects: which weights reach which stage."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from coordexp.config.loading import load_params
from coordexp.config.schema import Params
from coordexp.errors import CheckpointError
from coordexp.models.detection_config import BASE
from coordexp.training import builders
from coordexp.training.rollout_pool import match_schedule
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


# A different number for every weight, so that a swap shows.
COORDINATE = ("softce_weight", "w1_weight", "gate_weight", "coord_ce_weight", "text_gate_weight")
BOX = ("bbox_smoothl1_weight", "bbox_ciou_weight", "bbox_giou_weight", "bbox_l1_weight", "bbox_log_wh_weight")
TOP = {name: 2.0 + i for i, name in enumerate([*COORDINATE, "entropy_weight", *BOX])}
STAGE1 = {name: 20.0 + i for i, name in enumerate(COORDINATE)}


def test_every_weight_reaches_its_term(repository, checkpoint):
    params = params_with(repository, **TOP, stage1=STAGE1, stage2={"text_ce_weight": 0.5})
    stage1 = builders.stage1_objective(params, checkpoint, 10).weights
    stage2 = builders.stage2_objective(params, checkpoint, 10).weights
    for field in fields(stage2):
        if field.name == "text_ce":
            continue
        assert getattr(stage2, field.name) == TOP.get(f"{field.name}_weight", 0.0), field.name
        assert getattr(stage1, field.name) == STAGE1.get(f"{field.name}_weight", 0.0), field.name
    assert (stage1.text_ce, stage2.text_ce) == (1.0, 0.5)
    assert {f"{field.name}_weight" for field in fields(stage2)} >= TOP.keys()


def test_the_target_is_shared(repository, checkpoint):
    params = params_with(repository, sigma=1.5, truncate=5, target="triangular", temperature=0.7)
    stage1 = builders.stage1_objective(params, checkpoint, 10)
    stage2 = builders.stage2_objective(params, checkpoint, 10)
    assert stage1.target == stage2.target
    assert (stage1.target.sigma, stage1.target.truncate, stage1.target.kind) == (1.5, 5, "triangular")
    assert stage1.temperature == stage2.temperature == 0.7
    assert stage1.first_coord_id == checkpoint.coord.first_id


def test_targets_narrow_and_distributions_cool_over_their_shares(repository, checkpoint):
    ramps = {"sigma_from": 6.0, "sigma_fraction": 0.5, "temperature_from": 3.0, "temperature_fraction": 0.2}
    params = params_with(repository, sigma=2.0, truncate=8, temperature=1.0, anneal=ramps)
    objective = builders.stage1_objective(params, checkpoint, 8)
    steps = [objective.at(step) for step in range(8)]
    assert [o.target.sigma for o in steps] == [6.0, 5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0]
    assert [o.target.truncate for o in steps] == [24, 20, 16, 12, 8, 8, 8, 8]  # as many sigmas as at the end
    assert [o.temperature for o in steps] == [3.0, 2.0, *[1.0] * 6]
    assert builders.stage2_objective(params, checkpoint, 8).at(1).target.sigma == 5.0


def test_without_shares_every_step_has_the_same_objective(repository, checkpoint):
    objective = builders.stage2_objective(params_with(repository), checkpoint, 10)
    assert objective.at(0) is objective


def test_soft_context_of_the_parameters(repository, checkpoint):
    changes = {"n_softctx_iter": 3, "coord_ctx_embed_mode": "expectation", "softctx_grad_mode": "em_detach"}
    context = builders.soft_context(params_with(repository, stage2=changes, temperature=2.0), checkpoint)
    assert (context.n_iter, context.embed_mode, context.grad_mode) == (3, "expectation", "em_detach")
    assert (context.temperature, context.first_coord_id) == (2.0, checkpoint.coord.first_id)


def test_the_curriculum_goes_from_strict_to_relaxed_and_brings_names_in(repository):
    matching = {"gate_threshold": 0.2, "lambda_sem": 1.0}
    stage2 = {"curriculum_fraction": 0.5, "gate_from": 0.6, "lambda_sem_from": 0.0}
    schedule = match_schedule(params_with(repository, matching=matching, stage2=stage2), 8)
    assert [schedule(s).gate_threshold for s in range(6)] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.2])
    assert [schedule(s).lambda_sem for s in range(6)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    off = match_schedule(params_with(repository, matching=matching), 8)
    assert (off(0).gate_threshold, off(0).lambda_sem) == (0.2, 1.0)


def test_a_checkpoint_without_coordinate_tokens_is_refused(repository, checkpoint):
    with pytest.raises(CheckpointError, match="norm1000"):
        builders.stage1_objective(params_with(repository), replace(checkpoint, detection=BASE), 10)
