"""Unlikelihood of one token a slot: value, gradient, and what happens at the ends."""

from __future__ import annotations

import math

import pytest
import torch

from coordexp.losses.unlikelihood import MAX_UNLIKELIHOOD, unlikelihood, unlikelihood_terms

IDS = torch.tensor([0, 3, 6])


def random_logits(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(3, 7, dtype=dtype, generator=torch.Generator().manual_seed(2)).requires_grad_()


def test_two_tokens_by_hand():
    """Odds of 3 to 1 for the unwanted token: P = 3/4, so the loss is log 4."""
    logits = torch.tensor([[math.log(3.0), 0.0]])
    assert unlikelihood(logits, torch.tensor([0])).item() == pytest.approx(math.log(4))
    assert unlikelihood(logits, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3))


def test_value_and_gradient_of_the_formula():
    """P at the unwanted token, -P_v P / (1 - P) at every other."""
    logits = random_logits()
    loss = unlikelihood(logits, IDS)
    p = logits.softmax(-1).detach()
    bad = p[range(3), IDS]
    torch.testing.assert_close(loss, -torch.log1p(-bad))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = -p * (bad / (1 - bad))[:, None]
    expected[range(3), IDS] = bad
    torch.testing.assert_close(gradient, expected)


def test_gradient_against_finite_differences():
    assert torch.autograd.gradcheck(lambda logits: unlikelihood(logits, IDS), (random_logits(),))


def test_an_unlikely_token_keeps_an_exact_loss_and_a_certain_one_is_clamped():
    logits = torch.tensor([[-40.0, 0.0], [40.0, 0.0]], requires_grad=True)
    loss = unlikelihood(logits, torch.tensor([0, 0]))
    assert loss[0].item() == pytest.approx(math.exp(-40), rel=1e-5)  # 1 - P would have rounded it to 0
    assert loss[1].item() == pytest.approx(MAX_UNLIKELIHOOD)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert not gradient[1].any()


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(scale, dtype):
    logits = torch.zeros(1, 5, dtype=dtype)
    logits[0, 2] = scale
    logits.requires_grad_()
    loss = unlikelihood(logits, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def test_sums_counts_and_what_is_not_wanted():
    logits = random_logits()
    (term,) = unlikelihood_terms(logits, IDS, {"duplicate_unlikelihood", "softce"}).values()
    assert term.count.item() == 3
    torch.testing.assert_close(term.sum, unlikelihood(logits, IDS).sum())
    assert unlikelihood_terms(logits, IDS, {"softce"}) == {}
    empty = unlikelihood_terms(logits[:0], IDS[:0], {"duplicate_unlikelihood"})["duplicate_unlikelihood"]
    assert (empty.sum.item(), empty.count.item()) == (0, 0)
    assert empty.sum.requires_grad
