"""Terms over the whole vocabulary, computed from hidden states and the head without storing all logits.

One pass sends the slots through the head, one chunk at a time, and computes both the sums of the terms and the
gradients of hidden states and head; at most one chunk of logits exists at any time. The idea is that of cut
cross-entropy (Wijmans et al. 2024, arXiv:2411.09009) and Liger's fused linear cross-entropy (Hsu et al. 2024,
arXiv:2410.10989), extended to several terms. For each slot the pass reduces the logits to three numbers: the log mass
on the text ids, the log mass on the coordinate ids, and the logit of the slot's own token, which counts in neither
mass. The terms are functions of these three, and their derivatives turn the chunk's logits, in place, into its
gradient.

The pass computes gradients for the factor that each sum is expected to have in the loss (weight / count, known in
advance). A backward pass that asks for these factors, or a common multiple of them, receives these gradients. Any other
request (the gradient of one term alone, a second backward pass) runs the pass again.

On a CPU the logits are stored with the vocabulary dimension first: the matrix library repacks the head for every chunk,
which is a third faster if the head is the left factor. On a GPU the logits of a slot are contiguous, the products use
bfloat16 factors, and chunks are as large as memory allows, because each chunk reads the head twice and reads and writes
its gradient.

N slots, R slots of a chunk, V vocabulary, D hidden size, K coordinate ids, M slots whose coordinate logits are
returned, S terms. Logits and sums are float32 (float64 stays float64), whatever the dtype of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.terms import TERMS, sum_slots, term

# With Qwen3-VL's vocabulary, 256 slots at a time (157 MB): 3 % of the logits of 8,192 tokens, yet enough to make one
# addition to the head's gradient per chunk cheap. With a small vocabulary, all slots at once.
CHUNK_LOGITS = 256 * 152_936
# The maximum on a GPU: larger chunks are no faster. A chunk takes at most 1 / _FREE_PART of the free memory.
GPU_CHUNK_SLOTS = 2048
_FREE_PART = 8
LOGIT_BYTES = 4 + 2  # float32, plus the bfloat16 factor of the gradient products
# Text gate and unlikelihood are capped at the penalty for a remaining mass of 1e-6, so that a single extreme slot
# cannot dominate a batch.
MAX_PENALTY = -math.log(1e-6)


@term("text_ce", "text")
def cross_entropy(token_log_odds_N: Tensor) -> Tensor:
    """(N,) -log P of the slot's token, from its log-odds log(P / (1 - P)), which are accurate near P = 0 and 1."""
    return -F.logsigmoid(token_log_odds_N)


@term("text_gate", "inner_text")
def text_gate(text_log_odds_N: Tensor) -> Tensor:
    """(N,) -log clamp(1 - m, 1e-6, 1) with m = P(coordinate ids); no gradient where clamped."""
    return (-F.logsigmoid(text_log_odds_N)).clamp(max=MAX_PENALTY)


@term("reordered_ce", "reordered")
def reordered_cross_entropy(token_log_odds_N: Tensor) -> Tensor:
    """(N,) -log P of a coordinate token over the whole vocabulary: ordinary cross-entropy without a soft target."""
    return cross_entropy(token_log_odds_N)


@term("duplicate_unlikelihood", "unlikely")
def unlikelihood(token_log_odds_N: Tensor) -> Tensor:
    """(N,) -log max(1 - P, 1e-6) for the unwanted token (Welleck et al. 2020, arXiv:1908.04319, eq. 1).

    It makes that token less probable without naming a replacement; no gradient where clamped.
    """
    return F.softplus(token_log_odds_N).clamp(max=MAX_PENALTY)


