"""Measured limits of the hardware, and the patch embedding as a convolution and as a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from benchmarks.gpu_check.run import Check, moment, seconds_between
from benchmarks.gpu_check.shapes import config_of
from torch import Tensor

from coordexp.models.attention import PatchProduct

PATIENCE_SECONDS = 2.0  # for one call of the convolution


@contextmanager
def product_precision(name: str) -> Iterator[None]:
    """float32 products in here as `torch.set_float32_matmul_precision` names it: highest is plain, high is TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ceilings(check: Check) -> None:
    """Products of square matrices, copies on the device, and transfers to it."""
    side = check.pick(8192, 256)
    for name, dtype, precision in (
        ("bf16 product", torch.bfloat16, "highest"),
        ("TF32 product", torch.float32, "high"),
        ("float32 product", torch.float32, "highest"),
    ):
        left, right = (torch.randn(side, side, device=check.device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        with product_precision(precision):
            seconds = check.seconds_of(_product(left, right, out))
        check.add(name, 2 * side**3 / seconds / 1e12, "TFLOP/s", f"{side}^3")
    source = torch.ones(check.pick(2**30, 2**22), dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    seconds = check.seconds_of(lambda: target.copy_(source))
    check.add("copy", 2 * source.numel() / seconds / 1e12, "TB/s", "bytes read and written")
    for name, pinned in (("to device, pageable", False), ("to device, pinned", True)):
        host = torch.ones(check.pick(2**28, 2**22), dtype=torch.uint8, pin_memory=pinned and not check.small)
        seconds = check.seconds_of(lambda host=host: target[: host.numel()].copy_(host, non_blocking=True))
        check.add(name, host.numel() / seconds / 1e9, "GB/s")


def _product(left: Tensor, right: Tensor, out: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.mm(left, right, out=out)


def patch_embedding(check: Check) -> None:
    """Qwen3-VL's own patch embedding beside models/attention.py's on the same weight, forward and backward, in bf16."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed

    vision = config_of("2b", check.small).vision_config
    with torch.device(check.device):
        theirs = Qwen3VLVisionPatchEmbed(vision)
    ours = PatchProduct(theirs.proj)
    volume = theirs.proj.weight[0].numel()
    patches = torch.randn(check.pick(20_000, 64), volume, device=check.device)
    outputs = []
    for name, embed in (("product", ours), ("convolution", theirs)):
        with check.part(name, is_ours=embed is ours):

            def run(embed: torch.nn.Module = embed) -> Tensor:
                with torch.autocast(check.device.type, torch.bfloat16):
                    out = embed(patches)
                out.sum().backward()
                return out.detach()

            outputs.append(run())
            first = moment(check.device)
            run()
            once = seconds_between(first, moment(check.device))
            is_slow = once > PATIENCE_SECONDS
            seconds = once if is_slow else check.seconds_of(run)
            check.add(name, seconds, "s", f"{len(patches):,} patches" + (", one call" if is_slow else ""))
    if len(outputs) == 2:
        apart = (outputs[0].float() - outputs[1].float()).norm() / outputs[1].float().norm()
        check.add("product - convolution", float(apart), "of the norm", "bf16", at_most=1e-2)
