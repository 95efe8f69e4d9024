"""The objective: one division, ordered logs, accumulation, and the rule about unsupervised coordinates."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from coordexp.errors import ConfigError, TrainingError
from coordexp.losses.box_terms import box_terms
from coordexp.losses.coord_terms import coordinate_terms
from coordexp.losses.objective import COORD_SUPERVISION, TERM_ORDER, ObjectiveWeights, combine, weighted_terms
from coordexp.losses.soft_targets import SoftTarget
from coordexp.losses.terms import TermSum
from coordexp.losses.text_terms import text_terms

FIRST_ID = 5
VOCAB = FIRST_ID + 1000 + 2
WEIGHTS = ObjectiveWeights(
    text_ce=1.0, text_gate=0.1, softce=1.0, w1=0.1, gate=2.0, coord_ce=0.5, entropy=0.01, bbox_ciou=0.2
)


def term(total: float, count: float) -> TermSum:
    return TermSum(torch.tensor(total, requires_grad=True), torch.tensor(count))


def all_terms(logits_NV, y_N, text_NV, ids_N, pred_B4, target_B4) -> dict[str, TermSum]:
    return {
        **coordinate_terms(logits_NV, y_N, FIRST_ID, SoftTarget(), 0.9, WEIGHTS.wanted),
        **text_terms(text_NV, ids_N, FIRST_ID, 0.9, WEIGHTS.wanted),
        **box_terms(pred_B4, target_B4, 10, WEIGHTS.wanted),
    }


@pytest.fixture
def batch():
    """18 coordinate slots, 9 text slots, 4 boxes, with a gradient on the logits and the boxes."""
    generator = torch.Generator().manual_seed(17)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    boxes_B4 = normal(8, 4).sigmoid()
    leaves = normal(18, VOCAB).requires_grad_(), normal(9, VOCAB).requires_grad_(), boxes_B4[:4].requires_grad_()
    targets = (
        999 * normal(18).sigmoid(),
        torch.randint(0, FIRST_ID, (9,), generator=generator),
        boxes_B4[4:].detach(),
    )
    return leaves, targets


def terms_of(batch, coord=slice(None), text=slice(None), box=slice(None)) -> dict[str, TermSum]:
    (logits, text_logits, pred), (y, ids, target) = batch
    return all_terms(logits[coord], y[coord], text_logits[text], ids[text], pred[box], target[box])


def test_loss_and_logs_by_hand():
    terms = {"gate": term(6.0, 4.0), "softce": term(10.0, 4.0), "w1": term(1.0, 4.0)}
    loss, logs = combine(terms, ObjectiveWeights(softce=2.0, gate=0.5))
    assert loss.item() == pytest.approx(2.0 * 10 / 4 + 0.5 * 6 / 4)
    assert {key: value.item() for key, value in logs.items()} == pytest.approx(
        {
            **{"loss/softce": 5.0, "raw/softce": 2.5, "count/softce": 4.0},
            **{"raw/w1": 0.25, "count/w1": 4.0},
            **{"loss/gate": 0.75, "raw/gate": 1.5, "count/gate": 4.0},
        }
    )
    assert [key for key in logs if key.startswith("raw/")] == ["raw/softce", "raw/w1", "raw/gate"]
    assert not any(value.requires_grad for value in logs.values())


def test_weighted_losses_add_up_to_the_loss(batch):
    terms = terms_of(batch)
    loss, logs = combine(terms, WEIGHTS)
    parts = weighted_terms(terms, WEIGHTS)
    assert set(parts) == WEIGHTS.wanted
    assert sum(part.item() for part in parts.values()) == pytest.approx(loss.item())
    assert sum(value.item() for key, value in logs.items() if key.startswith("loss/")) == pytest.approx(loss.item())


def test_accumulated_micro_batches_equal_one_batch(batch):
    """Uneven micro-batches, one of them without boxes and text: same loss, same logs, same gradients."""
    leaves, _ = batch
    whole_terms = terms_of(batch)
    whole, whole_logs = combine(whole_terms, WEIGHTS)
    whole_grads = torch.autograd.grad(whole, leaves)
    denominators = {name: part.count for name, part in whole_terms.items()}
    cuts = [
        (slice(0, 2), slice(0, 0), slice(0, 0)),
        (slice(2, 3), slice(0, 7), slice(0, 1)),
        (slice(3, 18), slice(7, 9), slice(1, 4)),
    ]
    losses, logs = zip(*(combine(terms_of(batch, *cut), WEIGHTS, denominators) for cut in cuts), strict=True)
    grads = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
    torch.testing.assert_close(sum(losses), whole, rtol=1e-12, atol=0)
    for key, value in whole_logs.items():
        torch.testing.assert_close(sum(log[key] for log in logs), value, rtol=1e-12, atol=1e-15)
    for i, expected in enumerate(whole_grads):
        torch.testing.assert_close(sum(grad[i] for grad in grads), expected, rtol=1e-10, atol=1e-15)


def test_averaging_over_ranks_needs_counts_per_rank(batch):
    """DDP averages gradients over W ranks: with denominators of count / W the mean of the losses is the global loss."""
    whole_terms = terms_of(batch)
    denominators = {name: part.count / 2 for name, part in whole_terms.items()}
    ranks = [(slice(0, 4), slice(0, 8), slice(0, 1)), (slice(4, 18), slice(8, 9), slice(1, 4))]
    mean = sum(combine(terms_of(batch, *rank), WEIGHTS, denominators)[0] for rank in ranks) / 2
    torch.testing.assert_close(mean, combine(whole_terms, WEIGHTS)[0], rtol=1e-12, atol=0)


def test_denominators_divide_as_they_are_and_zero_divides_by_one():
    terms, weights = {"softce": term(3.0, 2.0), "w1": term(0.0, 0.0)}, ObjectiveWeights(softce=1.0, w1=1.0)
    loss, _ = combine(terms, weights, {"softce": torch.tensor(0.5), "w1": torch.tensor(0.0)})
    assert loss.item() == 6.0


def test_an_empty_batch_has_a_zero_loss_that_can_be_differentiated(batch):
    leaves, _ = batch
    nothing = slice(0, 0)
    loss, logs = combine(terms_of(batch, nothing, nothing, nothing), WEIGHTS)
    assert loss.item() == 0
    assert logs["count/softce"].item() == 0
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(loss, leaves))


def test_a_term_of_weight_zero_does_not_reach_the_loss():
    terms = {"softce": term(1.0, 1.0), "w1": term(float("nan"), 1.0)}
    loss, logs = combine(terms, ObjectiveWeights(softce=1.0))
    assert loss.item() == 1.0
    assert "loss/w1" not in logs


def test_a_loss_that_is_not_finite_names_its_terms():
    terms = {"softce": term(1.0, 1.0), "bbox_ciou": term(float("nan"), 2.0)}
    with pytest.raises(TrainingError, match=r"raw/bbox_ciou=nan.*Expected finite"):
        combine(terms, ObjectiveWeights(softce=1.0, bbox_ciou=0.2))


def test_unknown_or_unweighted_terms_are_bugs():
    with pytest.raises(AssertionError, match="without a weight"):
        combine({"softceee": term(1.0, 1.0)}, ObjectiveWeights(softce=1.0))
    with pytest.raises(AssertionError, match="no term with a weight"):
        combine({"w1": term(1.0, 1.0)}, ObjectiveWeights(softce=1.0))


BAD_WEIGHTS = [(name, bad) for name in TERM_ORDER for bad in (-0.1, float("nan"), float("inf"))]


@pytest.mark.parametrize(("name", "bad"), [case for case in BAD_WEIGHTS if case != ("entropy", -0.1)])
def test_weights_out_of_range_name_their_key(name, bad):
    with pytest.raises(ConfigError, match=f"{name}_weight: found"):
        ObjectiveWeights(**{name: bad})


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_entropy_is_paid_for_or_rewarded(sign):
    """One step down the gradient sharpens a distribution for a positive weight and flattens it for a negative one."""
    logits_NV = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def entropy(logits):
        y_N = torch.full((3,), 500.0)
        return coordinate_terms(logits, y_N, FIRST_ID, SoftTarget(), 1.0, {"entropy"})

    loss, logs = combine(entropy(logits_NV), ObjectiveWeights(entropy=sign * 0.5))
    assert logs["loss/entropy"].item() == pytest.approx(sign * 0.5 * logs["raw/entropy"].item())
    (gradient,) = torch.autograd.grad(loss, logits_NV)
    moved = entropy(logits_NV.detach() - 100 * gradient)["entropy"].mean()
    assert (logs["raw/entropy"] - moved).item() * sign > 0.01


@pytest.mark.parametrize("name", COORD_SUPERVISION)
def test_any_one_of_the_four_weights_supervises_coordinates(name):
    ObjectiveWeights(**{name: 0.01}).require_coord_supervision()


def test_coordinates_without_a_token_loss_are_an_error():
    weights = dataclasses.replace(WEIGHTS, softce=0, w1=0, gate=0, coord_ce=0)
    with pytest.raises(ConfigError, match=r"stage1\.softce_weight.*stage1\.coord_ce_weight.*all are 0"):
        weights.require_coord_supervision("stage1.")
