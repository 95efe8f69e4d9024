"""Segment attention equals attention over each segment alone, and the dense mask that it replaces.

Shapes: N tokens, H and G heads of queries and keys, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from coordexp.infra.device import GROUPED, VARIABLE_LENGTH, attention_kernel, varlen_options
from coordexp.models import attention
from coordexp.models.attention import Groups, PatchProduct, segment_attention, use_segment_attention
from coordexp.models.forward import hidden_states
from coordexp.models.loading import Checkpoint, load_checkpoint, save_checkpoint
from coordexp.packing.collator import PackedBatch, Segment, teacher_segment
from helpers import World, new_checkpoint

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
HEADS = st.sampled_from([(2, 2), (4, 2), (3, 1)])


def one_by_one(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, lengths: Sequence[int], causal: bool, scale: float
) -> Tensor:
    """The reference: torch's own function, one segment at a time."""
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (query_NHD, key_NGD, value_NGD)), strict=True)
    done = [F.scaled_dot_product_attention(*p, is_causal=causal, enable_gqa=True, scale=scale) for p in parts]
    return torch.cat(done, 2)[0].transpose(0, 1)


def inputs(n: int, heads: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values (N, heads, 8) that require gradients; equal for equal arguments."""
    generator = torch.Generator().manual_seed(n)
    sizes = (heads[0], heads[1], heads[1])
    return [torch.randn(n, h, 8, generator=generator, dtype=dtype).requires_grad_() for h in sizes]


def check_against_one_by_one(lengths: list[int], heads: tuple[int, int], causal: bool) -> None:
    """Output and gradients."""
    ours, theirs = inputs(sum(lengths), heads), inputs(sum(lengths), heads)
    out = segment_attention(*ours, tuple(lengths), 0.3, causal)
    expected = one_by_one(*theirs, lengths, causal, 0.3)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, HEADS, st.booleans())
def test_each_segment_attends_to_itself(lengths: list[int], heads: tuple[int, int], causal: bool) -> None:
    check_against_one_by_one(lengths, heads, causal)


@pytest.mark.parametrize("known", [{"window_size", "enable_gqa"}, {"window_size"}, {"is_causal"}])
@settings(max_examples=10, deadline=None)
@given(LENGTHS, HEADS, st.booleans())
def test_the_variable_length_kernel_gets_equivalent_options_in_each_version_of_torch(
    known: set[str], lengths: list[int], heads: tuple[int, int], causal: bool
) -> None:
    """The stand-in accepts its arguments, and checks only bounds and window."""

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float, **options: Any,
    ) -> Tensor:  # fmt: skip
        assert options.keys() <= known
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == max_k == int(cu_seq_q.diff().max())
        assert options.get("enable_gqa", False) == (query.shape[1] != key.shape[1])
        assert options.get("window_size", (-1, -1)) in ((-1, 0), (-1, -1))
        says_causal = options.get("is_causal", False) or options.get("window_size") == (-1, 0)
        return one_by_one(query, key, value, cu_seq_q.diff().tolist(), says_causal, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", kernel)
        patch.setattr(attention, "varlen_options", lambda: frozenset(known))
        patch.setattr(attention, "_has_kernel", lambda _: True)
        check_against_one_by_one(lengths, heads, causal)


def test_torch_has_the_kernel_and_cpus_do_not_use_it() -> None:
    assert {"window_size", "enable_gqa", "scale"} <= varlen_options()
    assert attention_kernel(torch.device("cuda"), torch.bfloat16) == VARIABLE_LENGTH
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        assert attention_kernel(torch.device(device), dtype) == GROUPED


@pytest.mark.parametrize(("head_size", "fits"), [(64, True), (72, True), (128, True), (20, False), (264, False)])
def test_unsupported_head_sizes_use_matrix_products(monkeypatch: pytest.MonkeyPatch, head_size, fits) -> None:
    monkeypatch.setattr(attention, "attention_kernel", lambda *_: VARIABLE_LENGTH)
    assert attention._has_kernel(torch.zeros(1, 1, head_size)) == fits


@pytest.mark.gpu
@settings(max_examples=20, deadline=None)
@given(LENGTHS, HEADS, st.booleans())
def test_the_kernel_equals_float64(lengths: list[int], heads: tuple[int, int], causal: bool) -> None:
    exact = inputs(sum(lengths), heads)
    on_gpu = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    assert attention._has_kernel(on_gpu[0])
    out = segment_attention(*on_gpu, tuple(lengths), 0.3, causal)
    expected = one_by_one(*exact, lengths, causal, 0.3)
    out.double().sum().backward()
    expected.sum().backward()
    for found, wanted in [(out, expected), *((x.grad, y.grad) for x, y in zip(on_gpu, exact, strict=True))]:
        assert (found.cpu().double() - wanted).norm() <= 2e-2 * wanted.norm() + 1e-3


@given(LENGTHS, st.integers(1, 3), st.booleans())
def test_groups_contain_every_row_once_by_segment_head_and_token(lengths: list[int], heads: int, padded: bool) -> None:
    groups = Groups.of(lengths, heads, padded)
    assert groups.rows[groups.places].tolist() == list(range(heads * sum(lengths)))
    assert sum(n for n, _ in groups.shapes) == heads * len(lengths)
    assert max(length for _, length in groups.shapes) == max(lengths)
    for piece in groups.pieces(groups.rows[:, None]):
        rows = piece.view(-1, heads, piece.shape[1])
        assert (rows % heads == torch.arange(heads)[:, None]).all()
        assert (rows // heads == (rows // heads)[:, :1]).all()  # all heads have the same tokens
    assert padded or len(groups.rows) == heads * sum(lengths)


@pytest.fixture(scope="module")
def segments(world: World) -> list[Segment]:
    """Some segments of the world; the last row is shorter than the others."""
    return [teacher_segment(sample) for sample in world.samples]


def gradients(checkpoint: Checkpoint, batch: PackedBatch, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states of real tokens, and the gradients of a function of them."""
    checkpoint.model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        hidden = hidden_states(checkpoint.model, batch)
    # Not their squares: the norm of normalized states has almost no gradient.
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()
    named = {name: p.grad for name, p in checkpoint.model.named_parameters() if p.grad is not None}
    return hidden.detach(), torch.cat([named[name].flatten() for name in sorted(named)])


def plain_checkpoint() -> Checkpoint:
    """The same weights under transformers' own attention and patch embedding."""
    checkpoint = new_checkpoint()
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(checkpoint.model.config.to_dict()))
    model.load_state_dict(checkpoint.model.state_dict())
    model.generation_config = checkpoint.model.generation_config
    return replace(checkpoint, model=model.eval())


