"""`coordexp verify` on a small DVC repository whose workspace is linked to the cache, and on files outside DVC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coordexp.config.profile import DatasetConfig
from coordexp.errors import DamagedArtefactError
from coordexp.experiments.runs import Repository
from coordexp.experiments.verify import Verified, verify
from coordexp.infra.artefacts import sealing
from coordexp.records.manifest import write_manifest
from coordexp.rollout.engine import Generation, Journal
from coordexp.rollout.records import read_generations
from coordexp.training.checkpoint import load_state, save_state
from toy_graph import enter_environment

STAGE = """\
stages:
  rollout:
    cmd: {python} make.py
    deps:
      - make.py
    outs:
      - runs/toy/rollout
      - runs/toy/compute.json
"""
MAKE = """\
import json
from pathlib import Path
from coordexp.infra.artefacts import sealing, write_sealed
from coordexp.infra.files import write_text
with sealing(Path("runs/toy/rollout")) as folder:
    rows = [{"image_id": i, "ids": [i, 2, 3], "finish_reason": "stop"} for i in range(9)]
    write_text(folder / "rollouts.jsonl", "".join(json.dumps(row) + "\\n" for row in rows))
write_sealed(Path("runs/toy/compute.json"), {"steps": 4})
"""
ROLLOUTS = "runs/toy/rollout/rollouts.jsonl"


@dataclass(frozen=True, slots=True)
class Small:
    """A repository with one stage that ran."""

    root: Path

    def verify(self, repair: bool = False) -> Verified:
        repository = Repository(self.root, lambda line: None)
        return verify(self.root, repository.run, repair, repository.say)

    def succeed(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def flip(self, name: str) -> Path:
        """Change one bit of a file where it lies, and leave its time as it was."""
        path = self.root / name
        before, content = path.stat(), bytearray(path.read_bytes())
        path.chmod(0o644)
        content[len(content) // 2] ^= 1
        with path.open("r+b") as handle:
            handle.write(content)
        path.chmod(before.st_mode)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return path

    def entry(self, name: str) -> Path:
        """The entry of DVC's cache that is the same file, or has the same content."""
        content = (self.root / name).read_bytes()
        return next(p for p in self.root.glob(".dvc/cache/files/md5/*/*") if p.read_bytes() == content)


@pytest.fixture
def small(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, warm: Path) -> Small:
    enter_environment(monkeypatch, repository, tmp_path, warm)
    made = Small(tmp_path / "small")
    made.root.mkdir()
    made.succeed("git", "init", "--quiet")
    made.succeed("dvc", "init", "--quiet")
    (made.root / ".dvc" / "config").write_text('[cache]\n    type = "hardlink,symlink"\n')
    (made.root / "dvc.yaml").write_text(STAGE.format(python=sys.executable))
    (made.root / "make.py").write_text(MAKE)
    made.succeed("dvc", "repro", "--quiet")
    return made


def words(found: Verified) -> list[str]:
    return [str(fault) for fault in found.faults]


def test_damage_of_a_file_linked_to_the_cache_is_found_in_both_places(small: Small) -> None:
    assert words(small.verify()) == []
    entry = small.entry(ROLLOUTS)
    path = small.flip(ROLLOUTS)
    assert entry.samefile(path)
    assert "up to date" in small.succeed("dvc", "status"), "DVC trusts what it linked"
    with pytest.raises(DamagedArtefactError, match="coordexp verify --repair"):
        read_generations(path, 100)
    found = small.verify()
    assert sorted(fault.where for fault in found.faults) == sorted([str(entry), ROLLOUTS])
    assert not found.is_whole
    found = small.verify(repair=True)
    assert [w for w in words(found) if "rollout" not in w.partition("dvc repro")[2]] == []
    assert not found.is_whole
    assert not path.exists()
    assert not entry.exists()
    small.succeed("dvc", "repro", "--quiet")
    assert len(read_generations(path, 100)) == 9
    assert words(small.verify()) == []


