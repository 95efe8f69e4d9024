"""Where a model computes, and in which number formats: decided here, once, for everything that loads or runs one.

    plan = training_plan("bf16")        # or inference_plan(), for a model that only answers
    plan.adopt()                        # what is set for the whole process, and one line of the log
    model.to(plan.device)               # weights that train in plan.trained, the others in plan.frozen
    with plan.autocast(model): ...      # products in plan.compute

The device is a fact of the machine, not a parameter of the run: `--device` of a command or a stage, COORDEXP_DEVICE in
the environment of a whole graph, or without either the GPU of this process, or the CPU.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.infra import DEVICE_VARIABLE

log = logging.getLogger(__name__)

AUTO = "auto"
VARIABLE_LENGTH, GROUPED = "variable-length kernel", "grouped products"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def choose_device(wanted: str = AUTO) -> torch.device:
    """The device that `wanted` names; "auto" is what COORDEXP_DEVICE names, else the GPU of this process, else the CPU.

    "auto" and "cuda" without a number give each process of a run its own GPU, by LOCAL_RANK.

    Raises:
        ConfigError: there is no such device.
    """
    if wanted == AUTO:
        wanted = os.environ.get(DEVICE_VARIABLE, AUTO)
    if wanted == AUTO:
        return _accelerator() or torch.device("cpu")
    if wanted == "cuda" and (own := _accelerator()):
        return own
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)  # fails for a device that this machine or this build of torch does not have
    except (RuntimeError, AssertionError) as error:  # torch's CPU build asserts
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device {wanted!r} cannot be used ({reason}). Expected auto, cpu, cuda or cuda:N with an N that exists."
        ) from error
    return device


def _accelerator() -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputePlan:
    """Device and number formats of one model: of weights that train, of those that do not, and of products."""

    device: torch.device
    trained: torch.dtype
    frozen: torch.dtype
    compute: torch.dtype

    @property
    def matmul_precision(self) -> str:
        """Of the products that stay in float32, as torch names it: "high" is TF32, "highest" plain float32."""
        return "high" if self.device.type == "cuda" and self.compute != torch.float32 else "highest"

    @property
    def attention(self) -> str:
        """How segments attend to themselves (models/attention.py)."""
        return attention_kernel(self.device, self.compute)

    @property
    def fuses_optimizer(self) -> bool:
        """Whether AdamW updates in one kernel, without a temporary copy of all second moments."""
        return self.device.type == "cuda"

    def adopt(self) -> ComputePlan:
        """Set what holds for the whole process, and log what was chosen and why."""
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision(self.matmul_precision)
        log.info("%s", self)
        return self

    def autocast(self, model: nn.Module, *, keeps_copies: bool = True) -> AbstractContextManager[object]:
        """Products in `compute`, whatever the surroundings; without `keeps_copies` weights are cast at each use."""
        kind = self.device.type
        if not torch.amp.is_autocast_available(kind):
            return nullcontext()
        # A model all of whose weights have the format already needs no casts.
        casts = self.compute != torch.float32 and any(p.dtype != self.compute for p in model.parameters())
        return torch.autocast(kind, torch.bfloat16, enabled=casts, cache_enabled=keeps_copies)

    def __str__(self) -> str:
        weights, products = f"weights {_NAMES[self.trained]}", f"products {_NAMES[self.compute]}"
        if self.frozen != self.trained:
            weights += f" where they train, {_NAMES[self.frozen]} where not"
        if self.matmul_precision == "high":
            products += " (what stays float32: TF32)"
        return f"device: {self.device} ({_why(self.device)}); {weights}; {products}; attention by {self.attention}"


def _why(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no such GPU here"
        return f"{name}, torch {torch.__version__}"
    if device.type == "cpu" and os.environ.get(DEVICE_VARIABLE, AUTO) != AUTO:
        return f"{DEVICE_VARIABLE}={os.environ[DEVICE_VARIABLE]}"
    return "torch sees no GPU" if device.type == "cpu" and _accelerator() is None else "as asked"


def training_plan(precision: Literal["bf16", "fp32"], device: torch.device | None = None) -> ComputePlan:
    """For a model that trains, by the `precision` of its stage; what trains is float32, and what does not is bfloat16
    where products are, but on a CPU, where a copy in another format costs more than it saves."""
    device = device or choose_device()
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen = torch.float32 if device.type == "cpu" else compute
    return ComputePlan(device=device, trained=torch.float32, frozen=frozen, compute=compute)


def inference_plan(device: torch.device | None = None) -> ComputePlan:
    """For a model that only answers: bfloat16 on an accelerator; float32 on the CPU, where results repeat."""
    device = device or choose_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return ComputePlan(device=device, trained=dtype, frozen=dtype, compute=dtype)


def compute_dtype(operand: Tensor) -> torch.dtype:
    """In which format a product with this operand is taken here: autocast's while it is on, else its own."""
    kind = operand.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else operand.dtype


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """On the device of this tensor every operand keeps its format."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def factor_dtype(operand: Tensor) -> torch.dtype:
    """Format of the factors of a product whose result is float32: CUDA multiplies halves so, a CPU only float32."""
    return compute_dtype(operand) if operand.is_cuda else torch.promote_types(operand.dtype, torch.float32)


@cache
def varlen_options() -> frozenset[str]:
    """What this build of torch lets one say to `varlen_attn`; nothing if it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """VARIABLE_LENGTH where torch, device and number format have it, otherwise GROUPED."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return GROUPED
    says_causal = bool({"window_size", "is_causal"} & varlen_options())  # the older name of the same
    is_new = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    return VARIABLE_LENGTH if "scale" in varlen_options() and says_causal and is_new else GROUPED


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """What a device was seen to do; a copy reads and writes its bytes."""

    bf16_flops: float
    float32_flops: float
    copied_bytes: float

    def __str__(self) -> str:
        return (
            f"measured: {self.bf16_flops / 1e12:.3g} TFLOP/s in bfloat16, {self.float32_flops / 1e12:.3g} in float32; "
            f"copies {self.copied_bytes / 1e9:.3g} GB/s"
        )


def measured_rates(plan: ComputePlan) -> DeviceRates:
    """Rates of square products and of a copy on the device of the plan, within three seconds; of a CPU in one."""
    side, seconds = (8192, 3.0) if plan.device.type == "cuda" else (1024, 0.6)

    def product(dtype: torch.dtype) -> float:
        left, right = (torch.randn(side, side, device=plan.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        return 2 * side**3 * _per_second(lambda: torch.mm(left, right, out=out), plan.device, seconds / 3)

    source = torch.zeros(side, 4 * side, device=plan.device)
    target = torch.empty_like(source)
    copies = _per_second(lambda: target.copy_(source), plan.device, seconds / 3)
    return DeviceRates(
        bf16_flops=product(torch.bfloat16),
        float32_flops=product(torch.float32),
        copied_bytes=2 * source.nbytes * copies,
    )


def _per_second(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """How often `run` is done in a second: the fastest of rounds that fill half of the time, after one to warm up."""

    def spent() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    until = time.perf_counter() + seconds / 2
    spent()
    best = spent()
    while time.perf_counter() < until:
        best = min(best, spent())
    return 1 / best
