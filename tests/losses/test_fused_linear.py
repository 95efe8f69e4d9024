"""The fused pass against the plain terms on stored logits: values, gradients, and what it keeps."""

from __future__ import annotations

import itertools

import pytest
import torch

from coordexp.losses.coord_terms import coordinate_terms, slice_terms
from coordexp.losses.fused_linear import fused_terms
from coordexp.losses.head_sweep import FUSED_TERMS, HeadSlots, HeadSweep
from coordexp.losses.partition import CoordSlots
from coordexp.losses.soft_targets import SoftTarget, rounded_bins
from coordexp.losses.text_terms import text_terms
from coordexp.losses.unlikelihood import unlikelihood_terms

FIRST_ID, K, D = 7, 1000, 8
VOCAB = FIRST_ID + K + 13
N_COORD, N_TEXT, N_UNLIKELY = 8, 11, 3
N = N_COORD + N_TEXT + N_UNLIKELY
FACTORS = {"text_ce": 0.3, "text_gate": 0.02, "gate": 0.11, "duplicate_unlikelihood": 0.7}
SLICE_TERMS = {"softce", "w1", "coord_ce"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(17)


class Case:
    """Hidden states, a head, and slots of every kind: coordinate slots, then text, then tokens to push down."""

    def __init__(self, dtype=torch.float32, n_coord=N_COORD, n_text=N_TEXT, n_unlikely=N_UNLIKELY, spread=1.0):
        self.kinds = (n_coord, n_text, n_unlikely)
        self.hidden_ND = torch.randn(sum(self.kinds), D, dtype=torch.float64).mul(spread).to(dtype).requires_grad_()
        self.weight_VD = torch.randn(VOCAB, D, dtype=torch.float64).to(dtype).requires_grad_()
        self.y_N = 999 * torch.rand(n_coord)
        text_ids = torch.cat([torch.arange(FIRST_ID), torch.arange(FIRST_ID + K, VOCAB)])
        self.text_ids_N = text_ids[torch.randint(len(text_ids), (n_text,))]
        self.unlikely_ids_N = torch.randint(VOCAB, (n_unlikely,))
        self.ce_weights_N = torch.rand(n_text) * 2
        self.gate_weights_N = (torch.arange(n_text) % 4 > 0).float()

    def slots(self, wanted) -> HeadSlots:
        def at(kind: int, weights_N: torch.Tensor) -> torch.Tensor:
            return torch.cat([weights_N if i == kind else torch.zeros(n) for i, n in enumerate(self.kinds)])

        weights = {
            "gate": at(0, torch.ones(self.kinds[0])),
            "text_ce": at(1, self.ce_weights_N),
            "text_gate": at(1, self.gate_weights_N),
            "duplicate_unlikelihood": at(2, torch.ones(self.kinds[2])),
        }
        return HeadSlots(
            token_ids_N=torch.cat([FIRST_ID + rounded_bins(self.y_N), self.text_ids_N, self.unlikely_ids_N]),
            weights={name: weights[name] for name in wanted},
            first_coord_id=FIRST_ID,
            n_coord=self.kinds[0],
        )

    def plain(self, wanted, hidden_ND, weight_VD):
        """Terms by the functions on full logits, and the coordinate slots."""
        coord_NV, text_NV, unlikely_NV = (hidden_ND @ weight_VD.t()).split(self.kinds)
        terms = text_terms(
            text_NV, self.text_ids_N, FIRST_ID, 1.0, wanted, self.ce_weights_N, self.gate_weights_N
        ) | unlikelihood_terms(unlikely_NV, self.unlikely_ids_N, wanted)
        terms |= coordinate_terms(coord_NV, self.y_N, FIRST_ID, SoftTarget(), 1.0, {*wanted, *SLICE_TERMS})
        return terms, CoordSlots.of(coord_NV, FIRST_ID, 1.0)

    def fused(self, wanted, factors=FACTORS, chunk=5, **changes):
        slots = self.slots(wanted)
        found = fused_terms(self.hidden_ND, self.weight_VD, slots, tensors(factors), chunk, **changes)
        terms = found.terms | slice_terms(found.coord_MK, self.y_N, SoftTarget(), 1.0, SLICE_TERMS)
        return terms, CoordSlots(found.coord_MK, found.text_log_odds_N[: self.kinds[0]])


def tensors(factors):
    return (
        None if factors is None else {name: torch.tensor(value, dtype=torch.float64) for name, value in factors.items()}
    )


def loss_of(terms, factors=FACTORS, slice_factor=0.05) -> torch.Tensor:
    return torch.stack([factors.get(name, slice_factor) * term.sum.double() for name, term in terms.items()]).sum()


def gradients(loss, *inputs, **options):
    return torch.autograd.grad(loss, inputs, **options)


def assert_same(case: Case, wanted, rtol: float, **fused_options) -> None:
    """Values, counts, coordinate slots, and gradients on hidden states and head."""
    hidden_ND, weight_VD = (t.detach().requires_grad_() for t in (case.hidden_ND, case.weight_VD))
    theirs, their_slots = case.plain(wanted, hidden_ND, weight_VD)
    ours, our_slots = case.fused(wanted, **fused_options)
    assert ours.keys() == theirs.keys()
    for name, term in theirs.items():
        torch.testing.assert_close(ours[name].sum, term.sum, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(ours[name].count, term.count, rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(our_slots.logits_NK, their_slots.logits_NK, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(our_slots.text_log_odds_N, their_slots.text_log_odds_N, rtol=rtol, atol=1e-5)
    found = gradients(loss_of(ours), case.hidden_ND, case.weight_VD)
    for ours_, theirs_ in zip(found, gradients(loss_of(theirs), hidden_ND, weight_VD), strict=True):
        assert (ours_ - theirs_).norm() <= rtol * theirs_.norm()
        torch.testing.assert_close(ours_, theirs_, rtol=rtol, atol=rtol * float(theirs_.norm()))


SUBSETS = [s for n in range(len(FUSED_TERMS) + 1) for s in itertools.combinations(FUSED_TERMS, n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_equals_the_plain_terms_whatever_is_wanted(wanted):
    assert_same(Case(), wanted, 1e-5)


@pytest.mark.parametrize("chunk", [1, 4, N_COORD, N - 1, N, 256])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    assert_same(Case(torch.float64), FUSED_TERMS, 1e-12, chunk=chunk)


@pytest.mark.parametrize("kinds", [(0, 11, 3), (8, 0, 3), (8, 11, 0), (0, 0, 0), (8, 0, 0)])
def test_slots_of_a_kind_may_be_missing(kinds):
    n_coord, n_text, n_unlikely = kinds
    case = Case(n_coord=n_coord, n_text=n_text, n_unlikely=n_unlikely)
    assert_same(case, FUSED_TERMS, 1e-5)
    terms, _ = case.fused(FUSED_TERMS)
    assert all(torch.isfinite(g).all() for g in gradients(loss_of(terms), case.hidden_ND, case.weight_VD))


@pytest.mark.parametrize("factors", [None, FACTORS, {**FACTORS, "gate": 0.0}, dict.fromkeys(FACTORS, 0.0)])
def test_what_was_expected_changes_no_gradient(factors):
    """Right, unknown, or wrong in one term or in all."""
    assert_same(Case(), FUSED_TERMS, 1e-5, factors=factors)


def test_the_gradient_of_one_term_and_then_that_of_the_loss_twice():
    """What a monitor asks for before the step, and a second backward pass after gradients were handed over."""
    case = Case(torch.float64)
    hidden_ND, weight_VD = (t.detach().requires_grad_() for t in (case.hidden_ND, case.weight_VD))
    ours, _ = case.fused(FUSED_TERMS)
    theirs, _ = case.plain(FUSED_TERMS, hidden_ND, weight_VD)
    for pick in (*({name: 1.0} for name in FACTORS), FACTORS, FACTORS, {k: 3 * v for k, v in FACTORS.items()}):
        picked = [{name: terms[name] for name in pick} for terms in (ours, theirs)]
        found = gradients(loss_of(picked[0], pick), case.hidden_ND, case.weight_VD, retain_graph=True)
        expected = gradients(loss_of(picked[1], pick), hidden_ND, weight_VD, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_a_backward_pass_as_expected_needs_no_second_pass(monkeypatch):
    case = Case()
    terms, _ = case.fused(FUSED_TERMS)
    monkeypatch.setattr(HeadSweep, "run", lambda *_: pytest.fail("ran again"))
    found = gradients(2.0 * loss_of(terms), case.hidden_ND, case.weight_VD)  # a scaled loss is a multiple
    assert all(torch.isfinite(g).all() for g in found)


@pytest.mark.parametrize("factors", [None, FACTORS])
def test_gradcheck(factors):
    case = Case(torch.float64, 2, 2, 1)
    # No text gate: it is flat beyond its clamp, and finite differences step over the edge of others.
    slots = case.slots(FUSED_TERMS)

    def run(hidden_ND, columns_UD):
        weight_VD = case.weight_VD.detach().index_copy(0, columns, columns_UD)
        found = fused_terms(hidden_ND, weight_VD, slots, tensors(factors), 2)
        return *(term.sum for term in found.terms.values()), found.coord_MK[:, ::97]

    columns = torch.cat([slots.token_ids_N, torch.tensor([0, 300])]).unique()
    columns_UD = case.weight_VD.detach()[columns].requires_grad_()
    assert torch.autograd.gradcheck(run, (case.hidden_ND, columns_UD), fast_mode=True)


def test_bf16_inputs_are_accumulated_in_float32():
    """The sums differ from those of the same numbers in float32 by no more than the gradients' rounding to bf16."""
    case = Case(torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (case.hidden_ND, case.weight_VD)]
    theirs, _ = case.plain(FUSED_TERMS, *wide)
    ours, slots = case.fused(FUSED_TERMS)
    assert slots.logits_NK.dtype == torch.float32
    for name, term in theirs.items():
        torch.testing.assert_close(ours[name].sum, term.sum, rtol=1e-5, atol=1e-6)
    found = gradients(loss_of(ours), case.hidden_ND, case.weight_VD)
    for ours_, theirs_ in zip(found, gradients(loss_of(theirs), *wide), strict=True):
        assert ours_.dtype == torch.bfloat16
        torch.testing.assert_close(ours_.float(), theirs_, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_finite(dtype):
    """Logits of +-1e4 and beyond, where one side of the vocabulary has no mass that a float could hold."""
    case = Case(dtype, spread=3e3)
    assert (case.hidden_ND @ case.weight_VD.t()).abs().max() > 1e4
    terms, slots = case.fused(FUSED_TERMS)
    assert torch.isfinite(slots.text_log_odds_N).all()
    assert all(torch.isfinite(term.sum) for term in terms.values())
    assert all(torch.isfinite(g).all() for g in gradients(loss_of(terms), case.hidden_ND, case.weight_VD))
    theirs, _ = case.plain(FUSED_TERMS, case.hidden_ND, case.weight_VD)
    for name, term in theirs.items():
        torch.testing.assert_close(terms[name].sum, term.sum, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same():
    case = Case()
    whole, _ = case.fused(FUSED_TERMS)
    (expected,) = gradients(loss_of(whole), case.hidden_ND)
    case.weight_VD.requires_grad_(False)
    frozen, _ = case.fused(FUSED_TERMS)
    torch.testing.assert_close(gradients(loss_of(frozen), case.hidden_ND)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factors", [None, FACTORS])
def test_a_head_of_which_the_coordinate_rows_train(factors):
    case = Case()
    slots = case.slots(FUSED_TERMS)
    rows_KD = case.weight_VD[slots.span].detach().requires_grad_()
    whole, frozen = (
        fused_terms(case.hidden_ND, case.weight_VD, slots, tensors(factors), 5, rows) for rows in (None, rows_KD)
    )
    loss = loss_of(frozen.terms) + frozen.coord_MK.square().sum()
    grad_hidden_ND, grad_KD = gradients(loss, case.hidden_ND, rows_KD)
    expected = gradients(loss_of(whole.terms) + whole.coord_MK.square().sum(), case.hidden_ND, case.weight_VD)
    torch.testing.assert_close(grad_hidden_ND, expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad_KD, expected[1][slots.span], rtol=1e-5, atol=1e-7)
    assert case.weight_VD.grad is None


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    case = Case()
    monkeypatch.setattr(HeadSweep, "_add_gradients", lambda *_: pytest.fail("not wanted"))
    with torch.no_grad():
        terms, _ = case.fused(FUSED_TERMS)
    assert not any(term.sum.requires_grad for term in terms.values())


@pytest.mark.gpu
def test_a_bf16_head_on_a_gpu():
    """There the products themselves are bf16 with float32 results."""
    case = Case(torch.bfloat16)
    wide = [t.detach().float().cuda().requires_grad_() for t in (case.hidden_ND, case.weight_VD)]
    narrow = [t.detach().cuda().requires_grad_() for t in (case.hidden_ND, case.weight_VD)]
    slots = case.slots(FUSED_TERMS)
    slots = HeadSlots(
        token_ids_N=slots.token_ids_N.cuda(),
        weights={name: weights_N.cuda() for name, weights_N in slots.weights.items()},
        first_coord_id=FIRST_ID,
        n_coord=slots.n_coord,
    )
    theirs, ours = (fused_terms(*inputs, slots, tensors(FACTORS), 5) for inputs in (wide, narrow))
    for name, term in theirs.terms.items():
        torch.testing.assert_close(ours.terms[name].sum, term.sum, rtol=1e-5, atol=1e-6)
    found = gradients(loss_of(ours.terms), *narrow)
    for ours_, theirs_ in zip(found, gradients(loss_of(theirs.terms), *wide), strict=True):
        torch.testing.assert_close(ours_.float(), theirs_, rtol=2**-6, atol=1e-3)
