"""The fused head against reference terms on stored logits: values, gradients, and memory.

N slots: coordinate slots first, then text, then tokens to push down.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from coordexp.losses.coord_terms import gate
from coordexp.losses.terms import TERMS, sum_slots
from coordexp.losses.vocabulary_terms import (
    CHUNK_LOGITS,
    MAX_PENALTY,
    HeadProducts,
    HeadSlots,
    HeadSweep,
    chunk_slots,
    unlikelihood,
    vocabulary_sums,
)
from loss_reference import text_log_odds, textbook_text, token_log_odds

FIRST_ID, K, D = 7, 1000, 8
VOCAB = FIRST_ID + K + 13
N_COORD, N_TEXT, N_UNLIKELY = 8, 11, 3
N = N_COORD + N_TEXT + N_UNLIKELY
FACTORS = {"text_ce": 0.3, "text_gate": 0.02, "gate": 0.11, "duplicate_unlikelihood": 0.7}
ALL = tuple(FACTORS)
SPAN = slice(FIRST_ID, FIRST_ID + K)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(17)


class Case:
    """Hidden states, a head, and slots of every kind."""

    def __init__(self, dtype=torch.float32, n_coord=N_COORD, n_text=N_TEXT, n_unlikely=N_UNLIKELY, spread=1.0):
        self.kinds = (n_coord, n_text, n_unlikely)
        self.hidden_ND = torch.randn(sum(self.kinds), D, dtype=torch.float64).mul(spread).to(dtype).requires_grad_()
        self.head_VD = torch.randn(VOCAB, D, dtype=torch.float64).to(dtype).requires_grad_()
        text_ids = torch.cat([torch.arange(FIRST_ID), torch.arange(FIRST_ID + K, VOCAB)])
        parts = (torch.randint(FIRST_ID, FIRST_ID + K, (n_coord,)), text_ids[torch.randint(len(text_ids), (n_text,))])
        self.ids_N = torch.cat([*parts, torch.randint(VOCAB, (n_unlikely,))])
        weights = {
            "gate": (0, torch.ones(n_coord)),
            "text_ce": (1, torch.rand(n_text) * 2),
            "text_gate": (1, (torch.arange(n_text) % 4 > 0).float()),
            "duplicate_unlikelihood": (2, torch.ones(n_unlikely)),
        }
        self.weights = {
            name: torch.cat([w if i == kind else torch.zeros(n) for i, n in enumerate(self.kinds)])
            for name, (kind, w) in weights.items()
        }

    def slots(self, wanted=ALL) -> HeadSlots:
        weights = {name: self.weights[name] for name in wanted}
        return HeadSlots(token_ids_N=self.ids_N, weights=weights, first_coord_id=FIRST_ID, n_coord=self.kinds[0])

    def textbook(self, hidden_ND, head_VD, wanted=ALL):
        """Sums, coordinate logits and text log-odds from stored logits."""
        logits_NV = hidden_ND @ head_VD.t()
        values = textbook_text(logits_NV, self.ids_N, FIRST_ID)
        values["gate"] = logits_NV.logsumexp(-1) - logits_NV[:, SPAN].logsumexp(-1)
        sums = {name: sum_slots(values[name], self.weights[name]) for name in wanted}
        return sums, logits_NV[: self.kinds[0], SPAN], text_log_odds(logits_NV, FIRST_ID)

    def ours(self, wanted=ALL, factors=FACTORS, coord_rows_KD=None, products=None, **how):
        how = replace(HeadProducts.on(self.head_VD, products), **({"chunk": 5} | how))
        return vocabulary_sums(self.hidden_ND, self.head_VD, self.slots(wanted), factors, coord_rows_KD, how)

    def wide(self, dtype=torch.float64):
        """The same numbers, as leaves of their own."""
        return [t.detach().to(dtype).requires_grad_() for t in (self.hidden_ND, self.head_VD)]


def loss_of(sums, coord_NK, factors=FACTORS) -> torch.Tensor:
    """The weighted sum, and something on the coordinate logits."""
    parts = [factors[name] * total.double() for name, total in sums.items()]
    return torch.stack([*parts, 0.05 * coord_NK.double().square().sum()]).sum()


def gradients(loss, *inputs, **options):
    return torch.autograd.grad(loss, inputs, **options)


def assert_same(case: Case, wanted=ALL, rtol=1e-5, **options) -> None:
    """Sums, coordinate logits, odds, and gradients on hidden states and head, against the textbook in float64."""
    wide = case.wide()
    expected, found = case.textbook(*wide, wanted), case.ours(wanted, **options)
    assert found[0].keys() == expected[0].keys()
    for name, total in expected[0].items():
        torch.testing.assert_close(found[0][name].double(), total, rtol=rtol, atol=1e-6)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=1e-5)
    pairs = zip(
        gradients(loss_of(*found[:2]), case.hidden_ND, case.head_VD),
        gradients(loss_of(*expected[:2]), *wide),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= rtol * theirs.norm()


SUBSETS = [s for n in range(len(ALL) + 1) for s in itertools.combinations(ALL, n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_equals_the_reference_for_every_combination_of_gradients(wanted):
    assert_same(Case(), wanted)


@pytest.mark.parametrize("chunk", [1, 4, N_COORD, N - 1, N, 256])
@pytest.mark.parametrize("slots_first", [False, True])
def test_chunk_size_and_layout_do_not_change_the_result(chunk, slots_first):
    assert_same(Case(torch.float64), rtol=1e-10, chunk=chunk, slots_first=slots_first)


@pytest.mark.parametrize("trained", ["head", "rows", "nothing"])
def test_bfloat16_factors_are_accumulated_in_float32(trained):
    """As on a GPU: weights and hidden states stay in float32, and so do the gradients on them."""
    case = Case()
    expected = gradients(loss_of(*case.ours()[:2]), case.hidden_ND, case.head_VD)
    rows_KD = case.head_VD[SPAN].detach().requires_grad_() if trained == "rows" else None
    case.head_VD.requires_grad_(trained == "head")
    sums, coord_MK, _ = case.ours(coord_rows_KD=rows_KD, products=torch.bfloat16, slots_first=True)
    assert {t.dtype for t in (*sums.values(), coord_MK)} == {torch.float32}
    given = {"head": case.head_VD, "rows": rows_KD}.get(trained)
    found = gradients(loss_of(sums, coord_MK), case.hidden_ND, *([] if given is None else [given]))
    wanted = (expected[0], expected[1][SPAN] if trained == "rows" else expected[1])
    for ours, theirs in zip(found, wanted, strict=False):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 2**-6 * theirs.norm()


@pytest.mark.parametrize("kinds", [(0, 11, 3), (8, 0, 3), (8, 11, 0), (0, 0, 0), (8, 0, 0)])
def test_any_kind_of_slot_may_be_absent(kinds):
    assert_same(Case(n_coord=kinds[0], n_text=kinds[1], n_unlikely=kinds[2]))


@pytest.mark.parametrize("factors", [None, FACTORS, {**FACTORS, "gate": 0.0}, dict.fromkeys(FACTORS, 0.0)])
def test_expected_factors_do_not_change_gradients(factors):
    """Right, unknown, or wrong in one term or in all."""
    assert_same(Case(), factors=factors)


def test_gradients_of_single_terms_and_of_the_loss_can_be_repeated():
    """The requests of the gradient monitor, and a second backward pass after the gradients were given away."""
    case = Case(torch.float64)
    wide = case.wide()
    ours, theirs = case.ours()[0], case.textbook(*wide)[0]
    nothing = torch.zeros(1)
    for pick in (*({name: 1.0} for name in FACTORS), FACTORS, FACTORS, {k: 3 * v for k, v in FACTORS.items()}):
        losses = [loss_of({name: sums[name] for name in pick}, nothing, pick) for sums in (ours, theirs)]
        found = gradients(losses[0], case.hidden_ND, case.head_VD, retain_graph=True)
        expected = gradients(losses[1], *wide, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_backward_pass_with_expected_factors_needs_no_second_pass(monkeypatch):
    case = Case()
    found = case.ours()
    monkeypatch.setattr(HeadSweep, "run", lambda *_: pytest.fail("ran again"))
    grads = gradients(2.0 * loss_of(*found[:2]), case.hidden_ND, case.head_VD)  # a scaled loss is a multiple
    assert all(torch.isfinite(g).all() for g in grads)


def test_unneeded_gradients_are_not_computed(monkeypatch):
    monkeypatch.setattr(HeadSweep, "_add_gradients", lambda *_: pytest.fail("not wanted"))
    with torch.no_grad():
        sums, _, _ = Case().ours()
    assert not any(total.requires_grad for total in sums.values())


@pytest.mark.parametrize("factors", [None, FACTORS])
def test_gradcheck(factors):
    case = Case(torch.float64, 2, 2, 1)
    # No text gate: it is flat beyond its clamp, and finite differences step over the edge of others.
    slots = case.slots(("text_ce", "gate", "duplicate_unlikelihood"))
    columns = torch.cat([slots.token_ids_N, torch.tensor([0, 300])]).unique()

    def run(hidden_ND, columns_UD):
        head_VD = case.head_VD.detach().index_copy(0, columns, columns_UD)
        how = replace(HeadProducts.on(head_VD), chunk=2)
        sums, coord_MK, _ = vocabulary_sums(hidden_ND, head_VD, slots, factors, how=how)
        return *sums.values(), coord_MK[:, ::97]

    columns_UD = case.head_VD.detach()[columns].requires_grad_()
    assert torch.autograd.gradcheck(run, (case.hidden_ND, columns_UD), fast_mode=True)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)  # on a GPU the products themselves are bf16 with float32 results
def test_bf16_inputs_are_accumulated_in_float32(device):
    """The sums differ from those of the same numbers in float32 by no more than the gradients' rounding to bf16."""
    case = Case(torch.bfloat16)
    wide = case.wide(torch.float32)
    given = [t.detach().to(device).requires_grad_() for t in (case.hidden_ND, case.head_VD)]
    weights = {name: w.to(device) for name, w in case.weights.items()}
    slots = HeadSlots(
        token_ids_N=case.ids_N.to(device), weights=weights, first_coord_id=FIRST_ID, n_coord=case.kinds[0]
    )
    sums, coord_MK, _ = vocabulary_sums(*given, slots, FACTORS)
    theirs, their_coord_MK, _ = case.textbook(*wide)
    assert coord_MK.dtype == torch.float32
    for name, total in theirs.items():
        torch.testing.assert_close(sums[name].cpu(), total, rtol=1e-4, atol=1e-5)
    found = gradients(loss_of(sums, coord_MK), *given)
    for ours, expected in zip(found, gradients(loss_of(theirs, their_coord_MK), *wide), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.cpu().float() - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_finite(dtype):
    """Logits of +-1e4 and beyond, where one side of the vocabulary has no mass that a float could hold."""
    case = Case(dtype, spread=3e3)
    assert (case.hidden_ND @ case.head_VD.t()).abs().max() > 1e4
    sums, coord_MK, odds_N = case.ours()
    assert torch.isfinite(odds_N).all()
    assert all(torch.isfinite(total) for total in sums.values())
    assert all(torch.isfinite(g).all() for g in gradients(loss_of(sums, coord_MK), case.hidden_ND, case.head_VD))
    expected = case.textbook(*case.wide(dtype))[0]
    for name in ("text_ce", "gate"):
        torch.testing.assert_close(sums[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factors", [None, FACTORS])
def test_a_frozen_head_and_one_of_which_the_coordinate_rows_train(factors):
    case = Case()
    whole = case.ours(factors=factors)
    grad_hidden_ND, grad_VD = gradients(loss_of(*whole[:2]), case.hidden_ND, case.head_VD)
    rows_KD = case.head_VD[SPAN].detach().requires_grad_()
    rows = case.ours(factors=factors, coord_rows_KD=rows_KD)
    found = gradients(loss_of(*rows[:2]), case.hidden_ND, rows_KD)
    torch.testing.assert_close(found[0], grad_hidden_ND, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[1], grad_VD[SPAN], rtol=1e-5, atol=1e-7)
    case.head_VD.requires_grad_(False)
    frozen = case.ours(factors=factors)
    torch.testing.assert_close(gradients(loss_of(*frozen[:2]), case.hidden_ND)[0], grad_hidden_ND, rtol=1e-6, atol=0)


def test_chunks_hold_all_slots_for_a_small_vocabulary_and_256_for_qwens():
    assert chunk_slots(152_936) == 256
    assert chunk_slots(2_536) > 8_192
    assert chunk_slots(2 * CHUNK_LOGITS) == 1


@pytest.mark.parametrize(("free_gb", "slots"), [(0, 256), (1, 256), (4, 512), (20, 2048), (80, 2048)])
def test_on_a_gpu_the_chunk_size_follows_free_memory(free_gb, slots):
    assert chunk_slots(152_936, int(free_gb * 1e9)) == slots


@pytest.mark.parametrize("first_id", [FIRST_ID, 0, VOCAB - K])
def test_terms_of_log_odds_match_the_reference(first_id):
    """Values and gradients in float64, wherever the coordinate ids lie in the vocabulary."""
    logits_NV = torch.randn(6, VOCAB, dtype=torch.float64, requires_grad=True)
    ids_N = torch.tensor([0, 3, VOCAB - 1, VOCAB // 2, 8, 900])
    odds = {
        "token_log_odds_N": token_log_odds(logits_NV, ids_N),
        "text_log_odds_N": text_log_odds(logits_NV, first_id),
    }
    for name, expected_N in textbook_text(logits_NV, ids_N, first_id).items():
        found_N = TERMS[name].function(**{key: odds[key] for key in TERMS[name].arguments})
        torch.testing.assert_close(found_N, expected_N, rtol=1e-11, atol=0)
        pair = [gradients(values_N.sum(), logits_NV, retain_graph=True)[0] for values_N in (found_N, expected_N)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-13)
    mass_N = logits_NV.softmax(-1)[:, first_id : first_id + K].sum(-1)
    torch.testing.assert_close(gate(odds["text_log_odds_N"]), -mass_N.log(), rtol=1e-11, atol=0)


def test_improbable_tokens_have_accurate_losses_and_clamped_slots_no_gradient():
    odds_N = torch.tensor([math.log(3.0), -40.0, 40.0], requires_grad=True)
    values_N = unlikelihood(odds_N)
    assert values_N.tolist() == pytest.approx([math.log(4), math.exp(-40), MAX_PENALTY], rel=1e-5)
    (gradient,) = gradients(values_N.sum(), odds_N)
    assert gradient[1] > 0
    assert gradient[2] == 0
    gate_N = TERMS["text_gate"].function(-odds_N)
    assert gate_N[2].item() == pytest.approx(MAX_PENALTY)
    assert gradients(gate_N.sum(), odds_N)[0][2] == 0
    assert F.softplus(odds_N)[2] > MAX_PENALTY


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The kernels on the CPU, run by Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("here they are compiled: see the tests that need a GPU")
    pytest.importorskip("triton", reason="no Triton: it comes with torch for CUDA, not with the CPU build")
    from coordexp.losses import head_kernels

    monkeypatch.setattr(head_kernels, "BLOCK", 256)  # several of them
    return head_kernels


def test_the_kernels_match_the_reference(kernels):
    assert kernels.hold_on(torch.device("cpu"))
    for kinds in ((N_COORD, N_TEXT, N_UNLIKELY), (8, 0, 3), (0, 0, 0)):
        assert_same(Case(n_coord=kinds[0], n_text=kinds[1], n_unlikely=kinds[2]), slots_first=True, kernels=kernels)
    case = Case()
    whole = [case.ours(slots_first=True, kernels=k, products=torch.bfloat16) for k in (None, kernels)]
    first, other = (gradients(loss_of(*w[:2]), case.hidden_ND, case.head_VD) for w in whole)
    for ours, theirs in zip(other, first, strict=True):
        assert (ours - theirs).norm() <= 2**-8 * theirs.norm()  # the interpreter cuts bf16 off instead of rounding it


def test_kernels_that_differ_from_torch_are_not_used(kernels, monkeypatch, caplog):
    right = kernels.masses
    monkeypatch.setattr(kernels, "masses", lambda *given: tuple(1.001 * m_R for m_R in right(*given)))
    assert not kernels.hold_on(torch.device("cpu"))
    assert "other numbers than torch's operations, and are not used" in caplog.text
