"""Text cross-entropy and the text gate."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from coordexp.losses.partition import VocabularyPartition
from coordexp.losses.text_terms import TEXT_TERMS, text_gate, text_terms

K = 1000
FIRST_ID = 20
VOCAB = FIRST_ID + K + 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(17)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("wanted", [("text_ce",), TEXT_TERMS])
def test_text_ce_is_torch_cross_entropy_whatever_else_is_wanted(temperature, wanted):
    logits_NV = torch.randn(6, VOCAB, dtype=torch.float64, requires_grad=True)
    ids_N = torch.tensor([0, 5, 19, 1020, 1024, 3])
    weights_N = torch.tensor([1.0, 2.0, 1.0, 0.5, 4.0, 0.0], dtype=torch.float64)
    term = text_terms(logits_NV, ids_N, FIRST_ID, temperature, wanted, weights_N)["text_ce"]
    expected = (F.cross_entropy(logits_NV, ids_N, reduction="none") * weights_N).sum()
    torch.testing.assert_close(term.sum, expected, rtol=1e-13, atol=0)
    assert term.count.item() == 8.5
    torch.testing.assert_close(
        torch.autograd.grad(term.sum, logits_NV)[0], torch.autograd.grad(expected, logits_NV)[0], rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_text_gate_value_and_gradient(temperature):
    logits_NV = torch.randn(3, VOCAB, dtype=torch.float64, requires_grad=True)
    gate_N = text_gate(VocabularyPartition.of(logits_NV, FIRST_ID).text_log_odds(temperature))
    is_coord_V = torch.zeros(VOCAB, dtype=torch.bool)
    is_coord_V[FIRST_ID : FIRST_ID + K] = True
    prob_NV = (logits_NV.detach() / temperature).softmax(-1)
    mass_N1 = prob_NV[:, is_coord_V].sum(-1, keepdim=True)
    torch.testing.assert_close(gate_N.detach(), -(1 - mass_N1[:, 0]).log(), rtol=1e-10, atol=0)
    expected_NV = torch.where(is_coord_V, prob_NV, -prob_NV * mass_N1 / (1 - mass_N1)) / temperature
    grad_NV = torch.autograd.grad(gate_N.sum(), logits_NV)[0]
    torch.testing.assert_close(grad_NV, expected_NV, rtol=0, atol=1e-13)


def test_text_gate_is_flat_beyond_its_clamp():
    logits_NV = torch.zeros(1, VOCAB)
    logits_NV[:, FIRST_ID] = 40.0
    logits_NV.requires_grad_()
    term = text_terms(logits_NV, torch.tensor([0]), FIRST_ID, 1.0, {"text_gate"})["text_gate"]
    term.sum.backward()
    assert term.sum.item() == pytest.approx(-math.log(1e-6), rel=1e-6)
    assert torch.equal(logits_NV.grad, torch.zeros_like(logits_NV))


def test_text_gate_has_weights_of_its_own():
    logits_NV, ids_N = torch.randn(3, VOCAB), torch.tensor([0, 1, 2])
    without_last = torch.tensor([1.0, 1.0, 0.0])
    terms = text_terms(logits_NV, ids_N, FIRST_ID, 1.0, TEXT_TERMS, gate_weights_N=without_last)
    first_two = text_terms(logits_NV[:2], ids_N[:2], FIRST_ID, 1.0, TEXT_TERMS)
    assert terms["text_gate"].count.item() == 2
    assert terms["text_ce"].count.item() == 3
    assert terms["text_gate"].sum.item() == pytest.approx(first_two["text_gate"].sum.item(), rel=1e-6)


def test_a_vocabulary_without_coordinate_tokens_has_text_ce_alone():
    logits_NV = torch.randn(2, 12)
    terms = text_terms(logits_NV, torch.tensor([3, 4]), None, 1.0, {"text_ce"})
    assert terms["text_ce"].sum.item() == pytest.approx(
        F.cross_entropy(logits_NV, torch.tensor([3, 4]), reduction="sum").item(), rel=1e-6
    )
    with pytest.raises(AssertionError, match="text_gate needs"):
        text_terms(logits_NV, torch.tensor([3, 4]), None, 1.0, {"text_gate"})


def test_gradients_of_both_terms_against_finite_differences():
    generator = torch.Generator().manual_seed(4)
    logits_NV = torch.randn(4, 1008, dtype=torch.float64, generator=generator).requires_grad_()
    # Only the ids around the edge of the coordinate block are moved: all 1008 would take minutes.
    moved = [0, 3, 4, 5, 500, 1003, 1004, 1007]
    ids_N = torch.tensor([0, 3, 1005, 1007])

    def both(part_NM):
        logits = logits_NV.detach().clone()
        logits[:, moved] = part_NM
        terms = text_terms(logits, ids_N, 4, 0.7, {"text_ce", "text_gate"})
        return terms["text_ce"].sum, terms["text_gate"].sum

    assert torch.autograd.gradcheck(both, (logits_NV.detach()[:, moved].requires_grad_(),))


def test_no_slots_and_extreme_logits():
    empty_NV = torch.zeros(0, VOCAB, requires_grad=True)
    extreme_NV = torch.full((2, VOCAB), -1e4).bfloat16()
    extreme_NV[0, FIRST_ID], extreme_NV[1, 0] = 1e4, 1e4
    extreme_NV.requires_grad_()
    for logits_NV, count in ((empty_NV, 0), (extreme_NV, 2)):
        terms = text_terms(logits_NV, torch.ones(count, dtype=torch.long), FIRST_ID, 1.0, TEXT_TERMS)
        torch.stack([term.sum for term in terms.values()]).sum().backward()
        assert [term.count.item() for term in terms.values()] == [count, count]
        assert all(term.sum.dtype == torch.float32 and torch.isfinite(term.sum) for term in terms.values())
        assert torch.isfinite(logits_NV.grad).all()
    assert terms["text_ce"].sum.item() == pytest.approx(4e4, rel=1e-2)
