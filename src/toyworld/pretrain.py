"""Pretraining of the embedded base model: boxes as plain digits, names and counts, by text cross-entropy alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from coordexp.config.profile import OptimConfig
from coordexp.geometry.bins import NUM_BINS, target_bins
from coordexp.infra.device import training_plan
from coordexp.infra.provenance import run_metadata, write_json
from coordexp.losses.coord_terms import gaussian_target, soft_cross_entropy, target_entropy
from coordexp.models.detection_config import BASE
from coordexp.models.forward import hidden_states, slot_logits
from coordexp.models.loading import Checkpoint, save_checkpoint
from coordexp.models.processor import pixel_spec
from coordexp.packing.collator import Collator, Segment, teacher_segment
from coordexp.packing.pixels import PixelSpec
from coordexp.packing.prepare import SamplePreparer, write_split
from coordexp.packing.samples import Sample, SampleStore
from coordexp.records.convert import convert_file
from coordexp.text.codecs import NUMBER_FORMATS, Role, get_codec
from coordexp.training.distributed import Row
from coordexp.training.loop import MicroBatch, train
from coordexp.training.schedule import legs_schedule, step_items
from coordexp.training.session import write_curve
from toyworld.coco_folder import ANNOTATIONS
from toyworld.model import build_tiny
from toyworld.sprites import load_catalog
from toyworld.tokenizer import build_tiny_tokenizer

MIN_PIXELS, MAX_PIXELS = 64 * 64, 192 * 192
AVERAGED_STEPS = 100  # metrics are means over the last steps
CURVE_EVERY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CurriculumPhase:
    """A sample file, the steps it serves, and how many samples each of them takes."""

    samples: Path
    image_root: Path
    steps: int
    samples_per_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainWeights:
    """Weight of names in the token loss, and weight and target width (bins) of the localiser."""

    desc: float
    localiser: float
    localiser_sigma: float


class BaseModel(nn.Module):
    """The model in pretraining: Qwen3-VL plus a localiser that reads a coordinate from the slot of its first digit.

    Digits alone teach places slowly: a far miss costs as much as a near one. The localiser, a linear layer to 1000 bins
    trained with a wide soft target, gives every coordinate slot a dense signal. It is dropped afterwards: the saved
    checkpoint answers in digits and knows no coordinate token.
    """

    def __init__(self, vlm: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.vlm = vlm
        self.localiser = nn.Linear(vlm.lm_head.in_features, NUM_BINS)


def digit_segment(sample: Sample) -> Segment:
    """Teacher segment whose coordinate slots are those of the first digit of each number."""
    segment = teacher_segment(sample)
    is_number = sample.answer_roles == Role.NUMBER
    first = np.flatnonzero(is_number & ~np.concatenate([[False], is_number[:-1]])).reshape(-1, 4)
    targets = target_bins(sample.boxes_xyxy_px, sample.width, sample.height)[: len(first)]
    return replace(segment, box_tokens=first, box_targets=targets.astype(np.float32))


class TextTask:
    """Token cross-entropy on whole answers, names weighted up, plus the localiser, over the phases of a curriculum."""

    def __init__(
        self,
        model: BaseModel,
        collators: Sequence[Collator],
        phases: Sequence[CurriculumPhase],
        weights: PretrainWeights,
        seed: int,
    ) -> None:
        self._model = model
        self._weights = weights
        self._collators = collators
        self._stores = [SampleStore(phase.samples) for phase in phases]
        self._plan = [
            (i, items)
            for i, phase in enumerate(phases)
            for items in step_items(len(self._stores[i]), phase.samples_per_step, phase.steps, seed + i, "stage1/order")
        ]

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """The whole step in one packed batch; logs the accuracy of each token role beside the losses."""
        phase, items = self._plan[step]
        batch = self._collators[phase]([digit_segment(self._stores[phase][i]) for i in items])
        batch = batch.to(self._model.vlm.device)
        hidden = hidden_states(self._model.vlm, batch)
        logits = slot_logits(self._model.vlm, hidden, batch.text_slots).float()
        weights = torch.where(batch.text_roles == int(Role.DESC), self._weights.desc, 1.0)
        text_ce = (F.cross_entropy(logits, batch.text_targets, reduction="none") * weights).sum() / weights.sum()
        log_p = self._model.localiser(hidden[batch.coord_slots]).float().log_softmax(-1)
        sigma = self._weights.localiser_sigma
        q = gaussian_target(batch.coord_targets, sigma, int(4 * sigma))
        localiser = (soft_cross_entropy(log_p, q) - target_entropy(q)).sum() / max(1, len(q))
        logs: Row = {"loss/text_ce": float(text_ce.detach()), "loss/localiser_kl": float(localiser.detach())}
        hit = (logits.argmax(-1) == batch.text_targets).float()
        for role in (Role.DESC, Role.NUMBER, Role.CLOSE):
            mask = batch.text_roles == int(role)
            if bool(mask.any()):
                logs[f"accuracy/{role.name.lower()}"] = float(hit[mask].mean())
        bins = torch.arange(NUM_BINS, dtype=torch.float32, device=log_p.device)
        if len(q):
            logs["localiser/bin_mae"] = float(((log_p.detach().exp() @ bins) - batch.coord_targets).abs().mean())
        yield MicroBatch(text_ce + self._weights.localiser * localiser, logs)

    def items(self, step: int) -> dict[str, Any]:
        """Phase and images of a step."""
        phase, items = self._plan[step]
        return {"phase": phase, "images": [self._stores[phase][i].image_id for i in items]}


def pretrain(home: Path, state: Path, params: Mapping[str, Any]) -> None:
    """Tokenise the scenes below `home`, train, and write the checkpoint with its log, metrics and metadata there.

    An interrupted run continues from `state`.
    """
    options, seed = params["train"], params["seed"]
    tokenizer = build_tiny_tokenizer(load_catalog(Path(params["sprites"])).seen)
    vlm = build_tiny(tokenizer, seed)
    model = BaseModel(vlm)
    pixels = pixel_spec(vlm.config, MIN_PIXELS, MAX_PIXELS)
    phases = []
    for name, phase in params["phases"].items():
        folder, samples = home / "data" / name, state / f"{name}.parquet"
        prepare_base_samples(folder, samples, tokenizer, pixels, phase["task_shares"], seed)
        steps, per_step = phase["steps"], phase["samples_per_step"]
        phases.append(CurriculumPhase(samples=samples, image_root=folder, steps=steps, samples_per_step=per_step))
    collators = [
        Collator(p.image_root, pixels, vlm.config.image_token_id, tokenizer.pad_token_id, options["pack_tokens"])
        for p in phases
    ]
    optim = OptimConfig(
        optimizer="muon",
        steps=sum(phase.steps for phase in phases),
        lr=options["lr"],
        coord_row_lr_factor=1.0,
        vision_lr_factor=1.0,
        projector_lr_factor=1.0,
        language_lr_factor=1.0,
        betas=(0.9, 0.95),
        warmup_steps=options["warmup_steps"],
        weight_decay=0.0,
        precision="bf16",
        max_grad_norm=1.0,
        log_every=25,
        grad_monitor_every=0,
    )
    model.to(training_plan(optim.precision).adopt().device)
    schedule = legs_schedule(legs(params["phases"]), options["warmup_steps"], options["decay_fraction"])
    task = TextTask(model, collators, phases, PretrainWeights(**options["weights"]), seed)
    train(model, task, optim, state, state / "train_log.jsonl", save_every_seconds=240, schedule=schedule)
    finish_base(home, vlm, tokenizer, pixels, state / "train_log.jsonl", params)


def prepare_base_samples(
    coco_folder: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    pixels: PixelSpec,
    task_shares: Mapping[str, float],
    seed: int,
) -> None:
    """Tokenise one composed folder with the digits codec, drawing a task per image."""
    annotations = coco_folder / ANNOTATIONS.format(split="train")
    found = convert_file("coco", annotations, coco_folder / "train", "train").splits["train"]
    records = [replace(record, image=f"train/{record.image}") for record in found]
    rng = np.random.default_rng([seed, 7])
    names = [*task_shares, "detect"]
    shares = [*task_shares.values(), 1.0 - sum(task_shares.values())]
    tasks = rng.choice(names, size=len(records), p=shares).tolist()
    write_split(SamplePreparer(tokenizer, get_codec("digits"), pixels, NUMBER_FORMATS), records, tasks, out)


def legs(phases: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Steps between the points where the learning rate has come down: the ends of the phases that say `settle`."""
    lengths = [0]
    for phase in phases.values():
        lengths[-1] += phase["steps"]
        if phase["settle"]:
            lengths.append(0)
    return [steps for steps in lengths if steps]


def finish_base(
    home: Path,
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pixels: PixelSpec,
    log_path: Path,
    params: Mapping[str, Any],
) -> None:
    """Write `checkpoint/` in bfloat16 with its log and metadata, and `metrics.json` beside it."""
    folder = home / "checkpoint"
    base = Checkpoint(model=model.bfloat16(), tokenizer=tokenizer, pixels=pixels, detection=BASE)
    save_checkpoint(folder, base)
    rows = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]
    names = sorted({name for row in rows for name in row if name.startswith(("loss/", "accuracy/"))})
    metrics = {name: round(_mean(rows[-AVERAGED_STEPS:], name), 4) for name in names}
    write_curve(log_path, folder / "train_loss.tsv", names, every=CURVE_EVERY)
    write_json(home / "metrics.json", metrics | {"steps": len(rows)})
    catalog = {"sprites": Path(params["sprites"]) / "catalog.json"}
    extra = {"steps": len(rows), "metrics": metrics}
    write_json(folder / "run_metadata.json", run_metadata("base", params, catalog, extra))


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else float("nan")