def test_packed_rows_give_the_result_of_the_dense_mask(
    world: World, pair: tuple[Checkpoint, Checkpoint], segments: list[Segment]
) -> None:
    plain, ours = pair
    rows = [list(range(len(segments) - 1)), [len(segments) - 1]]
    batch = world.collator(ours).layout(segments, rows)
    assert batch.input_ids.shape[1] > segments[-1].length  # one row is padded
    (expected, expected_grads), (found, grads) = gradients(plain, batch), gradients(ours, batch)
    assert (found - expected).norm() < 4e-6 * expected.norm()
    assert (grads - expected_grads).norm() < 4e-5 * expected_grads.norm()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 9))
def test_random_segments_give_the_result_of_the_dense_mask(
    world: World, pair: tuple[Checkpoint, Checkpoint], lengths: list[int], padding: int
) -> None:
    """Text only, with any lengths including 1."""
    plain, ours = pair
    lengths = [*lengths, padding] if padding else lengths
    batch = text_batch(world, ours, lengths)
    (expected, expected_grads), (found, grads) = gradients(plain, batch), gradients(ours, batch)
    assert (found - expected).norm() < 4e-6 * expected.norm()
    assert (grads - expected_grads).norm() < 4e-5 * expected_grads.norm()


@pytest.fixture(scope="module")
def pair() -> tuple[Checkpoint, Checkpoint]:
    return plain_checkpoint(), new_checkpoint()


