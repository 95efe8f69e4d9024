"""The full evaluation on dev by training step, from kept checkpoints (`monitor.keep_every_steps`).

Answers are stored by step and reused while the weights and the request are the same, so an interrupted evaluation
resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordexp.config.paths import DECODE_SUMMARY, KEPT_STEPS, RUN_METADATA
from coordexp.config.run import RunConfig
from coordexp.config.schema import Params
from coordexp.errors import DataError
from coordexp.evaluation.evaluator import Evaluation, evaluate
from coordexp.infra.files import remove
from coordexp.infra.foreign import Gate
from coordexp.infra.provenance import answer_files, fingerprint
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.rollout.engine import READOUT_KEYS
from coordexp.rollout.scoring import read_decoded, read_summary, scored
from coordexp.rollout.stages import decode_split

METADATA = Gate("the metadata of a training stage", DataError, "Run the stage again.")


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """A stage after some step: its answers on dev, and their evaluation."""

    step: int
    results: list[ImageResult]
    evaluation: Evaluation


def step_folders(run: RunConfig, stage: str) -> dict[int, Path]:
    """The checkpoints of a finished stage by step, including the final one.

    Raises:
        DataError: the stage has not run.
    """
    folder = run.paths.run(stage)
    if not (folder / RUN_METADATA).is_file():
        raise DataError(f"{folder}: no checkpoint found. Run `dvc repro` (or `dvc checkout`) first.")
    metadata = METADATA.read_json(folder / RUN_METADATA)
    kept = {int(path.name.removeprefix("step_")): path for path in (folder / KEPT_STEPS).glob("step_*")}
    return dict(sorted((kept | {int(metadata["steps"]): folder}).items()))


def evaluate_steps(
    run: RunConfig, stage: str, out: Path, say: Callable[[str], None], draws: Params | None = None
) -> list[Point]:
    """Evaluate every kept checkpoint of a stage on all of dev; answers go below `out`.

    `draws` has the resampling parameters (default: those of the run).
    """
    draws = draws or run.params
    params = run.params.eval.model_copy(update={"bootstrap_resamples": draws.eval.bootstrap_resamples})
    categories = read_categories(run.paths.records / "categories.json")
    points = []
    for step, folder in step_folders(run, stage).items():
        answers = out / f"step_{step:06d}"
        if not _holds(answers, folder, run):
            say(f"{stage} after step {step}: answers on dev")
            remove(answers)
            decode_split(run, stage, folder, answers, split="dev")
        results = [scored(answer, run.params.decode) for answer in read_decoded(answers)]
        points.append(Point(step, results, evaluate(results, categories, params, run.params.matching, draws.seed)))
    return points


def _holds(answers: Path, folder: Path, run: RunConfig) -> bool:
    """Whether a folder has the answers of these weights to this request."""
    if not (answers / DECODE_SUMMARY).is_file():  # written last
        return False
    found, asked = read_summary(answers), run.params.decode.model_dump(mode="json", exclude=READOUT_KEYS)
    same = asked == found["settings"]
    return same and found["identity"]["model"] == fingerprint({}, answer_files(folder))
