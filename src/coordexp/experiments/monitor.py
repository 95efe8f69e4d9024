"""The eval callback from outside: called with each resume state that a training run saves, in a process of its own.

The same dev images and the same decoding as in training, with mAP beside the counts, and on as many images as wanted.
The folder holds what the callback leaves in training (coordexp.training.eval_callback), and `curve.tsv`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordexp.config.run import RunConfig
from coordexp.config.study import TRAINED
from coordexp.errors import DataError
from coordexp.evaluation.evaluator import evaluate
from coordexp.infra.device import AUTO
from coordexp.models.loading import load_for_inference
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.training.checkpoint import STATE_NAME, load_state
from coordexp.training.eval_callback import EvalCallback, make_eval_callback

STAGES = TRAINED
RESAMPLES = 100  # intervals are not shown; the least that the evaluator takes


def open_monitor(run: RunConfig, stage: str, images: int | None, out: Path, device: str = AUTO) -> EvalCallback:
    """The eval callback of a stage with a model of its own, to be given the weights of one state after another."""
    start = run.paths.init if stage == "stage1" else run.paths.run("stage1")
    categories = read_categories(run.paths.records / "categories.json")
    params = run.params.eval.model_copy(update={"bootstrap_resamples": RESAMPLES})

    def measure(results: Sequence[ImageResult]) -> Mapping[str, float | None]:
        found = evaluate(results, categories, params, run.params.matching, run.params.seed)
        return {"map": found.value("coco.mAP"), "map_50": found.value("coco.AP50")}

    callback = make_eval_callback(run, stage, load_for_inference(start, device), 0, images)
    return replace(callback, folder=out, curve=out / "curve.tsv", measure=measure)


def find_state(root: Path, stage: str) -> Path:
    """The resume folder of the stage that was written last; raises DataError if there is none."""
    states = sorted((root / ".resume").glob(f"{stage}-*/{STATE_NAME}"), key=lambda file: file.stat().st_mtime)
    # "stage1-*" also matches the control.
    own = [file.parent for file in states if stage != "stage1" or not file.parent.name.startswith("stage1-control-")]
    if not own:
        raise DataError(
            f"{root / '.resume'}: no state of {stage}. A stage saves one about every minute while it runs; start it, "
            "wait, and run this again."
        )
    return own[-1]


def follow(
    callback: EvalCallback,
    state_folder: Path,
    poll_seconds: float,
    on_poll: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Evaluate every new state until the run ends and removes its folder; yields the row of each.

    `on_poll` is called whenever there may be something new in the folder.
    """
    seen = -1.0
    while True:
        on_poll()
        try:
            changed = (state_folder / STATE_NAME).stat().st_mtime
            if changed == seen:
                time.sleep(poll_seconds)
                continue
            state = load_state(state_folder)
        except FileNotFoundError:  # the run ended, perhaps between looking and reading
            return
        seen = changed
        if state is not None:
            callback.checkpoint.model.load_state_dict(state.model)
            yield callback.evaluate(state.step)
