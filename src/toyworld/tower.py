"""The first part of pretraining: the vision tower alone learns to name patches.

In text training, a scene supervises its names at a handful of tokens behind six layers of language model, and nouns
stay near chance for a long time. Here a linear layer, which is removed afterwards, predicts color and noun of the
object on each covered patch; an image costs a fifth of its cost with text. A color-noun pair that training text may not
contain does not occur here either: such scenes have the task `nouns` or `colors`, and supervise only that word.

Shapes: P patches, in the order of `packing.pixels.patchify`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration

from coordexp.infra.prefetch import Prefetcher
from coordexp.models.forward import patch_states
from coordexp.packing.pixels import PixelSpec, load_sample_rgb, patchify
from coordexp.packing.samples import Sample, SampleStore
from coordexp.training.distributed import Row
from coordexp.training.loop import MicroBatch
from coordexp.training.schedule import step_items
from toyworld.sprites import SpriteCatalog

UNNAMED = -100  # the index that cross_entropy ignores
KINDS = ("color", "noun")


@dataclass(frozen=True, slots=True, kw_only=True)
class CurriculumPhase:
    """A sample file, its number of steps, and the samples per step."""

    samples: Path
    image_root: Path
    steps: int
    samples_per_step: int


class Curriculum:
    """The samples of each step, phase after phase; known before training, so a resumed run needs no replay."""

    def __init__(self, phases: Sequence[CurriculumPhase], seed: int) -> None:
        self._stores = [SampleStore(phase.samples) for phase in phases]
        self._plan = [
            (i, items)
            for i, phase in enumerate(phases)
            for items in step_items(len(self._stores[i]), phase.samples_per_step, phase.steps, seed + i, "stage1/order")
        ]

    def __len__(self) -> int:
        return len(self._plan)

    def samples(self, step: int) -> tuple[int, list[Sample]]:
        """The index of a step's phase, and its samples."""
        phase, items = self._plan[step]
        return phase, [self._stores[phase][i] for i in items]

    def items(self, step: int) -> dict[str, Any]:
        """Phase and image ids of a step, for a message."""
        phase, samples = self.samples(step)
        return {"phase": phase, "images": [sample.image_id for sample in samples]}


class NamedPatches(nn.Module):
    """The vision tower, and a linear layer that predicts colors and nouns from its patches."""

    def __init__(self, vlm: Qwen3VLForConditionalGeneration, n_words: int) -> None:
        super().__init__()
        self.visual = vlm.model.visual
        self.auxiliary_head = nn.Linear(self.visual.config.hidden_size, n_words)


class PatchTargets:
    """For the patches of a sample, the indices of its words among the catalog's colors and nouns."""

    def __init__(self, catalog: SpriteCatalog, pixels: PixelSpec) -> None:
        self.n_colors = len(catalog.colors)
        kinds = catalog.words[: self.n_colors], catalog.words[self.n_colors :]
        self._places = [{word: i for i, word in enumerate(kind)} for kind in kinds]
        self._pixels = pixels

    def of(self, sample: Sample) -> NDArray[np.int64]:
        """(P, 2) color and noun of the object on each patch.

        UNNAMED if there is no object of the answer, or its name has no such word. If there are several objects, the
        smallest counts, because it is rarely behind another. An object smaller than a patch gets the patch of its
        center.
        """
        side, merge = self._pixels.patch_size, self._pixels.merge_size
        rows, columns = sample.resized_height // side, sample.resized_width // side
        scale = np.array([sample.resized_width / sample.width, sample.resized_height / sample.height] * 2) / side
        boxes = sample.boxes_xyxy_px * scale
        grid = np.full((rows, columns, 2), UNNAMED, np.int64)
        y, x = np.mgrid[:rows, :columns] + 0.5
        for i in np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable"):
            x1, y1, x2, y2 = boxes[i]
            on = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
            on[min(int((y1 + y2) / 2), rows - 1), min(int((x1 + x2) / 2), columns - 1)] = True
            grid[on] = self._words(sample.descs[i])
        blocks = grid.reshape(rows // merge, merge, columns // merge, merge, 2)
        return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)

    def _words(self, desc: str) -> list[int]:
        return [next((at[word] for word in desc.split() if word in at), UNNAMED) for at in self._places]


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Patches (P, D) of the images of a step, their grids (I, 3), and the words (P, 2) of the patches."""

    patches: Tensor
    grids: Tensor
    words: Tensor


class TowerTask:
    """Cross-entropy of colors and of nouns, each averaged over the patches that have one."""

    def __init__(
        self,
        model: NamedPatches,
        targets: PatchTargets,
        phases: Sequence[CurriculumPhase],
        pixels: PixelSpec,
        seed: int,
    ) -> None:
        self._model, self._targets, self._pixels = model, targets, pixels
        self._roots = [phase.image_root for phase in phases]
        self._curriculum = Curriculum(phases, seed)
        self._pictures = Prefetcher(self._pictures_of, len(self._curriculum))

    def _pictures_of(self, step: int) -> Iterator[_Pictures]:
        phase, samples = self._curriculum.samples(step)
        sizes = [(s.resized_width, s.resized_height) for s in samples]
        patches = [
            patchify(load_sample_rgb(self._roots[phase], s.image, *size), self._pixels)
            for s, size in zip(samples, sizes, strict=True)
        ]
        side = self._pixels.patch_size
        yield _Pictures(
            patches=torch.from_numpy(np.concatenate(patches)),
            grids=torch.tensor([(1, height // side, width // side) for width, height in sizes]),
            words=torch.from_numpy(np.concatenate([self._targets.of(sample) for sample in samples])),
        )

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """The whole step in one forward; logs losses and accuracies."""
        for pictures, waited in self._pictures.take(step):
            device = self._model.auxiliary_head.weight.device
            states = patch_states(self._model.visual, pictures.patches.to(device), pictures.grids.to(device))
            logits = self._model.auxiliary_head(states).float()
            by_kind = logits.tensor_split([self._targets.n_colors], dim=1)
            words = pictures.words.to(device).unbind(1)
            losses, hits = zip(*map(_loss_and_hits, by_kind, words), strict=True)
            logs: Row = {"time/wait_s": waited}
            for kind, loss, hit in zip(KINDS, losses, hits, strict=True):
                logs |= {f"loss/patch_{kind}": float(loss.detach()), f"accuracy/patch_{kind}": float(hit)}
            yield MicroBatch(torch.stack(losses).sum(), logs)

    def items(self, step: int) -> dict[str, Any]:
        """Phase and images of a step."""
        return self._curriculum.items(step)


def _loss_and_hits(logits: Tensor, words_P: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy over the patches that have a word; 0 if there are none."""
    named = words_P != UNNAMED
    logits, words, count = logits[named], words_P[named], named.sum().clamp(min=1)
    return F.cross_entropy(logits, words, reduction="sum") / count, (logits.argmax(-1) == words).sum() / count
