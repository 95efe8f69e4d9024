"""Stage 2's steps: channel and samples of each step; packing, accumulation and logs in both channels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from coordexp.packing.collator import teacher_segment
from coordexp.training.rollout_pool import RolloutPool
from coordexp.training.schedule import is_channel_b
from coordexp.training.stage2_task import Stage2Task, StepPlan, plan_segments, plan_steps
from coordexp.training.step import TeacherTask, micro_batch, step_counts
from helpers import (
    ALL_WEIGHTS,
    MATCHING,
    PARAMS,
    build_world,
    changed,
    criterion_of,
    logs_of,
    new_checkpoint,
    teacher_rollouts,
)
from loss_reference import terms_of

ALL = tuple(range(6))
TWO = changed(PARAMS.stage2, passes="two", missed="append", eos_weight=2.0)
ONE = changed(TWO, passes="one")


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


@pytest.fixture(scope="module")
def rollouts(world, checkpoint):
    return teacher_rollouts(checkpoint, world)


def test_a_plan_follows_the_schedule_and_uses_images_with_rollouts():
    plan = plan_steps(n_samples=40, rolled_out=[3, 8, 30], samples_per_step=4, steps=50, b_ratio=0.3, seed=1)
    assert [step.channel == "B" for step in plan] == [is_channel_b(s, 0.3) for s in range(50)]
    assert {i for step in plan if step.channel == "B" for i in step.items} == {3, 8, 30}
    assert {i for step in plan if step.channel == "A" for i in step.items} == set(range(40))
    assert all(len(step.items) == 4 for step in plan)
    assert plan == plan_steps(40, [3, 8, 30], 4, 50, 0.3, 1)
    assert plan != plan_steps(40, [3, 8, 30], 4, 50, 0.3, 2)


def test_fresh_rollouts_use_images_without_rollouts():
    plan = plan_steps(40, [3, 8, 30], samples_per_step=4, steps=50, b_ratio=0.5, seed=1, refresh_steps=10)
    before, after = ([{*s.items} for s in part if s.channel == "B"] for part in (plan[:10], plan[10:]))
    assert set().union(*before) == {3, 8, 30}
    assert set().union(*after) == {*range(40)} - {3, 8, 30}
    assert sum(map(len, after[:9])) == len(set().union(*after[:9]))  # each once before any comes again
    plain = plan_steps(40, [3, 8, 30], 4, 50, 0.5, 1)
    assert [s for s in plan if s.channel == "A"] == [s for s in plain if s.channel == "A"]
    everywhere = plan_steps(4, [0, 1, 2, 3], 4, 20, 1.0, 1, refresh_steps=10)
    assert {i for s in everywhere[10:] for i in s.items} == {0, 1, 2, 3}  # no image is left without


def test_another_ratio_does_not_shuffle_the_samples_of_a_channel():
    """An A/B over b_ratio compares channels, not data orders."""

    def drawn(b_ratio: float, channel: str) -> list:
        plan = plan_steps(12, list(range(12)), 2, 20, b_ratio, seed=5)
        return [step.items for step in plan if step.channel == channel]

    for channel in "AB":
        few, many = sorted((drawn(0.3, channel), drawn(0.6, channel)), key=len)
        assert few == many[: len(few)]


def test_only_channel_a_needs_no_rollouts():
    assert all(step.channel == "A" for step in plan_steps(5, [], 2, 10, 0.0, 0))


@pytest.mark.parametrize(("settings", "per_sample"), [(TWO, 2), (ONE, 1)])
def test_segments_and_counts_of_channel_b(world, checkpoint, rollouts, settings, per_sample):
    source, encoder = world.source(checkpoint), world.encoder(checkpoint)
    segments, logs = plan_segments(StepPlan("B", ALL), 0, source, rollouts, encoder, settings)
    n_true = [len(s.descs) - sum(s.iscrowd) for s in world.samples]
    assert len(segments) == per_sample * 5 + 1  # the last sample's answer does not parse
    # Of each image the first object is missed and the second found twice (see helpers.teacher_rollouts).
    assert logs["stage2_ab/matched_total"] == sum(max(n - 1, 0) for n in n_true[:5])
    assert logs["stage2_ab/fn_appended_total"] == sum(n > 0 for n in n_true[:5]) + n_true[5]
    assert logs["stage2_ab/fp_context_total"] == sum(n > 1 for n in n_true[:5])
    assert logs["stage2_ab/fallback_total"] == 1
    assert sum(len(segment.box_tokens) for segment in segments) == sum(n_true)


def test_channel_a_is_teacher_forcing(world, checkpoint):
    source, encoder = world.source(checkpoint, "random"), world.encoder(checkpoint)
    segments, logs = plan_segments(StepPlan("A", (4, 0)), 7, source, {}, encoder, TWO)
    expected = [teacher_segment(source.get(i, 7)) for i in (4, 0)]
    assert [s.answer_ids.tolist() for s in segments] == [e.answer_ids.tolist() for e in expected]
    assert logs == {"channel": "A"}


def stage2(world, checkpoint, rollouts, plan, settings=TWO, pack_tokens=256, weights=ALL_WEIGHTS, **changes):
    """A task at these parameters of stage 2 but for `changes`."""
    criterion = criterion_of(checkpoint, weights, stage2=changed(settings, **changes).model_dump())
    return Stage2Task(
        checkpoint.model,
        criterion,
        world.source(checkpoint),
        RolloutPool(rollouts, lambda _: MATCHING),
        world.encoder(checkpoint),
        world.collator(checkpoint, pack_tokens),
        plan,
    )


def run(task: Stage2Task, step: int = 0):
    """The loss of a step, and its log row."""
    (micro,) = task.micro_batches(step)
    return SimpleNamespace(loss=micro.loss, logs=logs_of(micro))


def gradient(checkpoint, loss) -> torch.Tensor:
    checkpoint.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in checkpoint.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("n_iter", [1, 2])
@pytest.mark.parametrize("plan", [StepPlan("A", ALL), StepPlan("B", ALL)], ids="AB")
@pytest.mark.parametrize("settings", [TWO, ONE], ids=["two", "one"])
def test_packed_equals_unpacked(world, checkpoint, rollouts, plan, settings, n_iter):
    changes = {"n_softctx_iter": n_iter, "coord_ctx_embed_mode": "expectation"}  # the other modes may flip a near tie
    longest = max(s.length for s in plan_segments(plan, 0, world.source(checkpoint), rollouts,
                                                  world.encoder(checkpoint), settings)[0])  # fmt: skip
    packed, alone = (
        run(stage2(world, checkpoint, rollouts, [plan], settings, tokens, **changes))
        for tokens in (4 * longest, longest)
    )
    assert float(packed.loss.detach()) == pytest.approx(float(alone.loss.detach()), rel=1e-5)
    ours, theirs = gradient(checkpoint, packed.loss), gradient(checkpoint, alone.loss)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("plan", [StepPlan("A", ALL), StepPlan("B", ALL)], ids="AB")
def test_packed_equals_unpacked_in_tags_too(tmp_path, checkpoint, plan):
    world = build_world(tmp_path, "tags")
    rollouts = teacher_rollouts(checkpoint, world)
    packed, alone = (run(stage2(world, checkpoint, rollouts, [plan], TWO, tokens)) for tokens in (400, 100))
    assert float(packed.loss.detach()) == pytest.approx(float(alone.loss.detach()), rel=1e-5)
    assert packed.logs["coord_diag/expected_bin_mae"] > 0


@pytest.mark.parametrize("plan", [StepPlan("A", ALL), StepPlan("B", ALL)], ids="AB")
@pytest.mark.parametrize("parts", [2, 5])
def test_accumulated_micro_batches_equal_one_batch(world, checkpoint, rollouts, plan, parts):
    """Divided by the counts of the whole step, the parts add up, however unevenly they hold slots."""
    whole = run(stage2(world, checkpoint, rollouts, [plan]))
    segments, _ = plan_segments(plan, 0, world.source(checkpoint), rollouts, world.encoder(checkpoint), TWO)
    counts, criterion, collator = step_counts(segments), criterion_of(checkpoint), world.collator(checkpoint)
    total = torch.zeros(())
    for part in range(parts):
        batch = collator(segments[part::parts])
        total = total + micro_batch(checkpoint.model, criterion, batch, counts).loss
    assert float(total.detach()) == pytest.approx(float(whole.loss.detach()), rel=1e-5)
    ours, theirs = gradient(checkpoint, total), gradient(checkpoint, whole.loss)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_channel_a_without_self_context_equals_stage_1(world, checkpoint, rollouts):
    ours = run(stage2(world, checkpoint, rollouts, [StepPlan("A", (0, 1))]))
    teacher = TeacherTask(
        checkpoint.model, criterion_of(checkpoint), world.source(checkpoint), world.collator(checkpoint), [[[0, 1]]]
    )
    (theirs,) = teacher.micro_batches(0)
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-5)


def test_self_context_is_channel_a_only_and_counted_as_compute(world, checkpoint, rollouts):
    plan = [StepPlan("A", ALL), StepPlan("B", ALL)]
    once, twice = (stage2(world, checkpoint, rollouts, plan, n_softctx_iter=n) for n in (1, 2))
    a_once, a_twice, b_once, b_twice = run(once, 0), run(twice, 0), run(once, 1), run(twice, 1)
    assert a_twice.logs["tokens"] == 2 * a_once.logs["tokens"] == 2 * sum(s.length for s in world.samples)
    assert a_twice.logs["loss/text_ce"] == pytest.approx(a_once.logs["loss/text_ce"])  # anchored on the first forward
    assert a_twice.logs["loss/softce"] != pytest.approx(a_once.logs["loss/softce"], rel=1e-5)
    assert b_twice.logs == b_once.logs
    assert float(b_twice.loss.detach()) == float(b_once.loss.detach())


def test_every_parameter_that_stage_2_trains_gets_a_gradient(world, checkpoint, rollouts):
    """Weights off, one by one, would pass unseen in the loss of a random model."""
    micro = run(stage2(world, checkpoint, rollouts, [StepPlan("B", ALL)]))
    checkpoint.model.zero_grad()
    micro.loss.backward()
    untouched = [name for name, p in checkpoint.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    assert micro.logs["channel"] == "B"
    assert micro.logs["samples"] == 11


def test_diagnostics_cover_the_first_and_the_last_forward(world, checkpoint, rollouts):
    plan = [StepPlan("A", ALL)]
    once, twice = (run(stage2(world, checkpoint, rollouts, plan, n_softctx_iter=n)).logs for n in (1, 2))
    assert not [name for name in once if name.startswith("coord_diag_a1/")]
    first = {name.removeprefix("coord_diag_a1/"): v for name, v in twice.items() if name.startswith("coord_diag_a1/")}
    plain = {name.removeprefix("coord_diag/"): v for name, v in once.items() if name.startswith("coord_diag/")}
    assert first == pytest.approx(plain)  # teacher forcing is the first forward
    assert twice["coord_diag/expected_bin_mae"] != pytest.approx(plain["expected_bin_mae"], rel=1e-5)


def test_the_anchor_is_the_coordinate_objective_of_the_first_forward(world, checkpoint, rollouts):
    """Its terms are those of teacher forcing, times the factor, and its gradient is added to that of the rest."""
    plan, twice = [StepPlan("A", ALL)], {"n_softctx_iter": 2, "softctx_grad_mode": "em_detach"}
    plain = run(stage2(world, checkpoint, rollouts, plan, **twice))
    anchored = run(stage2(world, checkpoint, rollouts, plan, **twice, a1_coord_weight=0.5))
    teacher = run(stage2(world, checkpoint, rollouts, plan))
    names = ("softce", "w1", "gate", "coord_ce")
    for name in names:
        assert anchored.logs[f"loss/a1_{name}"] == pytest.approx(0.5 * teacher.logs[f"loss/{name}"], rel=1e-5)
    added = sum(anchored.logs[f"loss/a1_{name}"] for name in names)
    assert float(anchored.loss.detach()) == pytest.approx(float(plain.loss.detach()) + added, rel=1e-5)
    assert {k: v for k, v in anchored.logs.items() if "/a1_" not in k} == pytest.approx(plain.logs)
    difference = gradient(checkpoint, anchored.loss) - gradient(checkpoint, plain.loss)
    assert difference.norm() > 1e-3


def test_a_single_forward_has_no_anchor(world, checkpoint, rollouts):
    for plan in (StepPlan("A", ALL), StepPlan("B", ALL)):
        with_anchor, without = (run(stage2(world, checkpoint, rollouts, [plan], a1_coord_weight=w)) for w in (0.5, 0.0))
        assert with_anchor.logs == without.logs


def test_packed_equals_unpacked_with_duplicate_unlikelihood(world, checkpoint, rollouts):
    """Every option of channel B at once; the second object of each rollout is found twice."""
    settings = changed(
        TWO, duplicate_unlikelihood_weight=0.5, over_generation="truncate", eos_weight=3.0, over_close_weight=2.0
    )
    weights = ALL_WEIGHTS | {"duplicate_unlikelihood": 0.5}
    plan = [StepPlan("B", ALL)]
    results = [run(stage2(world, checkpoint, rollouts, plan, settings, n, weights)) for n in (1200, 300)]
    packed, alone = results
    assert packed.logs["stage2_ab/unlikely_total"] > 0
    assert packed.logs["loss/duplicate_unlikelihood"] == pytest.approx(alone.logs["loss/duplicate_unlikelihood"])
    assert float(packed.loss.detach()) == pytest.approx(float(alone.loss.detach()), rel=1e-5)
    ours, theirs = gradient(checkpoint, packed.loss), gradient(checkpoint, alone.loss)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_reordered_ce_is_the_cross_entropy_of_the_coordinates(world, checkpoint, rollouts):
    """By hand: coordinates taken for text make text_ce the mean over both, so theirs follows from the two means."""
    plan, settings = StepPlan("B", ALL), changed(TWO, reordered_ce_weight=0.5)
    made = run(stage2(world, checkpoint, rollouts, [plan], settings, weights=ALL_WEIGHTS | {"reordered_ce": 0.5}))
    plain = run(stage2(world, checkpoint, rollouts, [plan]))
    added = 0.5 * made.logs["raw/reordered_ce"]
    assert float(made.loss.detach()) == pytest.approx(float(plain.loss.detach()) + added, rel=1e-5)
    segments, _ = plan_segments(plan, 0, world.source(checkpoint), rollouts, world.encoder(checkpoint), settings)
    as_text = []
    for segment in segments:
        weights = segment.text_weights.copy()
        weights[segment.reordered_tokens] = 1
        as_text.append(replace(segment, text_weights=weights, reordered_tokens=segment.reordered_tokens[:0]))
    n_text, n_coord = step_counts(segments)["text"], step_counts(segments)["reordered"]
    assert n_coord > 0
    criterion = criterion_of(checkpoint, {"text_ce": 1.0, "gate": 1.0})
    both = logs_of(micro_batch(checkpoint.model, criterion, world.collator(checkpoint)(as_text), step_counts(as_text)))
    total = both["raw/text_ce"] * (n_text + n_coord)
    assert made.logs["raw/reordered_ce"] == pytest.approx(
        (total - made.logs["raw/text_ce"] * n_text) / n_coord, rel=1e-4
    )


def test_every_box_term_is_logged_and_the_weighted_ones_train(world, checkpoint, rollouts):
    """The raw value of a term does not depend on its weight, and the loss is made of those with one."""
    plan = [StepPlan("A", ALL)]
    boxes = terms_of("box")
    off, on = (
        run(stage2(world, checkpoint, rollouts, plan, weights=ALL_WEIGHTS | dict.fromkeys(boxes, w)))
        for w in (0.0, 1.0)
    )
    for name in boxes:
        assert off.logs[f"raw/{name}"] == pytest.approx(on.logs[f"raw/{name}"]) == on.logs[f"loss/{name}"]
        assert f"loss/{name}" not in off.logs
    added = sum(on.logs[f"loss/{name}"] for name in boxes)
    assert float(on.loss.detach()) == pytest.approx(float(off.loss.detach()) + added, rel=1e-5)
