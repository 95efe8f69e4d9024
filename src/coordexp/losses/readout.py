"""Readout rules: one value from a distribution over the 1000 bins, for box losses, soft context and decoding.

    argmax             value of the center bin: quantized, no gradient
    expectation        sum_k p_k v_k: differentiable; falls between the modes of a bimodal p
    straight_through   argmax forward, expectation backward (Bengio et al. 2013, arXiv:1308.3432)
    local_expectation  expectation in a window around the center bin: sub-bin resolution within one mode
    top_k              expectation over the k most probable bins
    median             where the CDF crosses 1/2: minimizes the expected absolute error

The caller supplies the value of each bin: bin k stands for the coordinate k / 1000 in a box loss, for position k in
decoding, and for its embedding in soft context. The center bin is the most probable one; in decoding, the emitted one.

K bins; `...` any leading shape (slots, or boxes x 4); D numbers per value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coordexp.config.schema import ReadoutRule
from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.terms import at_least_float32

LOCAL_RADIUS_BINS = 8


def read_coordinates(rule: ReadoutRule, logits_K: Tensor, temperature: float, top_k: int) -> Tensor:
    """(..., K) logits -> (...) coordinates in [0, 1), computed in float32 (float64 stays float64).

    The gradient of the expectation with respect to logit k is p_k (k / 1000 - value) / temperature.
    """
    assert temperature > 0, f"temperature {temperature}: expected > 0"
    probs_K = (at_least_float32(logits_K) / temperature).softmax(-1)
    phi_K = torch.arange(NUM_BINS, dtype=probs_K.dtype, device=probs_K.device) / NUM_BINS
    return read(rule, probs_K, phi_K, top_k)


def read(
    rule: ReadoutRule, probs_K: Tensor, values: Tensor, top_k: int | None = None, center_bins: Tensor | None = None
) -> Tensor:
    """(..., K) distributions -> (...) for values of shape (K,), (..., D) for values of shape (K, D).

    Args:
        rule: one of the rules in the module docstring.
        probs_K: sums to 1 over K.
        values: the value of each bin.
        top_k: number of bins that the rule `top_k` keeps; the other rules ignore it.
        center_bins: (...) integers; by default the most probable bins, the lowest one on a tie.
    """
    if rule == "expectation":
        return _mean(probs_K, values)
    if rule == "median":
        return _median(probs_K, values)
    if rule == "top_k":
        assert top_k is not None
        kept = probs_K.topk(top_k, dim=-1)
        return _mean(_normalised(torch.zeros_like(probs_K).scatter(-1, kept.indices, kept.values)), values)
    center = probs_K.argmax(-1) if center_bins is None else center_bins
    if rule == "local_expectation":
        return _mean(_window(probs_K, center), values)
    if rule == "straight_through":
        soft = _mean(probs_K, values)
        return values[center].detach() + (soft - soft.detach())
    assert rule == "argmax", rule
    return values[center]


def _mean(probs_K: Tensor, values: Tensor) -> Tensor:
    return (probs_K * values).sum(-1) if values.dim() == 1 else probs_K @ values


def _normalised(mass_K: Tensor) -> Tensor:
    return mass_K / mass_K.sum(-1, keepdim=True)


def _window(probs_K: Tensor, center: Tensor) -> Tensor:
    """The distribution renormalized to within LOCAL_RADIUS_BINS of the center m; a point mass at m if that is empty.

    At the borders the window shrinks to the largest one that is symmetric around m. Otherwise a distribution that the
    border cuts off would be read inward of its peak.
    """
    last = probs_K.shape[-1] - 1
    bins_K, m = torch.arange(last + 1, device=probs_K.device), center[..., None]
    radius = torch.minimum(m, last - m).clamp(max=LOCAL_RADIUS_BINS)
    kept_K = probs_K.masked_fill((bins_K - m).abs() > radius, 0.0)
    is_empty = kept_K.sum(-1, keepdim=True) == 0
    return _normalised(torch.where(is_empty, (bins_K == m).to(kept_K), kept_K))


def _median(probs_K: Tensor, values: Tensor) -> Tensor:
    """Where the CDF crosses 1/2, with the mass of bin k uniform over [k - 1/2, k + 1/2].

    The position between two bins interpolates their values.
    """
    # Half of the last entry, not 0.5: a float32 cumulative sum need not end at exactly 1.
    cdf_K = probs_K.cumsum(-1)
    half = cdf_K[..., -1:] / 2
    crossing = (cdf_K < half).sum(-1, keepdim=True)
    mass = probs_K.gather(-1, crossing)
    before = cdf_K.gather(-1, crossing) - mass
    last = probs_K.shape[-1] - 1
    position = (crossing - 0.5 + ((half - before) / mass).clamp(0, 1)).clamp(0, last).squeeze(-1)
    low = position.detach().floor().long()
    part = position - low
    part = part if values.dim() == 1 else part[..., None]
    return torch.lerp(values[low], values[(low + 1).clamp(max=last)], part)
