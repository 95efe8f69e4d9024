"""Attention over packed segments without a mask, and patch embedding as the matrix product that it is.

A packed row holds segments that must not see each other. transformers keeps them apart by a dense T x T mask, and most
of what it then computes is thrown away; of images it makes one call each. Here each segment attends to itself alone:
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
# The vision tower hands over all images in one call, with their bounds, to a function with this word in its name.
VISION = "coordexp_flash_segments"

MAX_GROUPS = 4  # of segments of similar length: more waste less padding, but make more and smaller products
Lengths = tuple[int, ...]  # of consecutive segments of one line of tokens, or of the patches of images; all above 0

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
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Lengths, scale: float, causal: bool
) -> Tensor:
    """(N, H, D) attention of each segment over itself; all three of one dtype."""
    attend = _variable_length if _has_kernel(query_NHD) else _grouped_products
    return attend(query_NHD, key_NGD, value_NGD, segments, scale, causal)


def _has_kernel(query: Tensor) -> bool:
    """Whether torch's variable-length attention takes it; of head sizes it takes Qwen3-VL's (64, 72, 128)."""
    size = query.shape[-1]
    return size % 8 == 0 and size <= 256 and attention_kernel(query.device, query.dtype) == VARIABLE_LENGTH


def _variable_length(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Lengths, scale: float, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = varlen_options()  # torch 2.11 lacks some, and older ones say `is_causal`
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
    assert isinstance(out_NHD, Tensor)  # without the statistics that it can return too
    return out_NHD


@lru_cache(maxsize=16)
def _bounds(lengths: Lengths, device: torch.device) -> Tensor:
    """(segments + 1,) int32: where each begins, and the end; the same for every layer of a forward."""
    with torch.inference_mode(False):  # what decoding leaves here must serve training too
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _grouped_products(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, segments: Lengths, scale: float, causal: bool
) -> Tensor:
    """By batched products over groups of segments: on a CPU the fused kernel's backward is slow for short sequences."""
    n_heads = query_NHD.shape[1]
    shared = n_heads // key_NGD.shape[1]
    if shared > 1:
        key_NGD, value_NGD = (x.repeat_interleave(shared, 1) for x in (key_NGD, value_NGD))
    groups = _groups(segments, n_heads, causal, query_NHD.device)
    rows = (x.flatten(0, 1) for x in (query_NHD, key_NGD, value_NGD))
    return _GroupedProducts.apply(*rows, groups, scale, causal).view(query_NHD.shape)


@lru_cache(maxsize=16)
def _groups(lengths: Lengths, heads: int, causal: bool, device: torch.device) -> Groups:
    """The same for every layer of a forward. Only what is causal may be padded: nothing sees what follows it."""
    with torch.inference_mode(False):  # also asked in there, and then remembered for a step of training
        return Groups.of(lengths, heads, padded=causal).to(device)


@dataclass(frozen=True, slots=True)
class Groups:
    """Segments gathered into groups of one padded length, so that few batched products serve all of them.

    A row is one head of one token, rows of a token one after another. In the groups they stand by segment, head and
    token, each group being (segments, heads, padded length).

    rows: (R,) which row stands at each place of the groups; padding repeats a segment's last token. places:
    (N * heads,) where each row stands. shapes: segments times heads, and padded length, of each group.
    """

    rows: Tensor
    places: Tensor
    shapes: tuple[tuple[int, int], ...]

    def pieces(self, states_RD: Tensor) -> list[Tensor]:
        """Views (segments * heads, padded length, D) of each group."""
        parts = states_RD.split([n * length for n, length in self.shapes])
        return [part.view(n, length, -1) for part, (n, length) in zip(parts, self.shapes, strict=True)]

    @classmethod
    def of(cls, lengths: Sequence[int], heads: int, padded: bool) -> Groups:
        """Group segments of similar length, or of equal length if they may not be padded."""
        sizes_S = np.array(lengths, np.int64)
        starts_S = np.cumsum(sizes_S) - sizes_S
        by_size, n_sizes = np.argsort(sizes_S, kind="stable"), len(set(lengths))
        if padded and n_sizes > MAX_GROUPS:
            groups = np.array_split(by_size, MAX_GROUPS)
        else:
            groups = np.split(by_size, np.flatnonzero(np.diff(sizes_S[by_size])) + 1)
        rows, places = [], np.empty(sizes_S.sum() * heads, np.int64)
        shapes: list[tuple[int, int]] = []
        first = 0  # place of the group
        for group in groups:
            longest = int(sizes_S[group].max())
            shape = (len(group), heads, longest)
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
        """The same with its indices on `device`."""
        return Groups(self.rows.to(device), self.places.to(device), self.shapes)


class _GroupedProducts(torch.autograd.Function):
    """Attention over groups, rows (N * H, D) in and out; in a group S counts each head of each segment.

    As one function, so that no gradient is gathered, transposed or scaled more than once.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float, causal: bool
    ) -> Tensor:
        gathered = [x.index_select(0, groups.rows) for x in (query, key, value)]
        out = torch.empty_like(gathered[0])
        probabilities = []
        for q_SLD, k_SLD, v_SLD, out_SLD in zip(*(groups.pieces(x) for x in (*gathered, out)), strict=True):
            length = q_SLD.shape[1]
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
        grad_out = torch.zeros_like(query).index_copy_(0, groups.places, grad)  # 0 at padding
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
    pictures: Lengths | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """All images of a forward at once, each over itself; shapes as for text, with one row."""
    if pictures is None:  # generation, which knows no batch of ours
        pictures = tuple(torch.diff(cu_seq_lens_q).tolist())
    return _in_compute_dtype(query, key, value, pictures, scaling, causal=False)[None], None


def _in_compute_dtype(
    query: Tensor, key: Tensor, value: Tensor, segments: Lengths, scale: float, causal: bool
) -> Tensor:
    """(B, H, T, D) each to (N, H, D), in one dtype: under autocast the norms leave queries and keys in float32."""
    dtype = compute_dtype(value)
    query_NHD, key_NGD, value_NGD = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    with without_autocast(query):
        return segment_attention(query_NHD, key_NGD, value_NGD, segments, scale, causal)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    return None if _is_packed.get() else sdpa_mask(*args, **options)


AttentionInterface.register(TEXT, _text_attention)
AttentionMaskInterface.register(TEXT, _mask)
AttentionInterface.register(VISION, _vision_attention)
