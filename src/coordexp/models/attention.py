"""Attention over packed segments without a mask, and patch embedding as a matrix product.

The segments of a packed row must not attend to each other ("cross-contamination", Krell et al., arXiv:2107.02027).
transformers separates them with a dense T x T mask and discards most of what it computes: k equal segments need only
1/k of the T x T scores. For images it makes one call each. Here each segment attends only to itself: with torch's
variable-length kernel (FlashAttention-2, arXiv:2307.08691) if available, otherwise with plain matrix products over
groups of segments. Both are registered in transformers' tables of attention functions. A forward pass without segments
(generation with a cache) uses transformers' own attention, including its mask.

    use_segment_attention(model)   # once, after loading or building a model
    with packed():                 # only in models/forward.py
        model.model(..., segments=batch.segments)

Shapes: B rows of T tokens, flattened to N = B * T; H query heads, G key heads, D head size; S segments of one group,
padded to L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Qwen3VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coordexp.infra.device import VARIABLE_LENGTH, attention_kernel, compute_dtype, varlen_options, without_autocast

TEXT = "coordexp_segments"
# transformers' vision tower passes all images in one call, with their bounds, if the name contains "flash".
VISION = "coordexp_flash_segments"

MAX_GROUPS = 4  # groups of segments of similar length: more groups mean less padding, but more and smaller products
Lengths = tuple[int, ...]  # lengths > 0 of consecutive segments of a token sequence, or numbers of patches per image

_is_packed: ContextVar[bool] = ContextVar("is_packed", default=False)


def use_segment_attention(model: Qwen3VLForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """Switch the model to segment attention, in place, and return it; weights and their names do not change."""
    model.set_attn_implementation({"text_config": TEXT, "vision_config": VISION})
    visual = model.model.visual
    if not isinstance(visual.patch_embed, PatchProduct):
        visual.patch_embed = PatchProduct(visual.patch_embed.proj)
    return model


@contextmanager
def packed() -> Iterator[None]:
    """Within the block, no mask is built: the forward pass gets segments instead."""
    token = _is_packed.set(True)
    try:
        yield
    finally:
        _is_packed.reset(token)


class PatchProduct(nn.Module):
    """Qwen3-VL's patch embedding as one matrix product: a convolution whose stride equals its kernel size."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, patches: Tensor) -> Tensor:
        """(P, patch volume) -> (P, D)."""
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


def segment_attention(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Lengths, scale: float, causal: bool
) -> Tensor:
    """Attention (N, H, D) of each segment over itself; all inputs have the same dtype."""
    attend = _variable_length if _has_kernel(query_NHD) else _grouped_products
    return attend(query_NHD, key_NGD, value_NGD, segments, scale, causal)


def _has_kernel(query: Tensor) -> bool:
    """Whether torch's variable-length kernel can be used; Qwen3-VL's head sizes (64, 72, 128) are supported."""
    size = query.shape[-1]
    return size % 8 == 0 and size <= 256 and attention_kernel(query.device, query.dtype) == VARIABLE_LENGTH


def _variable_length(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Lengths, scale: float, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = varlen_options()  # torch 2.11 lacks some options, and older versions have `is_causal`
    options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)}
    if "window_size" not in known:
        options = {"is_causal": causal}
    shared = query_NHD.shape[1] // key_NGD.shape[1]
    if shared > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif shared > 1:
        key_NGD, value_NGD = (x.repeat_interleave(shared, 1) for x in (key_NGD, value_NGD))
    bounds, longest = _bounds(segments, query_NHD.device), max(segments)
    out_NHD = varlen_attn(
        query_NHD.contiguous(), key_NGD.contiguous(), value_NGD.contiguous(), bounds, bounds, longest, longest,
        scale=scale, **options,
    )  # fmt: skip
    assert isinstance(out_NHD, Tensor)  # not a tuple with softmax statistics
    return out_NHD


