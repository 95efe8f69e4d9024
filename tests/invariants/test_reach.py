"""Limits on the reach of code: the files and classes of a training step, and the files of a new loss term (three).

pytest tests/invariants/test_reach.py -s      # prints the files and classes of a step
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from coordexp.training.loop import MicroBatch, train
from coordexp.training.stage1 import TeacherTask
from coordexp.training.step import Criterion
from helpers import PARAMS, World, build_world, new_checkpoint, optim
from source_tree import PACKAGE, ROOT

MOST_FILES, MOST_CLASSES = 18, 25


class Trace:
    """Files of the package that were entered, and its classes with a method call or a new instance."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.classes: set[str] = set()

    def start(self) -> None:
        """Trace this thread and those that it starts; functions on the stack count as entered."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            self._enter(frame, "call", None)
            frame = frame.f_back
        threading.setprofile(self._enter)
        sys.setprofile(self._enter)

    @staticmethod
    def stop() -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _enter(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            self.files.add(file.relative_to(PACKAGE).as_posix())
        owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
        by_name = frame.f_globals.get(frame.f_code.co_qualname.split(".")[0])  # a static method has no owner
        kinds = (owner if isinstance(owner, type) else type(owner)).__mro__
        if isinstance(by_name, type) and by_name.__module__.startswith("coordexp."):
            self.classes.add(by_name.__qualname__)
        elif frame.f_code.co_qualname.startswith("__create_fn__") and kinds[0].__module__.startswith("coordexp."):
            self.classes.add(kinds[0].__qualname__)  # a generated __init__ has no file


class FirstStep(TeacherTask):
    """Starts the trace when the loop requests the batches of the first step, so that it includes collation."""

    trace: Trace

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        if step == 0:
            self.trace.start()
        yield from super().micro_batches(step)


def traced_step(world: World, folder: Path) -> Trace:
    """The trace of one step of stage 1, from taking the batch to the optimizer's update."""
    checkpoint = new_checkpoint()
    assert checkpoint.coord is not None
    criterion = Criterion.stage1(PARAMS, checkpoint.coord.first_id, 1)
    task = FirstStep(
        checkpoint.model, criterion, world.source(checkpoint), world.collator(checkpoint), [[[0, 1, 2], [3, 4, 5]]]
    )
    task.trace = trace = Trace()
    muon = optim(optimizer="muon", steps=1, warmup_steps=0, precision="bf16")

    def stop(optimizer: Optimizer, *_: object) -> None:
        if optimizer.param_groups and type(optimizer).__module__.startswith("coordexp."):
            trace.stop()

    hook = register_optimizer_step_post_hook(stop)
    try:
        train(checkpoint.model, task, muon, folder / "state", folder / "log.jsonl", save_every_seconds=1e9)
    finally:
        trace.stop()
        hook.remove()
    return trace


def test_a_step_of_stage_1_is_short(tmp_path: Path) -> None:
    trace = traced_step(build_world(tmp_path), tmp_path)
    files, classes = sorted(trace.files), sorted(trace.classes - {FirstStep.__name__})
    print(f"\n{len(files)} files: {' '.join(files)}\n{len(classes)} classes: {' '.join(classes)}")
    assert len(files) <= MOST_FILES, files
    assert len(classes) <= MOST_CLASSES, classes


# The edits that add a term, as pattern and replacement: function and declaration, key, values.
NEW_TERM = {
    "src/coordexp/losses/coord_terms.py": (
        r"\n(?=def gaussian_target\()",
        """
@term("overshoot", "coord")
def overshoot(p_NK: Tensor, label_N: Tensor) -> Tensor:
    return (p_NK * (torch.arange(NUM_BINS, device=p_NK.device) > label_N[:, None])).sum(-1)

""",
    ),
    "src/coordexp/config/schema.py": (
        r"\n\n(?=\nclass CoordWeights)",
        '\n    overshoot_weight: Weight = Field(description="probability above the target")\n\n',
    ),
    "params.yaml": (r"(?m)^( *)(coord_ce_weight: .*)$", r"\1\2\n\1overshoot_weight: 0.25"),
}
TRAIN = """
import json, sys
from pathlib import Path
sys.path[:0] = ["src", "tests"]
import helpers
from test_reach import traced_step
folder = Path(sys.argv[1])
traced_step(helpers.build_world(folder), folder)
print((folder / "log.jsonl").read_text())
"""


@pytest.mark.slow
def test_a_term_is_added_in_three_files(tmp_path: Path, warm: Path) -> None:
    """In a copy of the package; a step then trains with it."""
    copy = tmp_path / "copy"
    for folder in ("src", "tests", "data/sprites"):
        shutil.copytree(ROOT / folder, copy / folder)
    shutil.copy(ROOT / "params.yaml", copy)
    for name, (pattern, replacement) in NEW_TERM.items():
        text, count = re.subn(pattern, replacement, (copy / name).read_text(encoding="utf-8"))
        assert count, name
        (copy / name).write_text(text, encoding="utf-8")
    paths = os.pathsep.join([str(copy / "src"), str(copy / "tests" / "invariants")])
    (copy / "train.py").write_text(TRAIN, encoding="utf-8")
    command = ["python", "train.py", str(tmp_path)]
    path = f"{warm}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": paths, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.strip().splitlines()[-1])
    assert row["loss/overshoot"] == pytest.approx(0.25 * row["raw/overshoot"], rel=1e-4)
    assert 0 < row["raw/overshoot"] < 1
