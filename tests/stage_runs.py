"""Run training stages as separate processes, as DVC does, and compare their logs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from coordexp.config.loading import read_yaml
from coordexp.infra.artefacts import write_sealed
from coordexp.models.loading import load_checkpoint
from helpers import MAX_PIXELS, MIN_PIXELS, Workspace, World, put_rollouts, teacher_rollouts

REPOSITORY = Path(__file__).parents[1]
ENDS_WITHIN_S = 240.0
ENTRIES = {"stage1": "stage1", "stage1-control": "stage1_control", "stage2": "stage2"}
# Muon orthogonalises in bfloat16, which turns the last digit of a gradient into the third of an update.
EXACT = {"precision": "fp32", "optimizer": "adamw", "lr": 1e-4}


def add_rollouts(space: Workspace, world: World) -> None:
    """Write rollouts, one of which does not parse, and the compute of stage 2."""
    checkpoint = load_checkpoint(space.paths.run("stage1"))
    put_rollouts(space.paths, teacher_rollouts(checkpoint, world))
    write_sealed(space.paths.run("stage2-compute.json"), {"steps": 4, "tokens": 2000, "rollout_tokens": 3000})


@pytest.fixture
def ready(workspace: Workspace, world: World, warm: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace in which every stage can run; its processes are forked from one that has imported torch."""
    monkeypatch.setenv("PATH", f"{warm}{os.pathsep}{os.environ['PATH']}")
    add_rollouts(workspace, world)
    return workspace


def run_stage(
    ready: Workspace,
    stage: str,
    launch: Mapping[str, Any],
    *,
    optim: Mapping[str, Any] = EXACT,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    before: str = "",
    starter: Sequence[str] = ("python",),
) -> tuple[int, str]:
    """Run the entry of a stage in the workspace; returns exit code and output.

    Args:
        ready: the workspace.
        stage: which one.
        launch: keys of the profile's `launch` that differ from the smoke profile's.
        optim: likewise, of both stages' optimizers.
        params: keys of blocks of params.yaml that differ.
        before: code that each process runs first.
        starter: the command that is given the script.
    """
    root = ready.paths.root
    profile = read_yaml(REPOSITORY / "configs" / "smoke.yaml")
    profile["model"] |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    profile["launch"] |= launch
    if "sharding" in launch:
        profile["monitor"]["every_steps"] = 0
    for part in ("stage1", "stage2"):
        profile[part] |= optim
    (root / "configs").mkdir(exist_ok=True)
    YAML().dump(profile, root / "configs" / "smoke.yaml")
    tree = read_yaml(REPOSITORY / "params.yaml")
    for block, changes in (params or {}).items():
        tree[block] |= changes
    YAML().dump(tree, root / "params.yaml")
    (root / "entry.py").write_text(
        f"import os\nimport sys\nfrom pipelines.{ENTRIES[stage]} import run\n"
        f"from coordexp.stage import stage_main\n{before}\nsys.exit(stage_main(run))\n"
    )
    done = subprocess.run(
        [*starter, "entry.py", "--profile", "smoke"],
        cwd=root,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}",
            "DVC_ROOT": str(root),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ENDS_WITHIN_S,
        check=False,
    )
    return done.returncode, done.stdout


def trace(ready: Workspace, stage: str) -> list[dict[str, Any]]:
    """The log of a stage without its timings."""
    lines = (ready.paths.run(stage) / "train_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def assert_alike(
    found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], within: float = 1e-5
) -> None:
    """Assert equal rows within a tolerance; quantiles are skipped, because an error may fall into the next cell."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            if isinstance(value, str):
                assert row[name] == value
            elif not name.endswith("_p90"):
                # The logarithm of a side of a tenth of a bin magnifies a rounding error ten thousand times.
                near = max(within, 1e-3) if name == "raw/bbox_log_wh" else within
                assert row[name] == pytest.approx(value, rel=near, abs=near), (wanted["step"], name)
