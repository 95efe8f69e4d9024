"""Soft self-context: the inputs of the later forwards, and the flow of gradients.

Shapes: N coordinate slots, K bins, D hidden size, B rows, T tokens.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from coordexp.geometry.bins import NUM_BINS
from coordexp.models.forward import hidden_states, slot_logits
from coordexp.packing.collator import teacher_segment
from coordexp.training import soft_context
from coordexp.training.soft_context import context_embeddings, self_contexts
from coordexp.training.step import term_sums
from helpers import criterion_of, new_checkpoint

MODES = ("expectation", "straight_through", "argmax")


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


@pytest.fixture(scope="module")
def batch(world, checkpoint):
    """Two images side by side in one row, so that slots are flat positions of a pack."""
    return world.collator(checkpoint)([teacher_segment(world.store[i]) for i in (2, 5)])


def forwards(checkpoint, batch, n_forwards=2, mode="expectation", grad_mode="unroll"):
    """Hidden states of the first and of the last forward."""
    criterion = criterion_of(checkpoint, stage2__coord_ctx_embed_mode=mode, stage2__softctx_grad_mode=grad_mode)
    first = soft_context.hidden_states(checkpoint.model, batch)
    later = self_contexts(checkpoint.model, batch, first, criterion.params, criterion.first_coord_id, n_forwards)
    return first, [first, *later][-1]


def random_logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (5, K) that want gradients, and a table (K, 6)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(5, NUM_BINS, generator=generator)
    return logits.requires_grad_(), torch.randn(NUM_BINS, 6, generator=generator)


def test_soft_is_the_mean_embedding_and_hard_the_most_likely_one():
    logits, table = random_logits()
    expected = torch.stack([sum(p * row for p, row in zip(ps, table, strict=True)) for ps in logits.softmax(-1)])
    torch.testing.assert_close(context_embeddings(logits, table, 1.0, "expectation"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(context_embeddings(logits, table, 1.0, "argmax"), table[logits.argmax(-1)])


def test_straight_through_is_hard_forwards_and_soft_backwards():
    logits, table = random_logits()
    values = {mode: context_embeddings(logits, table, 0.7, mode) for mode in MODES}
    torch.testing.assert_close(values["straight_through"], values["argmax"])
    assert (values["straight_through"] - values["expectation"]).abs().max() > 0.1
    seed = torch.randn(values["straight_through"].shape, generator=torch.Generator().manual_seed(1))
    st, soft = (
        torch.autograd.grad((values[mode] * seed).sum(), logits)[0] for mode in ("straight_through", "expectation")
    )
    torch.testing.assert_close(st, soft)
    assert st.abs().max() > 0
    assert not values["argmax"].requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_a_point_mass_gives_the_embedding_of_its_bin(mode):
    _, table = random_logits()
    bins = torch.tensor([0, 17, 999])
    logits = 200.0 * F.one_hot(bins, NUM_BINS)
    torch.testing.assert_close(context_embeddings(logits, table, 1.0, mode), table[bins])


def test_temperature_flattens_the_soft_embedding():
    logits, table = random_logits()
    hot = context_embeddings(logits, table, 1e6, "expectation")
    torch.testing.assert_close(hot, table.mean(0).expand(5, -1), atol=1e-3, rtol=0)


def test_a_correct_context_changes_nothing(checkpoint, batch, monkeypatch):
    """With the embeddings of the very tokens that stand there: the slots and the picture are put where they were."""
    tokens = batch.input_ids.flatten()[batch.coord_slots + 1] - checkpoint.coord.first_id
    monkeypatch.setattr(soft_context, "context_embeddings", lambda logits, table, *_: table[tokens])
    with torch.no_grad():
        first, last = forwards(checkpoint, batch, 3)
    assert first is not last
    torch.testing.assert_close(last, first, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_each_forward_uses_the_predictions_of_the_previous_one(checkpoint, batch, mode, monkeypatch):
    seen = []

    def recording(model, packed, inputs_embeds_BTD=None):
        hidden = hidden_states(model, packed, inputs_embeds_BTD)
        seen.append((inputs_embeds_BTD, hidden))
        return hidden

    monkeypatch.setattr(soft_context, "hidden_states", recording)
    with torch.no_grad():
        _, last = forwards(checkpoint, batch, 3, mode)
        assert len(seen) == 3
        assert seen[0][0] is None
        assert last is seen[2][1]
        table = checkpoint.model.get_input_embeddings().weight
        span = slice(checkpoint.coord.first_id, checkpoint.coord.end_id)
        for (_, before), (embeds, _) in pairwise(seen):
            logits_NK = slot_logits(checkpoint.model, before, batch.coord_slots)[:, span]
            expected = table[batch.input_ids].flatten(0, 1)
            expected[batch.coord_slots + 1] = context_embeddings(logits_NK, table[span], 1.0, mode)
            torch.testing.assert_close(embeds.flatten(0, 1), expected)
        assert (seen[1][1] - seen[0][1]).abs().max() > 0.1
        assert (seen[2][1] - seen[1][1]).abs().max() > 1e-3


def reaches_first(checkpoint, batch, mode, grad_mode) -> bool:
    """Whether the coordinate loss of the last forward has a gradient with respect to the first one."""
    first, last = forwards(checkpoint, batch, 2, mode, grad_mode)
    loss = slot_logits(checkpoint.model, last, batch.coord_slots).square().mean()
    (gradient,) = torch.autograd.grad(loss, first, allow_unused=True)
    return gradient is not None and bool(gradient.abs().max() > 0)


@pytest.mark.parametrize("mode", MODES)
def test_only_unrolled_and_differentiable_context_reaches_the_first_forward(checkpoint, batch, mode):
    assert reaches_first(checkpoint, batch, mode, "unroll") == (mode != "argmax")
    assert not reaches_first(checkpoint, batch, mode, "em_detach")


def losses(checkpoint, batch, n_forwards=2, grad_mode="unroll") -> tuple[torch.Tensor, torch.Tensor]:
    """Text cross-entropy, anchored on the first forward, and the coordinate terms of the last one."""
    first, last = forwards(checkpoint, batch, n_forwards, grad_mode=grad_mode)
    sums, _ = term_sums(checkpoint.model, criterion_of(checkpoint), batch, first, last)
    return sums["text_ce"] / len(batch.text_slots), sums["softce"] / len(batch.coord_slots)


def gradient(checkpoint, loss) -> torch.Tensor:
    parameters = list(checkpoint.model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@pytest.mark.parametrize("grad_mode", ["unroll", "em_detach"])
def test_text_is_trained_as_without_self_context(checkpoint, batch, grad_mode):
    """The known failure of em_detach is a first forward without gradient: text would stay untrained."""
    alone = gradient(checkpoint, losses(checkpoint, batch, 1)[0])
    text, _ = losses(checkpoint, batch, grad_mode=grad_mode)
    assert alone.norm() > 0
    torch.testing.assert_close(gradient(checkpoint, text), alone)


def test_unrolling_changes_the_gradient_and_not_the_loss(checkpoint, batch):
    (_, unrolled), (_, detached) = losses(checkpoint, batch), losses(checkpoint, batch, grad_mode="em_detach")
    torch.testing.assert_close(unrolled, detached)
    full, partial = gradient(checkpoint, unrolled), gradient(checkpoint, detached)
    assert (full - partial).norm() > 0.01 * full.norm()


def test_the_unrolled_gradient_is_the_derivative_of_the_loss(world):
    """Against a central difference, in the direction of what em_detach leaves out."""
    checkpoint = new_checkpoint()
    batch = world.collator(checkpoint)([teacher_segment(world.store[2])])
    full = gradient(checkpoint, losses(checkpoint, batch)[1])
    partial = gradient(checkpoint, losses(checkpoint, batch, grad_mode="em_detach")[1])
    through_context = (full - partial) / (full - partial).norm()
    values, step = [], 3e-4
    for sign in (1, -1):
        moved = new_checkpoint()
        with torch.no_grad():
            at = 0
            for parameter in moved.model.parameters():
                parameter += sign * step * through_context[at : at + parameter.numel()].view_as(parameter)
                at += parameter.numel()
            values.append(float(losses(moved, batch)[1]))
    measured = (values[0] - values[1]) / (2 * step)
    assert measured == pytest.approx(float(full @ through_context), rel=0.01)
    assert float(partial @ through_context) != pytest.approx(measured, rel=0.1)
