"""The terms that see the whole vocabulary, from hidden states and the head, without the logits of all slots.

One pass over the slots (losses/head_sweep.py) gives the sums of the terms and the gradients of hidden states and head;
what is ever stored of the logits is one chunk.

Gradients are found in that pass for the factors that the caller expects each sum to get in the loss (weight /
denominator, known beforehand). If a backward pass asks for that, or a multiple, they are handed over; if it asks for
something else (the gradient of one term alone, a second backward pass), it is run again for what it asks.

N slots, V vocabulary, D hidden size, K coordinate ids, M slots whose coordinate logits are wanted, S terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.head_sweep import FUSED_TERMS, HeadSlots, HeadSweep
from coordexp.losses.terms import TermSum


@dataclass(frozen=True, slots=True)
class FusedTerms:
    """terms: sums by name. coord_MK: coordinate logits. text_log_odds_N: log((1 - m) / m), without a graph."""

    terms: dict[str, TermSum]
    coord_MK: Tensor
    text_log_odds_N: Tensor


def fused_terms(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    slots: HeadSlots,
    expected: Mapping[str, Tensor] | None,
    chunk: int,
    coord_rows_KD: Tensor | None = None,
) -> FusedTerms:
    """Terms of N slots under the logits hidden_ND @ weight_VD.T; for a temperature, divide the hidden states by it.

    Args:
        hidden_ND: hidden states at the slots (N may be 0); float32 or float64, or half like the head.
        weight_VD: weight of the head, which has no bias.
        slots: what is asked at each slot.
        expected: factor of each sum in the loss, by name; None if no gradient, or one of unknown factors, is wanted.
        chunk: slots whose logits exist at a time.
        coord_rows_KD: the coordinate rows of `weight_VD`, if they alone train: then they get its gradient.
    """
    vocab_size = len(weight_VD)
    assert vocab_size >= slots.span.stop, f"coordinate ids {slots.span} exceed {vocab_size} logits"
    assert vocab_size > NUM_BINS + 1, "no text id is left beside a slot's own token"
    factors_S = None
    if expected is not None and torch.is_grad_enabled():
        factors = [float(expected[name]) if name in slots.weights else 0.0 for name in FUSED_TERMS]
        factors_S = torch.tensor(factors, dtype=torch.float64, device=hidden_ND.device)
    whole, trained = (None, weight_VD) if coord_rows_KD is None else (weight_VD.detach(), coord_rows_KD)
    sums_S, coord_MK, odds_N = _FusedLinear.apply(hidden_ND, trained, whole, slots, factors_S, chunk)
    terms = {
        name: TermSum(total, slots.weights[name].sum().to(total))
        for name, total in zip(FUSED_TERMS, sums_S.unbind(), strict=True)
        if name in slots.weights
    }
    return FusedTerms(terms, coord_MK, odds_N)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        trained: Tensor,
        whole_VD: Tensor | None,
        slots: HeadSlots,
        factors_S: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sweep = HeadSweep(hidden_ND, trained, whole_VD, slots, chunk)
        sweep.run(factors_S, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(hidden_ND, trained, whole_VD)
        ctx.slots, ctx.chunk, ctx.factors_S = slots, chunk, factors_S
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
    """Gradients of the sums: those of the forward pass if they are what is asked for, else by a pass of their own."""
    hidden_ND, trained, whole_VD = ctx.saved_tensors
    if grad_S is None:  # of the coordinate logits alone
        dtype = torch.promote_types(trained.dtype, torch.float32)
        of_hidden, of_trained = (
            torch.zeros_like(given, dtype=dtype) if is_needed else None
            for given, is_needed in zip((hidden_ND, trained), ctx.needs_input_grad[:2], strict=True)
        )
        return of_hidden, of_trained
    if ctx.gradients is not None:
        factor = _common_factor(grad_S, ctx.factors_S)
        if factor is not None:
            found, ctx.gradients = ctx.gradients, None  # handed over: whoever gets them may write into them
            of_hidden, of_trained = (g if g is None or factor == 1 else g.mul_(factor) for g in found)
            return of_hidden, of_trained
    sweep = HeadSweep(hidden_ND, trained, whole_VD, ctx.slots, ctx.chunk)
    sweep.run(grad_S, *ctx.needs_input_grad[:2])
    return sweep.grad_hidden_ND, sweep.grad_trained


def _common_factor(found_S: Tensor, expected_S: Tensor) -> float | None:
    """c with found = c * expected, up to rounding; None if there is none."""
    rounding = 8 * torch.finfo(found_S.dtype).eps
    found, expected = found_S.tolist(), expected_S.tolist()
    largest = max(range(len(expected)), key=lambda term: abs(expected[term]))
    if expected[largest] == 0:
        return None
    factor = found[largest] / expected[largest]
    is_multiple = all(abs(f - factor * e) <= rounding * abs(f) for f, e in zip(found, expected, strict=True))
    return factor if is_multiple else None
