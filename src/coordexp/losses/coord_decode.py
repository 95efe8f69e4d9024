"""From the 1000 coordinate logits of a slot to a coordinate in [0, 1]: phi(k) = k / 1000.

    expectation        sum p phi           differentiable; lies between the modes of a two-peaked p
    argmax             phi(argmax p)       quantised, no gradient; what greedy decoding emits
    straight_through   argmax forward, expectation backward
    local_expectation  expectation in a window round the argmax: sub-bin and mode-safe
    top_k_expectation  expectation over the k likeliest bins
    median             first bin where the CDF reaches 1/2, no gradient; minimises the expected absolute error

K bins; `...` any leading shape (slots, or boxes x 4). Float32 inside (float64 stays float64).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from coordexp.geometry.bins import MAX_BIN, NUM_BINS
from coordexp.losses.terms import at_least_float32

LOCAL_RADIUS_BINS = 8
TOP_K_BINS = 16


def expectation(logits_K: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., K) -> (...): sum_k p_k k / 1000. Its gradient on s_k is p_k (phi(k) - value) / temperature."""
    return _mean_coordinate(_scaled(logits_K, temperature))


def argmax(logits_K: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., K) -> (...): the likeliest bin (the lowest one of a tie); does not depend on the temperature."""
    logits_K = at_least_float32(logits_K)
    return logits_K.argmax(-1).to(logits_K) / NUM_BINS


def straight_through(logits_K: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., K) -> (...): argmax forward, gradient of the expectation backward (Bengio et al. 2013, arXiv:1308.3432)."""
    soft = expectation(logits_K, temperature)
    return argmax(logits_K) + (soft - soft.detach())


def local_expectation(logits_K: Tensor, temperature: float = 1.0, radius_bins: int = LOCAL_RADIUS_BINS) -> Tensor:
    """(..., K) -> (...): expectation within `radius_bins` of the argmax m.

    At the borders the window shrinks to the largest one symmetric round m, else a target cut off at the border would
    decode inward of its peak.
    """
    logits_K = _scaled(logits_K, temperature)
    bins_K = torch.arange(NUM_BINS, device=logits_K.device)
    mode = logits_K.argmax(-1, keepdim=True)
    radius = torch.minimum(mode, MAX_BIN - mode).clamp(max=radius_bins)
    return _mean_coordinate(logits_K.masked_fill((bins_K - mode).abs() > radius, -torch.inf))


def top_k_expectation(logits_K: Tensor, temperature: float = 1.0, keep_bins: int = TOP_K_BINS) -> Tensor:
    """(..., K) -> (...): expectation over the `keep_bins` likeliest bins, renormalised."""
    kept = _scaled(logits_K, temperature).topk(keep_bins, dim=-1)
    return (kept.values.softmax(-1) * (kept.indices.to(kept.values) / NUM_BINS)).sum(-1)


def median(logits_K: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., K) -> (...): the first bin k whose CDF is at least 1/2."""
    cdf_K = _scaled(logits_K, temperature).softmax(-1).cumsum(-1)
    below = (cdf_K < 0.5).sum(-1).clamp(max=MAX_BIN)
    return below.to(cdf_K) / NUM_BINS


# The rules by the names that parameters use; each takes (logits_K, temperature).
DECODE_RULES: MappingProxyType[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "exp": expectation,
        "st": straight_through,
        "hard": argmax,
        "local": local_expectation,
        "top_k": top_k_expectation,
        "median": median,
    }
)


def _scaled(logits_K: Tensor, temperature: float) -> Tensor:
    assert temperature > 0, f"temperature {temperature}: expected > 0"
    return at_least_float32(logits_K) / temperature


def _mean_coordinate(scaled_logits_K: Tensor) -> Tensor:
    phi_K = torch.arange(NUM_BINS, dtype=scaled_logits_K.dtype, device=scaled_logits_K.device) / NUM_BINS
    return (scaled_logits_K.softmax(-1) * phi_K).sum(-1)
