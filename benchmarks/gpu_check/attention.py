"""Attention over packed segments: the time of each variant, and equality of packed and single samples."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.gpu_check.predictions import STEP_TOKENS
from benchmarks.gpu_check.products import product_precision
from benchmarks.gpu_check.run import Check
from benchmarks.gpu_check.shapes import build, collator, config_of, samples
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import Qwen3VLForConditionalGeneration

from coordexp.models.attention import segment_attention, use_segment_attention
from coordexp.models.forward import hidden_states
from coordexp.models.processor import pixel_spec
from coordexp.packing.collator import PackedBatch, teacher_segment

KEY_HEADS, HEAD_DIM = 8, 128
SEGMENT_TOKENS = 490  # of a picture with its answer
SCALE = HEAD_DIM**-0.5
KERNEL_LIMIT = 2e-2  # of values and gradients in bf16 beside float64, of their norm
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def speed(check: Check) -> None:
    """One layer's attention, forward and backward, in bf16; query heads share eight heads of keys and values."""
    _kernel_exactness(check)
    for way, make in WAYS.items():
        for label, tokens in STEP_TOKENS.items():
            lengths = _lengths(check.pick(tokens, 128), check.pick(SEGMENT_TOKENS, 32))
            for heads in (16, 32):
                name = f"{label}, {heads} heads: {way}"
                with check.part(name, is_ours=way == "segments"):
                    inputs, attend = _inputs(check, sum(lengths), heads), make(lengths, check.device)
                    has_backward = not (check.small and way == "flex")  # torch has none for CPUs
                    seconds = check.seconds_of(_run(attend, inputs, has_backward))
                    check.add(name, seconds, "s", f"{len(lengths)} segments")


