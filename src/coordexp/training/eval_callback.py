"""The eval callback: a fixed few images of dev, answered, counted and drawn, always the same ones.

The training loop calls it every so many steps; `coordexp monitor` calls it with the states that a run saves. Training
computes what it would compute without it: the random generators and the mode of the model are put back, and nothing
that a step reads is written. In training its files lie beside the resume state, so that an interrupted run keeps them,
and go into the checkpoint folder at the end:

    monitor.jsonl                       one line an evaluation: step, counts, ratios, seconds
    monitor/step_000050.jpg             annotated beside predicted, some of the images
    monitor_answers/step_000050.jsonl   all answers (gt_vs_pred), for `coordexp report --html`

The curve of `dvc plots` is written anew each time. Of several processes each answers some of the images, and the main
one counts and draws all of them.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from coordexp.config.run import RunConfig
from coordexp.infra.files import write_bytes, write_text
from coordexp.infra.logs import read_rows, without_clock
from coordexp.infra.random_streams import generator
from coordexp.matching.summary import MatchCounts, ratio_text, rounded_ratio
from coordexp.models.loading import Checkpoint
from coordexp.packing.samples import Sample, SampleStore
from coordexp.records.gt_vs_pred import ImageResult, write_results
from coordexp.rollout.decode import AnswerReader
from coordexp.rollout.engine import DecodeRequest, greedy
from coordexp.rollout.stages import make_reader, predict_samples
from coordexp.training.dev_answers import count_answers, draw_answers, judge_answer
from coordexp.training.distributed import any_process, shared_out, world
from coordexp.training.loop import Callback
from coordexp.training.recorder import stopping_at_once

log = logging.getLogger(__name__)

ROWS, PICTURES, ANSWERS = "monitor.jsonl", "monitor", "monitor_answers"
BOUNDED = ("f1", "precision", "recall")  # in the curve with the bounds of their intervals, `_lo` and `_hi`
CURVE_COLUMNS = (
    *(f"{name}{bound}" for name in BOUNDED for bound in ("", "_lo", "_hi")),
    *("f1_boxes", "predictions", "right", "false", "missed", "dup_pairs_90"),
)
MEASURED = ("map", "map_50")  # of evaluation proper, where it is at hand
_LONGEST = 2  # answers are cut at so many times the longest annotated one: a runaway must not stop the training
_JPEG_QUALITY = 90

Measure = Callable[[Sequence[ImageResult]], Mapping[str, float | None]]


@dataclass(kw_only=True)
class EvalCallback(Callback):
    """Evaluates after every `every_steps`-th step and after the last one; never by itself, if that is 0.

    `measure` adds MEASURED to the counts, in rows and curve; training, which lies below evaluation, adds nothing.
    `folder` is where everything is kept while a run lasts.
    """

    checkpoint: Checkpoint
    reader: AnswerReader
    samples: Sequence[Sample]
    request: DecodeRequest
    image_root: Path
    batch_images: int
    every_steps: int
    steps: int
    curve: Path
    folder: Path = Path()
    measure: Measure = lambda _results: {}

    def on_train_begin(self, done_steps: int) -> None:
        """Forget evaluations after a step that will run again, show those that stay, and make up for one cut short."""
        if world().is_main:
            self._forget_after(done_steps)
        is_missing = world().is_main and self._is_due(done_steps) and done_steps not in self._steps()
        if any_process(is_missing):
            self.evaluate(done_steps)

    def _steps(self) -> set[int]:
        return {row["step"] for row in self.rows()}

    def _is_due(self, done_steps: int) -> bool:
        every = self.every_steps
        return every > 0 and done_steps > 0 and (done_steps % every == 0 or done_steps == self.steps)

    def _forget_after(self, done_steps: int) -> None:
        kept = [row for row in self.rows() if row["step"] <= done_steps]
        self._write(kept)
        steps = {row["step"] for row in kept}
        for path in [*(self.folder / PICTURES).glob("step_*"), *(self.folder / ANSWERS).glob("step_*")]:
            if int(path.stem.removeprefix("step_")) not in steps:
                path.unlink()

    def on_step_end(self, done_steps: int) -> None:
        """Evaluate if this step is due."""
        if self._is_due(done_steps):
            self.evaluate(done_steps)

    def evaluate(self, step: int) -> dict[str, Any]:
        """Answer, count and draw with the weights as they are; returns the row, which replaces one of the same step.

        All processes must call it; those beside the main one get an empty row.
        """
        started = time.monotonic()

        def answer(samples: Sequence[Sample]) -> list[ImageResult]:
            return predict_samples(
                self.checkpoint, self.reader, samples, self.image_root, self.request, self.batch_images
            )

        with undisturbed(self.checkpoint.model), stopping_at_once():
            results = shared_out(f"eval after step {step}", self.samples, answer, self.checkpoint.model.model)
        if not world().is_main:
            return {}
        answers = [judge_answer(result) for result in results]
        write_results(self.folder / ANSWERS / f"step_{step:06d}.jsonl", results)
        picture = io.BytesIO()
        draw_answers(answers, self.image_root, f"after step {step}").save(picture, "JPEG", quality=_JPEG_QUALITY)
        write_bytes(self.folder / PICTURES / f"step_{step:06d}.jpg", picture.getvalue())
        row = {"step": step, **count_answers(answers), **self.measure(results)}
        row["seconds"] = round(time.monotonic() - started, 3)
        others = [other for other in self.rows() if other["step"] != step]
        self._write(sorted([*others, row], key=lambda r: r["step"]))
        log.info(
            "eval on %d dev images after step %d: F1 %s, precision %s, recall %s, %d duplicate pairs, %d cut; %.1f s",
            *(row[name] for name in ("images", "step")),
            *(ratio_text(row[name]) for name in ("f1", "precision", "recall")),
            *(row[name] for name in ("dup_pairs_90", "truncated", "seconds")),
        )
        return row

    def rows(self) -> list[dict[str, Any]]:
        """The evaluations so far, by step."""
        path = self.folder / ROWS
        return read_rows(path) if path.is_file() else []

    def seconds(self) -> float:
        """What all evaluations took."""
        return round(sum(row["seconds"] for row in self.rows()), 1)

    def copy_to(self, folder: Path) -> None:
        """Copy everything but the seconds into the folder of the finished checkpoint."""
        write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in without_clock(self.rows())))
        for name in (PICTURES, ANSWERS):
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, folder / name)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows in the folder, and the curve where `dvc plots` looks: with intervals, without what never repeats.

        A value that is undefined is null in the rows and an empty cell in the curve.
        """
        write_text(self.folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
        measured = [name for name in MEASURED if any(name in row for row in rows)]
        columns = ["step", *CURVE_COLUMNS, *measured]
        points = [row | _bounds(row) for row in rows]
        write_text(self.curve, pd.DataFrame(points, columns=columns, dtype=object).to_csv(sep="\t", index=False))


def _bounds(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The 95 % interval of each BOUNDED ratio of an evaluation."""
    intervals = MatchCounts(row["predictions"], row["objects"], row["right"]).intervals
    return {
        f"{name}{bound}": rounded_ratio(value)
        for name in BOUNDED
        for bound, value in zip(("_lo", "_hi"), intervals[name] or (None, None), strict=True)
    }


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


def make_eval_callback(
    run: RunConfig, stage: str, checkpoint: Checkpoint, steps: int, images: int | None = None
) -> EvalCallback:
    """The eval callback of one training stage: the first `images` of dev (the profile's number) in one random order."""
    store = SampleStore(run.paths.norm1000 / "dev.parquet")
    order = generator(run.params.seed, "monitor/images").permutation(len(store))
    samples = [store[int(i)] for i in np.sort(order[: images or run.profile.monitor.images])]
    decode = greedy(_LONGEST * max(len(sample.answer_ids) for sample in samples), "argmax", "coord_logprob")
    return EvalCallback(
        checkpoint=checkpoint,
        reader=make_reader(checkpoint),
        samples=samples,
        request=DecodeRequest(params=decode, codec=checkpoint.codec, seed=0),
        image_root=run.paths.raw,
        batch_images=run.profile.monitor.batch_images,
        every_steps=run.profile.monitor.every_steps,
        steps=steps,
        curve=run.paths.curve(f"{stage}-monitor"),
    )
