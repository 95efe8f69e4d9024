"""The eval callback: predictions for a small, fixed set of dev images, counted and drawn.

The training loop calls it at regular steps; `coordexp monitor` calls it with the states that a run saves. It does not
change the results of training: it restores the random generators and the mode of the model, and writes nothing that a
step reads. During training its files are next to the resume state, so that an interrupted run keeps them. At the end
they go into the checkpoint folder:

    monitor.jsonl                       one line per evaluation: step, counts, ratios, seconds
    context_errors.jsonl                one line per image and evaluation: coordinate errors by context
    monitor/step_000050.jpg             annotations next to predictions, for some of the images
    monitor_answers/step_000050.jsonl   all answers (gt_vs_pred), for `coordexp report --html`

Each evaluation rewrites the curve for `dvc plots`. With several processes, each one answers some of the batches; the
batches do not depend on the number of processes. The main process counts and draws all answers.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from coordexp.config.paths import CONTEXT_ROWS
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
from coordexp.training.context_errors import ContextErrors, ErrorRow, mean_errors
from coordexp.training.dev_answers import count_answers, draw_answers, judge_answer
from coordexp.training.distributed import any_process, shared_out, world
from coordexp.training.loop import Callback
from coordexp.training.recorder import stopping_at_once

log = logging.getLogger(__name__)

ROWS, PICTURES, ANSWERS = "monitor.jsonl", "monitor", "monitor_answers"
BOUNDED = ("f1", "precision", "recall")  # the curve also has the bounds of their intervals, `_lo` and `_hi`
CURVE_COLUMNS = (
    *(f"{name}{bound}" for name in BOUNDED for bound in ("", "_lo", "_hi")),
    *("f1_boxes", "predictions", "right", "false", "missed", "dup_pairs_90"),
)
MEASURED = ("map", "map_50")  # from the full evaluation, where it is available
_LONGEST = 2  # token budget in multiples of the longest annotated answer: a loop must not hold up training
_JPEG_QUALITY = 90

Measure = Callable[[Sequence[ImageResult]], Mapping[str, float | None]]


@dataclass(kw_only=True)
class EvalCallback(Callback):
    """Evaluates after every `every_steps`-th step and after the last one; 0 means only when `evaluate` is called.

    `measure` adds MEASURED to rows and curve. Training passes none: its layer may not import evaluation.
    `contexts` measures the same images in several contexts; a model without coordinate tokens has none.
    `folder` holds all files during a run.
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
    contexts: ContextErrors | None = None
    measure: Measure = lambda _results: {}

    def on_train_begin(self, done_steps: int) -> None:
        """Delete evaluations of steps that will run again, and repeat one that was interrupted."""
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
        self._write_contexts(row for row in self._context_rows() if row["step"] in steps)
        for path in [*(self.folder / PICTURES).glob("step_*"), *(self.folder / ANSWERS).glob("step_*")]:
            if int(path.stem.removeprefix("step_")) not in steps:
                path.unlink()

    def on_step_end(self, done_steps: int) -> None:
        """Evaluate if this step is due."""
        if self._is_due(done_steps):
            self.evaluate(done_steps)

    def evaluate(self, step: int) -> dict[str, Any]:
        """Answer, count and draw with the current weights; returns the row, which replaces one of the same step.

        All processes must call it; all but the main one get an empty row.
        """
        started = time.monotonic()

        # Batches do not depend on the number of processes: answers can depend on what else is in their batch.
        size = self.batch_images
        batches = [self.samples[first : first + size] for first in range(0, len(self.samples), size)]
        with undisturbed(self.checkpoint.model), stopping_at_once():
            answered = shared_out(f"eval after step {step}", batches, self._answer, self.checkpoint.model.model)
        if not world().is_main:
            return {}
        results, contexts = zip(*chain(*answered), strict=True)
        answers = [judge_answer(result) for result in results]
        write_results(self.folder / ANSWERS / f"step_{step:06d}.jsonl", results)
        picture = io.BytesIO()
        draw_answers(answers, self.image_root, f"after step {step}").save(picture, "JPEG", quality=_JPEG_QUALITY)
        write_bytes(self.folder / PICTURES / f"step_{step:06d}.jpg", picture.getvalue())
        row = {"step": step, **count_answers(answers), **self.measure(results)}
        row["seconds"] = round(time.monotonic() - started, 3)
        others = [other for other in self.rows() if other["step"] != step]
        self._write(sorted([*others, row], key=lambda r: r["step"]))
        read = [{"step": step, **found} for found in contexts if found is not None]
        kept = [other for other in self._context_rows() if other["step"] != step]
        self._write_contexts(sorted([*kept, *read], key=lambda r: r["step"]))
        log.info(
            "eval on %d dev images after step %d: F1 %s, precision %s, recall %s, %d duplicate pairs, %d cut; %.1f s",
            *(row[name] for name in ("images", "step")),
            *(ratio_text(row[name]) for name in ("f1", "precision", "recall")),
            *(row[name] for name in ("dup_pairs_90", "truncated", "seconds")),
        )
        if read:
            shown = ", ".join(f"{name} {error:.1f}" for name, error in mean_errors(read).items())
            log.info("coordinate error on dev after step %d, bins by context: %s", step, shown or "no object")
        return row

    def _answer(self, batches: Sequence[Sequence[Sample]]) -> list[list[tuple[ImageResult, ErrorRow | None]]]:
        """The answer to each image of each batch, and its coordinate errors by context."""

        def read(samples: Sequence[Sample]) -> Iterator[tuple[ImageResult, ErrorRow | None]]:
            predicted = predict_samples(
                self.checkpoint, self.reader, samples, self.image_root, self.request, self.batch_images
            )
            for sample, (result, generation) in zip(samples, predicted, strict=True):
                yield result, self.contexts.row(sample, generation) if self.contexts else None

        return [list(read(samples)) for samples in batches]

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all evaluations so far, by step."""
        path = self.folder / ROWS
        return read_rows(path) if path.is_file() else []

    def seconds(self) -> float:
        """Total time of all evaluations."""
        return round(sum(row["seconds"] for row in self.rows()), 1)

    def copy_to(self, folder: Path) -> None:
        """Copy everything except the timing into the folder of the finished checkpoint."""
        write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in without_clock(self.rows())))
        shutil.copyfile(self.folder / CONTEXT_ROWS, folder / CONTEXT_ROWS)
        for name in (PICTURES, ANSWERS):
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, folder / name)

    def _context_rows(self) -> list[ErrorRow]:
        path = self.folder / CONTEXT_ROWS
        return read_rows(path) if path.is_file() else []

    def _write_contexts(self, rows: Iterable[ErrorRow]) -> None:
        if self.contexts:
            write_text(self.folder / CONTEXT_ROWS, "".join(json.dumps(row) + "\n" for row in rows))

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows to the folder, and the curve for `dvc plots`: with intervals, without timing.

        An undefined value is null in the rows and an empty cell in the curve.
        """
        write_text(self.folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
        measured = [name for name in MEASURED if any(name in row for row in rows)]
        columns = ["step", *CURVE_COLUMNS, *measured]
        points = [row | _bounds(row) for row in rows]
        write_text(self.curve, pd.DataFrame(points, columns=columns, dtype=object).to_csv(sep="\t", index=False))


def _bounds(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The bounds of the 95 % interval of each BOUNDED ratio."""
    intervals = MatchCounts(row["predictions"], row["objects"], row["right"]).intervals
    return {
        f"{name}{bound}": rounded_ratio(value)
        for name in BOUNDED
        for bound, value in zip(("_lo", "_hi"), intervals[name] or (None, None), strict=True)
    }


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards, mode and random generators (CPU and GPU) are restored."""
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
    """The eval callback of a training stage, on a random sample of `images` dev images (default: the profile's)."""
    store = SampleStore(run.paths.norm1000 / "dev.parquet")
    order = generator(run.params.seed, "monitor/images").permutation(len(store))
    samples = [store[int(i)] for i in np.sort(order[: images or run.profile.monitor.images])]
    decode = greedy(_LONGEST * max(len(sample.answer_ids) for sample in samples), "argmax", "coord_logprob")
    reader = make_reader(checkpoint)
    return EvalCallback(
        checkpoint=checkpoint,
        reader=reader,
        contexts=ContextErrors.of(run, stage, checkpoint, reader),
        samples=samples,
        request=DecodeRequest(params=decode, codec=checkpoint.codec, seed=0),
        image_root=run.paths.raw,
        batch_images=run.profile.monitor.batch_images,
        every_steps=run.profile.monitor.every_steps,
        steps=steps,
        curve=run.paths.curve(f"{stage}-monitor"),
    )
