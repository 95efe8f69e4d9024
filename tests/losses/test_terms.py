"""The registry of terms: it agrees with the parameters, and a single division makes the loss independent of packing."""

from __future__ import annotations

import pytest
import torch

from coordexp.config.schema import CoordSupervision, Params, SignedWeight, Stage1Params, Stage2Params
from coordexp.losses.terms import (
    OF_VOCABULARY,
    TERMS,
    at_least_float32,
    computed,
    loss_factors,
    means,
    sum_slots,
    supervises_coordinates,
    term,
    term_weights,
)
from coordexp.training.step import weigh
from helpers import PARAMS, changed
from loss_reference import coord_slots, coord_sums

FIRST_ID, VOCAB = 5, 1012
BLOCKS = (Params, Stage2Params)
NOT_TERMS = {"a1_coord_weight", "eos_weight", "over_close_weight"}  # factors on terms
COUNTS = {"text": 4.0, "inner_text": 3.0, "coord": 8.0, "box": 2.0, "unlikely": 1.0}


def test_every_term_has_a_weight_and_every_weight_a_term():
    keys = [key for block in BLOCKS for key in block.model_fields if key.endswith("_weight")]
    assert sorted(keys) == sorted({*(f"{name}_weight" for name in TERMS), *NOT_TERMS})


def test_signed_and_supervising_terms_match_the_parameter_ranges():
    assert [f"{n}_weight" for n in TERMS if supervises_coordinates(n)] == list(CoordSupervision.model_fields)
    fields = {k: f for block in BLOCKS for k, f in block.model_fields.items()}
    signed = {
        k for k, f in fields.items() if k.endswith("_weight") and f.metadata == SignedWeight.__metadata__[0].metadata
    }
    assert signed == {f"{name}_weight" for name, t in TERMS.items() if t.signed}


def test_every_weight_is_read_by_its_key_from_the_block_that_has_it():
    keys = [f"{name}_weight" for name in TERMS]
    changes = {key: 2.0 + i for i, key in enumerate(keys) if key in Params.model_fields}
    changes |= {f"stage1__{key}": 20.0 + i for i, key in enumerate(keys) if key in Stage1Params.model_fields}
    changes |= {f"stage2__{key}": 40.0 + i for i, key in enumerate(keys) if key in Stage2Params.model_fields}
    params = changed(PARAMS, **changes)
    expected = {name: changes.get(key, changes.get(f"stage2__{key}")) for name, key in zip(TERMS, keys, strict=True)}
    assert term_weights(params, params.stage2) == expected
    stage1 = {n: changes[f"stage1__{k}"] for n, k in zip(TERMS, keys, strict=True) if k in Stage1Params.model_fields}
    assert term_weights(params.stage1) == stage1


def test_terms_without_a_weight_are_skipped_except_box_terms():
    weights = dict.fromkeys(TERMS, 0.0) | {"w1": 1.0}
    assert [t.name for t in computed(weights, "coord")] == ["w1"]
    assert computed(weights, "text") == []
    assert [t.name for t in computed(weights, "box")] == [n for n, t in TERMS.items() if t.place == "box"]
    assert computed({"w1": 1.0}, "box") == []  # a stage without box weights has no box terms


def test_a_term_cannot_be_declared_twice():
    with pytest.raises(AssertionError, match="declared twice"):
        term("w1", "coord")(lambda p_NK, q_NK: p_NK)


def test_the_arguments_of_a_term_exist_at_its_place():
    slots = coord_slots(torch.randn(2, VOCAB), torch.tensor([3.0, 5.0]), FIRST_ID)
    for name, declared in TERMS.items():
        if declared.place == "coord":
            assert declared.values(slots).shape == (2,), name
        elif declared.place != "box":
            assert set(declared.arguments) <= OF_VOCABULARY, name


def test_loss_and_logs_by_hand():
    sums = {"gate": torch.tensor(6.0, requires_grad=True), "softce": torch.tensor(10.0), "bbox_giou": torch.tensor(3.0)}
    weights = {"softce": 2.0, "gate": 0.5, "bbox_giou": 0.0}
    weighted, logs = weigh(sums, weights, COUNTS, "a1_")
    assert {name: value.item() for name, value in weighted.items()} == {"a1_softce": 2.5, "a1_gate": 0.375}
    assert logs == {
        **{"loss/a1_softce": 2.5, "raw/a1_softce": 1.25, "loss/a1_gate": 0.375, "raw/a1_gate": 0.75},
        "raw/a1_bbox_giou": 1.5,
        "loss/a1_coord_reg": 2.875,
    }
    factors = loss_factors(weights, COUNTS)
    assert {name: factors[name] * sums[name].item() for name in factors} == {"softce": 2.5, "gate": 0.375}


def test_sums_are_divided_by_counts_and_by_one_if_the_count_is_zero():
    sums = {"softce": torch.tensor(3.0), "text_ce": torch.tensor(0.0)}
    assert {k: v.item() for k, v in means(sums, COUNTS | {"coord": 0.5, "text": 0.0}).items()} == {
        "softce": 6.0,
        "text_ce": 0.0,
    }


@pytest.mark.parametrize("cuts", [(0, 18), (3, 7), (18, 18)])
def test_micro_batches_add_up_to_one_batch(cuts):
    """Uneven ones, and some without a slot: same sums, same gradients."""
    logits_NV = torch.randn(18, VOCAB, dtype=torch.float64, requires_grad=True)
    y_N = 999 * torch.rand(18, dtype=torch.float64)

    def total(rows: slice) -> torch.Tensor:
        sums = coord_sums(coord_slots(logits_NV[rows], y_N[rows], FIRST_ID))
        return torch.stack(list(means(sums, COUNTS).values())).sum()

    whole = total(slice(None))
    parts = [total(slice(*rows)) for rows in ((0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], 18))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, logits_NV, retain_graph=True)[0] for loss in (sum(parts), whole)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-15)


def test_a_slot_of_weight_zero_is_absent_even_if_infinite():
    values_N = torch.tensor([3.0, torch.inf, 1.0], requires_grad=True)
    total = sum_slots(values_N, torch.tensor([1.0, 0.0, 0.5]))
    total.backward()
    assert total.item() == 3.5
    assert values_N.grad.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_sign_of_the_entropy_weight_sharpens_or_flattens(sign):
    """One step down the gradient sharpens a distribution for a positive weight and flattens it for a negative one."""
    logits_NV = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1), requires_grad=True)
    before = coord_sums(coord_slots(logits_NV, torch.full((3,), 500.0), FIRST_ID), {"entropy"})["entropy"]
    (gradient,) = torch.autograd.grad(sign * before, logits_NV)
    moved_NV = logits_NV.detach() - 30 * gradient
    after = coord_sums(coord_slots(moved_NV, torch.full((3,), 500.0), FIRST_ID), {"entropy"})["entropy"]
    assert (before - after).item() * sign > 0.01


@pytest.mark.parametrize(
    ("given", "used"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_precision_rises_to_float32_and_never_falls(given, used):
    assert at_least_float32(torch.zeros(2, dtype=given)).dtype == used