def _lengths(tokens: int, each: int) -> tuple[int, ...]:
    return (*(each,) * (tokens // each), *((tokens % each,) if tokens % each else ()))


def _inputs(check: Check, tokens: int, heads: int) -> list[Tensor]:
    shapes = [(tokens, n, HEAD_DIM) for n in (heads, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(s, device=check.device, dtype=torch.bfloat16).requires_grad_() for s in shapes]


def _run(attend: Attend, inputs: list[Tensor], has_backward: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(has_backward):
            out = attend(*inputs)
        if has_backward:
            out.sum().backward()

    return run


def _dense(lengths: tuple[int, ...], device: torch.device) -> Attend:
    """As transformers does with packed positions: a T x T mask, keys and values repeated for their queries."""
    owner = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    mask = ((owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril())[
        None
    ]

    def attend(query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor) -> Tensor:
        shared = query_NHD.shape[1] // key_NGD.shape[1]
        key_NHD, value_NHD = (x.repeat_interleave(shared, 1) for x in (key_NGD, value_NGD))
        rows = (x.transpose(0, 1)[None] for x in (query_NHD, key_NHD, value_NHD))
        return F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=SCALE)[0].transpose(0, 1)

    return attend


def _segments(lengths: tuple[int, ...], device: torch.device) -> Attend:
    return lambda query, key, value: segment_attention(query, key, value, lengths, SCALE, causal=True)


def _flex(lengths: tuple[int, ...], device: torch.device) -> Attend:
    """torch's flex_attention with a block mask of the segments, which is made once."""
    owner = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (owner[query] == owner[key]) & (query >= key)

    mask = create_block_mask(visible, None, None, len(owner), len(owner), device=device.type)
    kernel = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def attend(query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor) -> Tensor:
        rows = (x.transpose(0, 1)[None].contiguous() for x in (query_NHD, key_NGD, value_NGD))
        return kernel(*rows, block_mask=mask, scale=SCALE, enable_gqa=True)[0].transpose(0, 1)

    return attend


WAYS: dict[str, Callable[[tuple[int, ...], torch.device], Attend]] = {
    "segments": _segments,
    "dense": _dense,
    "flex": _flex,  # last: compiling it takes longer than everything else
}


def _kernel_exactness(check: Check) -> None:
    """Random lengths, one of them 1, beside the textbook in float64, segment by segment."""
    lengths = (1, *np.random.default_rng(5).integers(2, check.pick(700, 20), 7).tolist(), 1)
    inputs = _inputs(check, sum(lengths), 2 * KEY_HEADS)
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    exact = torch.cat([_textbook(*(x[a:b] for x in wide)) for a, b in pairwise(np.cumsum([0, *lengths]).tolist())])
    cotangent = torch.randn(exact.shape, dtype=torch.float64)
    out = segment_attention(*inputs, lengths, SCALE, causal=True)
    out.backward(cotangent.to(out))
    exact.backward(cotangent)
    pairs = {"values": (out, exact)} | {
        f"gradient of {name}": (ours.grad, theirs.grad)
        for name, ours, theirs in zip(("queries", "keys", "values"), inputs, wide, strict=True)
    }
    for name, (found, wanted) in pairs.items():
        assert found is not None
        assert wanted is not None
        check.add(f"segments - float64: {name}", _apart(found, wanted), "of the norm", "bf16", at_most=KERNEL_LIMIT)


def _textbook(query_LHD: Tensor, key_LGD: Tensor, value_LGD: Tensor) -> Tensor:
    shared = query_LHD.shape[1] // key_LGD.shape[1]
    key_LHD, value_LHD = (x.repeat_interleave(shared, 1) for x in (key_LGD, value_LGD))
    scores_HLL = torch.einsum("qhd,khd->hqk", query_LHD, key_LHD) * SCALE
    hidden = torch.ones(scores_HLL.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores_HLL.masked_fill(hidden, -torch.inf).softmax(-1), value_LHD)


def _apart(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).norm() / wanted.norm())


def packed_as_alone(check: Check) -> None:
    """Hidden states and gradients of samples in a padded pack beside those of each alone, for each attention."""
    config = config_of("2b", small=True)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 4, ["full_attention"] * 4
    pixels, side = pixel_spec(config, 64 * 64, 128 * 128), 64
    chosen = [
        teacher_segment(samples(config.image_token_id, 1, side * wide, side, pixels.factor, objects)[0])
        for objects, wide in check.pick(((7, 1), (1, 2), (3, 1), (12, 2), (2, 1)), ((2, 1), (1, 2), (3, 1)))
    ]
    longest = max(segment.length for segment in chosen)
    layout = collator(config, pixels, longest + min(segment.length for segment in chosen))
    pack, alone = layout(chosen).to(check.device), [layout([segment]).to(check.device) for segment in chosen]
    for way in ("segments", "sdpa"):
        for precision, limits in {"float32": (2e-5, 2e-4), "bf16": (2e-2, 6e-2)}.items():
            name = f"{way}, {precision}"
            with check.part(name, way == "segments"), product_precision("highest"):
                model = build(config, check.device)
                use_segment_attention(model) if way == "segments" else model.set_attn_implementation(way)
                apart = _packed_error(model, pack, alone, layout.rows(chosen), precision == "bf16")
                for what, value, limit in zip(("hidden states", "gradients"), apart, limits, strict=True):
                    check.add(f"{name}: {what}", value, "of the norm", "", limit)


def _packed_error(
    model: Qwen3VLForConditionalGeneration,
    pack: PackedBatch,
    alone: list[PackedBatch],
    rows: list[list[int]],
    bf16: bool,
) -> tuple[float, float]:
    """Relative error of hidden states and of the summed gradient, the pack beside each segment alone."""

    def hidden(batch: PackedBatch) -> Tensor:
        with torch.autocast(pack.input_ids.device.type, torch.bfloat16, enabled=bf16):
            return hidden_states(model, batch).float()

    width = pack.input_ids.shape[1]
    together = hidden(pack)
    parts: list[Tensor] = []
    for r, row in enumerate(rows):
        at = r * width
        for i in row:
            n = alone[i].input_ids.shape[1]
            parts.append(together[at : at + n])
            at += n
    order = [i for row in rows for i in row]
    singles = [hidden(alone[i]) for i in order]
    directions = [torch.randn_like(x) for x in singles]
    gradients = []
    for states in (parts, singles):
        model.zero_grad(set_to_none=True)
        torch.stack([(x * d).sum() for x, d in zip(states, directions, strict=True)]).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return _apart(torch.cat(parts), torch.cat(singles)), _apart(*gradients)
