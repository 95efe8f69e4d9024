"""A look at the model while it trains: a fixed few images of dev, decoded, counted and drawn every so many steps.

Training computes what it would compute without it: the random generators and the mode of the model are put back, and
nothing that a step reads is written. What a look leaves lies beside the resume state, so that an interrupted run keeps
it, and goes into the checkpoint folder at the end:

    monitor.jsonl                   one line a look: step, counts, ratios, seconds
    monitor/step_000050.jpg         annotated beside predicted, some of the images
    monitor_answers/step_000050.jsonl   all answers (gt_vs_pred), for `coordexp report --html`

The curve of `dvc plots` is written anew at every look. Of several processes the main one looks, the others wait.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coordexp.config.run import RunConfig
from coordexp.infra.files import write_bytes, write_text
from coordexp.infra.logs import read_rows
from coordexp.matching.summary import ratio_text
from coordexp.models.loading import Checkpoint
from coordexp.packing.samples import Sample, SampleStore
from coordexp.records.gt_vs_pred import write_results
from coordexp.rollout.decode import EMITTED, AnswerReader
from coordexp.rollout.engine import DecodeSettings
from coordexp.rollout.stages import make_reader, predict_samples
from coordexp.training.looks import count_answers, draw_answers, judge_answer

log = logging.getLogger(__name__)

ROWS, PICTURES, ANSWERS = "monitor.jsonl", "monitor", "monitor_answers"
CURVE_COLUMNS = ("f1", "precision", "recall", "f1_boxes", "predictions", "right", "false", "missed", "dup_pairs_90")
_SUBSET = 3  # chooses the images, whatever the seed of the run: looks of two runs are at the same ones
_LONGEST = 2  # answers are cut at so many times the longest annotated one: a runaway must not stop the training
_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewer:
    """How the model in training is asked: samples, settings, and the reader of the answers."""

    checkpoint: Checkpoint
    reader: AnswerReader
    samples: Sequence[Sample]
    decode: DecodeSettings
    image_root: Path
    batch_images: int


class Monitor:
    """Looks after every `every_steps`-th step and after the last one; never, if that is 0."""

    def __init__(self, viewer: Viewer, every_steps: int, steps: int, curve: Path) -> None:
        self._viewer = viewer
        self._every_steps = every_steps
        self._steps = steps
        self._curve = curve
        self._folder = Path()

    def open(self, folder: Path) -> None:
        """Where looks are kept while the run lasts: beside its resume state."""
        self._folder = folder

    def resume(self, done_steps: int) -> None:
        """Forget looks after a step that will run again, and show those that stay."""
        kept = [row for row in self.rows() if row["step"] <= done_steps]
        self._write(kept)
        steps = {row["step"] for row in kept}
        for path in [*(self._folder / PICTURES).glob("step_*"), *(self._folder / ANSWERS).glob("step_*")]:
            if int(path.stem.removeprefix("step_")) not in steps:
                path.unlink()

    def after(self, done_steps: int) -> None:
        """Look if this is a step to look at."""
        due = self._every_steps > 0 and (done_steps % self._every_steps == 0 or done_steps == self._steps)
        if not due:
            return
        started = time.monotonic()
        row = {"step": done_steps, **self._look(done_steps)}
        row["seconds"] = round(time.monotonic() - started, 3)
        self._write([*self.rows(), row])
        log.info(
            "look at %d dev images after step %d: F1 %s, precision %s, recall %s, %d duplicate pairs, %d cut; %.1f s",
            *(row[name] for name in ("images", "step")),
            *(ratio_text(row[name]) for name in ("f1", "precision", "recall")),
            *(row[name] for name in ("dup_pairs_90", "truncated", "seconds")),
        )

    def rows(self) -> list[dict[str, Any]]:
        """The looks so far; a line that was cut off is none."""
        path = self._folder / ROWS
        return read_rows(path, growing=True) if path.is_file() else []

    def seconds(self) -> float:
        """What all looks took."""
        return round(sum(row["seconds"] for row in self.rows()), 1)

    def hand_over(self, folder: Path) -> None:
        """Copy everything into the folder of the finished checkpoint."""
        shutil.copyfile(self._folder / ROWS, folder / ROWS)
        for name in (PICTURES, ANSWERS):
            if (self._folder / name).is_dir():
                shutil.copytree(self._folder / name, folder / name)

    def _look(self, step: int) -> dict[str, float | None]:
        viewer = self._viewer
        with undisturbed(viewer.checkpoint.model):
            results = predict_samples(
                viewer.checkpoint,
                viewer.reader,
                viewer.samples,
                viewer.image_root,
                viewer.decode,
                viewer.batch_images,
            )
        answers = [judge_answer(result) for result in results]
        write_results(self._folder / ANSWERS / f"step_{step:06d}.jsonl", results)
        picture = io.BytesIO()
        draw_answers(answers, viewer.image_root, f"after step {step}").save(picture, "JPEG", quality=_JPEG_QUALITY)
        write_bytes(self._folder / PICTURES / f"step_{step:06d}.jpg", picture.getvalue())
        return count_answers(answers)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows beside the state, and the curve where `dvc plots` looks: seconds, which never repeat, are not in it.

        A value that is undefined is null in the rows and an empty cell in the curve.
        """
        write_text(self._folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
        names = ("step", *CURVE_COLUMNS)
        lines = [list(names), *(["" if row[name] is None else str(row[name]) for name in names] for row in rows)]
        write_text(self._curve, "".join("\t".join(line) + "\n" for line in lines))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards the mode and the random generators of CPU and GPU are what they were."""
    was_training = model.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


def make_monitor(run: RunConfig, stage: str, checkpoint: Checkpoint, steps: int) -> Monitor:
    """The monitor of one training stage of a profile."""
    store = SampleStore(run.paths.norm1000 / "dev.parquet")
    chosen = np.sort(np.random.default_rng(_SUBSET).permutation(len(store))[: run.profile.monitor.images])
    samples = [store[int(i)] for i in chosen]
    viewer = Viewer(
        checkpoint=checkpoint,
        reader=make_reader(checkpoint, run.params.text.codec, EMITTED, identity={}),
        samples=samples,
        decode=DecodeSettings(
            max_new_tokens=_LONGEST * max(len(sample.answer_ids) for sample in samples),
            temperature=0.0,
            top_p=1.0,
            repetition_penalty=1.0,
            seed=0,
        ),
        image_root=run.paths.raw,
        batch_images=run.profile.monitor.batch_images,
    )
    return Monitor(viewer, run.profile.monitor.every_steps, steps, run.paths.curve(f"{stage}-monitor"))