@lru_cache(maxsize=16)
def _bounds(lengths: Lengths, device: torch.device) -> Tensor:
    """(segments + 1,) int32: start of each segment, then the end; cached, as all layers of a forward pass share it."""
    with torch.inference_mode(False):  # a cached tensor from decoding must be usable in training, too
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _grouped_products(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Lengths, scale: float, causal: bool
) -> Tensor:
    """Batched products over groups of segments: on a CPU, the fused kernel's backward is slow for short sequences."""
    n_heads = query_NHD.shape[1]
    shared = n_heads // key_NGD.shape[1]
    if shared > 1:
        key_NGD, value_NGD = (x.repeat_interleave(shared, 1) for x in (key_NGD, value_NGD))
    groups = _groups(segments, n_heads, causal, query_NHD.device)
    rows = (x.flatten(0, 1) for x in (query_NHD, key_NGD, value_NGD))
    return _GroupedProducts.apply(*rows, groups, scale, causal).view(query_NHD.shape)


@lru_cache(maxsize=16)
def _groups(lengths: Lengths, heads: int, causal: bool, device: torch.device) -> Groups:
    """The groups, cached: all layers of a forward pass share them.

    Only causal attention may be padded: padding comes after the tokens of a segment, and no token sees later ones.
    """
    with torch.inference_mode(False):  # a cached value from decoding must be usable in training, too
        return Groups.of(lengths, heads, padded=causal).to(device)


@dataclass(frozen=True, slots=True)
class Groups:
    """Segments gathered into groups with a common padded length, so that a few batched products serve all of them.

    A row is one head of one token; the rows of a token are consecutive. Each group has the layout (segments, heads,
    padded length).

    Attributes:
        rows: (R,) the row at each place of the groups; padding repeats the last token of a segment.
        places: (N * heads,) the place of each row.
        shapes: (segments * heads, padded length) of each group.
    """

    rows: Tensor
    places: Tensor
    shapes: tuple[tuple[int, int], ...]

    def pieces(self, states_RD: Tensor) -> list[Tensor]:
        """A view (segments * heads, padded length, D) of each group."""
        parts = states_RD.split([n * length for n, length in self.shapes])
        return [part.view(n, length, -1) for part, (n, length) in zip(parts, self.shapes, strict=True)]

    @classmethod
    def of(cls, lengths: Sequence[int], heads: int, padded: bool) -> Groups:
        """Group segments of similar length, or of equal length if padding is not allowed."""
        sizes_S = np.array(lengths, np.int64)
        starts_S = np.cumsum(sizes_S) - sizes_S
        by_size, n_sizes = np.argsort(sizes_S, kind="stable"), len(set(lengths))
        if padded and n_sizes > MAX_GROUPS:
            groups = np.array_split(by_size, MAX_GROUPS)
        else:
            groups = np.split(by_size, np.flatnonzero(np.diff(sizes_S[by_size])) + 1)
        rows, places = [], np.empty(sizes_S.sum() * heads, np.int64)
        shapes: list[tuple[int, int]] = []
        first = 0  # first place of the group
        for group in groups:
            longest = int(sizes_S[group].max())
            shape = (len(group), heads, longest)
            # Padding columns point to the segment's last token; their results are never read, their gradients are 0.
            columns, last = np.arange(longest), sizes_S[group, None, None] - 1
            tokens = starts_S[group, None, None] + np.minimum(columns, last)
            rows.append(tokens * heads + np.arange(heads)[:, None])
            is_token = np.broadcast_to(columns <= last, shape)
            places[rows[-1][is_token]] = (first + np.arange(rows[-1].size).reshape(shape))[is_token]
            shapes.append((len(group) * heads, longest))
            first += rows[-1].size
        all_rows = np.concatenate([group.ravel() for group in rows])
        return cls(torch.from_numpy(all_rows), torch.from_numpy(places), tuple(shapes))

    def to(self, device: torch.device) -> Groups:
        """The same groups with indices on `device`."""
        return Groups(self.rows.to(device), self.places.to(device), self.shapes)


