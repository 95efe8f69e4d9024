"""Sums and counts: they add up, and nothing divides by zero."""

from __future__ import annotations

import pytest
import torch

from coordexp.losses.terms import positive_or_one, sum_slots


def test_weighted_mean_by_hand():
    term = sum_slots(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.5, 0.0]))
    assert (term.sum.item(), term.count.item()) == (2.0, 1.5)
    assert term.mean().item() == pytest.approx(2.0 / 1.5)


def test_sums_of_parts_equal_the_sum_of_all():
    values_N, weights_N = torch.rand(10, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    whole = sum_slots(values_N, weights_N)
    parts = sum_slots(values_N[:3], weights_N[:3]) + sum_slots(values_N[3:], weights_N[3:])
    torch.testing.assert_close(parts.mean(), whole.mean())


def test_no_slots_give_zero_with_a_graph():
    values_N = torch.zeros(0, requires_grad=True)
    term = sum_slots(values_N)
    assert (term.sum.item(), term.count.item()) == (0.0, 0.0)
    term.mean().backward()
    assert values_N.grad is not None
    assert values_N.grad.shape == (0,)


def test_a_slot_of_weight_zero_is_absent_even_if_infinite():
    values_N = torch.tensor([3.0, torch.inf], requires_grad=True)
    term = sum_slots(values_N, torch.tensor([1.0, 0.0]))
    term.sum.backward()
    assert term.sum.item() == 3.0
    assert values_N.grad.tolist() == [1.0, 0.0]


def test_fractional_counts_divide_as_they_are():
    assert positive_or_one(torch.tensor([0.0, 0.25, 3.0])).tolist() == [1.0, 0.25, 3.0]
