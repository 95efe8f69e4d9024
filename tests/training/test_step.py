"""Whole training steps against reference losses on stored logits, for every kind of head; and the log of a stage."""

from __future__ import annotations

import json

import pytest
import torch

from coordexp.config.profile import TuningConfig
from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.coord_terms import CoordSlots
from coordexp.losses.terms import TERMS, sum_slots
from coordexp.losses.vocabulary_terms import HeadSweep
from coordexp.models.adapters import apply_tuning
from coordexp.models.forward import hidden_states, slot_logits
from coordexp.packing.collator import PackedBatch, teacher_segment
from coordexp.text.codecs import Role
from coordexp.training.channel_b import channel_b_segments
from coordexp.training.stage1 import train_stage1
from coordexp.training.step import Criterion, micro_batch, step_counts
from helpers import ALL_WEIGHTS, PARAMS, changed, criterion_of, new_checkpoint, teacher_rollouts
from loss_reference import box_sums, coord_sums, text_log_odds, textbook_text

WEIGHTS = ALL_WEIGHTS | {"entropy": 0.1, "duplicate_unlikelihood": 0.5, "reordered_ce": 0.25}


def untied():
    checkpoint = new_checkpoint()
    model = checkpoint.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 0.01)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    return checkpoint


def with_duplicates(checkpoint, world):
    """Every kind of supervised slot: annotations, rollouts, and duplicates to push down."""
    policies = {"passes": "two", "missed": "append", "eos_weight": 2.0, "duplicate_unlikelihood_weight": 0.5}
    policies |= {"reordered_ce_weight": 0.25}
    stage2 = changed(PARAMS.stage2, **policies)
    rollouts, encoder = teacher_rollouts(checkpoint, world), world.encoder(checkpoint)
    rolled_out = [
        segment
        for sample in world.samples[:3]
        for segment in channel_b_segments(sample, rollouts[sample.image_id], encoder, stage2)
    ]
    return [*rolled_out, *(teacher_segment(sample) for sample in world.samples[3:])]


def textbook_loss(model, criterion: Criterion, batch: PackedBatch, counts) -> torch.Tensor:
    """The weighted sum from logits of all supervised slots and softmaxes over the whole vocabulary."""
    hidden, temperature, first_id = hidden_states(model, batch), criterion.params.temperature, criterion.first_coord_id
    places = (batch.text_slots, batch.coord_slots, batch.unlikely_slots, batch.reordered_slots)
    text_NV, coord_NV, unlikely_NV, reordered_NV = (slot_logits(model, hidden, slots) for slots in places)
    span = slice(first_id, first_id + NUM_BINS)
    odds_N = text_log_odds(coord_NV, first_id, temperature)
    slots = CoordSlots(coord_NV[:, span], odds_N, batch.coord_targets, criterion.params)
    expected_N = (coord_NV[:, span] / temperature).softmax(-1) @ torch.arange(NUM_BINS).to(hidden) / NUM_BINS
    sums = coord_sums(slots) | box_sums(expected_N.reshape(-1, 4), batch.coord_targets.reshape(-1, 4) / NUM_BINS)
    ids = batch.text_targets
    sums["text_ce"] = sum_slots(textbook_text(text_NV, ids, first_id)["text_ce"], batch.text_weights)
    gated_N = (batch.text_roles != int(Role.CLOSE)).float()
    sums["text_gate"] = sum_slots(textbook_text(text_NV / temperature, ids, first_id)["text_gate"], gated_N)
    pushed = textbook_text(unlikely_NV, batch.unlikely_ids, first_id)
    sums["duplicate_unlikelihood"] = sum_slots(pushed["duplicate_unlikelihood"])
    sums["reordered_ce"] = sum_slots(textbook_text(reordered_NV, batch.reordered_ids, first_id)["text_ce"])
    return sum(w * sums[name] / counts[TERMS[name].place] for name, w in criterion.weights.items())


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_step_is_the_textbooks(checkpoint, world, dtype=torch.float32, rtol=1e-5, **changes) -> None:
    model = checkpoint.model.to(dtype)
    segments = with_duplicates(checkpoint, world)
    batch, counts = world.collator(checkpoint)(segments), step_counts(segments)
    assert all(counts.values())
    criterion = criterion_of(checkpoint, WEIGHTS, **changes)
    ours = micro_batch(model, criterion, batch, counts).loss
    found = gradients(model, ours)
    theirs = textbook_loss(model, criterion, batch, counts)
    expected = gradients(model, theirs)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=rtol)
    assert found.keys() == expected.keys()
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= rtol * whole, name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("made", [new_checkpoint, untied])
def test_a_step(world, made, temperature):
    assert_step_is_the_textbooks(made(), world, temperature=temperature)


def test_a_step_in_float64(world):
    """Loss and gradient agree to the last digits: both paths compute the same thing."""
    assert_step_is_the_textbooks(new_checkpoint(), world, torch.float64, 1e-9)


@pytest.mark.parametrize("made", [new_checkpoint, untied])
@pytest.mark.parametrize("changes", [{"method": "lora"}, {"method": "full", "language": "freeze"}])
def test_a_step_in_which_the_head_trains_its_coordinate_rows_alone(world, made, changes):
    if changes["method"] == "lora":
        pytest.importorskip("peft")
    checkpoint = made()
    keys = {"vision": "train", "projector": "train", "language": "train", "rank": 4, "alpha": 8.0, "dropout": 0.0}
    apply_tuning(
        checkpoint.model,
        TuningConfig(**(keys | {"activations": "keep", "vision_activations": "keep"} | changes)),
        checkpoint.coord,
    )
    assert_step_is_the_textbooks(checkpoint, world)


def test_a_step_runs_through_the_head_once(world, monkeypatch):
    """Counts are known before the forward, so the gradient found on the way is the one asked for."""
    checkpoint = new_checkpoint()
    segments = with_duplicates(checkpoint, world)
    runs, original = [], HeadSweep.run
    monkeypatch.setattr(HeadSweep, "run", lambda *given: runs.append(1) or original(*given))
    batch, counts = world.collator(checkpoint)(segments), step_counts(segments)
    micro_batch(checkpoint.model, criterion_of(checkpoint, WEIGHTS), batch, counts).loss.backward()
    assert len(runs) == 1


def test_logged_names_of_a_stage(workspace):
    """Terms of its weights alone, and diagnostics under their names."""
    train_stage1(workspace)
    lines = (workspace.paths.run("stage1") / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1])
    logged = {name.removeprefix("loss/") for name in row if name.startswith("loss/")}
    assert logged == {"total", "text_ce", "softce", "w1", "gate", "coord_reg"}
    assert {name.removeprefix("raw/") for name in row if name.startswith("raw/")} == logged - {"total", "coord_reg"}
    assert row["coord_diag/expected_bin_abs_err_p90"] >= row["coord_diag/expected_bin_mae"] > 0