def chunk_slots(vocab_size: int, free_bytes: int | None = None) -> int:
    """Number of slots per chunk, for a GPU with `free_bytes` of free memory, or for a CPU if that is None."""
    on_cpu = max(1, CHUNK_LOGITS // vocab_size)
    if free_bytes is None:
        return on_cpu
    fitting = free_bytes // (_FREE_PART * LOGIT_BYTES * vocab_size)
    # A power of two, so that the order of summation does not depend on every byte of free memory.
    return min(GPU_CHUNK_SLOTS, max(min(on_cpu, GPU_CHUNK_SLOTS // 8), 1 << max(0, fitting.bit_length() - 1)))


@cache
def _kernels(gpu: torch.device) -> ModuleType | None:
    """The Triton kernels, if Triton (part of torch for CUDA) is installed and they match torch on this GPU."""
    if find_spec("triton") is None:
        return None
    from coordexp.losses import head_kernels

    return head_kernels if head_kernels.hold_on(gpu) else None


def _free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, including the unused part of torch's pool; None for a CPU."""
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSlots:
    """N slots whose terms need the whole vocabulary.

    token_ids_N: the token to predict or to make less probable; any id where no term uses it.
    weights: term name -> (N,) weight >= 0 of each slot; a term without an entry is not computed.
    n_coord: the pass also returns the K coordinate logits of this many leading slots.
    """

    token_ids_N: Tensor
    weights: Mapping[str, Tensor]
    first_coord_id: int
    n_coord: int

    @property
    def span(self) -> slice:
        """The coordinate ids."""
        return slice(self.first_coord_id, self.first_coord_id + NUM_BINS)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadProducts:
    """How to multiply by the head: dtype of the factors, layout of the logits, and slots per chunk."""

    factors: torch.dtype
    slots_first: bool
    chunk: int
    kernels: ModuleType | None = None  # losses/head_kernels.py where it is usable

    @classmethod
    def on(cls, weight_VD: Tensor, factors: torch.dtype | None = None) -> HeadProducts:
        """The best choice for the device of the head; factors are float32 (float64 for a float64 head) by default."""
        return cls(
            factors=factors or torch.promote_types(weight_VD.dtype, torch.float32),
            slots_first=weight_VD.is_cuda,
            chunk=chunk_slots(len(weight_VD), _free_bytes(weight_VD.device)),
            kernels=_kernels(weight_VD.device) if weight_VD.is_cuda else None,
        )


class HeadSweep:
    """One pass over N slots; the results are attributes.

    `trained` is the head (V, D), or only its coordinate rows (K, D) if the rest of `whole_VD` is frozen.
    """

    def __init__(
        self, hidden_ND: Tensor, trained: Tensor, whole_VD: Tensor | None, slots: HeadSlots, how: HeadProducts
    ) -> None:
        weight_VD = trained if whole_VD is None else whole_VD
        dtype = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
        self._hidden_ND = hidden_ND.to(how.factors)
        self._weight_VD = weight_VD.to(how.factors)
        self._slots = slots
        self._slots_first = how.slots_first
        self._kernels: Any = how.kernels if dtype == torch.float32 else None
        self._trained_rows = slice(None) if whole_VD is None else slots.span
        size = min(how.chunk, len(hidden_ND))
        self._logits = hidden_ND.new_empty(len(weight_VD) * size, dtype=dtype)  # the only logits; reused by all chunks
        self._chunk = size
        self._factors_S: Tensor | None = None
        self.sums_S = self._logits.new_zeros(len(slots.weights))
        self.coord_MK = self._logits.new_empty(slots.n_coord, NUM_BINS)
        self.text_log_odds_N = self._logits.new_empty(len(hidden_ND))
        self.grad_hidden_ND: Tensor | None = None
        self.grad_trained: Tensor | None = None  # (V, D), or (K, D) for the coordinate rows alone

    def run(self, factors_S: Tensor | None, of_hidden: bool, of_trained: bool) -> None:
        """Process all slots; with factors, also compute the gradients of sum(factors * sums)."""
        self._factors_S = factors_S
        if factors_S is not None:
            new = self._logits.new_empty if len(self._hidden_ND) else self._logits.new_zeros
            self.grad_hidden_ND = new(self._hidden_ND.shape) if of_hidden else None
            self.grad_trained = new(self._weight_VD[self._trained_rows].shape) if of_trained else None
        for start in range(0, len(self._hidden_ND), max(1, self._chunk)):
            rows = slice(start, min(start + self._chunk, len(self._hidden_ND)))
            n_rows = rows.stop - start
            room, hidden_RD = self._logits[: len(self._weight_VD) * n_rows], self._hidden_ND[rows]
            if self._slots_first:
                logits_VR = room.view(n_rows, -1).t()
                _multiply(hidden_RD, self._weight_VD.t(), logits_VR.t())
            else:
                logits_VR = room.view(-1, n_rows)
                _multiply(self._weight_VD, hidden_RD.t(), logits_VR)
            inside = self.coord_MK[rows]
            inside.copy_(logits_VR[self._slots.span, : len(inside)].t())
            grad_VR = self._reduce_by_kernels(logits_VR, rows) if self._kernels else self._reduce(logits_VR, rows)
            if factors_S is not None:
                self._add_gradients(grad_VR, rows)

    def _reduce_by_kernels(self, logits_VR: Tensor, rows: slice) -> Tensor:
        """Like `_reduce`, which is the reference; the gradient has the dtype of the factors."""
        span, ids_R, logits_RV = self._slots.span, self._slots.token_ids_N[rows], logits_VR.t()
        text_R, coord_R, token_R = self._kernels.masses(logits_RV, ids_R, span)
        is_coord_R = (ids_R >= span.start) & (ids_R < span.stop)
        derivatives = self._slot_terms(text_R, coord_R, token_R, is_coord_R, rows)
        if self._factors_S is None:
            return logits_VR
        dtype = self._hidden_ND.dtype
        return self._kernels.gradient(logits_RV, ids_R, span, text_R, coord_R, derivatives, dtype).t()

    def _reduce(self, logits_VR: Tensor, rows: slice) -> Tensor:
        """Add up the terms of a chunk and overwrite its logits with the gradient of the weighted sum."""
        span, token_1R = self._slots.span, self._slots.token_ids_N[None, rows]
        token_R = logits_VR.gather(0, token_1R)[0]
        # Without the slot's own token, both masses stay accurate when its probability approaches 1.
        logits_VR.scatter_(0, token_1R, -torch.inf)
        coord_KR = logits_VR[span].clone()
        logits_VR[span] = -torch.inf
        highest_R = logits_VR.amax(0)
        mass_R = logits_VR.sub_(highest_R).exp_().sum(0)
        text_R = highest_R + mass_R.log()
        is_coord_R = (token_1R[0] >= span.start) & (token_1R[0] < span.stop)
        coord_R = coord_KR.logsumexp(0)
        by_text_R, by_coord_R, by_token_R = self._slot_terms(text_R, coord_R, token_R, is_coord_R, rows)
        if self._factors_S is not None:
            # d logsumexp / d logit is softmax: each id gets the derivative of its mass times its fraction of the mass.
            logits_VR.mul_(by_text_R / mass_R)
            logits_VR[span] = coord_KR.sub_(coord_R).exp_().mul_(by_coord_R)
            logits_VR.scatter_(0, token_1R, by_token_R[None])
        return logits_VR

    def _slot_terms(
        self, text_R: Tensor, coord_R: Tensor, token_R: Tensor, is_coord_R: Tensor, rows: slice
    ) -> tuple[Tensor, ...]:
        """Add up the terms from the three numbers of each slot; returns the derivatives of the weighted sum by them."""
        factors_S, weights = self._factors_S, self._slots.weights
        with torch.set_grad_enabled(factors_S is not None):
            masses = [m_R.detach().requires_grad_() for m_R in (text_R, coord_R, token_R)]
            odds = _log_odds(masses[0], masses[1], masses[2], is_coord_R)
            sums = [sum_slots(TERMS[name].values(odds), weights_N[rows]) for name, weights_N in weights.items()]
            self.text_log_odds_N[rows] = odds.text_log_odds_N.detach()
            if not sums:
                return tuple(torch.zeros_like(m_R) for m_R in masses)
            sums_S = torch.stack(sums)
            self.sums_S += sums_S.detach()
            if factors_S is None:  # the caller ignores the derivatives
                return tuple(masses)
            loss = sums_S @ factors_S.to(sums_S)
            return torch.autograd.grad(loss, masses, allow_unused=True, materialize_grads=True)

    def _add_gradients(self, grad_VR: Tensor, rows: slice) -> None:
        hidden_RD = self._hidden_ND[rows]
        grad_VR = grad_VR.to(hidden_RD.dtype)
        if self.grad_hidden_ND is not None:
            _multiply(grad_VR.t(), self._weight_VD, self.grad_hidden_ND[rows])
        if self.grad_trained is not None:
            _multiply(grad_VR[self._trained_rows], hidden_RD, self.grad_trained, add=rows.start > 0)


def _log_odds(text_N: Tensor, coord_N: Tensor, token_N: Tensor, is_coord_N: Tensor) -> SimpleNamespace:
    """The inputs of the terms: log(P / (1 - P)) of a slot's token, and log((1 - m) / m).

    Both given masses exclude the token. The odds of the token against all other ids are therefore accurate where its
    probability is near 0 or 1.
    """
    all_text_N = torch.where(is_coord_N, text_N, torch.logaddexp(text_N, token_N))
    all_coord_N = torch.where(is_coord_N, torch.logaddexp(coord_N, token_N), coord_N)
    token_log_odds_N = token_N - torch.logaddexp(text_N, coord_N)
    return SimpleNamespace(token_log_odds_N=token_log_odds_N, text_log_odds_N=all_text_N - all_coord_N)


def _multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """out = left @ right, or out += left @ right; accumulated in the dtype of `out`."""
    if not left.is_cuda:  # only CUDA multiplies bfloat16 factors into a float32 result
        left, right = left.to(out.dtype), right.to(out.dtype)
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def vocabulary_sums(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    slots: HeadSlots,
    expected: Mapping[str, float] | None,
    coord_rows_KD: Tensor | None = None,
    how: HeadProducts | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sums of the terms by name, coordinate logits (M, K), and log((1 - m) / m) of all N slots, detached.

    The logits are hidden_ND @ weight_VD.T; for a temperature, divide the hidden states by it.

    Args:
        hidden_ND: hidden states at the slots (N may be 0).
        weight_VD: weight of the head, which has no bias.
        slots: what to compute at each slot.
        expected: factor of each sum in the loss, by name; None without gradient, or if the factors are not known yet.
        coord_rows_KD: the coordinate rows of `weight_VD`, if only these are trained: they receive the gradient.
        how: how to multiply; by default `HeadProducts.on` the device, with the dtype of the head on a GPU.
    """
    vocab_size = len(weight_VD)
    assert slots.first_coord_id >= 0, f"first coordinate id {slots.first_coord_id}: expected >= 0"
    assert vocab_size >= slots.span.stop, f"coordinate ids {slots.span} exceed {vocab_size} logits"
    assert vocab_size > NUM_BINS + 1, "no text id other than a slot's own token is left"
    factors_S = None
    if expected is not None and torch.is_grad_enabled():
        factors_S = torch.tensor([float(expected[name]) for name in slots.weights], dtype=torch.float64)
    whole, trained = (None, weight_VD) if coord_rows_KD is None else (weight_VD.detach(), coord_rows_KD)
    how = how or HeadProducts.on(weight_VD, weight_VD.dtype if weight_VD.is_cuda else None)
    sums_S, coord_MK, odds_N = _FusedLinear.apply(hidden_ND, trained, whole, slots, factors_S, how)
    return dict(zip(slots.weights, sums_S.unbind(), strict=True)), coord_MK, odds_N


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        trained: Tensor,
        whole_VD: Tensor | None,
        slots: HeadSlots,
        factors_S: Tensor | None,
        how: HeadProducts,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sweep = HeadSweep(hidden_ND, trained, whole_VD, slots, how)
        sweep.run(factors_S, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(hidden_ND, trained, whole_VD)
        ctx.slots, ctx.how, ctx.factors_S = slots, how, factors_S
        ctx.gradients = None if factors_S is None else (sweep.grad_hidden_ND, sweep.grad_trained)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sweep.text_log_odds_N)
        return sweep.sums_S, sweep.coord_MK, sweep.text_log_odds_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor | None, grad_MK: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        hidden_ND, trained, whole_VD = ctx.saved_tensors
        grad_hidden_ND, grad_trained = _gradients(ctx, grad_S)
        if grad_MK is not None:
            n_coord, rows = ctx.slots.n_coord, ctx.slots.span if whole_VD is None else slice(None)
            if grad_hidden_ND is not None:
                grad_hidden_ND[:n_coord].addmm_(grad_MK, trained[rows].to(grad_MK))
            if grad_trained is not None:
                grad_trained[rows].addmm_(grad_MK.t(), hidden_ND[:n_coord].to(grad_MK))
        return (
            None if grad_hidden_ND is None else grad_hidden_ND.to(hidden_ND.dtype),
            None if grad_trained is None else grad_trained.to(trained.dtype),
            *(None,) * 4,
        )


def _gradients(ctx: Any, grad_S: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the sums: those of the forward pass if it expected these factors, otherwise from another pass."""
    hidden_ND, trained, whole_VD = ctx.saved_tensors
    if grad_S is None:  # only the coordinate logits have a gradient
        dtype = torch.promote_types(trained.dtype, torch.float32)
        of_hidden, of_trained = (
            torch.zeros_like(given, dtype=dtype) if is_needed else None
            for given, is_needed in zip((hidden_ND, trained), ctx.needs_input_grad[:2], strict=True)
        )
        return of_hidden, of_trained
    if ctx.gradients is not None:
        factor = _common_factor(grad_S, ctx.factors_S)
        if factor is not None:
            found, ctx.gradients = ctx.gradients, None  # given away, because the receiver may modify them in place
            of_hidden, of_trained = (g if g is None or factor == 1 else g.mul_(factor) for g in found)
            return of_hidden, of_trained
    sweep = HeadSweep(hidden_ND, trained, whole_VD, ctx.slots, ctx.how)
    sweep.run(grad_S, *ctx.needs_input_grad[:2])
    return sweep.grad_hidden_ND, sweep.grad_trained


def _common_factor(found_S: Tensor, expected_S: Tensor) -> float | None:
    """c such that found = c * expected up to rounding (a scaled loss gives c != 1); None if there is no such c."""
    rounding = 8 * torch.finfo(found_S.dtype).eps
    found, expected = found_S.tolist(), expected_S.tolist()
    if not expected:
        return None
    largest = max(range(len(expected)), key=lambda term: abs(expected[term]))
    if expected[largest] == 0:
        return None
    factor = found[largest] / expected[largest]
    is_multiple = all(abs(f - factor * e) <= rounding * abs(f) for f, e in zip(found, expected, strict=True))
    return factor if is_multiple else None
