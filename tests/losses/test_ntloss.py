"""W1 to a one-hot target against an independent implementation: the Wasserstein number token loss of `ntloss`.

Zausinger et al. 2025, arXiv:2411.02083, equation 4: the expected distance to the target number over number tokens.
"""

from __future__ import annotations

import pytest
import torch

from coordexp.losses.coord_terms import wasserstein1

ntloss = pytest.importorskip("ntloss", reason="ntloss is a development dependency; install the dev extra")

FIRST_ID, NUMBERS, AFTER = 4, 1000, 3
VOCAB = FIRST_ID + NUMBERS + AFTER


class NumberTokenizer:
    """The part of a tokenizer that ntloss reads: which token is which number."""

    def get_vocab(self) -> dict[str, int]:
        words = {f"before{i}": i for i in range(FIRST_ID)}
        numbers = {str(k): FIRST_ID + k for k in range(NUMBERS)}
        return words | numbers | {f"after{i}": FIRST_ID + NUMBERS + i for i in range(AFTER)}

    def __len__(self) -> int:
        return VOCAB


@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_w1_and_its_gradient_agree(spread):
    generator = torch.Generator().manual_seed(11)
    logits_NV = (spread * torch.randn(16, VOCAB, generator=generator)).requires_grad_()
    bins_N = torch.randint(0, NUMBERS, (16,), generator=generator)
    theirs = ntloss.NTLoss(NumberTokenizer(), digit_level=False, reweigh=False)
    expected = theirs(logits_NV[None], (FIRST_ID + bins_N)[None]) / (NUMBERS - 1)
    p_NK = logits_NV[:, FIRST_ID : FIRST_ID + NUMBERS].softmax(-1)
    ours = wasserstein1(p_NK, torch.nn.functional.one_hot(bins_N, NUMBERS).float()).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)
    gradients = [torch.autograd.grad(loss, logits_NV)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-8)
