"""Weights sharded over processes: the same trace and files as in one process, and resuming from any saved state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coordexp.config.profile import Profile
from coordexp.errors import ConfigError, Interrupted
from coordexp.models.loading import load_checkpoint, save_checkpoint
from coordexp.training.stage1 import train_stage1
from coordexp.training.stage2 import train_stage2
from coordexp.training.step import TeacherTask
from helpers import Workspace, World, build_workspace
from stage_runs import ENDS_WITHIN_S, EXACT, REPOSITORY, add_rollouts, assert_alike, trace

STAGES = {"stage1": train_stage1, "stage2": train_stage2}
STOP = 1


@dataclass(frozen=True, slots=True)
class Case:
    """A run in two processes, as a rule with sharded weights, which must be that of one process."""

    stage: str = "stage1"
    sharding: str = "fsdp2"
    nodes: int = 1
    params: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    rows_per_forward: int = 0
    tied: bool = True
    interrupted: str = ""  # "both" or "alone": who is stopped after step 1, so that the other kind goes on
    within: float = 1e-5


CASES = {
    "stage1": Case(),
    "accumulated, recomputed": Case(rows_per_forward=1, tuning={"activations": "recompute"}),
    "muon, vision frozen, head of its own": Case(optim={"optimizer": "muon"}, tuning={"vision": "freeze"}, tied=False),
    "stage2": Case("stage2", params={"stage2__n_softctx_iter": 3, "stage2__a1_coord_weight": 0.5}),
    "stage2, detached, one pass": Case(
        "stage2",
        params={"stage2__n_softctx_iter": 3, "stage2__softctx_grad_mode": "em_detach", "stage2__passes": "one"},
        tuning={"activations": "recompute"},
    ),
    # Sharded weights are served; those of one process answer in memory.
    "stage2, fresh rollouts": Case(
        "stage2", params={"stage2__b_ratio": 1.0, "stage2__refresh_steps": 2, "decode__max_new_tokens": 12}
    ),
    "bf16": Case(optim={"precision": "bf16"}, within=5e-3),
    "saved sharded": Case(interrupted="both"),
    "saved alone": Case(interrupted="alone"),
    "saved by both, whole": Case(sharding="none", interrupted="both"),
    "saved alone, whole": Case(sharding="none", interrupted="alone"),
    "muon, two nodes": Case(optim={"optimizer": "muon"}, nodes=2, interrupted="both"),
}


def prepared(root: Path, world: World, case: Case, sharding: str) -> Workspace:
    space = build_workspace(root, world)
    for folder in (space.paths.norm1000 / "init", space.paths.run("stage1")):
        if not case.tied:
            untie(folder)
    add_rollouts(space, world)
    tree = space.profile.model_dump()
    tree["launch"] |= {"sharding": sharding, "rows_per_forward": case.rows_per_forward, "threads": 1}
    tree["rollout"]["engine"] = "hf" if sharding == "none" else "vllm"
    tree["tuning"] |= case.tuning
    tree["monitor"]["every_steps"] = 0
    for stage in STAGES:
        tree[stage] |= {**EXACT, **case.optim}
    return replace(space, profile=Profile.model_validate(tree)).set(**case.params)


def alike(case: Case) -> Case:
    """What a run in one process depends on."""
    return replace(case, sharding="none", nodes=1, interrupted="", within=0.0)


def untie(folder: Path) -> None:
    """Give the head weights of its own, as in the 8B model."""
    checkpoint = load_checkpoint(folder)
    model = checkpoint.model
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(0.5 * model.lm_head.weight.detach())
    shutil.rmtree(folder)
    save_checkpoint(folder, replace(checkpoint, model=model))
    assert "lm_head.weight" in load_file(folder / "model.safetensors")


def train(space: Workspace, stage: str) -> None:
    """In this very process, alone."""
    os.environ["DVC_ROOT"] = str(space.paths.root)
    STAGES[stage](space)


def interrupt(space: Workspace, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TeacherTask.micro_batches

    def stopping(self, step):
        step == STOP and os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(TeacherTask, "micro_batches", stopping)
    with pytest.raises(Interrupted):
        train(space, stage)
    monkeypatch.setattr(TeacherTask, "micro_batches", original)


def run_sharded(runs: list[tuple[Case, Workspace]], folder: Path, warm: Path) -> None:
    entries = [
        {
            "stage": case.stage,
            "nodes": case.nodes,
            "params": space.params.model_dump(),
            "profile": space.profile.model_dump(),
            "root": str(space.paths.root),
            "stop_in": STOP if case.interrupted == "both" else None,
        }
        for case, space in runs
    ]
    (folder / "runs.json").write_text(json.dumps(entries))
    launcher = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(REPOSITORY / "tests" / "sharded_runs.py"), str(folder / "runs.json")],
        env={
            "PATH": f"{warm}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY / "src"),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * ENDS_WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def spaces(tmp_path_factory, world: World, warm: Path) -> dict[str, tuple[Workspace, Workspace]]:
    """By case: where one process ran, and where two ran sharded. All sharded runs share two processes."""
    root = tmp_path_factory.mktemp("fsdp")
    patch = pytest.MonkeyPatch()
    patch.setenv("DVC_ROOT", str(root))
    made: dict[str, tuple[Workspace, Workspace]] = {}
    for name, case in CASES.items():
        sharded = prepared(root / "both" / name, world, case, case.sharding)
        # How two processes run it is nothing to one process.
        alone = next((made[other][0] for other in made if alike(CASES[other]) == alike(case)), None)
        if alone is None:
            alone = prepared(root / "alone" / name, world, case, "none")
            train(alone, case.stage)
        if case.interrupted == "alone":
            interrupt(sharded, case.stage, patch)
        made[name] = alone, sharded
    run_sharded([(CASES[name], sharded) for name, (_, sharded) in made.items()], root, warm)
    for name, (_, sharded) in made.items():
        if CASES[name].interrupted == "both":
            train(sharded, CASES[name].stage)
    patch.undo()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_equals_a_run_in_one_process(spaces, name):
    case, (alone, sharded) = CASES[name], spaces[name]
    assert_alike(trace(sharded, case.stage), trace(alone, case.stage), within=case.within)
    if case.within <= 1e-5:
        found, expected = (load_file(s.paths.run(case.stage) / "model.safetensors") for s in (sharded, alone))
        assert found.keys() == expected.keys()
        for weight, value in found.items():
            torch.testing.assert_close(value, expected[weight], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_checkpoint_has_the_layout_of_one_process(spaces, name):
    case, folders = CASES[name], [s.paths.run(CASES[name].stage) for s in spaces[name]]
    contents = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert contents[0] == contents[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]
    assert ("lm_head.weight" in load_file(folders[1] / "model.safetensors")) != case.tied
    load_checkpoint(folders[1])


@pytest.mark.slow
def test_a_process_holds_its_shard(spaces):
    """Half of the weights and gradients, with what does not divide evenly."""
    _, sharded = spaces["stage1"]
    held = json.loads((sharded.paths.root / "held.json").read_text())
    assert len(held) == sharded.profile.stage1.steps
    assert all(0.49 < share < 0.52 for share in held)


def test_fresh_rollouts_in_memory_and_sharding_are_refused_together(workspace):
    tree = workspace.profile.model_dump()
    tree["launch"]["sharding"] = "fsdp2"
    tree["monitor"]["every_steps"] = 0
    space = replace(workspace, profile=Profile.model_validate(tree)).set(stage2__refresh_steps=2)
    with pytest.raises(ConfigError, match=r"stage2\.refresh_steps is 2, but launch\.sharding is fsdp2"):
        train_stage2(space)