def text_batch(world: World, checkpoint: Checkpoint, lengths: list[int]) -> PackedBatch:
    """One row of random tokens, and one unused image, because a forward pass requires one."""
    seen = world.collator(checkpoint)([teacher_segment(world.samples[0])])
    ids = torch.randint(0, 400, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(4, 1, -1)
    return replace(
        seen,
        input_ids=torch.cat([seen.input_ids, ids], 1),
        position_ids=torch.cat([seen.position_ids, positions], 2),
        segments=(*seen.segments, *lengths),
    )


def test_bfloat16_is_about_as_far_from_float32_as_with_the_mask(
    world: World, pair: tuple[Checkpoint, Checkpoint], segments: list[Segment]
) -> None:
    batch = world.collator(pair[1])(segments)
    _, exact = gradients(pair[0], batch)
    errors = [(gradients(p, batch, torch.bfloat16)[1] - exact).norm() / exact.norm() for p in pair]
    assert errors[1] < 2 * errors[0]


class Shapes(TorchDispatchMode):
    """Records the last two dimensions of all computed tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.seen.add(tuple(tensor.shape[-2:]))
        return out


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_nothing_as_large_as_a_mask_is_ever_computed(world: World, segments: list[Segment], activations: str) -> None:
    squares = []
    for checkpoint in (plain_checkpoint(), new_checkpoint()):
        if activations == "recompute":
            checkpoint.model.train().gradient_checkpointing_enable({"use_reentrant": False})
        batch = world.collator(checkpoint).layout(segments, [list(range(len(segments)))])
        width = batch.input_ids.shape[1]
        with Shapes() as shapes:
            hidden_states(checkpoint.model, batch).sum().backward()
        squares.append((width, width) in shapes.seen)
    assert squares == [True, False]


@torch.no_grad()
def test_a_changed_image_affects_only_its_own_segment(world: World, segments: list[Segment]) -> None:
    checkpoint = new_checkpoint()
    batch = world.collator(checkpoint).layout(segments[:2], [[0, 1]])
    before = hidden_states(checkpoint.model, batch)
    patches = int(batch.image_grid_thw[0].prod())
    batch.pixel_values[:patches] += 1.0
    moved = (hidden_states(checkpoint.model, batch) - before).abs().amax(-1)
    assert moved[: segments[0].length].max() > 1e-3
    assert moved[segments[0].length :].max() == 0


@torch.no_grad()
def test_generation_with_a_cache_uses_the_attention_of_transformers(
    world: World, pair: tuple[Checkpoint, Checkpoint], segments: list[Segment]
) -> None:
    """Two prompts, so that one is padded."""
    batches = [world.collator(pair[0])([segment]) for segment in segments[:2]]
    width = max(batch.input_ids.shape[1] for batch in batches)
    left = [width - batch.input_ids.shape[1] for batch in batches]
    assert any(left)
    ids = torch.cat([F.pad(b.input_ids, (n, 0), value=1) for b, n in zip(batches, left, strict=True)])
    given_inputs = {
        "input_ids": ids, "attention_mask": (torch.arange(width) >= torch.tensor(left)[:, None]).long(),
        "mm_token_type_ids": (ids == pair[0].model.config.image_token_id).int(),
        "pixel_values": torch.cat([b.pixel_values for b in batches]),
        "image_grid_thw": torch.cat([b.image_grid_thw for b in batches]),
    }  # fmt: skip
    answers = [p.model.eval().generate(**given_inputs, max_new_tokens=12, do_sample=False) for p in pair]
    assert answers[0].tolist() == answers[1].tolist()


def test_loaded_and_built_models_use_it_and_files_do_not_record_it(tmp_path: Path) -> None:
    built = new_checkpoint()
    save_checkpoint(tmp_path / "ours", built)
    save_checkpoint(tmp_path / "plain", plain_checkpoint())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    for checkpoint in (built, load_checkpoint(tmp_path / "plain")):
        use_segment_attention(checkpoint.model)  # calling it twice has no further effect
        config, visual = checkpoint.model.config, checkpoint.model.model.visual
        found = config.text_config._attn_implementation, config.vision_config._attn_implementation
        assert found == (attention.TEXT, attention.VISION)
        assert isinstance(visual.patch_embed, PatchProduct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patches_are_a_matrix_product(dtype: torch.dtype) -> None:
    proj = torch.nn.Conv3d(3, 10, (2, 4, 4), stride=(2, 4, 4)).to(dtype)
    patches = torch.randn(7, 3 * 2 * 4 * 4, dtype=dtype)
    expected = proj(patches.view(-1, 3, 2, 4, 4)).flatten(1)
    torch.testing.assert_close(PatchProduct(proj)(patches), expected)
