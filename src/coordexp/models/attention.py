"""Attention over packed segments without a mask, and patch embedding as the matrix product that it is.

A packed row holds segments that must not see each other. transformers keeps them apart by a dense T x T mask, and most
of what it then computes is thrown away; of pictures it makes one call each. Here each segment attends to itself alone:
by torch's variable-length kernel where there is one, otherwise by plain products over groups of segments. Both come in
through transformers' registries of attention functions; a forward without segments (generation with its cache) takes
transformers' own path, mask included.

    use_segment_attention(model)   # once, by whoever loads or builds a model
    with packed():                 # models/forward.py alone
        model.model(..., segments=batch.segments)

Shapes: B rows of T tokens, N = B * T of them in one line; H query heads, G key heads, D head size; S segments of one
group, padded to L tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Qwen3VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coordexp.packing.segments import Groups, Segments

TEXT = "coordexp_segments"
# The vision tower hands over all pictures in one call, with their bounds, to a function with this word in its name.
VISION = "coordexp_flash_segments"

_is_packed: ContextVar[bool] = ContextVar("is_packed", default=False)


def use_segment_attention(model: Qwen3VLForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """Make the model's forwards go this way, in place, and return it; weights, their names and files stay."""
    model.set_attn_implementation({"text_config": TEXT, "vision_config": VISION})
    visual = model.model.visual
    if not isinstance(visual.patch_embed, PatchProduct):
        visual.patch_embed = PatchProduct(visual.patch_embed.proj)
    return model


@contextmanager
def packed() -> Iterator[None]:
    """In here no mask is built: the forward is given its segments."""
    token = _is_packed.set(True)
    try:
        yield
    finally:
        _is_packed.reset(token)


class PatchProduct(nn.Module):
    """Qwen3-VL's patch embedding, a convolution whose kernel is its stride, as one matrix product."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, patches: Tensor) -> Tensor:
        """(P, patch volume) -> (P, D)."""
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


def segment_attention(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Segments, scale: float, causal: bool
) -> Tensor:
    """(N, H, D) attention of each segment over itself; all three of one dtype."""
    if kernel := _kernel_for(query_NHD):
        return kernel(query_NHD, key_NGD, value_NGD, segments, scale, causal)
    return _grouped_products(query_NHD, key_NGD, value_NGD, segments, scale, causal)


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float, bool], Tensor]


def _kernel_for(query: Tensor) -> Kernel | None:
    """torch's variable-length attention, where torch, device and number format have it."""
    fits = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if fits and _takes_windows() and torch.cuda.get_device_capability(query.device) >= (8, 0):
        return _variable_length
    return None


@cache
def _varlen_options() -> frozenset[str]:
    """What this build of torch lets one say to `varlen_attn`; nothing if it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _takes_windows() -> bool:
    return "window_size" in _varlen_options()  # before, `is_causal` said the same


def _variable_length(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Segments, scale: float, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    shared = query_NHD.shape[1] // key_NGD.shape[1]
    if shared > 1 and "enable_gqa" in _varlen_options():
        options["enable_gqa"] = True
    elif shared > 1:
        key_NGD, value_NGD = (x.repeat_interleave(shared, 1) for x in (key_NGD, value_NGD))
    bounds, longest = segments.bounds, segments.longest
    out_NHD = varlen_attn(
        query_NHD.contiguous(), key_NGD.contiguous(), value_NGD.contiguous(), bounds, bounds, longest, longest,
        scale=scale, window_size=(-1, 0) if causal else (-1, -1), **options,
    )  # fmt: skip
    assert isinstance(out_NHD, Tensor)  # without the statistics that it can return too
    return out_NHD


def _grouped_products(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Segments, scale: float, causal: bool
) -> Tensor:
    """By batched products over groups of segments: on a CPU the fused kernel's backward is slow for short sequences."""
    shared = query_NHD.shape[1] // key_NGD.shape[1]
    groups = _groups(segments.lengths, query_NHD.shape[1], causal, query_NHD.device)
    own = _groups(segments.lengths, key_NGD.shape[1], causal, query_NHD.device)
    grouped = (_grouped(query_NHD, groups), _grouped(key_NGD, own), _grouped(value_NGD, own))
    out = []
    for query, key, value in zip(*grouped, strict=True):
        if shared > 1:
            key, value = (x.repeat_interleave(shared, 0) for x in (key, value))
        out.append(_products(query, key, value, scale, causal).flatten(0, 1))
    return _InLine.apply(torch.cat(out), groups.places).view(query_NHD.shape)


@lru_cache(maxsize=16)
def _groups(lengths: tuple[int, ...], heads: int, causal: bool, device: torch.device) -> Groups:
    """The same for every layer of a forward. Only what is causal may be padded: nothing sees what follows it."""
    with torch.inference_mode(False):  # also asked in there, and then remembered for a step of training
        return Groups.of(lengths, heads, padded=causal).to(device)


def _grouped(states_NHD: Tensor, groups: Groups) -> Iterator[Tensor]:
    """(S * H, L, D) of each group."""
    heads = states_NHD.shape[1]
    places = _Gathered.apply(states_NHD.flatten(0, 1), groups.rows, groups.places)
    pieces = places.split([n * heads * length for n, length in groups.shapes])
    return (piece.view(n * heads, length, -1) for piece, (n, length) in zip(pieces, groups.shapes, strict=True))


def _products(query_SLD: Tensor, key_SLD: Tensor, value_SLD: Tensor, scale: float, causal: bool) -> Tensor:
    """(S, L, D), where S counts each head of each segment."""
    length = query_SLD.shape[1]
    masked_LL = query_SLD.new_zeros(length, length)
    if causal:
        masked_LL = masked_LL.fill_(-torch.inf).triu_(1)
    scores_SLL = torch.baddbmm(masked_LL, query_SLD, key_SLD.mT, beta=int(causal), alpha=scale)
    return scores_SLL.softmax(-1) @ value_SLD


class _Gathered(torch.autograd.Function):
    """Tokens to their places in the groups. The gradient at padding is zero, so that the way back is a gather too."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return tokens.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _InLine(torch.autograd.Function):
    """The way back; padding is dropped."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.n_places = len(places)
        return places.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.n_places, *grad.shape[1:]).index_copy_(0, back, grad), None


def _text_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: (B, H, T, D) in, (B, T, H, D) out."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    out_NHD = _in_compute_dtype(query, key, value, segments, scaling, causal=True)
    return out_NHD.unflatten(0, (query.shape[0], query.shape[2])), None


def _vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    pictures: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """All pictures of a forward at once, each over itself; shapes as for text, with one row."""
    if pictures is None:  # generation, which knows no batch of ours
        pictures = Segments(tuple(torch.diff(cu_seq_lens_q).tolist()), cu_seq_lens_q.int())
    return _in_compute_dtype(query, key, value, pictures, scaling, causal=False)[None], None


def _in_compute_dtype(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, causal: bool
) -> Tensor:
    """(B, H, T, D) each to (N, H, D), in one dtype: under autocast the norms leave queries and keys in float32."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query_NHD, key_NGD, value_NGD = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    with torch.autocast(kind, enabled=False):
        return segment_attention(query_NHD, key_NGD, value_NGD, segments, scale, causal)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    return None if _is_packed.get() else sdpa_mask(*args, **options)


AttentionInterface.register(TEXT, _text_attention)
AttentionMaskInterface.register(TEXT, _mask)
AttentionInterface.register(VISION, _vision_attention)