def test_files_with_an_intact_copy_are_restored(small: Small) -> None:
    """From the workspace into the cache, from the cache into the workspace, and into both from a fetched revision."""
    whole = (small.root / ROLLOUTS).read_bytes()
    compute = small.root / "runs" / "toy" / "compute.json"
    entry = small.entry(ROLLOUTS)
    for path, content in ((small.root / ROLLOUTS, whole), (compute, compute.read_bytes())):
        path.unlink()  # a copy of its own
        path.write_bytes(content)
    small.flip(str(entry.relative_to(small.root)))
    small.flip("runs/toy/compute.json")
    found = small.verify(repair=True)
    assert found.is_whole, words(found)
    assert len(found.faults) == 2
    assert entry.read_bytes() == whole
    assert json.loads(compute.read_text())["steps"] == 4
    kept = small.root / "runs" / "revisions" / "0123" / ROLLOUTS
    kept.parent.mkdir(parents=True)
    kept.write_bytes(whole)
    (small.root / ROLLOUTS).unlink()
    (small.root / ROLLOUTS).hardlink_to(entry)
    small.flip(ROLLOUTS)
    found = small.verify(repair=True)
    assert found.is_whole, words(found)
    assert (small.root / ROLLOUTS).read_bytes() == entry.read_bytes() == whole
    assert "up to date" in small.succeed("dvc", "status")


def test_a_later_result_than_the_recorded_one_is_not_damage(small: Small) -> None:
    (small.root / ROLLOUTS).unlink()
    with sealing(small.root / "runs" / "toy" / "rollout") as folder:
        (folder / "rollouts.jsonl").write_text("of another run")
    found = small.verify(repair=True)
    assert words(found) == []
    assert "runs/toy/rollout: intact, but not the result in dvc.lock: see `dvc status`" in found.looked_at
    (folder / "rollouts.jsonl").write_text("damaged")
    assert [fault.where for fault in small.verify().faults] == [
        f"runs/toy/rollout/{n}" for n in sorted(os.listdir(folder))
    ]


def test_damaged_states_journals_and_images_are_found(small: Small, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    state = small.root / ".resume" / "stage1-ff"
    for step in (1, 2):
        save_state(state, step, model, torch.optim.SGD(model.parameters()))
    journal = Journal(small.root / ".resume" / "generations-ff" / "generations.jsonl")
    for key in ("a", "b"):
        journal.append(key, Generation(np.array([1, 2], np.int32), "stop"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 40), "red" if name == "a.png" else "blue").save(pictures / name)
    rows = [{"id": i, "file_name": name, "width": 40, "height": 40} for i, name in enumerate(("a.png", "b.png"), 1)]
    truth = {"images": rows, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (pictures / "train.json").write_text(json.dumps(truth))
    places = {"root": str(pictures), "train": "train.json", "val": "none", "train_images": ".", "val_images": "."}
    config = DatasetConfig.model_validate({"format": "coco", "weight": 1.0, "prompt": "open", **places})
    with sealing(small.root / "data" / "toy" / "raw") as raw:
        write_manifest(raw, {"mine": config}, False, 1)
    assert words(small.verify()) == []

    next((state / "state-000002").glob("part-*")).write_bytes(b"")
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0].replace(b"1, 2", b"1, 3") + lines[1])
    Image.new("RGB", (40, 40), "green").save(pictures / "b.png")
    found = small.verify(repair=True)
    assert [fault.is_repaired for fault in found.faults] == [True, True, False]
    assert [part in w for part, w in zip(("part-000", "1 lines are damaged", "mine/b.png"), words(found), strict=True)]
    resumed = load_state(state)
    assert resumed is not None
    assert resumed.step == 1
    assert journal.read(10).keys() == {"b"}
    assert [fault.where.partition(" ")[0] for fault in small.verify().faults] == ["mine/b.png"]
