"""A small DVC repository with the stages and files that `coordexp ab` reads; a stage is a few lines and trains nothing.

Its ignore files, DVC configuration, parameters, profile and stage `check` are those of this repository. Every other
stage that really runs leaves a line in a file outside of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from coordexp.config.loading import read_yaml
from coordexp.models.pins import write_pins
from warm_python import enter

INTERPRETER = sys.executable
SCRIPT = '''
"""Write the outputs of one stage: three images with boxes that are off by what the parameters say."""
import json, os, shutil, time
from pathlib import Path
from ruamel.yaml import YAML
from coordexp.infra.artefacts import write_sealed
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction, write_results

def write_stage(stage, words):
    params = YAML(typ="safe", pure=True).load(Path("params.yaml"))
    weight, seed = params["softce_weight"], params["stage2"]["seed"]
    if stage != "report":
        with Path(os.environ["TOY_LOG"]).open("a") as lines:
            lines.write(f"{stage} {weight} {seed}\\n")
    if os.environ.get("TOY_HANG") == f"{stage} {weight} {seed}":
        time.sleep(600)
    if os.environ.get("TOY_FAIL") == stage:
        raise SystemExit("the toy fails")
    if stage == "convert":
        folder = Path("data/tiny/records")
        folder.mkdir(parents=True)
        (folder / "categories.json").write_text(json.dumps([{"id": 1, "name": "cat", "split": "train"}]))
    elif stage.startswith("decode@"):
        checkpoint = stage.removeprefix("decode@")
        folder = Path("runs/tiny/decode") / checkpoint
        folder.mkdir(parents=True)
        rows = []
        for i in range(1, 4):
            off = i * weight * 4 + seed + {"stage1": 6, "stage1-control": 3, "stage2": 0}[checkpoint]
            x, y = ((5.0, 20.0), (25.0, 55.0), (55.0, 5.0))[i % 3]  # no place that a blind answer could guess
            box = (x + off, y, x + 40 + off, y + 40)
            bins = tuple(round(5 * edge) for edge in box)
            pred = Prediction("cat", box, bins, (0.0, 0.0, 0.0, 0.0), 0.0)
            gt = (GroundTruth("cat", (x, y, x + 40, y + 40)),)
            rows.append(ImageResult(i, f"{i}.jpg", 200, 200, gt, (pred,), "", ParseReport(True, 1), "stop", 1))
        write_results(folder / "answers.jsonl", rows)
        (folder / "decode.json").write_text(json.dumps({"codec": "digits"}))
    elif stage == "coco-eval":
        for checkpoint in ("stage1", "stage1-control", "stage2"):
            folder = Path("runs/tiny/eval") / checkpoint
            folder.mkdir(parents=True)
            shutil.copy(Path("runs/tiny/decode") / checkpoint / "answers.jsonl", folder / "gt_vs_pred.jsonl")
        Path("reports/tiny").mkdir(parents=True, exist_ok=True)
        Path("reports/tiny/headline.json").write_text(json.dumps({"weight": weight}))
    elif stage == "report":
        Path("reports/tiny/progress.md").write_text(words)
    else:
        if stage == "stage1":
            from coordexp.config.loading import load_profile
            from coordexp.models.pins import pinned_folder
            pinned_folder(load_profile(Path("configs/tiny.yaml")).model, "tiny")
        folder = Path("runs/tiny") / stage
        folder.mkdir(parents=True)
        changed = weight if stage == "stage2" else ""
        (folder / "model.safetensors").write_text(f"{stage} {params['sigma']} {changed} {seed}")
        (folder / "run_metadata.json").write_text(json.dumps({"tokens": 10}))
        if stage == "stage2":
            write_sealed(Path("runs/tiny/stage2-compute.json"), {"tokens": 10, "rollout_tokens": 6})
            control = Path("runs/tiny/stage1-control")
            control.mkdir(parents=True)
            (control / "run_metadata.json").write_text(json.dumps({"tokens": 15, "after": [weight, seed]}))
        rows = [{"step": s, "raw/softce": 5.0 - s, "raw/text_ce": 1.0} for s in range(4)]
        (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
'''

ENTRY = """\
import sys

from toy import write_stage

if __name__ == "__main__":
    from {room}.words import WORDS  # where it is called, as stages may

    item = [f"@{{key}}" for key in sys.argv[1:] if key.startswith("stage")]
    write_stage("".join(["{stage}", *item]), WORDS)
"""
ROOMS = {
    **{"convert": "records", "stage1": "training", "stage2": "training", "decode": "answering"},
    **{"coco-eval": "judging", "report": "telling"},
}

TABLE = """\
convert:
  params: [seed]
stage1:
  params: [sigma, stage1]
  profile: [model, stage1]
stage2:
  params: [softce_weight, stage2]
  profile: [model, stage2]
decode:
  params: [seed]
coco-eval:
  params: [eval]
report:
  params: [eval]
