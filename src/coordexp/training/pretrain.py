"""Pretraining of the embedded base model: boxes as plain digits, names and counts, by text cross-entropy alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from coordexp.models.forward import hidden_states, slot_logits
from coordexp.packing.collator import Collator, teacher_segment
from coordexp.packing.pixels import PixelSpec
from coordexp.packing.prepare import SamplePreparer, write_split
from coordexp.packing.samples import SampleStore
from coordexp.records.sources.coco import read_coco
from coordexp.text.codecs import Role, get_codec
from coordexp.training.loop import MicroBatch
from coordexp.training.schedule import step_items


@dataclass(frozen=True, slots=True, kw_only=True)
class CurriculumPhase:
    """A sample file, the steps it serves, and how many samples each of them takes."""

    samples: Path
    image_root: Path
    steps: int
    samples_per_step: int


class TextTask:
    """Token cross-entropy on whole answers, names weighted up, over the phases of a curriculum."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        collators: Sequence[Collator],
        phases: Sequence[CurriculumPhase],
        desc_weight: float,
        seed: int,
    ) -> None:
        self._model = model
        self._desc_weight = desc_weight
        self._collators = collators
        self._stores = [SampleStore(phase.samples) for phase in phases]
        self._plan = [
            (i, items)
            for i, phase in enumerate(phases)
            for items in step_items(len(self._stores[i]), phase.samples_per_step, phase.steps, seed + i)
        ]

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """The whole step in one packed batch; logs the accuracy of each token role beside the loss."""
        phase, items = self._plan[step]
        batch = self._collators[phase]([teacher_segment(self._stores[phase][i]) for i in items])
        logits = slot_logits(self._model, hidden_states(self._model, batch), batch.text_slots).float()
        is_desc = batch.text_roles == int(Role.DESC)
        weights = torch.where(is_desc, self._desc_weight, 1.0)
        losses = F.cross_entropy(logits, batch.text_targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        hit = (logits.argmax(-1) == batch.text_targets).float()
        logs = {"loss/text_ce": float(loss.detach())}
        for role in (Role.DESC, Role.NUMBER, Role.CLOSE):
            mask = batch.text_roles == int(role)
            logs[f"accuracy/{role.name.lower()}"] = float(hit[mask].mean()) if bool(mask.any()) else float("nan")
        yield MicroBatch(loss, {k: v for k, v in logs.items() if v == v})


def prepare_base_samples(
    coco_folder: Path, out: Path, tokenizer: PreTrainedTokenizerBase, pixels: PixelSpec, task_shares: dict[str, float], seed: int
) -> None:
    """Tokenise one composed folder with the digits codec, drawing a task per image."""
    conversion = read_coco(coco_folder / "annotations" / "instances_train.json", "images/train/")
    rng = np.random.default_rng([seed, 7])
    names = [*task_shares, "detect"]
    shares = [*task_shares.values(), 1.0 - sum(task_shares.values())]
    tasks = rng.choice(names, size=len(conversion.records), p=shares).tolist()
    write_split(SamplePreparer(tokenizer, get_codec("digits"), pixels), conversion.records, tasks, out)


def save_bf16(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain Hugging Face checkpoint in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
