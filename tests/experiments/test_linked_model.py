"""A model behind a symbolic link: experiments can read it, and neither git nor DVC ever stores it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from toy_graph import Toy, cold_path, enter_environment, new_toy


@pytest.fixture
def toy(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, warm: Path) -> Toy:
    """The profile names a link to the weights; the pins are those of the same files."""
    enter_environment(monkeypatch, repository, tmp_path, warm)
    toy = new_toy(repository, tmp_path)
    (toy.root / "models" / "tiny-base").rename(tmp_path / "weights")
    (toy.root / "models" / "linked").symlink_to(tmp_path / "weights")
    profile = toy.root / "configs" / "tiny.yaml"
    profile.write_text(profile.read_text().replace("path: models/tiny-base", "path: models/linked"))
    toy.commit("a linked model")
    return toy


def files_of(toy: Toy, revision: str) -> list[str]:
    return [name for name in toy.succeed("git", "ls-tree", "-r", "--name-only", revision).split() if "models" in name]


def test_nothing_behind_the_link_is_committed(toy: Toy) -> None:
    toy.succeed("dvc", "exp", "run", "--name", "here", "--set-param", "sigma=2.5")
    toy.succeed("dvc", "exp", "run", "--temp", "--name", "there", "--set-param", "sigma=3.5")
    assert [line.split()[0] for line in toy.ran()].count("stage1") == 2
    for name in ("here", "there"):
        [revision] = toy.succeed("git", "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").split()
        assert files_of(toy, revision) == []
    assert (toy.root / "models" / "linked").is_symlink()
    toy.commit("the experiment")
    assert files_of(toy, "HEAD") == []
    digests = {path.stat().st_size for path in (toy.root / ".dvc" / "cache").rglob("*") if path.is_file()}
    assert (toy.root / "models" / "linked" / "model.safetensors").stat().st_size not in digests


def test_after_a_killed_experiment_a_commit_works(toy: Toy, monkeypatch: pytest.MonkeyPatch, warm: Path) -> None:
    monkeypatch.setenv("TOY_HANG", "stage2 0.25 0")
    monkeypatch.setenv("PATH", cold_path(warm))
    command = ["dvc", "exp", "run", "--set-param", "softce_weight=0.25"]
    with subprocess.Popen(command, cwd=toy.root, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not toy.log.exists() or "stage2 0.25 0" not in toy.log.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    toy.commit("after a killed experiment")
    assert files_of(toy, "HEAD") == []
    assert toy.succeed("git", "status", "--porcelain") == ""
