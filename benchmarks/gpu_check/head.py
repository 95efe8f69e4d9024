"""The fused head of the objective: correctness against float64, and speed by number format and chunk size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from benchmarks.gpu_check.predictions import CHUNKS, VOCABULARY
from benchmarks.gpu_check.products import product_precision
from benchmarks.gpu_check.run import Check, peak_bytes, reset_memory
from benchmarks.objective import SUPERVISED, Pack, bare, fused, usual
from torch import Tensor

from coordexp.losses.vocabulary_terms import HeadProducts

LIMITS = {"float32": (1e-5, 1e-4), "bf16": (1e-2, 2e-2)}  # of the value and of gradients


def exactness(check: Check) -> None:
    """Value and gradients beside logits in float64 of the same numbers, for a head that trains and a frozen one."""
    tokens, vocab, hidden = check.pick((4096, 20_000, 512), (512, 2500, 32))
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        pack = Pack(tokens, vocab, hidden, check.device, dtype)
        exact_loss, exact_hidden, exact_head = usual(pack.cast(torch.float64))
        with check.part(f"{name} head"), product_precision("highest"):
            loss, of_hidden, of_head = fused(pack, _products(pack, dtype, check.pick(384, 50)))
            value, gradient = LIMITS[name]
            check.add(f"{name} head: value", _apart(loss, exact_loss), "of the value", at_most=value)
            worst = max(_apart(of_hidden, exact_hidden), _apart(of_head, exact_head))
            check.add(f"{name} head: gradients", worst, "of the norm", "hidden states, head", at_most=gradient)
        with check.part(f"frozen {name} head"), product_precision("highest"):
            _, of_hidden, of_rows = fused(pack, _products(pack, dtype, check.pick(384, 50)), rows_only=True)
            worst = max(_apart(of_hidden, exact_hidden), _apart(of_rows, exact_head[pack.first_id :]))
            what = "hidden states, coordinate rows"
            check.add(f"frozen {name} head: gradients", worst, "of the norm", what, at_most=gradient)


def _apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _products(pack: Pack, factors: torch.dtype, chunk: int | None = None) -> HeadProducts:
    """The committed way of this device, with these factors, and this many slots at a time if that is said."""
    how = HeadProducts.on(pack.head_VD, factors)
    return how if chunk is None else replace(how, chunk=chunk)


def speed(check: Check) -> None:
    """Seconds and memory of a pack's objective, gradients included, beside the bare products in bf16."""
    for hidden in (2048, 2560):
        for slots in (3072, 8192):
            sizes = check.pick((round(slots / SUPERVISED), VOCABULARY, hidden), (slots // 40, 3000, 32))
            _speed(check, f"D {hidden}, N {slots}", *sizes)


def _speed(check: Check, where: str, tokens: int, vocab: int, hidden: int) -> None:
    half = Pack(tokens, vocab, hidden, check.device, torch.bfloat16)
    products = check.seconds_of(bare(half))
    check.add(f"{where}: bare bf16 products", products, "s", f"{len(half.slots_N)} slots")
    name = f"{where}: cross-entropy of torch alone in bf16, 2048 rows"
    _timed(check, name, lambda: _chunked_cross_entropy(half, 2048), products)
    pack = half.cast(torch.float32)
    ways = {"bf16, as committed": (torch.bfloat16, None)}
    ways |= {f"bf16, {chunk} rows": (torch.bfloat16, chunk) for chunk in CHUNKS}
    ways |= {"float32, 256 rows": (torch.float32, 256), "TF32, 256 rows": (torch.float32, 256)}
    for way, (factors, chunk) in ways.items():
        how = _products(pack, factors, chunk)
        with product_precision("high" if way.startswith("TF32") else "highest"):
            _timed(check, f"{where}: {way}", lambda how=how: fused(pack, how), products)


def _timed(check: Check, name: str, run: Callable[[], object], products: float) -> None:
    with check.part(name):
        reset_memory(check.device)
        before = peak_bytes(check.device)
        seconds = check.seconds_of(run, rounds=3, warm_ups=1)
        taken = (peak_bytes(check.device) - before) / 1e9
        check.add(name, seconds, "s", f"{seconds / products:.2f} x bare, {taken:.1f} GB")


def _chunked_cross_entropy(pack: Pack, chunk: int) -> None:
    """Plain cross-entropy of the supervised slots, so many at a time, with its gradients."""
    hidden_TD, head_VD = pack.leaves()
    ids_N = torch.cat([pack.first_id + pack.bins_N.round().long(), pack.ids_N])
    for slots_R, ids_R in zip(pack.slots_N.split(chunk), ids_N.split(chunk), strict=True):
        F.cross_entropy((hidden_TD[slots_R] @ head_VD.t()).float(), ids_R, reduction="sum").backward()
