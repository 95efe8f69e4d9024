"""The eval callback in a separate process, which evaluates each state that a training run saves.

It uses the same dev images and decoding as training, also computes mAP, and can use more images. Its folder has the
same files as that of the callback in training (coordexp.training.eval_callback), and `curve.tsv`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordexp.config.question import TRAINED
from coordexp.config.run import RunConfig
from coordexp.errors import CheckpointError, DamagedArtefactError, DataError
from coordexp.evaluation.evaluator import evaluate
from coordexp.infra.device import AUTO
from coordexp.models.adapters import apply_tuning
from coordexp.models.loading import load_for_inference
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.training.checkpoint import load_state
from coordexp.training.eval_callback import EvalCallback, make_eval_callback
from coordexp.training.state_files import generations

STAGES = TRAINED
RESAMPLES = 100  # the evaluator's minimum, as intervals are not shown


def start_folder(run: RunConfig, stage: str) -> Path:
    """The checkpoint that a training stage starts from."""
    return run.paths.init if stage == "stage1" else run.paths.run("stage1")


def open_monitor(run: RunConfig, stage: str, images: int | None, out: Path, device: str = AUTO) -> EvalCallback:
    """The eval callback of a stage with its own model, into which `follow` loads the weights of each state."""
    categories = read_categories(run.paths.records / "categories.json")
    params = run.params.eval.model_copy(update={"bootstrap_resamples": RESAMPLES})

    def measure(results: Sequence[ImageResult]) -> Mapping[str, float | None]:
        found = evaluate(results, categories, params, run.params.matching, run.params.seed)
        return {"map": found.value("coco.mAP"), "map_50": found.value("coco.AP50")}

    checkpoint = load_for_inference(start_folder(run, stage), device)
    assert checkpoint.coord is not None
    apply_tuning(checkpoint.model, run.profile.tuning, checkpoint.coord)  # a state holds only the trainable weights
    callback = make_eval_callback(run, stage, checkpoint, 0, images)
    return replace(callback, folder=out, curve=out / "curve.tsv", measure=measure)


def find_state(root: Path, stage: str) -> Path:
    """The most recent resume folder of a stage; raises DataError if there is none."""
    # "stage1-*" also matches the control.
    folders = [path for path in (root / ".resume").glob(f"{stage}-*") if stage != "stage1" or not _is_of_control(path)]
    own = sorted((saved[0] for path in folders if (saved := generations(path))), key=lambda path: path.stat().st_mtime)
    if not own:
        raise DataError(
            f"{root / '.resume'}: no saved state of {stage}. A running stage saves one about every minute: start it, "
            "wait, and run this again."
        )
    return own[-1].parent


def _is_of_control(folder: Path) -> bool:
    return folder.name.startswith("stage1-control-")


def follow(callback: EvalCallback, state_folder: Path, start: str, poll_seconds: float) -> Iterator[dict[str, Any]]:
    """Evaluate every new state until the run ends and removes its folder; yield the row of each.

    `start` identifies the present weights of the callback's model (`start_hash`).

    Raises:
        DamagedArtefactError: no state is intact.
        CheckpointError: the run started from other weights.
    """
    seen, done = -1.0, -1
    while True:
        if not (saved := generations(state_folder)):
            return  # the run ended
        try:
            if (changed := saved[0].stat().st_mtime) == seen:
                time.sleep(poll_seconds)
                continue
            state = load_state(state_folder)
            if state is None:
                continue
            state.check_start(start)
            state.load_weights(callback.checkpoint.model)
        except (CheckpointError, DamagedArtefactError, FileNotFoundError):
            if generations(state_folder) == saved:
                raise
            continue  # the run saved a new state, or ended, since the list of states was read
        seen = changed
        if state.step != done:  # otherwise the newest state is damaged, and this is the previous one
            done = state.step
            yield callback.evaluate(done)
