"""Time and memory of the token objective of one pack: fused, with stored logits, and at all positions.

    PYTHONPATH=src python -m benchmarks.objective

One pack of COCO's mixture: 70 % of its tokens are image and prompt, 15 % of the supervised ones are coordinates. Each
way computes text CE, gate and softCE with the gradients of hidden states and head:

    fused   losses/vocabulary_terms.py: chunks of slots
    usual   one tensor of logits of the supervised slots, cross-entropy and log-sum-exps on it
    stock   the same on logits of all positions, as a model computes them from labels
    bare    the three matrix products of the supervised slots alone, into memory that is there

On a CPU, in float32; on a GPU the same ways are measured by benchmarks/gpu_check/head.py. Each runs in its
own process, except `bare`, which has the tightest target: it alternates with `fused` in one process that keeps freed
memory, as a trainer does. Memory is the peak resident set minus that of inputs and libraries, minus the head's
gradient, which every variant leaves behind. `stock` runs on half of the pack, because all of it would need more than 15
GB; its time and memory are doubled, as both grow linearly. `bare` and `fused` also alternate on half of the pack.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.harness import Figure, Row, cpu_seconds, measured, side_by_side
from torch import Tensor

from benchmarks import harness
from coordexp.losses.coord_terms import soft_cross_entropy, soft_target
from coordexp.losses.vocabulary_terms import HeadProducts, HeadSlots, vocabulary_sums
from coordexp.stage import LOG, tune_allocator

K = 1000
SUPERVISED = 0.3  # of the tokens
CPU = torch.device("cpu")
ORDER = ("fused", "usual", "stock")
TURNS = 3


@dataclass(frozen=True, slots=True)
class Size:
    """Of one measurement. `stock_share`: part of the pack that `stock` runs on."""

    tokens: int
    vocab: int
    hidden: int
    stock_share: float

    @property
    def head_bytes(self) -> int:
        """Of the head, and of its gradient."""
        return self.vocab * self.hidden * torch.float32.itemsize

    def pack(self, share: float = 1.0) -> Pack:
        """Part of the pack, as it is trained on."""
        return Pack(round(self.tokens * share), self.vocab, self.hidden)


class Pack:
    """Hidden states of a pack's tokens, and what is supervised: coordinate slots first, then text."""

    def __init__(
        self,
        tokens: int,
        vocab: int,
        hidden: int,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(17)
        n_supervised = round(SUPERVISED * tokens)
        self.n_coord = 4 * round(0.15 * n_supervised / 4)
        self.n_text = n_supervised - self.n_coord
        self.first_id = vocab - K
        self.head_VD = torch.empty(vocab, hidden, device=device, dtype=dtype).normal_(std=0.02)
        self.hidden_TD = torch.randn(tokens, hidden, device=device).to(dtype)
        self.slots_N = torch.randperm(tokens, device=device)[:n_supervised]
        self.bins_N = 999 * torch.rand(self.n_coord, device=device)
        self.ids_N = torch.randint(self.first_id, (self.n_text,), device=device)
        self.counts = {"text_ce": float(self.n_text), "gate": float(self.n_coord)}

    def cast(self, dtype: torch.dtype) -> Pack:
        """The same numbers in another format."""
        other = copy(self)
        other.head_VD, other.hidden_TD = self.head_VD.to(dtype), self.hidden_TD.to(dtype)
        return other

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden states (T, D) and head (V, D), without gradients so far."""
        return self.hidden_TD.detach().requires_grad_(), self.head_VD.detach().requires_grad_()

    def softce(self, logits_MK: Tensor) -> Tensor:
        """Mean cross-entropy of coordinate slots against the default soft target."""
        return soft_cross_entropy(logits_MK.log_softmax(-1), soft_target(self.bins_N, "gaussian", 2.0, 8)).mean()


Outcome = tuple[Tensor, Tensor, Tensor]  # loss, gradients of hidden states and head


def _outcome(loss: Tensor, hidden_TD: Tensor, head_VD: Tensor) -> Outcome:
    loss.backward()
    assert hidden_TD.grad is not None
    assert head_VD.grad is not None
    return loss.detach(), hidden_TD.grad, head_VD.grad


def fused(pack: Pack, how: HeadProducts | None = None, rows_only: bool = False) -> Outcome:
    """The pass of this package; with `rows_only`, the coordinate rows of the head train."""
    hidden_TD, head_VD = pack.leaves()
    rows_KD = pack.head_VD[pack.first_id :].clone().requires_grad_() if rows_only else None
    coord_N = torch.arange(len(pack.slots_N), device=hidden_TD.device) < pack.n_coord
    slots = HeadSlots(
        token_ids_N=torch.cat([pack.first_id + pack.bins_N.round().long(), pack.ids_N]),
        weights={"text_ce": (~coord_N).float(), "gate": coord_N.float()},
        first_coord_id=pack.first_id,
        n_coord=pack.n_coord,
    )
    factors = {name: 1 / count for name, count in pack.counts.items()}
    sums, coord_MK, _ = vocabulary_sums(hidden_TD[pack.slots_N], head_VD, slots, factors, rows_KD, how)
    loss = sum((factors[name] * total for name, total in sums.items()), pack.softce(coord_MK))
    return _outcome(loss, hidden_TD, head_VD if rows_KD is None else rows_KD)


def usual(pack: Pack) -> Outcome:
    """One product, and terms on its rows."""
    hidden_TD, head_VD = pack.leaves()
    logits_NV = hidden_TD[pack.slots_N] @ head_VD.t()
    labels_N = torch.cat([pack.ids_N.new_full((pack.n_coord,), -100), pack.ids_N])
    return _outcome(_usual_loss(pack, logits_NV, labels_N, logits_NV[: pack.n_coord]), hidden_TD, head_VD)


def stock(pack: Pack) -> Outcome:
    """Logits of all positions; labels of what is not supervised are -100."""
    hidden_TD, head_VD = pack.leaves()
    logits_TV = hidden_TD @ head_VD.t()
    labels_T = torch.full((len(hidden_TD),), -100, device=hidden_TD.device)
    labels_T[pack.slots_N[pack.n_coord :]] = pack.ids_N
    coord_MV = logits_TV[pack.slots_N[: pack.n_coord]]
    return _outcome(_usual_loss(pack, logits_TV, labels_T, coord_MV), hidden_TD, head_VD)


def _usual_loss(pack: Pack, logits_NV: Tensor, labels_N: Tensor, coord_MV: Tensor) -> Tensor:
    slice_MK = coord_MV[:, pack.first_id :]
    gate = (coord_MV.logsumexp(-1) - slice_MK.logsumexp(-1)).mean()
    return F.cross_entropy(logits_NV, labels_N) + gate + pack.softce(slice_MK)


def bare(pack: Pack) -> Callable[[], object]:
    """The products of the supervised slots; makes and touches their results beforehand."""
    hidden_ND = pack.hidden_TD[pack.slots_N]
    logits_NV = hidden_ND.new_full((len(hidden_ND), len(pack.head_VD)), 0.5)
    grad_ND, grad_VD = torch.ones_like(hidden_ND), torch.ones_like(pack.head_VD)

    def run() -> None:
        torch.mm(hidden_ND, pack.head_VD.t(), out=logits_NV)
        torch.mm(logits_NV, pack.head_VD, out=grad_ND)
        torch.mm(logits_NV.t(), hidden_ND, out=grad_VD)

    return run


WAYS: dict[str, Callable[[Pack], Outcome]] = {f.__name__: f for f in (fused, usual, stock)}


def measure_here(way: str, size: Size) -> dict[str, float]:
    """Seconds of one step in this process, and the bytes it took beyond inputs and head gradient."""
    WAYS[way](Pack(512, 2 * K, 64))  # libraries and their threads
    share = size.stock_share if way == "stock" else 1.0
    pack = size.pack(share)
    before = _status_bytes("VmRSS")
    started, began = time.perf_counter(), cpu_seconds()
    outcome = WAYS[way](pack)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - began
    extra = max(0, _status_bytes("VmHWM") - before - size.head_bytes)
    del outcome  # held until here, as a trainer holds its gradients
    return {"seconds": seconds / share, "cpu": cpu / share, "extra_bytes": extra / share}


def fused_beside_bare(size: Size) -> dict[str, list[float]]:
    """Time of the fused pass in that of the bare products, which take turns."""
    tune_allocator(LOG)
    pack = size.pack(size.stock_share)
    ratio = side_by_side({"fused": lambda: fused(pack), "bare": bare(pack)}, TURNS).ratio("fused", "bare")
    return {"ratios": list(ratio.rounds), "cpu_ratios": list(ratio.cpu_rounds)}


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def measure(size: Size) -> dict[str, dict[str, Any]]:
    """Each way in a process of its own, and `fused` with `bare` in another."""
    found: dict[str, dict[str, Any]] = {}
    for way in ("bare", *ORDER):
        command = [sys.executable, "-m", "benchmarks.objective", "--child", way, *_arguments(size)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[way] = json.loads(output.splitlines()[-1])
    return found


def _arguments(size: Size) -> list[str]:
    return [text for name, value in asdict(size).items() for text in (f"--{name.replace('_', '-')}", str(value))]


def rows_of(found: dict[str, dict[str, Any]], size: Size) -> list[Row]:
    """The table."""
    where = f"{size.tokens} tokens, vocabulary {size.vocab}, hidden {size.hidden}"
    logits = 4 * size.tokens * size.vocab
    ours = found["fused"]

    def time_row(other: str, beside: str, limit: float | None = None) -> Row:
        ratio = Figure(*([ours[clock] / found[other][clock]] for clock in ("seconds", "cpu")))
        return measured(f"fused / {other}: time", ratio, "x", f"{beside}, once; {where}", at_most=limit)

    def memory_row(way: str, limit: float | None = None) -> Row:
        beside = "peak beyond the head's gradient, beside float32 logits of the whole pack"
        share = found[way]["extra_bytes"] / logits
        return measured(f"{way}: extra memory", share, "of full logits", beside, at_most=limit)

    turns, products = found["bare"], "forward and two backward products of the supervised slots"
    bare_beside = Figure(turns["ratios"], turns["cpu_ratios"])
    return [
        measured("fused / bare: time", bare_beside, "x", f"{products}; {where}", at_most=1.1),
        time_row("stock", "logits at all positions", 0.5),
        time_row("usual", "logits of the supervised slots in one tensor"),
        memory_row("fused", 0.05),
        *(memory_row(way) for way in ("usual", "stock")),
    ]


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that say how large the pack is."""
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=152_936, help="the last 1000 ids are coordinates")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--stock-share", type=float, default=0.5, help="part of the pack that `stock` runs on")


def size_of(arguments: argparse.Namespace) -> Size:
    """The sizes that the options name."""
    return Size(arguments.tokens, arguments.vocab, arguments.hidden, arguments.stock_share)


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Every way in a process of its own, or with --quick in this one."""
    size = size_of(arguments)
    if arguments.quick:
        small = replace(size, tokens=1024, vocab=4096, hidden=64)
        return rows_of({"bare": fused_beside_bare(small)} | {way: measure_here(way, small) for way in ORDER}, small)
    return rows_of(measure(size), size)


def child() -> None:
    """What `measure` starts: one way, its figures as JSON."""
    parser = argparse.ArgumentParser()
    add_sizes(parser)
    parser.add_argument("--child", choices=[*WAYS, "bare"], required=True)
    arguments = parser.parse_args()
    size = size_of(arguments)
    print(json.dumps(fused_beside_bare(size) if arguments.child == "bare" else measure_here(arguments.child, size)))


if __name__ == "__main__":
    if "--child" in sys.argv:
        child()
    else:
        harness.script("objective", __doc__, rows, add_sizes)
