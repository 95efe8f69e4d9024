"""The ablation as runs: what it leaves, that nothing is run twice, and that stage-2 arms spend the same tokens."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from pipelines.ablation import run

from coordexp.config.ablation import Arm, Budget, all_arms
from coordexp.config.run import RunConfig
from coordexp.errors import ConfigError, Interrupted
from coordexp.models.forward import input_table
from coordexp.models.loading import load_checkpoint
from coordexp.models.pins import pins_of
from coordexp.rollout.records import write_rollouts
from coordexp.training import ablation
from coordexp.training.ablation import Ablation, ArmPaths, step_tokens, steps_for_tokens
from coordexp.training.session import summarise_log
from coordexp.training.stage2 import train_stage2
from helpers import Workspace, new_tokenizer, save_model, teacher_rollouts
from toyworld.model import build_tiny

BUDGET = Budget(seeds=(17, 18), stage1_steps=2, stage2_steps=2, dev_images=2, val_images=0)


@pytest.fixture
def space(workspace: Workspace, world) -> Workspace:
    """The smoke workspace with a dev split and its categories; answers are cut short to save time."""
    paths = workspace.paths
    shutil.copy(paths.norm1000 / "val.parquet", paths.norm1000 / "dev.parquet")
    names = sorted({desc for sample in world.samples for desc in sample.descs})
    paths.records.mkdir(parents=True)
    rows = [{"id": i, "name": name, "split": "train"} for i, name in enumerate(names, 1)]
    (paths.records / "categories.json").write_text(json.dumps(rows))
    return workspace.set(decode__max_new_tokens=8, eval__bootstrap_resamples=100)


def report_of(space: Workspace, budget: Budget, names: list[str]) -> dict:
    context = RunConfig(
        params=space.params, profile=space.profile, paths=space.paths, log=logging.getLogger("coordexp")
    )
    run(budget, names, context)
    out = space.paths.root / "reports" / "ablations"
    assert (out / "objective.md").read_text().startswith("# Ablation of the objective")
    return json.loads((out / "objective.json").read_text())


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, int]]:
    """The stages and seeds that were really trained."""
    calls: list[tuple[str, int]] = []

    def noting(name: str, original):
        def train(params, profile, paths):
            calls.append((name, params.seed))
            return original(params, profile, paths)

        return train

    for name in ("train_stage1", "train_stage2", "train_control"):
        monkeypatch.setattr(ablation, name, noting(name, getattr(ablation, name)))
    return calls


@pytest.mark.slow
def test_two_arms_and_two_seeds_are_run_once_and_go_on_after_a_stop(space, trained, monkeypatch):
    decode = ablation.decode_split

    def stopping(params, profile, paths, folder, split):
        if params.seed == 18:
            raise Interrupted("stopped")
        return decode(params, profile, paths, folder, split)

    monkeypatch.setattr(ablation, "decode_split", stopping)
    with pytest.raises(Interrupted):
        report_of(space, BUDGET, ["pure_ce"])
    first = json.loads((space.paths.root / "reports/ablations/objective.json").read_text())
    assert first["budget"]["seeds"] == [17]  # what is finished is reported
    assert trained == [("train_stage1", 17)] * 2 + [("train_stage1", 18)]
    monkeypatch.setattr(ablation, "decode_split", decode)
    report = report_of(space, BUDGET, ["pure_ce"])
    assert trained[3:] == [("train_stage1", 18)] * 2
    assert report["budget"]["seeds"] == [17, 18]
    recipe, pure = report["arms"]
    assert (recipe["name"], recipe["verdict"]) == ("seed_recipe", "baseline")
    assert (pure["name"], pure["baseline"]) == ("pure_ce", "seed_recipe")
    assert pure["difference"].keys() == {"coco.mAP", "coco.AP75", "f1.full_50", "set.dup_pairs_90"}
    assert recipe["val"]["bin_mae"] > 0
    assert [claim["arm"] for claim in report["claims"]] == ["seed_recipe"]
    assert report_of(space, BUDGET, ["pure_ce"]) == report
    assert len(trained) == 5  # nothing again
    report_of(space.set(stage1__w1_weight=0.3), BUDGET, ["pure_ce"])
    assert len(trained) == 5  # both arms state all weights of the recipe


@pytest.mark.slow
def test_stage_2_arms_start_from_one_checkpoint_and_spend_the_tokens_of_the_default(space, trained):
    budget = Budget(seeds=(17,), stage1_steps=2, stage2_steps=4, dev_images=2, val_images=2)
    ablated = Ablation(space, budget)
    arms = {arm.name: arm for arm in all_arms(Path())}
    folders = {name: ablated.run(arms[name], 17) for name in ("stage2_default", "a_only_n2", "control")}
    # params.yaml is the seed recipe here or not: at most one more stage 1 than there are recipes.
    assert trained.count(("train_stage1", 17)) == 1
    done = {name: json.loads((folder / "done.json").read_text()) for name, folder in folders.items()}
    tokens = {name: row["tokens"] for name, row in done.items()}
    largest_step = tokens["a_only_n2"] / done["a_only_n2"]["steps"]
    assert abs(tokens["a_only_n2"] - tokens["stage2_default"]) <= largest_step
    assert tokens["control"] >= tokens["stage2_default"]
    assert done["control"]["steps"] == done["stage2_default"]["steps"] == 4
    shared = folders["stage2_default"].parent / "stage1_default"
    starts = {
        json.loads((folders[name] / stage / "run_metadata.json").read_text())["inputs"]["start"]
        for name, stage in (("stage2_default", "stage2"), ("a_only_n2", "stage2"), ("control", "stage1-control"))
    }
    assert len(starts) == 1
    assert (shared / "done.json").is_file()


@pytest.fixture
def with_rollouts(space: Workspace, world) -> ArmPaths:
    """Paths of an arm whose rollouts are on file."""
    checkpoint = load_checkpoint(space.paths.run("stage1"))
    folder = space.paths.run("rollout")
    folder.mkdir()
    write_rollouts(folder / "rollouts.jsonl", teacher_rollouts(checkpoint, world).values())
    shared = {"stage1": space.paths.run("stage1"), "rollout": folder}
    return ArmPaths("smoke", space.paths.root, space.paths.run("arm"), shared)


def test_tokens_are_known_before_training(space, with_rollouts):
    """Counted from the plan, they are those that the run logs, with both channels and two forwards in A."""
    params = space.set(stage2__n_softctx_iter=2).params
    expected = step_tokens(params, space.profile, with_rollouts, space.profile.stage2.steps)
    train_stage2(params, space.profile, with_rollouts)
    log = with_rollouts.run("stage2") / "train_log.jsonl"
    assert [json.loads(line)["tokens"] for line in log.read_text().splitlines()] == expected
    assert summarise_log(log)["tokens"] == sum(expected)


def test_the_nearest_number_of_steps(space, with_rollouts):
    seen = np.cumsum(step_tokens(space.params, space.profile, with_rollouts, 16))
    for budget in (1, int(seen[0]), int(seen[2]) + 40, int(seen[5]) - 40, int(seen[9])):
        expected = int(np.abs(seen - budget).argmin()) + 1
        assert steps_for_tokens(space.params, space.profile, with_rollouts, budget) == expected


def test_arms_that_do_not_exist_in_the_parameters_fail_before_anything_runs(space):
    ablated = Ablation(space, BUDGET)
    with pytest.raises(ConfigError, match="ablation arm typo: wrong parameters"):
        ablated.run(Arm(name="typo", stage="stage1", changes={"sigm": 1.0}, baseline="seed_recipe"), 17)


@pytest.mark.slow
def test_an_arm_with_other_coordinate_rows_starts_from_them(space, trained, tmp_path):
    tokenizer = new_tokenizer()
    save_model(tmp_path / "base", build_tiny(tokenizer, 17), tokenizer)
    model = space.profile.model.model_copy(update={"path": str(tmp_path / "base"), "files": pins_of(tmp_path / "base")})
    profile = space.profile.model_copy(update={"model": model})
    ablated = Ablation(space.params, profile, space.paths, BUDGET)
    arms = {arm.name: arm for arm in all_arms(Path())}
    folders = {name: ablated.run(arms[name], 17) for name in ("seed_recipe", "init_mean", "init_digits")}
    assert len(set(folders.values())) == len(trained) == 3
    starts = {
        name: json.loads((folder / "stage1" / "run_metadata.json").read_text())["inputs"]["start"]
        for name, folder in folders.items()
    }
    assert len(set(starts.values())) == 3
    mean = load_checkpoint(space.paths.run("ablation") / "init-mean")
    rows = input_table(mean.model).weight[mean.coord.first_id : mean.coord.end_id]
    assert (rows == rows[0]).all()
