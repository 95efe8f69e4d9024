"""The device and the number formats of a model: decided here once, for all code that loads or runs a model.

    plan = training_plan("bf16")        # or inference_plan(), for a model that only generates
    plan.adopt()                        # process-wide settings, and one log line
    model.to(plan.device)               # trained weights in plan.trained, the others in plan.frozen
    with plan.autocast(model): ...      # matrix products in plan.compute

The device belongs to the machine, so it is not a parameter of the run. `--device` of a command or stage sets it, or
COORDEXP_DEVICE in the environment of a whole graph. The default is the GPU of this process, or else the CPU.
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
    """The device named by `wanted`; "auto" means COORDEXP_DEVICE, else the GPU of this process, else the CPU.

    "auto" and "cuda" without a number give each process of a run its own GPU, by LOCAL_RANK.

    Raises:
        ConfigError: the device does not exist.
    """
    if wanted == AUTO:
        wanted = os.environ.get(DEVICE_VARIABLE, AUTO)
    if wanted == AUTO:
        return _accelerator() or torch.device("cpu")
    if wanted == "cuda" and (own := _accelerator()):
        return own
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)  # fails if this machine or this build of torch does not have the device
    except (RuntimeError, AssertionError) as error:  # the CPU build of torch raises AssertionError
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
    """Device of one model, and the number formats of its trained weights, frozen weights and matrix products."""

    device: torch.device
    trained: torch.dtype
    frozen: torch.dtype
    compute: torch.dtype

    @property
    def matmul_precision(self) -> str:
        """Precision of the products that stay in float32, in torch's terms: "high" is TF32, "highest" is float32."""
        return "high" if self.device.type == "cuda" and self.compute != torch.float32 else "highest"

    @property
    def attention(self) -> str:
        """The attention kernel for packed segments (models/attention.py)."""
        return attention_kernel(self.device, self.compute)

    @property
    def fuses_optimizer(self) -> bool:
        """Whether AdamW uses one fused kernel, which needs no temporary copy of all second moments."""
        return self.device.type == "cuda"

    def adopt(self) -> ComputePlan:
        """Apply the process-wide settings, and log the plan with its reasons."""
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision(self.matmul_precision)
        log.info("%s", self)
        return self

    def autocast(self, model: nn.Module, *, keeps_copies: bool = True) -> AbstractContextManager[object]:
        """Compute products in `compute`, even inside another autocast; without `keeps_copies`, cast at every use."""
        kind = self.device.type
        if not torch.amp.is_autocast_available(kind):
            return nullcontext()
        # If all weights have the compute format already, autocast would only cost time.
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
    """Plan for a model that trains, from the `precision` of its stage.

    Trained weights are float32: in bfloat16 (8 bits of significand), updates much smaller than a weight round to zero.
    Frozen weights have the compute format, except on a CPU, where casting costs more than it saves.
    """
    device = device or choose_device()
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen = torch.float32 if device.type == "cpu" else compute
    return ComputePlan(device=device, trained=torch.float32, frozen=frozen, compute=compute)


def inference_plan(device: torch.device | None = None) -> ComputePlan:
    """Plan for a model that only generates: bfloat16 on an accelerator; float32 on the CPU, for exact repetition."""
    device = device or choose_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return ComputePlan(device=device, trained=dtype, frozen=dtype, compute=dtype)


def compute_dtype(operand: Tensor) -> torch.dtype:
    """The format of a product with this operand: the autocast format while autocast is on, else the operand's own."""
    kind = operand.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else operand.dtype


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the device of this tensor."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def factor_dtype(operand: Tensor) -> torch.dtype:
    """Format of the factors of a product with a float32 result: CUDA accepts half-precision factors, a CPU does not."""
    return compute_dtype(operand) if operand.is_cuda else torch.promote_types(operand.dtype, torch.float32)


@cache
def varlen_options() -> frozenset[str]:
    """The parameters of `varlen_attn` in this build of torch; empty if the function does not exist."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """VARIABLE_LENGTH if torch, device and number format support it, otherwise GROUPED."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return GROUPED
    says_causal = bool({"window_size", "is_causal"} & varlen_options())  # newer and older name of causal masking
    is_new = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    return VARIABLE_LENGTH if "scale" in varlen_options() and says_causal and is_new else GROUPED


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """Measured rates of a device; a copy counts the bytes it reads and writes."""

    bf16_flops: float
    float32_flops: float
    copied_bytes: float

    def __str__(self) -> str:
        return (
            f"measured: {self.bf16_flops / 1e12:.3g} TFLOP/s in bfloat16, {self.float32_flops / 1e12:.3g} in float32; "
            f"copies {self.copied_bytes / 1e9:.3g} GB/s"
        )


def measured_rates(plan: ComputePlan) -> DeviceRates:
    """Measure square products and a copy on the device of the plan: about 3 s on a GPU, less than 1 s on a CPU."""
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
    """Runs per second of `run`: the fastest run within half of the time, after one warm-up run."""

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
