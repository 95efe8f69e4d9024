"""Teacher forcing: the layout of the packs changes no loss, and the numbers that are logged."""

from __future__ import annotations

import pytest
import torch

from coordexp.packing.collator import teacher_segment
from coordexp.training.stage1 import TeacherTask
from coordexp.training.step import step_counts
from helpers import criterion_of, logs_of, new_checkpoint
from loss_reference import terms_of


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


def task(world, checkpoint, packs_by_step, object_order="top_left") -> TeacherTask:
    source = world.source(checkpoint, object_order)
    return TeacherTask(checkpoint.model, criterion_of(checkpoint), source, world.collator(checkpoint), packs_by_step)


def only(batches):
    (batch,) = batches
    return batch


def gradient(checkpoint, loss) -> torch.Tensor:
    checkpoint.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in checkpoint.model.parameters() if p.grad is not None])


def test_the_layout_of_the_packs_changes_nothing(world, checkpoint):
    """The same six samples alone, two by two in another order, and all in one row."""
    layouts = [[[0], [1], [2], [3], [4], [5]], [[5, 0], [3, 1], [2, 4]], [[0, 1, 2, 3, 4, 5]]]
    steps = task(world, checkpoint, layouts)
    results = [only(steps.micro_batches(step)) for step in range(len(layouts))]
    gradients = [gradient(checkpoint, r.loss) for r in results]
    for result, found in zip(results[1:], gradients[1:], strict=True):
        assert float(result.loss.detach()) == pytest.approx(float(results[0].loss.detach()), rel=1e-5)
        assert (found - gradients[0]).norm() < 1e-4 * gradients[0].norm()
        assert logs_of(result) == pytest.approx(logs_of(results[0]), rel=1e-3, abs=1e-4)


def test_a_step_is_the_mean_over_all_its_slots(world, checkpoint):
    """Not the mean of the means of its packs: the terms of two steps add up by their counts."""
    both, first, second = task(world, checkpoint, [[[0], [3]], [[0]], [[3]]]), 1, 2
    counts = [step_counts([teacher_segment(world.store[i])]) for i in (0, 3)]
    logs = [only(both.micro_batches(step)).logs for step in (0, first, second)]
    for name, place in (("text_ce", "text"), ("text_gate", "inner_text")):
        weights = [count[place] for count in counts]
        expected = (logs[1][f"raw/{name}"] * weights[0] + logs[2][f"raw/{name}"] * weights[1]) / sum(weights)
        assert logs[0][f"raw/{name}"] == pytest.approx(expected, rel=1e-4)
    assert logs[0]["raw/softce"] == pytest.approx(logs[1]["raw/softce"], rel=1e-4)  # sample 3 shows no object
    assert logs[2]["loss/softce"] == 0


def test_logged_numbers(world, checkpoint):
    micro = only(task(world, checkpoint, [[[0, 2], [5]]]).micro_batches(0))
    weighted = {name: v for name, v in micro.logs.items() if name.startswith("loss/") and name != "loss/coord_reg"}
    assert sum(weighted.values()) == pytest.approx(float(micro.loss.detach()), rel=1e-5)
    assert micro.logs["loss/coord_reg"] == pytest.approx(sum(weighted.get(f"loss/{n}", 0.0) for n in terms_of("coord")))
    assert micro.logs["samples"] == 3
    assert micro.logs["tokens"] == sum(world.store[i].length for i in (0, 2, 5))
    assert {"loss/text_ce", "loss/softce", "loss/bbox_ciou", "coord_diag/expected_bin_mae"} <= logs_of(micro).keys()
    assert 0 <= micro.logs["time/wait_s"] < 60


def test_random_order_differs_in_each_step(world, checkpoint):
    shuffled = task(world, checkpoint, [[[0]]] * 8, "random")
    losses = [float(only(shuffled.micro_batches(step)).loss.detach()) for step in range(8)]
    assert len({round(value, 5) for value in losses}) > 1
    again = float(only(shuffled.micro_batches(3)).loss.detach())
    assert again == losses[3]
