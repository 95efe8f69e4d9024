"""Turn segments into one packed batch: input ids, positions, pixels, and supervised slots.

A *slot* is the position whose logits predict a token: the token at flat position i of a row is predicted at i - 1.
Slots are listed per loss family instead of a shifted label tensor. The vocabulary head (152k tokens in Qwen3-VL) then
runs on supervised positions only, not on image and prompt tokens.

Shapes: B rows, T tokens per row, S text slots, N = 4 * G coordinate slots of G boxes, U slots of tokens whose
probability is reduced, O slots of the coordinate tokens of a reordered annotation, P patches, I images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordexp.geometry.bins import target_bins
from coordexp.packing.pixels import PixelSpec, load_sample_rgb, patchify
from coordexp.packing.planner import pack_rows
from coordexp.packing.samples import Sample
from coordexp.text.codecs import Role

_TEXT_ROLES = (Role.STRUCT, Role.DESC, Role.NUMBER, Role.CLOSE)


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence: a sample's image and prompt, an answer, and the supervision of its tokens.

    `text_weights` has one weight per answer token (0: no text loss). `box_tokens` (G, 4) are the answer positions of
    the coordinates of each supervised box, `box_targets` (G, 4) their unrounded target bins. `unlikely_tokens` (U,) are
    the answer positions of tokens with an unlikelihood loss, `reordered_tokens` (O,) those of coordinate tokens that
    are supervised by cross entropy.
    """

    sample: Sample
    answer_ids: NDArray[np.int32]
    answer_roles: NDArray[np.uint8]
    text_weights: NDArray[np.float32]
    box_tokens: NDArray[np.int64]
    box_targets: NDArray[np.float32]
    unlikely_tokens: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    reordered_tokens: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def length(self) -> int:
        """Number of tokens of prompt and answer."""
        return self.sample.prompt_length + len(self.answer_ids)