"""

GRAPH = """\
stages:
  check:
    cmd: python -m pipelines.check --profile ${profile}
    deps:
      - configs
      - pipelines
      - src
      - toy.py
    params:
      - params.yaml:
    outs:
      - inputs/${profile}:
          cache: false
          persist: true
  convert:
    cmd: python -m pipelines.convert --profile ${profile}
    deps:
      - inputs/${profile}/convert.json
    outs:
      - data/${profile}/records
  stage1:
    cmd: python -m pipelines.stage1 --profile ${profile}
    deps:
      - inputs/${profile}/stage1.json
      - data/${profile}/records
    outs:
      - runs/${profile}/stage1
  stage2:
    cmd: python -m pipelines.stage2 --profile ${profile}
    deps:
      - inputs/${profile}/stage2.json
      - runs/${profile}/stage1
    outs:
      - runs/${profile}/stage2
      - runs/${profile}/stage2-compute.json
      - runs/${profile}/stage1-control
  decode:
    foreach:
      stage1: runs/${profile}/stage1
      stage1-control: runs/${profile}/stage1-control
      stage2: runs/${profile}/stage2
    do:
      cmd: python -m pipelines.decode ${key} --profile ${profile}
      deps:
        - inputs/${profile}/decode.json
        - ${item}
      outs:
        - runs/${profile}/decode/${key}
  coco-eval:
    cmd: python -m pipelines.coco_eval --profile ${profile}
    deps:
      - inputs/${profile}/coco-eval.json
      - runs/${profile}/decode/stage1
      - runs/${profile}/decode/stage1-control
      - runs/${profile}/decode/stage2
      - data/${profile}/records
    outs:
      - runs/${profile}/eval
    metrics:
      - reports/${profile}/headline.json:
          cache: false
  report:
    cmd: python -m pipelines.report --profile ${profile}
    deps:
      - inputs/${profile}/report.json
      - runs/${profile}/eval
    outs:
      - reports/${profile}/progress.md:
          cache: false
"""


@dataclass(frozen=True, slots=True)
class Toy:
    """A repository, and the file in which its stages say that they ran."""

    root: Path
    log: Path

    def succeed(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def commit(self, message: str) -> None:
        self.succeed("git", "add", "--all")
        self.succeed("git", "commit", "--quiet", "--message", message)

    def write(self, name: str, text: str) -> None:
        """Change a file and commit it."""
        (self.root / name).write_text(text)
        self.commit(name)

    def ran(self) -> list[str]:
        """Stage, weight and seed of every run since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


def enter_environment(patch: pytest.MonkeyPatch, repository: Path, folder: Path, warm: Path) -> None:
    """Set the environment for stages, git and DVC, without reading or writing the user's home folder."""
    sources = f"{repository / 'src'}{os.pathsep}src"
    environment = {"TOY_LOG": str(folder / "log"), "PYTHONPATH": sources, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment |= {"DVC_SITE_CACHE_DIR": str(folder / "dvc"), "DVC_NO_ANALYTICS": "1"}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "test", f"GIT_{role}_EMAIL": "test@localhost"}
    enter(patch, environment | {"PATH": os.pathsep.join([str(warm), cold_path(warm)])}, warm)


def cold_path(warm: Path) -> str:
    """A path on which each program gets its own interpreter, so that one signal kills a whole process group."""
    folders = [str(Path(INTERPRETER).parent), *os.environ["PATH"].split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(folder for folder in folders if folder != str(warm)))


def new_toy(repository: Path, folder: Path) -> Toy:
    """The repository with its one commit, before any run."""
    root = folder / "toy"
    for name in (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / name, root / name)
    shutil.copytree(repository / "configs", root / "configs")
    model = root / "models" / "tiny-base"
    shutil.copytree(repository / "models" / "tiny-base", model)
    (model / "model.safetensors").write_bytes(bytes(5003))  # nobody loads it, and each experiment packs what git has
    with contextlib.chdir(root):
        write_pins(Path("configs", "tiny.yaml"))
    params = read_yaml(repository / "params.yaml")
    params["eval"]["bootstrap_resamples"] = 100
    YAML().dump(params, root / "params.yaml")
    (root / "pipelines").mkdir()
    (root / "pipelines" / "__init__.py").touch()
    shutil.copy(repository / "pipelines" / "check.py", root / "pipelines")
    for stage, room in ROOMS.items():
        (root / "src" / room).mkdir(parents=True, exist_ok=True)
        (root / "src" / room / "__init__.py").touch()
        (root / "src" / room / "words.py").write_text('WORDS = "as first written"\n')
        (root / "pipelines" / f"{stage.replace('-', '_')}.py").write_text(ENTRY.format(room=room, stage=stage))
    (root / "toy.py").write_text(SCRIPT)
    (root / "pipelines" / "inputs.yaml").write_text(TABLE)
    (root / "dvc.yaml").write_text(GRAPH)
    toy = Toy(root, folder / "log")
    toy.succeed("git", "init", "--quiet", "--initial-branch", "main")
    toy.commit("toy")
    return toy


def copied_toy(source: Path, folder: Path, repository: Path, patch: pytest.MonkeyPatch, warm: Path) -> Toy:
    """A copy of a folder with a toy repository, and the environment of its programs."""
    enter_environment(patch, repository, folder, warm)
    shutil.copytree(source / "toy", folder / "toy", symlinks=True)
    shutil.copy(source / "log", folder / "log")
    return Toy(folder / "toy", folder / "log")
