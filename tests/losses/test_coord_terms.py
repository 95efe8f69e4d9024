"""Coordinate terms: closed-form gradients, identities, units, extreme logits, no slots."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance

from coordexp.losses.coord_terms import (
    entropy,
    gate,
    gaussian_target,
    hard_cross_entropy,
    soft_cross_entropy,
    soft_target,
    target_entropy,
    two_bin_target,
    wasserstein1,
)
from coordexp.losses.readout import read_coordinates
from loss_reference import coord_slots, coord_sums, terms_of, text_log_odds

K = 1000
FIRST_ID = 7
VOCAB = FIRST_ID + K + 13
BINS = torch.arange(K, dtype=torch.float64)
TEMPERATURES = (1.0, 0.7, 2.0)
COORD_TERMS = terms_of("coord")


def one_hot_target(t_N, dtype=torch.float32) -> torch.Tensor:
    return F.one_hot(t_N.long(), K).to(dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(17)


def random_slice(n: int = 4) -> torch.Tensor:
    """Slice logits (n, K) with mass on all bins, float64."""
    return (2 * torch.randn(n, K, dtype=torch.float64)).requires_grad_()


def peaked_slice(centre: float, sd: float = 3.0) -> torch.Tensor:
    """Slice logits (1, K) of a Gaussian p."""
    return (-0.5 * ((BINS - centre) / sd) ** 2)[None].clone().requires_grad_()


def grad_of(values_N: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(values_N.sum(), logits)[0]


def log_p(logits_NK: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return F.log_softmax(logits_NK / temperature, dim=-1)


# --- the gradient table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_cross_entropy_gradients_are_p_minus_q(temperature):
    logits_NK, y_N = random_slice(), torch.tensor([0.0, 17.0, 500.0, 999.0], dtype=torch.float64)
    p_NK = log_p(logits_NK, temperature).exp().detach()
    one_hot_NK = one_hot_target(y_N, torch.float64)
    hard_NK = grad_of(hard_cross_entropy(log_p(logits_NK, temperature), y_N.long()), logits_NK)
    torch.testing.assert_close(hard_NK, (p_NK - one_hot_NK) / temperature, rtol=0, atol=1e-15)
    for q_NK in (gaussian_target(y_N, 2, 8, torch.float64), two_bin_target(y_N + 0.3, torch.float64)):
        soft_NK = grad_of(soft_cross_entropy(log_p(logits_NK, temperature), q_NK), logits_NK)
        torch.testing.assert_close(soft_NK, (p_NK - q_NK) / temperature, rtol=0, atol=1e-15)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_w1_gradient(temperature):
    logits_NK = random_slice()
    q_NK = gaussian_target(torch.tensor([0.0, 100.0, 500.0, 999.0]), 2, 8, torch.float64)
    p_NK = log_p(logits_NK, temperature).exp()
    sign_NK = torch.sign((p_NK - q_NK).cumsum(-1)).detach()
    sign_NK[:, -1] = 0  # the last CDF entry is no part of W1
    g_NK = sign_NK.flip(-1).cumsum(-1).flip(-1) / (K - 1)  # g_k = sum over i >= k
    p = p_NK.detach()
    expected = p * (g_NK - (p * g_NK).sum(-1, keepdim=True)) / temperature
    torch.testing.assert_close(grad_of(wasserstein1(p_NK, q_NK), logits_NK), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_w1_to_a_single_bin_is_the_expected_distance(temperature):
    logits_NK, t_N = random_slice(), torch.tensor([0, 100, 500, 999])
    distance_NK = (BINS - t_N[:, None]).abs()
    p_NK = log_p(logits_NK, temperature).exp()
    w1_N = wasserstein1(p_NK, one_hot_target(t_N.double(), torch.float64))
    p = p_NK.detach()
    expected_distance_N = (p * distance_NK).sum(-1, keepdim=True)
    torch.testing.assert_close(w1_N.detach(), expected_distance_N[:, 0] / (K - 1), rtol=1e-12, atol=0)
    expected_grad = p * (distance_NK - expected_distance_N) / (temperature * (K - 1))
    torch.testing.assert_close(grad_of(w1_N, logits_NK), expected_grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gate_gradient(temperature):
    logits_NV = torch.randn(3, VOCAB, dtype=torch.float64, requires_grad=True)
    gate_N = gate(text_log_odds(logits_NV, FIRST_ID, temperature))
    is_coord_V = torch.zeros(VOCAB, dtype=torch.bool)
    is_coord_V[FIRST_ID : FIRST_ID + K] = True
    prob_NV = (logits_NV.detach() / temperature).softmax(-1)
    mass_N1 = prob_NV[:, is_coord_V].sum(-1, keepdim=True)
    expected_NV = torch.where(is_coord_V, -prob_NV / mass_N1 * (1 - mass_N1), prob_NV) / temperature
    torch.testing.assert_close(grad_of(gate_N, logits_NV), expected_NV, rtol=0, atol=1e-15)
    torch.testing.assert_close(gate_N.detach(), -mass_N1[:, 0].log(), rtol=1e-12, atol=1e-15)


def test_entropy_gradient_and_bounds():
    logits_NK = random_slice()
    log_p_NK = log_p(logits_NK)
    entropy_N = entropy(log_p_NK)
    p, logp = log_p_NK.exp().detach(), log_p_NK.detach()
    expected_NK = -p * (logp + entropy_N.detach()[:, None])
    torch.testing.assert_close(grad_of(entropy_N, logits_NK), expected_NK, rtol=0, atol=1e-15)
    uniform = entropy(log_p(torch.zeros(1, K, dtype=torch.float64))).item()
    assert uniform == pytest.approx(torch.log(torch.tensor(1000.0)).item(), abs=1e-6)


@pytest.mark.parametrize(
    ("offset", "hard", "soft", "w1", "l1"),
    [
        (0, 0.91, 0.12, 4.6e-4, 0.0),
        (1, 0.92, 0.15, 6.0e-4, 6.5e-4),
        (5, 1.01, 0.39, 6.5e-4, 6.5e-4),
        (20, 1.05, 0.49, 6.5e-4, 6.5e-4),
        (100, 1.05, 0.49, 6.5e-4, 6.5e-4),
    ],
)
def test_published_gradient_norms(offset, hard, soft, w1, l1):
    """p Gaussian (sd 3) off by `offset` bins, q Gaussian (sigma 2, truncate 8): gradient norms by term."""
    t_N = torch.tensor([500])
    logits_NK = peaked_slice(500 + offset)
    q_NK = gaussian_target(t_N.double(), 2, 8, torch.float64)
    norms = [
        grad_of(hard_cross_entropy(log_p(logits_NK), t_N), logits_NK).norm().item(),
        grad_of(soft_cross_entropy(log_p(logits_NK), q_NK), logits_NK).norm().item(),
        grad_of(wasserstein1(log_p(logits_NK).exp(), q_NK), logits_NK).norm().item(),
    ]
    assert norms == pytest.approx([hard, soft, w1], rel=0.045)
    if offset:  # at 0 the absolute value has its kink
        l1_grad = grad_of((read_coordinates("expectation", logits_NK, 1.0, 16) - 0.5).abs(), logits_NK)
        assert l1_grad.norm().item() == pytest.approx(l1, rel=0.02)


# --- identities and units ------------------------------------------------------------------------------------------


def test_hard_ce_plus_gate_is_ordinary_cross_entropy():
    logits_NV = torch.randn(6, VOCAB, dtype=torch.float64, requires_grad=True)
    t_N = torch.tensor([0, 1, 400, 500, 998, 999])
    terms = coord_sums(coord_slots(logits_NV, t_N.double(), FIRST_ID))
    ordinary = F.cross_entropy(logits_NV, t_N + FIRST_ID, reduction="sum")
    both = terms["gate"] + terms["coord_ce"]
    torch.testing.assert_close(both, ordinary, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(both, logits_NV)[0], torch.autograd.grad(ordinary, logits_NV)[0], rtol=0, atol=1e-14
    )


def test_hard_ce_ignores_the_temperature_and_the_others_do_not():
    logits_NV, y_N = torch.randn(3, VOCAB), torch.tensor([3.0, 400.2, 999.0])
    cold, warm = (coord_sums(coord_slots(logits_NV, y_N, FIRST_ID, temperature=t)) for t in (0.5, 1.0))
    assert cold["coord_ce"].item() == pytest.approx(warm["coord_ce"].item(), rel=1e-6)
    for name in ("softce", "w1", "gate", "entropy"):
        assert cold[name].item() != pytest.approx(warm[name].item(), rel=1e-3)


def test_hard_plus_soft_is_cross_entropy_to_the_spiked_target():
    logits_NK, t_N = random_slice(1), torch.tensor([500])
    soft_q, hard_q = gaussian_target(t_N.double(), 1, 8, torch.float64), one_hot_target(t_N.double(), torch.float64)
    weight_hard, weight_soft = 0.4, 1.7
    spiked = (weight_hard * hard_q + weight_soft * soft_q) / (weight_hard + weight_soft)
    log_p_NK = log_p(logits_NK)
    separate = weight_hard * hard_cross_entropy(log_p_NK, t_N) + weight_soft * soft_cross_entropy(log_p_NK, soft_q)
    joint = (weight_hard + weight_soft) * soft_cross_entropy(log_p_NK, spiked)
    torch.testing.assert_close(separate, joint, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "triangular", "two_bin"])
def test_softce_reaches_its_lower_bound_only_at_the_target(kind):
    q_NK = soft_target(torch.tensor([500.3], dtype=torch.float64), kind, 2.0, 8, torch.float64)
    at_target = soft_cross_entropy(q_NK.clamp(min=1e-300).log(), q_NK)
    elsewhere = soft_cross_entropy(log_p(peaked_slice(501)), q_NK)
    assert at_target.item() == pytest.approx(target_entropy(q_NK).item(), rel=1e-12)
    assert elsewhere.item() > at_target.item() + 0.01


@pytest.mark.parametrize(("a", "b"), [(0, 999), (300, 340), (7, 7), (999, 998)])
def test_w1_between_single_bins_is_their_distance(a, b):
    delta_a, delta_b = one_hot_target(torch.tensor([float(a)])), one_hot_target(torch.tensor([float(b)]))
    assert wasserstein1(delta_a, delta_b).item() == pytest.approx(abs(a - b) / 999, rel=1e-6)


def test_w1_agrees_with_scipy():
    p_NK, q_NK = (torch.randn(3, K, dtype=torch.float64).mul(3).softmax(-1) for _ in range(2))
    ours = wasserstein1(p_NK, q_NK) * 999
    scipys = [wasserstein_distance(BINS, BINS, p, q) for p, q in zip(p_NK.numpy(), q_NK.numpy(), strict=True)]
    assert ours.tolist() == pytest.approx(scipys, rel=1e-9)


def test_w1_detects_two_modes_that_the_mean_does_not():
    """Modes 300 (60 %) and 340 (40 %): E = 316 has no error against 316, W1 reports 19.2 bins."""
    modes = 0.6 * gaussian_target(torch.tensor([300.0]), 2, 8) + 0.4 * gaussian_target(torch.tensor([340.0]), 2, 8)
    assert (modes.double() * BINS).sum().item() == pytest.approx(316, abs=1e-3)
    assert wasserstein1(modes, one_hot_target(torch.tensor([316.0]))).item() * 999 == pytest.approx(19.2, abs=0.01)


def test_w1_gradient_is_bounded_however_large_the_error():
    """The bound sd(p) / (K - 1) explains why a w1_weight below 10 has no effect in addition to softCE."""
    for centre in (510, 700, 990):
        logits_NK = peaked_slice(centre)
        p_NK = log_p(logits_NK).exp()
        w1_N = wasserstein1(p_NK, one_hot_target(torch.tensor([500.0]), torch.float64))
        mean = (p_NK * BINS).sum()
        sd = ((p_NK * (BINS - mean) ** 2).sum()).sqrt().item()
        assert 0 < grad_of(w1_N, logits_NK).norm().item() <= sd / 999


# --- robustness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "triangular", "two_bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(kind, dtype):
    logits_NV = torch.full((4, VOCAB), -1e4)
    logits_NV[0, FIRST_ID + 3] = 1e4  # certain of a wrong bin
    logits_NV[1, 0] = 1e4  # certain of a text token
    logits_NV[2] = 1e4
    logits_NV[3, ::2] = 1e4
    logits_NV = logits_NV.to(dtype).requires_grad_()
    y_N = torch.tensor([999.0, 0.0, 17.4, 500.0])
    terms = coord_sums(coord_slots(logits_NV, y_N, FIRST_ID, target=kind, temperature=0.7))
    torch.stack([term for term in terms.values()]).sum().backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert torch.isfinite(logits_NV.grad).all()


def test_no_slots_give_zero_sums_with_a_graph():
    logits_NV = torch.zeros(0, VOCAB, requires_grad=True)
    total = torch.stack(list(coord_sums(coord_slots(logits_NV, torch.zeros(0), FIRST_ID)).values()))
    assert not total.any()
    total.sum().backward()
    assert logits_NV.grad.shape == (0, VOCAB)


def test_bfloat16_logits_are_computed_in_float32():
    logits_NV = torch.randn(5, VOCAB).bfloat16()
    y_N = torch.tensor([0.0, 3.7, 500.0, 700.5, 999.0])
    low = coord_sums(coord_slots(logits_NV, y_N, FIRST_ID, temperature=0.9))
    same = coord_sums(coord_slots(logits_NV.double(), y_N.double(), FIRST_ID, temperature=0.9))
    for name in COORD_TERMS:
        assert low[name].dtype == torch.float32
        assert low[name].item() == pytest.approx(same[name].item(), rel=1e-5)


def test_gradient_of_all_terms_against_finite_differences():
    y_N = torch.tensor([3.0, 500.4], dtype=torch.float64)
    logits_NV = torch.randn(2, VOCAB, dtype=torch.float64, requires_grad=True)

    def total(logits):
        terms = coord_sums(coord_slots(logits, y_N, FIRST_ID, temperature=0.8))
        return torch.stack([term for term in terms.values()]).sum()

    direction = torch.randn_like(logits_NV)
    step = 1e-5
    numeric = (total(logits_NV + step * direction) - total(logits_NV - step * direction)).item() / (2 * step)
    assert (grad_of(total(logits_NV), logits_NV) * direction).sum().item() == pytest.approx(numeric, rel=1e-6)
