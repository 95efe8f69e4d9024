"""The cut vocabulary gives the same masses and gradients as the whole softmax."""

from __future__ import annotations

import pytest
import torch

from coordexp.losses.partition import CoordSlots, VocabularyPartition, at_least_float32


@pytest.mark.parametrize(("first_id", "vocab_size"), [(7, 1020), (0, 1010), (30, 1030)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_coord_mass_is_the_softmax_mass(first_id, vocab_size, temperature):
    logits_NV = torch.randn(5, vocab_size, dtype=torch.float64) * 3
    mass_N = CoordSlots.of(logits_NV, first_id, temperature).mass_N
    expected_N = (logits_NV / temperature).softmax(-1)[:, first_id : first_id + 1000].sum(-1)
    torch.testing.assert_close(mass_N, expected_N, rtol=1e-12, atol=1e-14)


def test_a_vocabulary_of_coordinates_alone_has_mass_one_and_no_nan_gradient():
    logits_NV = torch.randn(2, 1000, requires_grad=True)
    mass_N = torch.sigmoid(-VocabularyPartition.of(logits_NV, 0).text_log_odds(1.0))
    mass_N.sum().backward()
    assert mass_N.tolist() == [1.0, 1.0]
    assert torch.equal(logits_NV.grad, torch.zeros_like(logits_NV))


def test_coordinate_ids_outside_the_logits_are_refused():
    with pytest.raises(AssertionError, match="exceed 1010 logits"):
        VocabularyPartition.of(torch.zeros(1, 1010), first_coord_id=11)


@pytest.mark.parametrize(
    ("given", "used"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_precision_rises_to_float32_and_never_falls(given, used):
    assert at_least_float32(torch.zeros(2, dtype=given)).dtype == used