class _GroupedProducts(torch.autograd.Function):
    """Attention over groups: rows (N * H, D) in and out; within a group, S counts the heads of all segments.

    One autograd function for the whole computation: separate operations would gather, transpose and scale gradients
    several times. With P = softmax(scale * Q K^T), the backward pass is dV = P^T dO, dP = dO V^T,
    dS = P * (dP - rowsum(P * dP)), dQ = scale * dS K, dK = scale * dS^T Q (FlashAttention, arXiv:2205.14135,
    appendix B.2).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float, causal: bool
    ) -> Tensor:
        gathered = [x.index_select(0, groups.rows) for x in (query, key, value)]
        out = torch.empty_like(gathered[0])
        # Scores are stored per group, S * L * L in total instead of one T x T matrix per head.
        probabilities = []
        for q_SLD, k_SLD, v_SLD, out_SLD in zip(*(groups.pieces(x) for x in (*gathered, out)), strict=True):
            length = q_SLD.shape[1]
            # beta = int(causal): without a causal mask, baddbmm ignores `mask_LL`.
            mask_LL = q_SLD.new_full((length, length), -torch.inf).triu_(1)
            p_SLL = torch.baddbmm(mask_LL, q_SLD, k_SLD.mT, beta=int(causal), alpha=scale).softmax(-1)
            torch.bmm(p_SLL, v_SLD, out=out_SLD)
            probabilities.append(p_SLL)
        ctx.save_for_backward(*gathered, *probabilities)
        ctx.groups, ctx.scale = groups, scale
        return out.index_select(0, groups.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups, scale = ctx.groups, ctx.scale
        query, key, value, *probabilities = ctx.saved_tensors
        grad_out = torch.zeros_like(query).index_copy_(0, groups.places, grad)  # stays 0 at padding
        grads = [torch.empty_like(query) for _ in range(3)]
        pieces = zip(*(groups.pieces(x) for x in (query, key, value, grad_out, *grads)), probabilities, strict=True)
        for q_SLD, k_SLD, v_SLD, g_SLD, grad_q, grad_k, grad_v, p_SLL in pieces:
            torch.bmm(p_SLL.mT, g_SLD, out=grad_v)
            grad_p = g_SLD @ v_SLD.mT
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p_SLL, -1, p_SLL.dtype)
            torch.baddbmm(grad_q, grad_scores, k_SLD, beta=0, alpha=scale, out=grad_q)
            torch.baddbmm(grad_k, grad_scores.mT, q_SLD, beta=0, alpha=scale, out=grad_k)
        return *(x.index_select(0, groups.places) for x in grads), None, None, None


def _text_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    segments: Lengths | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function with the interface of transformers: (B, H, T, D) in, (B, T, H, D) out."""
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
    pictures: Lengths | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of every image of a forward pass over itself; shapes as for text, with one row."""
    if pictures is None:  # transformers' generate, which does not pass it
        pictures = tuple(torch.diff(cu_seq_lens_q).tolist())
    return _in_compute_dtype(query, key, value, pictures, scaling, causal=False)[None], None


def _in_compute_dtype(
    query: Tensor, key: Tensor, value: Tensor, segments: Lengths, scale: float, causal: bool
) -> Tensor:
    """Reshape (B, H, T, D) to (N, H, D), in one dtype: under autocast, norms leave queries and keys in float32."""
    dtype = compute_dtype(value)
    query_NHD, key_NGD, value_NGD = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    with without_autocast(query):
        return segment_attention(query_NHD, key_NGD, value_NGD, segments, scale, causal)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    return None if _is_packed.get() else sdpa_mask(*args, **options)


AttentionInterface.register(TEXT, _text_attention)
AttentionMaskInterface.register(TEXT, _mask)
AttentionInterface.register(VISION, _vision_attention)