def coordinate_positions(roles: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions of the coordinate tokens of a complete answer, four per object: (M, 4)."""
    return np.flatnonzero(roles == Role.COORD).reshape(-1, 4)


def teacher_segment(sample: Sample) -> Segment:
    """The segment with a sample's own answer (teacher forcing): boxes for all objects, text loss on other tokens."""
    box_tokens = coordinate_positions(sample.answer_roles)
    answered = sample.boxes_xyxy_px[: len(box_tokens)]  # crowd regions come last and are not in the answer
    targets = target_bins(answered, sample.width, sample.height)
    return Segment(
        sample=sample,
        answer_ids=sample.answer_ids,
        answer_roles=sample.answer_roles,
        text_weights=np.isin(sample.answer_roles, _TEXT_ROLES).astype(np.float32),
        box_tokens=box_tokens,
        box_targets=targets.astype(np.float32),
    )


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Model inputs and supervised slots. Slot tensors hold flat indices into B * T."""

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (4, B, T) int64
    pixel_values: Tensor  # (P, D) float32
    image_grid_thw: Tensor  # (I, 3) int64
    text_slots: Tensor  # (S,) int64
    text_targets: Tensor  # (S,) int64 token ids
    text_weights: Tensor  # (S,) float32
    text_roles: Tensor  # (S,) uint8
    coord_slots: Tensor  # (N,) int64, grouped by box: x1, y1, x2, y2
    coord_targets: Tensor  # (N,) float32 bins
    unlikely_slots: Tensor  # (U,) int64
    unlikely_ids: Tensor  # (U,) int64 token ids
    reordered_slots: Tensor  # (O,) int64
    reordered_ids: Tensor  # (O,) int64 token ids
    segments: tuple[int, ...]  # lengths, one row after another; the padding of a row is a segment, too
    pictures: tuple[int, ...]  # number of patches per image
    n_segments: int
    n_tokens: int  # without padding

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            slot.name: value.to(device)
            for slot in fields(self)
            if isinstance(value := getattr(self, slot.name), Tensor)
        }
        return replace(self, **moved)


class Collator:
    """Builds packed batches from segments; reads their images below the image root in the given pixel format."""

    def __init__(self, image_root: Path, pixels: PixelSpec, image_token_id: int, pad_id: int, pack_tokens: int) -> None:
        self._image_root = image_root
        self._pixels = pixels
        self._image_token_id = image_token_id
        self._pad_id = pad_id
        self._pack_tokens = pack_tokens

    def __call__(self, segments: Sequence[Segment]) -> PackedBatch:
        """Pack segments into rows (first-fit decreasing) and lay out the batch."""
        return self.layout(segments, self.rows(segments))

    def rows(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Assign segments to rows; the order is that of the slots."""
        return pack_rows([s.length for s in segments], self._pack_tokens)

    def patches(self, sample: Sample) -> NDArray[np.float32]:
        """The image of a sample in the model's input format (`packing.pixels.patchify`); raises DataError."""
        return patchify(self._load(sample), self._pixels)

    def layout(
        self,
        segments: Sequence[Segment],
        rows: Sequence[Sequence[int]],
        pictures: Sequence[NDArray[np.float32]] | None = None,
    ) -> PackedBatch:
        """Lay out segments in the given rows; padding at the end of a row is a separate segment.

        `pictures` are the `patches` of the segments, if they were read already.
        """
        width, side = max(sum(segments[i].length for i in row) for row in rows), self._pixels.patch_size
        input_ids = np.full((len(rows), width), self._pad_id, dtype=np.int64)
        positions = np.empty((4, len(rows), width), dtype=np.int64)
        ordered: list[Segment] = []
        answer_starts: list[int] = []
        patches, grids, lengths = [], [], []
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                segment = segments[i]
                end = at + segment.length
                input_ids[r, at:end], positions[:, r, at:end] = self._segment_inputs(segment)
                ordered.append(segment)
                answer_starts.append(r * width + at + segment.sample.prompt_length)
                patches.append(self.patches(segment.sample) if pictures is None else pictures[i])
                grids.append((1, segment.sample.resized_height // side, segment.sample.resized_width // side))
                lengths.append(segment.length)
                at = end
            positions[:, r, at:] = np.arange(width - at)
            if at < width:
                # As a separate segment, padding attends only to itself, and no attention mask is needed.
                lengths.append(width - at)
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(positions),
            pixel_values=torch.from_numpy(np.concatenate(patches)),
            image_grid_thw=torch.tensor(grids, dtype=torch.int64),
            **_slot_tensors(ordered, answer_starts),
            segments=tuple(lengths),
            pictures=tuple(len(picture) for picture in patches),
            n_segments=len(segments),
            n_tokens=sum(s.length for s in segments),
        )

    def idle(self, segment: Segment) -> PackedBatch:
        """A batch of only this segment, without supervision, that does not count."""
        nothing = np.zeros(len(segment.answer_ids), np.float32)
        no_tokens, no_targets = np.empty((0, 4), np.int64), np.empty((0, 4), np.float32)
        bare = Segment(segment.sample, segment.answer_ids, segment.answer_roles, nothing, no_tokens, no_targets)
        return replace(self.layout([bare], [[0]]), n_segments=0, n_tokens=0)

    def _load(self, sample: Sample) -> NDArray[np.uint8]:
        return load_sample_rgb(self._image_root, sample.image, sample.resized_width, sample.resized_height)

    def _segment_inputs(self, segment: Segment) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        sample, factor = segment.sample, self._pixels.factor
        prompt = sample.expanded_prompt_ids(self._image_token_id)
        (before,) = np.flatnonzero(sample.prompt_ids == self._image_token_id)
        after = len(sample.prompt_ids) - 1 - before + len(segment.answer_ids)
        positions = segment_positions(
            int(before), sample.resized_height // factor, sample.resized_width // factor, int(after)
        )
        return np.concatenate([prompt, segment.answer_ids]), positions


def segment_positions(before_image: int, grid_height: int, grid_width: int, after_image: int) -> NDArray[np.int64]:
    """Positions (4, L) of one segment: text, one image of grid_height x grid_width visual tokens, text.

    Row 0 holds text positions that restart at 0 in every segment. Rows 1-3 are the temporal, height and width positions
    of M-RoPE (Qwen2-VL, arXiv:2409.12191, section 2.1). If transformers builds the attention mask itself, it separates
    segments by the restarts of row 0.

    The rule is that of `Qwen3VLModel.get_rope_index`: image tokens share one temporal position, rows and columns count
    up from it, and the text after the image continues at the largest position plus one.

    Positions restart in every segment, so a packed segment has exactly the positions of an unpacked one. Rotary
    attention scores depend only on differences of positions (RoFormer, arXiv:2104.09864, section 3.2.2), and a segment
    attends only to itself: the restart changes no score, but keeps positions within the range of pretraining.
    """
    n_image = grid_height * grid_width
    length = before_image + n_image + after_image
    out = np.empty((4, length), dtype=np.int64)
    out[0] = np.arange(length)
    out[1:, :before_image] = np.arange(before_image)
    image = slice(before_image, before_image + n_image)
    out[1, image] = before_image
    out[2, image] = before_image + np.repeat(np.arange(grid_height), grid_width)
    out[3, image] = before_image + np.tile(np.arange(grid_width), grid_height)
    # One image advances the position by its longer side, not by its number of tokens.
    out[1:, image.stop :] = before_image + max(grid_height, grid_width) + np.arange(after_image)
    return out


@dataclass(frozen=True, slots=True)
class RankSlice:
    """The rows of a step that process `index` of `count` runs, and the rows per forward pass (0: all at once).

    Rows are assigned round-robin, so that processes differ by at most one row. Every process makes the same number of
    forward passes, because collective operations wait for all processes. A process without a row left runs an idle row,
    which has no slots and zero gradients.
    """

    index: int = 0
    count: int = 1
    rows_per_forward: int = 0

    def chunks(self, n_rows: int) -> list[list[int]]:
        """Row indices of each forward pass of this process; an empty list is an idle pass."""
        mine = list(range(self.index, n_rows, self.count))
        most = -(-n_rows // self.count)  # maximum number of rows of a process: the quotient rounded up
        size = self.rows_per_forward or most
        return [mine[first : first + size] for first in range(0, most, size)]


WHOLE = RankSlice()


def rank_batches(
    collator: Collator, segments: Sequence[Segment], rows: Sequence[Sequence[int]], share: RankSlice
) -> Iterator[PackedBatch]:
    """Yield the batches of this process. Across all processes, every row is in exactly one batch.

    Args:
        collator: lays out the batches.
        segments: all segments of the step.
        rows: segment indices of each row.
        share: the rows of this process.
    """
    for chunk in share.chunks(len(rows)):
        chosen = [rows[r] for r in chunk]
        if chosen:
            own = [segments[i] for row in chosen for i in row]
            ends = np.cumsum([0, *(len(row) for row in chosen)]).tolist()
            yield collator.layout(own, [list(range(a, b)) for a, b in pairwise(ends)])
        else:
            yield collator.idle(segments[rows[0][0]])


def _slot_tensors(segments: Sequence[Segment], answer_starts: Sequence[int]) -> dict[str, Tensor]:
    """The supervised slots of a batch by field name of `PackedBatch`; answers start at these flat positions."""
    supervised = [np.flatnonzero(s.text_weights > 0) for s in segments]
    texts = list(zip(segments, supervised, strict=True))
    # The slot of a token is the position before it. The first answer token's slot is the last token of the prompt, so
    # a slot is never in another segment or row.
    before = [start - 1 for start in answer_starts]
    coord = [s.box_tokens.reshape(-1) + at for s, at in zip(segments, before, strict=True)]
    columns: dict[str, list[NDArray]] = {
        "text_slots": [chosen + at for chosen, at in zip(supervised, before, strict=True)],
        "text_targets": [s.answer_ids[chosen].astype(np.int64) for s, chosen in texts],
        "text_weights": [s.text_weights[chosen] for s, chosen in texts],
        "text_roles": [s.answer_roles[chosen] for s, chosen in texts],
        "coord_slots": [slots.astype(np.int64) for slots in coord],
        "coord_targets": [s.box_targets.reshape(-1).astype(np.float32) for s in segments],
        "unlikely_slots": [s.unlikely_tokens + at for s, at in zip(segments, before, strict=True)],
        "unlikely_ids": [s.answer_ids[s.unlikely_tokens].astype(np.int64) for s in segments],
        "reordered_slots": [s.reordered_tokens + at for s, at in zip(segments, before, strict=True)],
        "reordered_ids": [s.answer_ids[s.reordered_tokens].astype(np.int64) for s in segments],
    }
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()}
