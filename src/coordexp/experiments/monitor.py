"""Watch a training run from outside: decode a fixed part of dev with each resume state that it saves.

A process of its own, at low priority, that evaluates with AP and on as many images as wanted: the stages' own looks
(coordexp.training.monitor) are smaller. Each look leaves the answers as `step_NNNNNN.jsonl` (gt_vs_pred, which
`coordexp report --html` draws, two steps side by side) and a line of `curve.tsv`; TensorBoard on request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from coordexp.config.run import RunConfig
from coordexp.errors import DataError
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.suite import eval_settings
from coordexp.infra.device import AUTO
from coordexp.infra.files import write_text
from coordexp.infra.random_streams import generator
from coordexp.models.loading import load_for_inference
from coordexp.packing.samples import SampleStore
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult, write_results
from coordexp.rollout.stages import (
    allowed_names,
    decode_settings,
    make_reader,
    make_readout,
    predict_samples,
)
from coordexp.training.checkpoint import STATE_NAME, load_state

STAGES = ("stage1", "stage1-control", "stage2")
COLUMNS = (
    *("coco.mAP", "coco.AP50", "f1.full_50", "f1.loc_50", "f1.tp_50", "f1.fp_50", "f1.fn_50"),
    *("set.dup_pairs_90", "set.count_error_mean", "parse.parse_rate"),
)
RESAMPLES = 100  # intervals are not shown; the least that the evaluator takes


@dataclass(frozen=True, slots=True)
class Look:
    """What one resume state answers on the fixed images."""

    step: int
    values: dict[str, float | None]
    results: list[ImageResult]


class Monitor:
    """Decodes the same images with the weights of one state after another."""

    def __init__(self, run: RunConfig, stage: str, images: int, device: str = AUTO) -> None:
        start = run.paths.init if stage == "stage1" else run.paths.run("stage1")
        self._checkpoint = load_for_inference(start, device)
        self._categories = read_categories(run.paths.records / "categories.json")
        store = SampleStore(run.paths.norm1000 / "dev.parquet")
        order = generator(run.params.seed, "coordexp-monitor/images").permutation(len(store))[:images]
        self._samples = [store[i] for i in np.sort(order).tolist()]
        codec = self._checkpoint.codec_name or run.params.text.codec
        self._decode = decode_settings(run.params, codec, allowed_names(run.params, run.paths))
        self._reader = make_reader(self._checkpoint, codec, make_readout(run.params), identity={})
        self._settings = replace(eval_settings(run.params), bootstrap_resamples=RESAMPLES)
        self._image_root, self._batch_images = run.paths.raw, run.profile.rollout.batch_images

    def look(self, state_folder: Path) -> Look | None:
        """Judge the state that lies there now; None if there is none."""
        try:
            state = load_state(state_folder)
        except FileNotFoundError:  # the run ended between looking and reading
            return None
        if state is None:
            return None
        self._checkpoint.model.load_state_dict(state.model)
        results = predict_samples(
            self._checkpoint, self._reader, self._samples, self._image_root, self._decode, self._batch_images
        )
        found = evaluate(results, self._categories, self._settings)
        values = {key: found.value(key) for key in COLUMNS if key.split(".")[1] in found.metrics[key.split(".")[0]]}
        return Look(state.step, values, results)


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


def watch(
    monitor: Monitor,
    state_folder: Path,
    out: Path,
    poll_seconds: float,
    follow: Callable[[Path], None] = lambda _run: None,
) -> Iterator[Look]:
    """Look at every new state until the run ends and removes its folder; writes each look.

    `follow` is given the folder whenever there may be something new in it.
    """
    seen = -1.0
    while True:
        follow(state_folder)
        try:
            changed = (state_folder / STATE_NAME).stat().st_mtime
        except FileNotFoundError:
            return
        if changed == seen:
            time.sleep(poll_seconds)
            continue
        seen = changed
        look = monitor.look(state_folder)
        if look is not None:
            write_look(look, out)
            yield look


def write_look(look: Look, out: Path) -> None:
    """Write the answers and the line of the curve; a step that was looked at before is replaced."""
    out.mkdir(parents=True, exist_ok=True)
    write_results(out / f"step_{look.step:06d}.jsonl", look.results)
    curve, rows = out / "curve.tsv", {}
    with suppress(FileNotFoundError):
        rows = {int(line.split("\t")[0]): line for line in curve.read_text(encoding="utf-8").splitlines()[1:]}
    cells = ["" if value is None else f"{value:.4f}" for value in look.values.values()]
    rows[look.step] = "\t".join([str(look.step), *cells])
    lines = ["\t".join(["step", *look.values]), *(rows[step] for step in sorted(rows))]
    write_text(curve, "\n".join(lines) + "\n")
