"""The smoke profile on the device, stage by stage as processes: where each model computes, and stop and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu_check.run import Check
from ruamel.yaml import YAML

PROFILE, STEPS = "smoke", 12
DATA = ("raw", "convert", "norm1000", "pack")
REST = (
    "rollout", "stage2", "stage1_control", "decode:base", "decode:stage1", "decode:stage1-control", "decode:stage2",
    "coco_eval", "report",
)  # fmt: skip
LOG = f"runs/{PROFILE}/stage1/train_log.jsonl"
INTERRUPTED = 75  # the exit code of a stage that saved its state
PATIENCE_SECONDS = 120.0
GPU_TESTS = ("tests/losses", "tests/models", "tests/training")


def smoke(check: Check) -> None:
    """All stages in order; stage 1 once more undisturbed, and once stopped by SIGTERM and resumed."""
    with TemporaryDirectory() as folder:
        home, twin, stopped = (Path(folder) / name for name in ("home", "twin", "stopped"))
        _write_parameters(home)
        _stages(check, home, home, (*DATA, "stage1", *REST))
        for other in (twin, stopped):
            shutil.copytree(home / "data", other / "data")
        _stages(check, home, twin, ("stage1",))
        _stop_and_resume(check, home, stopped)
        once, again, resumed = (_losses(root) for root in (home, twin, stopped))
        spread = max(abs(a - b) for a, b in zip(once, again, strict=True))
        check.add("loss of a second run - loss", spread, "nats", "largest of all steps", check.pick(None, 0.0))
        apart = max(abs(a - b) for a, b in zip(once, resumed, strict=True))
        limit = check.pick(max(0.05, 4 * spread), 0.0)
        check.add("loss of a resumed run - loss", apart, "nats", f"SIGTERM in one of {STEPS} steps", limit)


def _write_parameters(home: Path) -> None:
    """The committed parameters with a stage 1 that is long enough to be stopped."""
    (home / "configs").mkdir(parents=True)
    shutil.copy("params.yaml", home)
    shutil.copytree("configs", home / "configs", dirs_exist_ok=True)
    path, yaml = home / "configs" / f"{PROFILE}.yaml", YAML()
    profile = yaml.load(path.read_text(encoding="utf-8"))
    profile["stage1"]["steps"] = STEPS
    yaml.dump(profile, path)


def _command(home: Path, root: Path, stages: Sequence[str]) -> list[str]:
    options = ["--report", str(root / "devices.json"), "--params", str(home / "params.yaml"), "--out", str(root)]
    return [sys.executable, "-m", "benchmarks.gpu_check.witness", *options, "--profile", PROFILE, *stages]


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {"DVC_ROOT": str(root)}  # where resume states go


def _stages(check: Check, home: Path, root: Path, stages: Sequence[str]) -> None:
    """Run stages, and count those whose models compute anywhere but on the device."""
    root.mkdir(exist_ok=True)
    done = subprocess.run(
        _command(home, root, stages), env=_environment(root), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    if root != home:
        return
    devices: dict[str, list[str]] = json.loads((root / "devices.json").read_text(encoding="utf-8"))
    elsewhere = {stage: found for stage, found in devices.items() if set(found) != {check.device.type}}
    note = "; ".join(f"{stage}: {', '.join(found)}" for stage, found in (elsewhere or devices).items())
    check.add("stages with a model off the device", len(elsewhere), "stages", note, at_most=0)
    check.add("stages with a model on the device", len(devices) - len(elsewhere), "stages")


def _stop_and_resume(check: Check, home: Path, root: Path) -> None:
    """SIGTERM after the first step, then the same command again."""
    command, environment = _command(home, root, ["stage1"]), _environment(root)
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while running.poll() is None and not _has_a_step(root) and time.monotonic() < until:
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        code = running.wait(PATIENCE_SECONDS)
    finally:
        running.kill()
    check.add("exit code after SIGTERM", code, "", f"{INTERRUPTED} is expected", at_most=INTERRUPTED)
    if code != INTERRUPTED:
        raise RuntimeError(f"stage 1 ended with exit code {code} after SIGTERM, expected {INTERRUPTED}")
    _stages(check, home, root, ("stage1",))


def _has_a_step(root: Path) -> bool:
    return any(path.stat().st_size for path in (root / ".resume").glob("stage1-*/train_log.jsonl"))


def _losses(root: Path) -> list[float]:
    rows = [json.loads(line) for line in (root / LOG).read_text(encoding="utf-8").splitlines()]
    return [row["loss/total"] for row in rows]


def gpu_tests(check: Check) -> None:
    """The tests that need a GPU; on a CPU all of them are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    where = check.pick(GPU_TESTS, ("tests/models/test_attention.py",))
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    check.add("exit code of pytest", done.returncode, "", last, at_most=0)
