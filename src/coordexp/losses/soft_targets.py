"""Target distributions q over the K = 1000 bins, from unrounded target bins y in [0, 999].

Four families; sigma and truncate are in bins. Array ends cut the kernel and the rest is renormalised: no reflection, no
wrap, so near a border the mean of a broad target lies inward of the target (1.3 bins at bin 0 for sigma 2).

N slots, K bins, W bins of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.geometry.bins import MAX_BIN, NUM_BINS

TargetKind = Literal["gaussian", "triangular", "two_bin", "one_hot"]


@dataclass(frozen=True, slots=True)
class SoftTarget:
    """Settings of the target family.

    sigma: standard deviation of the Gaussian in bins, > 0. truncate: largest distance in bins that still has mass, >= 0
    (Gaussian and triangular). Raises ConfigError out of range.
    """

    kind: TargetKind = "gaussian"
    sigma: float = 2.0
    truncate: int = 8

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise ConfigError(f"sigma: found {self.sigma}, expected > 0 bins. For a one-bin target set truncate to 0.")
        if self.truncate < 0:
            raise ConfigError(f"truncate: found {self.truncate}, expected >= 0 bins.")

    def distribution(self, target_bins_N: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) target distributions for unrounded target bins (N,); rows sum to 1."""
        match self.kind:
            case "gaussian":
                return gaussian_target(target_bins_N, self.sigma, self.truncate, dtype)
            case "triangular":
                return triangular_target(target_bins_N, self.truncate, dtype)
            case "two_bin":
                return two_bin_target(target_bins_N, dtype)
            case "one_hot":
                return one_hot_target(target_bins_N, dtype)
            case _:
                assert_never(self.kind)


def rounded_bins(target_bins_N: Tensor) -> Tensor:
    """(N,) int64 target bins t: the nearest bin, clamped to 0..999. The bin that the hard label and the text name."""
    return target_bins_N.round().clamp(0, MAX_BIN).long()


def gaussian_target(target_bins_N: Tensor, sigma: float, truncate: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """q(k) ~ exp(-((k - t) / sigma)^2 / 2) for |k - t| <= truncate, centred on the rounded bin t."""
    return _windowed(target_bins_N, truncate, lambda distance: torch.exp(-0.5 * (distance / sigma) ** 2), dtype)


def triangular_target(target_bins_N: Tensor, truncate: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """q(k) ~ truncate + 1 - |k - t|, so that `truncate` is the last distance with mass, as for the Gaussian."""
    return _windowed(target_bins_N, truncate, lambda distance: truncate + 1 - distance, dtype)


def two_bin_target(target_bins_N: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mass 1 - f on floor(y) and f on the next bin: mean(q) == y exactly, also between bins.

    Distribution focal loss (Li et al. 2020, arXiv:2006.04388, eq. 6). y = 999 is bin 998 with f = 1.
    """
    y_N = target_bins_N.to(dtype).clamp(0, MAX_BIN)
    lower_N = y_N.floor().clamp(max=MAX_BIN - 1)
    fraction_N = y_N - lower_N
    pair_N2 = torch.stack([1 - fraction_N, fraction_N], dim=-1)
    return _scattered(torch.stack([lower_N, lower_N + 1], dim=-1).long(), pair_N2)


def one_hot_target(target_bins_N: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """All mass on the rounded bin."""
    return F.one_hot(rounded_bins(target_bins_N), NUM_BINS).to(dtype)


def target_entropy(target_NK: Tensor) -> Tensor:
    """(N,) entropy H(q) in nats: the floor of softCE. KL(q || p) = softCE - H(q) is what can reach 0."""
    return -torch.xlogy(target_NK, target_NK).sum(-1)


def _windowed(target_bins_N: Tensor, truncate: int, kernel: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """(N, K) kernel(|k - t|) for |k - t| <= truncate, renormalised.

    Only a window of W bins round t is computed and then scattered: ten times faster than evaluating all K.
    """
    width = min(2 * truncate + 1, NUM_BINS)
    t_N1 = rounded_bins(target_bins_N)[:, None]
    # Near a border the window shifts inward, so that its bins are distinct and exist.
    first_N1 = (t_N1 - truncate).clamp(0, NUM_BINS - width)
    bins_NW = first_N1 + torch.arange(width, device=t_N1.device)
    distance_NW = (bins_NW - t_N1).abs()
    mass_NW = kernel(distance_NW.to(dtype)).masked_fill(distance_NW > truncate, 0)
    mass_NW = mass_NW / mass_NW.sum(-1, keepdim=True)
    return _scattered(bins_NW, mass_NW)


def _scattered(bins_NW: Tensor, mass_NW: Tensor) -> Tensor:
    """(N, K) zeros with mass_NW at bins_NW; the bins of a row are distinct."""
    return mass_NW.new_zeros(len(mass_NW), NUM_BINS).scatter(-1, bins_NW, mass_NW)
