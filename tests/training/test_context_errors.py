"""Coordinate errors by context on held-out images, independent of the other images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coordexp.config.paths import CONTEXT_ROWS
from coordexp.geometry.bins import target_bins
from coordexp.losses.coord_terms import COORD_METRICS, slot_diagnostics
from coordexp.models.forward import hidden_states
from coordexp.models.loading import Checkpoint
from coordexp.packing.collator import teacher_segment
from coordexp.packing.samples import Sample, SampleStore
from coordexp.rollout.engine import Generation
from coordexp.rollout.stages import make_reader
from coordexp.training import eval_callback
from coordexp.training.context_errors import DIAGNOSTICS, OWN, ContextErrors, mean_errors
from coordexp.training.eval_callback import make_eval_callback
from coordexp.training.step import term_sums
from helpers import Workspace, new_checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return new_checkpoint()


@pytest.fixture
def samples(workspace: Workspace) -> list[Sample]:
    store = SampleStore(workspace.paths.norm1000 / "dev.parquet")
    return [store[i] for i in range(len(store))]


def measure(space: Workspace, checkpoint: Checkpoint, n_forwards: int = 2) -> ContextErrors:
    run = space.set(stage2__n_softctx_iter=n_forwards)
    return ContextErrors.of(run, "stage2", checkpoint, make_reader(checkpoint))


def said(ids: np.ndarray) -> Generation:
    return Generation(ids=ids, finish_reason="stop")


def objects(sample: Sample) -> int:
    return len(sample.descs) - sum(sample.iscrowd)


def test_an_answer_equal_to_the_annotation_gives_equal_errors(workspace, checkpoint, samples) -> None:
    """If the model said the annotation itself, all objects match, and its own context is A1."""
    contexts = measure(workspace, checkpoint)
    for sample in samples:
        row = contexts.row(sample, said(sample.answer_ids))
        assert list(row) == ["image_id", "text_ce", "text_tokens", "A1", "A2", DIAGNOSTICS, OWN]
        assert list(row[DIAGNOSTICS]) == ["A1", "A2"]
        assert len(row["A1"]) == len(row["A2"]) == objects(sample)
        assert row[OWN] == row["A1"]
        assert row["A2"] != row["A1"] or not objects(sample)
    assert sum(map(objects, samples)) > 3


def test_the_first_forward_is_what_the_training_log_calls_the_error_of_the_expected_bin(
    workspace, checkpoint, samples
) -> None:
    contexts = measure(workspace, checkpoint)
    rows = [contexts.row(sample, said(sample.answer_ids)) for sample in samples]
    batch = contexts.collator([teacher_segment(sample) for sample in samples])
    hidden = hidden_states(checkpoint.model, batch)
    with torch.no_grad():
        sums, slots = term_sums(checkpoint.model, contexts.criterion, batch, hidden, hidden)
    summary = slot_diagnostics(slots).summary()
    assert mean_errors(rows)["A1"] == pytest.approx(summary["expected_bin_mae"], abs=0.01)
    for name in COORD_METRICS:
        found = [(len(row["A1"]), row[DIAGNOSTICS]["A1"].get(name, 0.0)) for row in rows]
        assert sum(n * v for n, v in found) / sum(n for n, _ in found) == pytest.approx(summary[name], rel=1e-3), name
    assert sum(row["text_ce"] for row in rows) == pytest.approx(float(sums["text_ce"]), rel=1e-4)
    assert sum(row["text_tokens"] for row in rows) == len(batch.text_slots)


@pytest.mark.parametrize(("n_forwards", "names"), [(1, ["A1"]), (3, ["A1", "A2", "A3"])])
def test_there_is_a_context_for_each_forward_of_channel_a(workspace, checkpoint, samples, n_forwards, names) -> None:
    row = measure(workspace, checkpoint, n_forwards).row(samples[0], said(samples[0].answer_ids))
    assert [name for name in row if name.startswith("A")] == names


def test_a_missed_object_has_no_error_in_the_own_context(workspace, checkpoint, samples) -> None:
    """The answer of one image to another, or none at all: what does not match is null, and counts for nothing."""
    contexts = measure(workspace, checkpoint)
    sample = max(samples, key=objects)
    row = contexts.row(sample, said(sample.answer_ids[:0]))
    assert row[OWN] == [None] * objects(sample)
    assert OWN not in mean_errors([row])
    stretched = replace(sample, boxes_xyxy_px=sample.boxes_xyxy_px * np.float32(0.02))
    assert target_bins(stretched.boxes_xyxy_px, sample.width, sample.height).max() < 21
    assert contexts.row(stretched, said(sample.answer_ids))[OWN] == [None] * objects(sample)


def test_rows_do_not_depend_on_the_number_of_processes(
    workspace: Workspace, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are dealt out whole: those of two processes, put together, are those of one."""
    left = []
    for processes in (1, 2, 3):

        def shared_out(what, batches, work, model, n=processes):
            parts = [list(work(batches[rank::n])) if batches[rank::n] else [] for rank in range(n)]
            return [parts[place % n][place // n] for place in range(len(batches))]

        monkeypatch.setattr(eval_callback, "shared_out", shared_out)
        callback = make_eval_callback(workspace, "stage1", checkpoint, 4, images=4)
        callback.folder, callback.batch_images = tmp_path / str(processes), 2
        callback.evaluate(4)
        left.append({name: (callback.folder / name).read_bytes() for name in (CONTEXT_ROWS,)})
        left[-1]["answers"] = (callback.folder / "monitor_answers" / "step_000004.jsonl").read_bytes()
    assert left[0] == left[1] == left[2]
    rows = [json.loads(line) for line in left[0][CONTEXT_ROWS].decode().splitlines()]
    assert [row["image_id"] for row in rows] == [sample.image_id for sample in callback.samples]
    assert {row["step"] for row in rows} == {4}
