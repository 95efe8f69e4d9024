"""One pass of hidden states through the head, some rows at a time: sums of the terms, and their gradients.

For each slot of a chunk, three numbers: the log of the mass on the text ids, that on the coordinate ids, and the logit
of the slot's own token, which is kept out of both. The terms are functions of these, and so are the derivatives that
turn the chunk's logits, in place, into the gradient on them.

Logits lie with the vocabulary first: a CPU's matrix library repacks the head for each chunk, and does it a third faster
if the head is the left factor.

N slots, R slots of a chunk, V vocabulary, D hidden size, K coordinate ids, M slots whose coordinate logits are wanted,
S terms. Sums are float32 (float64 stays float64), also for a bf16 head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.coord_terms import gate
from coordexp.losses.text_terms import text_gate
from coordexp.losses.unlikelihood import unlikelihood_at

# From here on the objective goes through the vocabulary in chunks of so many slots; below, logits are megabytes. A
# chunk is 3 % of the logits of 8,192 tokens, and long enough that adding to the head's gradient once for each is cheap.
LARGE_VOCABULARY = 32_768
FUSED_ROWS = 256
FUSED_TERMS = ("text_ce", "text_gate", "gate", "duplicate_unlikelihood")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSlots:
    """What N slots ask of the whole vocabulary.

    token_ids_N: the token to predict, or to push down; any id where no term looks at it.
    weights: weight of each slot in a term, (N,) >= 0, by name in FUSED_TERMS; a term that is not here is not computed.
    n_coord: the first so many slots also give their K coordinate logits.
    """

    token_ids_N: Tensor
    weights: Mapping[str, Tensor]
    first_coord_id: int
    n_coord: int

    @property
    def span(self) -> slice:
        """The coordinate ids."""
        return slice(self.first_coord_id, self.first_coord_id + NUM_BINS)


class HeadSweep:
    """A pass over N slots; its results are attributes.

    `trained` is the head (V, D), or its coordinate rows (K, D) if the rest of `whole_VD` is frozen.
    """

    def __init__(
        self, hidden_ND: Tensor, trained: Tensor, whole_VD: Tensor | None, slots: HeadSlots, chunk: int
    ) -> None:
        weight_VD = trained if whole_VD is None else whole_VD
        dtype = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
        # A half-precision product with a float32 result exists on GPUs; elsewhere the operands are widened.
        is_mixed = weight_VD.dtype != dtype and weight_VD.is_cuda
        self._hidden_ND = hidden_ND.to(weight_VD.dtype if is_mixed else dtype)
        self._weight_VD = weight_VD if is_mixed else weight_VD.to(dtype)
        self._slots = slots
        self._trained_rows = slice(None) if whole_VD is None else slots.span
        size = min(chunk, len(hidden_ND))
        self._logits = hidden_ND.new_empty(len(weight_VD) * size, dtype=dtype)  # a last chunk may be narrower
        self._chunk = size
        absent_N = self._logits.new_zeros(len(hidden_ND))
        self._weights_SN = torch.stack([slots.weights.get(name, absent_N).to(dtype) for name in FUSED_TERMS])
        self._factors_S: Tensor | None = None
        self.sums_S = self._logits.new_zeros(len(FUSED_TERMS))
        self.coord_MK = self._logits.new_empty(slots.n_coord, NUM_BINS)
        self.text_log_odds_N = torch.empty_like(absent_N)
        self.grad_hidden_ND: Tensor | None = None
        self.grad_trained: Tensor | None = None  # (V, D), or (K, D) of the coordinate rows alone

    def run(self, factors_S: Tensor | None, of_hidden: bool, of_trained: bool) -> None:
        """Go through all slots; with factors, also find the gradients of sum(factors * sums)."""
        self._factors_S = factors_S
        if factors_S is not None:
            room = self._logits.new_empty if len(self._hidden_ND) else self._logits.new_zeros
            self.grad_hidden_ND = room(self._hidden_ND.shape) if of_hidden else None
            self.grad_trained = room(self._weight_VD[self._trained_rows].shape) if of_trained else None
        for start in range(0, len(self._hidden_ND), max(1, self._chunk)):
            rows = slice(start, min(start + self._chunk, len(self._hidden_ND)))
            n_rows = rows.stop - start
            logits_VR = self._logits[: len(self._weight_VD) * n_rows].view(-1, n_rows)
            _multiply(self._weight_VD, self._hidden_ND[rows].t(), logits_VR)
            self._reduce(logits_VR, rows)
            if factors_S is not None:
                self._add_gradients(logits_VR, rows)

    def _reduce(self, logits_VR: Tensor, rows: slice) -> None:
        """Add up the terms of a chunk, and turn its logits into the gradient of the weighted sum on them."""
        span, token_1R = self._slots.span, self._slots.token_ids_N[None, rows]
        inside = self.coord_MK[rows]
        inside.copy_(logits_VR[span, : len(inside)].t())
        token_R = logits_VR.gather(0, token_1R)[0]
        logits_VR.scatter_(0, token_1R, -torch.inf)
        coord_KR = logits_VR[span].clone()
        logits_VR[span] = -torch.inf
        highest_R = logits_VR.amax(0)
        mass_R = logits_VR.sub_(highest_R).exp_().sum(0)
        text_R = highest_R + mass_R.log()
        is_coord_R = (token_1R[0] >= span.start) & (token_1R[0] < span.stop)
        by_text_R, by_coord_R, by_token_R = self._slot_terms(text_R, coord_KR.logsumexp(0), token_R, is_coord_R, rows)
        if self._factors_S is not None:
            logits_VR.mul_(by_text_R / mass_R)
            logits_VR[span] = coord_KR.softmax(0).mul_(by_coord_R)
            logits_VR.scatter_(0, token_1R, by_token_R[None])

    def _slot_terms(
        self, text_R: Tensor, coord_R: Tensor, token_R: Tensor, is_coord_R: Tensor, rows: slice
    ) -> tuple[Tensor, ...]:
        """Terms from the three numbers of each slot; returns the derivatives of the weighted sum by them."""
        weights_SR = self._weights_SN[:, rows]
        with torch.enable_grad():
            text_R, coord_R, token_R = (n_R.detach().requires_grad_() for n_R in (text_R, coord_R, token_R))
            values_SR, odds_R = _values(text_R, coord_R, token_R, is_coord_R)
            # A slot of weight 0 is absent: 0 * inf must not turn the whole sum into NaN.
            sums_S = (torch.where(weights_SR > 0, values_SR, 0.0) * weights_SR).sum(1)
            factors_S = torch.zeros_like(sums_S) if self._factors_S is None else self._factors_S
            derivatives = torch.autograd.grad(sums_S @ factors_S.to(sums_S), (text_R, coord_R, token_R))
        self.sums_S += sums_S.detach()
        self.text_log_odds_N[rows] = odds_R.detach()
        return derivatives

    def _add_gradients(self, grad_VR: Tensor, rows: slice) -> None:
        hidden_RD = self._hidden_ND[rows]
        grad_VR = grad_VR.to(hidden_RD.dtype)
        if self.grad_hidden_ND is not None:
            _multiply(grad_VR.t(), self._weight_VD, self.grad_hidden_ND[rows])
        if self.grad_trained is not None:
            _multiply(grad_VR[self._trained_rows], hidden_RD, self.grad_trained, add=rows.start > 0)


def _values(text_R: Tensor, coord_R: Tensor, token_R: Tensor, is_coord_R: Tensor) -> tuple[Tensor, Tensor]:
    """(S, R) values of FUSED_TERMS and (R,) log-odds of text; both masses are without the token.

    Without it, the odds of the token against all others are exact where its probability is near 0 or 1.
    """
    token_log_odds_R = token_R - torch.logaddexp(text_R, coord_R)
    all_text_R = torch.where(is_coord_R, text_R, torch.logaddexp(text_R, token_R))
    all_coord_R = torch.where(is_coord_R, torch.logaddexp(coord_R, token_R), coord_R)
    text_log_odds_R = all_text_R - all_coord_R
    values = {
        "text_ce": -F.logsigmoid(token_log_odds_R),
        "text_gate": text_gate(text_log_odds_R),
        "gate": gate(text_log_odds_R),
        "duplicate_unlikelihood": unlikelihood_at(token_log_odds_R),
    }
    return torch.stack([values[name] for name in FUSED_TERMS]), text_log_odds_R


def _multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """out = left @ right, or out += left @ right; accumulated in the dtype of `out`."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
