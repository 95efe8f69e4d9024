"""Two Triton kernels that reduce a chunk of logits in the fused head (losses/vocabulary_terms.py).

They need a fraction of the memory traffic of the equivalent torch operations, which remain the reference. The first
kernel reads the logits once and computes the probability masses of each slot. The second reads them again and writes
the gradient in the dtype of the matrix product that follows. A device on which the kernels do not reproduce the
reference uses the torch operations.

R slots, V vocabulary, K coordinate ids; logits are float32 with the slot dimension first.
"""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

log = logging.getLogger(__name__)

BLOCK = 4096  # ids that one program holds at a time
_NOTHING = tl.constexpr(float("-inf"))  # log of zero mass


@triton.jit
def _mass_kernel(
    logits: tl.tensor,
    ids: tl.tensor,
    text: tl.tensor,
    coord: tl.tensor,
    token: tl.tensor,
    n_ids: tl.constexpr,
    first: tl.constexpr,
    end: tl.constexpr,
    size: tl.constexpr,
) -> None:
    """For one slot: log mass on the text ids and on the coordinate ids, both without its own token, and its logit."""
    # Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3): a running maximum rescales the sum,
    # so the logits are read once. int64, because slots * vocabulary may exceed 2^31.
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(ids + row)
    top, mass = _NOTHING, 0.0
    for start in range(0, n_ids, size):
        at = start + tl.arange(0, size)
        is_text = (at < n_ids) & (at != own) & ((at < first) | (at >= end))
        found = tl.load(logits + row * n_ids + at, mask=is_text, other=_NOTHING)
        higher = tl.maximum(top, tl.max(found, 0))
        shift = tl.where(higher == _NOTHING, 0.0, higher)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(found - shift), 0)
        top = higher
    tl.store(text + row, tl.where(top == _NOTHING, top, top + tl.log(mass)))
    top, mass = _NOTHING, 0.0
    for start in range(first, end, size):
        at = start + tl.arange(0, size)
        found = tl.load(logits + row * n_ids + at, mask=(at < end) & (at != own), other=_NOTHING)
        higher = tl.maximum(top, tl.max(found, 0))
        shift = tl.where(higher == _NOTHING, 0.0, higher)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(found - shift), 0)
        top = higher
    tl.store(coord + row, tl.where(top == _NOTHING, top, top + tl.log(mass)))
    tl.store(token + row, tl.load(logits + row * n_ids + own))


@triton.jit
def _gradient_kernel(
    logits: tl.tensor,
    ids: tl.tensor,
    text: tl.tensor,
    coord: tl.tensor,
    by_text: tl.tensor,
    by_coord: tl.tensor,
    by_token: tl.tensor,
    out: tl.tensor,
    n_ids: tl.constexpr,
    first: tl.constexpr,
    end: tl.constexpr,
    size: tl.constexpr,
) -> None:
    """For one slot and a block of ids: the derivative with respect to its mass times the id's fraction of that mass."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * size + tl.arange(0, size)
    found = tl.load(logits + row * n_ids + at, mask=at < n_ids, other=_NOTHING)
    is_coord = (at >= first) & (at < end)
    mass = tl.where(is_coord, tl.load(coord + row), tl.load(text + row))
    by = tl.where(is_coord, tl.load(by_coord + row), tl.load(by_text + row))
    gradient = tl.where(at == tl.load(ids + row), tl.load(by_token + row), by * tl.exp(found - mass))
    tl.store(out + row * n_ids + at, gradient.to(out.dtype.element_ty), mask=at < n_ids)


def masses(logits_RV: Tensor, ids_R: Tensor, span: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(R,) log mass on text ids, the same on coordinate ids, both without the slot's token, and the token's logit."""
    n_slots, n_ids = logits_RV.shape
    text_R, coord_R, token_R = (logits_RV.new_empty(n_slots) for _ in range(3))
    _mass_kernel[(n_slots,)](logits_RV, ids_R, text_R, coord_R, token_R, n_ids, span.start, span.stop, size=BLOCK)
    return text_R, coord_R, token_R


def gradient(
    logits_RV: Tensor,
    ids_R: Tensor,
    span: slice,
    text_R: Tensor,
    coord_R: Tensor,
    derivatives: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> Tensor:
    """(R, V) gradient of the logits, from the derivatives with respect to text mass, coordinate mass and token."""
    n_slots, n_ids = logits_RV.shape
    out_RV = torch.empty(logits_RV.shape, dtype=dtype, device=logits_RV.device)
    by = [x_R.contiguous() for x_R in derivatives]
    _gradient_kernel[(n_slots, triton.cdiv(n_ids, BLOCK))](
        logits_RV, ids_R, text_R, coord_R, *by, out_RV, n_ids, span.start, span.stop, size=BLOCK
    )
    return out_RV


def hold_on(device: torch.device) -> bool:
    """Whether the kernels compile on a device and reproduce torch's results for a few random slots; logged."""
    generator, span = torch.Generator().manual_seed(0), slice(6000, 7000)
    logits_RV = torch.randn(4, 9000, generator=generator).mul(5).to(device)
    ids_R = torch.tensor([3, 6500, 8999, 6000], device=device)
    by = torch.randn(3, 4, generator=generator).to(device)
    try:
        text_R, coord_R, token_R = masses(logits_RV, ids_R, span)
        found_RV = gradient(logits_RV, ids_R, span, text_R, coord_R, tuple(by), torch.float32)
    except (RuntimeError, triton.TritonError) as error:  # of compiler or driver
        log.warning("head: the Triton kernels do not run on %s (%s); using torch operations instead", device, error)
        return False
    others_RV = logits_RV.scatter(1, ids_R[:, None], -torch.inf)
    coords_RK = others_RV[:, span].clone()
    others_RV[:, span] = -torch.inf
    expected_RV = others_RV.softmax(1) * by[0][:, None]
    expected_RV[:, span] = coords_RK.softmax(1) * by[1][:, None]
    expected_RV.scatter_(1, ids_R[:, None], by[2][:, None])
    wanted = [others_RV.logsumexp(1), coords_RK.logsumexp(1), logits_RV.gather(1, ids_R[:, None])[:, 0], expected_RV]
    pairs = zip((text_R, coord_R, token_R, found_RV), wanted, strict=True)
    holds = all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) for ours, theirs in pairs)
    if holds:
        log.info("head: the Triton kernels match torch on %s and are used", device)
    else:
        log.warning("head: the Triton kernels differ from torch on %s; using torch operations instead", device)
    return holds
