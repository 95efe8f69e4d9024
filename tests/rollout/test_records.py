"""Rollouts: matching, answers that do not parse, and the round trip through the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordexp.errors import DataError
from coordexp.geometry.bins import encode_boxes
from coordexp.packing.prepare import text_objects
from coordexp.records.gt_vs_pred import ParseReport
from coordexp.rollout.engine import Generation
from coordexp.rollout.records import (
    Rollout,
    match_rollouts,
    parsed_rollout,
    read_generations,
    rollout_summary,
    warn_of_unusable,
    write_generations,
)
from coordexp.text.codecs import TextObject
from helpers import PARAMS, answer_reader, changed, new_checkpoint, rollout_of, teacher_rollouts


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


def truth_of(sample) -> list[TextObject]:
    return text_objects(sample.descs, encode_boxes(sample.boxes_xyxy_px, sample.width, sample.height))


def test_the_truth_in_reverse_order_matches_everything(world, checkpoint):
    sample = world.store[0]
    rollout = rollout_of(checkpoint, sample, truth_of(sample)[::-1])
    last = len(sample.descs) - 1
    assert last >= 1
    assert rollout.pairs == tuple((i, last - i) for i in range(last + 1))
    assert min(rollout.pair_ious) > 0.9
    assert rollout.usable


def test_crowd_regions_are_never_matched(world, checkpoint):
    sample = world.store[1]
    n_objects = len(sample.descs) - 1
    rollout = rollout_of(checkpoint, sample, truth_of(sample))
    assert len(rollout.objects) == n_objects + 1
    assert {gt for _, gt in rollout.pairs} == set(range(n_objects))


def test_the_threshold_leaves_a_distant_prediction_unmatched(world, checkpoint):
    sample = replace(
        world.store[0], boxes_xyxy_px=np.array([[0, 0, 20, 20]], np.float32), descs=("cat",), iscrowd=(False,)
    )
    near, far = TextObject("dog", (0, 0, 190, 190)), TextObject("cat", (700, 700, 900, 900))
    sample = replace(sample, width=100, height=100)
    assert rollout_of(checkpoint, sample, [far, near]).pairs == ((1, 0),)
    assert rollout_of(checkpoint, sample, [far]).pairs == ()
    closest_only = changed(PARAMS.matching, gate_threshold=0.95)
    generation = Generation(np.array(rollout_of(checkpoint, sample, [near]).ids, np.int32), "stop")
    parsed = parsed_rollout(sample.image_id, generation, answer_reader(checkpoint).parse(generation))
    (rollout,) = match_rollouts([parsed], [sample], closest_only)
    assert rollout.pairs == ()


def test_positions_point_at_the_coordinate_tokens(world, checkpoint):
    sample = world.store[2]
    rollout = rollout_of(checkpoint, sample, truth_of(sample))
    for obj in rollout.objects:
        assert tuple(checkpoint.coord.bin_of(rollout.ids[p]) for p in obj.coord_positions) == obj.bins


def test_an_answer_without_a_container_is_not_usable(world, checkpoint):
    rollouts = teacher_rollouts(checkpoint, world)
    broken = rollouts[world.samples[-1].image_id]
    assert (broken.usable, broken.objects, broken.pairs, broken.finish_reason) == (False, (), (), "length")
    assert all(r.usable for image_id, r in rollouts.items() if image_id != broken.image_id)


def test_an_empty_answer_is_usable(world, checkpoint):
    """Nothing found is an answer: its missed objects are appended; only what has no container falls back."""
    rollout = rollout_of(checkpoint, world.store[0], [])
    assert rollout.usable
    assert rollout.objects == rollout.pairs == ()


def test_rollouts_survive_the_file(world, checkpoint, tmp_path):
    path, rollouts = tmp_path / "rollouts.jsonl", teacher_rollouts(checkpoint, world)
    generations = {i: Generation(np.array(r.ids, np.int32), r.finish_reason) for i, r in rollouts.items()}
    write_generations(path, generations)
    found = read_generations(path, 10**6)
    assert {i: (g.ids.tolist(), g.finish_reason) for i, g in found.items()} == {
        i: (list(r.ids), r.finish_reason) for i, r in rollouts.items()
    }
    lines = path.read_text().splitlines()
    for damaged in ("{", "[]", lines[0].replace('"stop"', '"end"'), lines[0].replace("[", "[-")):
        path.write_text("\n".join([lines[1], damaged]))
        with pytest.raises(DataError, match=r"rollouts\.jsonl:2: (not a rollout|not valid JSON)"):
            read_generations(path, 10**6)
    path.write_text(lines[0])
    with pytest.raises(DataError, match="expected ids below 3"):
        read_generations(path, 3)


def test_a_summary_counts_by_hand(world, checkpoint):
    """One object of each image is missed, one found twice; the last image's answer does not parse."""
    rollouts = list(teacher_rollouts(checkpoint, world).values())
    reader = answer_reader(checkpoint)
    reports = [reader.parse(Generation(np.array(r.ids, np.int32), "stop")).report for r in rollouts]
    summary = rollout_summary(world.samples, rollouts, reports)
    n_true = [len(s.descs) - sum(s.iscrowd) for s in world.samples]
    assert summary["n_gt"] == sum(n_true)
    assert summary["n_matched"] == sum(max(n - 1, 0) for n in n_true[:-1])
    assert summary["n_pred"] == sum(n for n, s in zip(n_true[:-1], world.samples, strict=False) if n > 1)
    assert summary["f1"] == pytest.approx(2 * summary["n_matched"] / (summary["n_pred"] + summary["n_gt"]), abs=5e-5)
    assert summary["unusable"] == 1


def test_a_summary_without_objects_is_undefined(world, caplog):
    samples = [replace(s, iscrowd=(True,) * len(s.iscrowd)) for s in world.samples]
    rollouts = [Rollout(s.image_id, (1,), "length", True, (), (), ()) for s in samples]
    reports = [ParseReport(True, 0, truncated=True)] * len(samples)
    summary = rollout_summary(samples, rollouts, reports)
    assert [summary[key] for key in ("precision", "recall", "f1", "matched_iou_mean")] == [None] * 4
    warn_of_unusable(reports)
    assert f"{len(samples)} of {len(samples)} rollouts are truncated at the token budget" in caplog.text
    assert "the rollouts have no objects" in caplog.text
