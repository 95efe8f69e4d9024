"""The whole graph of the smoke profile in a temporary clone: it runs, it is reproducible, an A/B runs only its part."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordexp.config.loading import read_yaml
from coordexp.config.paths import CHECKPOINTS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smoke")]  # one worker: the clone is made once

STAGES = ("raw", "convert", "norm1000", "pack", "stage1", "rollout", "stage2", "stage1-control", "coco-eval", "report")
AFTER_STAGE_2 = {"stage2", "coco-eval", "report"}


@dataclass(frozen=True, slots=True)
class Clone:
    """A temporary repository with this working tree as its only commit, and the smoke profile chosen."""

    root: Path
    home: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the clone as a user with an empty home would; stderr is merged into stdout."""
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "DVC_SITE_CACHE_DIR": str(self.home / "dvc"),
            "DVC_NO_ANALYTICS": "1",
            "OMP_NUM_THREADS": "1",
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@localhost",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@localhost",
        }
        return subprocess.run(
            command,
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def succeed(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"
        return done.stdout

    def commit(self, message: str) -> None:
        self.succeed("git", "add", "--all")
        self.succeed("git", "commit", "--quiet", "--message", message)


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


def unchanged(output: str) -> set[str]:
    return set(re.findall(r"Stage '([^':]+)' didn't change, skipping", output))  # a colon: of another dvc.yaml


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Clone:
    """The clone before its first run."""
    copy = Clone(tmp_path_factory.mktemp("smoke"), tmp_path_factory.mktemp("home"))
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        source = repository / name
        if source.is_symlink() or source.is_file():  # a file deleted but not yet committed is listed too
            target = copy.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    params = copy.root / "params.yaml"
    params.write_text(re.sub(r"(?m)^profile: \S+", "profile: smoke", params.read_text()))
    (copy.root / "dvc.lock").unlink(missing_ok=True)  # it names another profile's outputs
    copy.succeed("git", "init", "--quiet", "--initial-branch", "main")
    copy.commit("working tree")
    return copy


@pytest.fixture(scope="module")
def reproduced(clone: Clone) -> str:
    """The output of the first `dvc repro`; its results are committed."""
    output = clone.succeed("dvc", "repro")
    clone.commit("smoke results")
    return output


def test_every_stage_runs_and_leaves_a_report(clone: Clone, reproduced: str) -> None:
    assert ran(reproduced) == set(STAGES)
    reports = clone.root / "reports" / "smoke"
    assert (reports / "progress.md").read_text().strip()
    assert any((reports / "gallery").iterdir())
    assert json.loads((reports / "metrics.json").read_text()).keys() >= set(CHECKPOINTS)


def test_a_second_run_changes_nothing(clone: Clone, reproduced: str) -> None:
    output = clone.succeed("dvc", "repro")
    assert ran(output) == set()
    assert unchanged(output) == set(STAGES)
    assert clone.succeed("git", "status", "--porcelain") == ""
    assert clone.run("dvc", "status", "--quiet").returncode == 0


def test_results_travel_through_a_local_remote(clone: Clone, reproduced: str, tmp_path: Path) -> None:
    """A colleague's clone has every output after `dvc pull`, and nothing left to run."""
    clone.succeed("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    clone.succeed("dvc", "push")
    clone.commit("a remote")
    theirs = Clone(tmp_path / "theirs", tmp_path / "home")
    theirs.home.mkdir()
    clone.succeed("git", "clone", "--quiet", str(clone.root), str(theirs.root))
    theirs.succeed("dvc", "pull")
    name = "runs/smoke/stage2/model.safetensors"
    assert (theirs.root / name).read_bytes() == (clone.root / name).read_bytes()
    assert ran(theirs.succeed("dvc", "repro")) == set()


def test_a_stage_2_weight_does_not_retrain_stage_1(clone: Clone, reproduced: str) -> None:
    before = read_yaml(clone.root / "dvc.lock")["stages"]
    output = clone.succeed("dvc", "exp", "run", "--set-param", "softce_weight=0.2")
    assert ran(output) == AFTER_STAGE_2
    after = read_yaml(clone.root / "dvc.lock")["stages"]
    assert {name for name in STAGES if before[name] != after[name]} == AFTER_STAGE_2
    table = clone.succeed("dvc", "metrics", "diff", "--all")
    assert re.search(r"reports/smoke/metrics\.json +stage2\.eval\.", table)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("softce_wt=0.2", "Could not override 'softce_wt'"),
        ("softce_weight=high", "softce_weight: found 'high' (text), expected a number >= 0."),
    ],
)
def test_a_wrong_parameter_stops_the_experiment(clone: Clone, reproduced: str, assignment: str, words: str) -> None:
    done = clone.run("dvc", "exp", "run", "--set-param", assignment)
    clone.succeed("git", "checkout", "--quiet", "--force", "HEAD")
    assert done.returncode != 0, done.stdout[-3000:]
    assert words in done.stdout
