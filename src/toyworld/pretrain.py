"""Pretraining of the embedded base model: its vision tower on the names of patches, then the whole model on text.

The text is that of a detector without coordinate tokens: boxes as plain digits, category names and counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from coordexp.config.profile import OptimConfig, RecordsConfig
from coordexp.errors import ConfigError
from coordexp.evaluation.bootstrap import interval
from coordexp.evaluation.evaluator import rounded
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.vocabulary import vocabulary_metrics
from coordexp.geometry.bins import NUM_BINS, target_bins
from coordexp.infra.device import training_plan
from coordexp.infra.files import write_bytes, write_text
from coordexp.infra.prefetch import Prefetcher
from coordexp.infra.provenance import run_metadata, write_json
from coordexp.losses.coord_terms import gaussian_target, soft_cross_entropy, target_entropy
from coordexp.models.detection_config import BASE
from coordexp.models.forward import hidden_states, slot_logits
from coordexp.models.loading import Checkpoint, save_checkpoint
from coordexp.models.processor import pixel_spec
from coordexp.packing.collator import Collator, PackedBatch, Segment, teacher_segment
from coordexp.packing.pixels import PixelSpec
from coordexp.packing.prepare import SamplePreparer, write_split
from coordexp.packing.samples import Sample
from coordexp.records.categories import Category
from coordexp.records.convert import FILE_POLICIES, Converted, convert_file
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.records.mixing import SetNames, probes, repeat_by_weight, with_prompt, with_views
from coordexp.records.schema import Record
from coordexp.records.store import RecordStore
from coordexp.rollout.engine import DecodeRequest, greedy
from coordexp.rollout.stages import make_reader
from coordexp.text.codecs import NUMBER_FORMATS, Role, get_codec
from coordexp.text.prompts import FORMAT_SUFFIXES
from coordexp.training.distributed import Row
from coordexp.training.eval_callback import EvalCallback
from coordexp.training.loop import MicroBatch, train
from coordexp.training.schedule import segments_schedule
from coordexp.training.session import write_curve
from toyworld.coco_folder import ANNOTATIONS
from toyworld.model import build_tiny
from toyworld.sprites import SpriteCatalog, load_catalog
from toyworld.tokenizer import build_tiny_tokenizer
from toyworld.tower import Curriculum, CurriculumPhase, NamedPatches, PatchTargets, TowerTask

MIN_PIXELS, MAX_PIXELS = 64 * 64, 192 * 192
AVERAGED_STEPS = 100  # metrics are means over the last steps
CURVE_EVERY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainWeights:
    """Weight of category names in the token loss; weight and target width (bins) of the localizer."""

    desc: float
    localiser: float
    localiser_sigma: float


class BaseModel(nn.Module):
    """The model in pretraining: Qwen3-VL plus a localizer that reads a coordinate from the slot of its first digit.

    Digits alone teach positions slowly, because a large error costs as much as a small one. The localizer, a linear
    layer to 1000 bins with a wide soft target, gives every coordinate slot a dense training signal. It is removed
    afterwards: the saved checkpoint answers in digits and has no coordinate tokens.
    """

    def __init__(self, vlm: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.vlm = vlm
        self.auxiliary_head = nn.Linear(vlm.lm_head.in_features, NUM_BINS)


def digit_segment(sample: Sample) -> Segment:
    """A teacher segment whose coordinate slots are the first digits of the numbers."""
    segment = teacher_segment(sample)
    is_number = sample.answer_roles == Role.NUMBER
    first = np.flatnonzero(is_number & ~np.concatenate([[False], is_number[:-1]])).reshape(-1, 4)
    targets = target_bins(sample.boxes_xyxy_px, sample.width, sample.height)[: len(first)]
    return replace(segment, box_tokens=first, box_targets=targets.astype(np.float32))


class TextTask:
    """Token cross-entropy on whole answers, with a higher weight on names, plus the localizer, over a curriculum."""

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
        self._curriculum = Curriculum(phases, seed)
        self._batches = Prefetcher(self._batch_of, len(self._curriculum))

    def _batch_of(self, step: int) -> Iterator[PackedBatch]:
        phase, samples = self._curriculum.samples(step)
        yield self._collators[phase]([digit_segment(sample) for sample in samples])

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """The whole step in one packed batch; logs losses and the accuracy of each token role."""
        for on_cpu, waited in self._batches.take(step):
            batch = on_cpu.to(self._model.vlm.device)
            hidden = hidden_states(self._model.vlm, batch)
            logits = slot_logits(self._model.vlm, hidden, batch.text_slots).float()
            weights = torch.where(batch.text_roles == int(Role.DESC), self._weights.desc, 1.0)
            text_ce = (F.cross_entropy(logits, batch.text_targets, reduction="none") * weights).sum() / weights.sum()
            log_p = self._model.auxiliary_head(hidden[batch.coord_slots]).float().log_softmax(-1)
            sigma = self._weights.localiser_sigma
            q = gaussian_target(batch.coord_targets, sigma, int(4 * sigma))
            localiser = (soft_cross_entropy(log_p, q) - target_entropy(q)).sum() / max(1, len(q))
            logs: Row = {"loss/text_ce": float(text_ce.detach()), "loss/localiser_kl": float(localiser.detach())}
            logs["time/wait_s"] = waited
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
        return self._curriculum.items(step)


def pretrain(home: Path, state: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenize the scenes below `home`, train, and write the checkpoint with its log, metrics and metadata there.

    An interrupted run resumes from `state`. Returns the record of the run.
    """
    options, seed = params["train"], params["seed"]
    if unknown := set(params["tower"]["phases"]) - set(params["phases"]):
        raise ConfigError(
            f"tower.phases names {sorted(unknown)}, which `phases` does not define; the vision tower trains on the"
            f" images of phases of the text. Expected some of {sorted(params['phases'])}"
        )
    catalog = load_catalog(Path(params["sprites"]))
    tokenizer = build_tiny_tokenizer(catalog.words)
    vlm = build_tiny(tokenizer, seed)
    model = BaseModel(vlm)
    pixels = pixel_spec(vlm.config, MIN_PIXELS, MAX_PIXELS)
    phases: dict[str, CurriculumPhase] = {}
    for name, phase in params["phases"].items():
        folder, samples = home / "data" / name, state / f"{name}.parquet"
        if not samples.is_file():  # a resumed run has them
            prepare_base_samples(folder, samples, tokenizer, pixels, phase, seed)
        steps, per_step = phase["steps"], phase["samples_per_step"]
        phases[name] = CurriculumPhase(samples=samples, image_root=folder, steps=steps, samples_per_step=per_step)
    collators = [
        Collator(p.image_root, pixels, vlm.config.image_token_id, tokenizer.pad_token_id, options["pack_tokens"])
        for p in phases.values()
    ]
    optim = _optim(options, sum(phase.steps for phase in phases.values()))
    model.to(training_plan(optim.precision).adopt().device)
    tower_log = train_tower(vlm, catalog, phases, params, state / "tower")
    schedule = segments_schedule(segment_steps(params["phases"]), options["warmup_steps"], options["decay_fraction"])
    task = TextTask(model, collators, list(phases.values()), PretrainWeights(**options["weights"]), seed)
    checkpoint = Checkpoint(model=vlm, tokenizer=tokenizer, pixels=pixels, detection=BASE)
    callback = make_dev_evaluation(home / "data" / "dev", checkpoint, optim.steps, params, state)
    log = state / "train_log.jsonl"
    train(model, task, optim, state, log, save_every_seconds=240, schedule=schedule, callback=callback)
    return finish_base(home, checkpoint, log, callback.rows(), _rows(tower_log), params)


def _optim(options: Mapping[str, Any], steps: int) -> OptimConfig:
    return OptimConfig(
        optimizer="muon",
        steps=steps,
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


def train_tower(
    vlm: Qwen3VLForConditionalGeneration,
    catalog: SpriteCatalog,
    phases: Mapping[str, CurriculumPhase],
    params: Mapping[str, Any],
    state: Path,
) -> Path:
    """Train the vision tower to name patches, on the images of some phases; returns the path of the log."""
    options, asked = params["train"] | {"lr": params["tower"]["lr"]}, params["tower"]["phases"]
    pixels = pixel_spec(vlm.config, MIN_PIXELS, MAX_PIXELS)
    model = NamedPatches(vlm, len(catalog.words)).to(vlm.device)
    named = [replace(phases[name], **counts) for name, counts in asked.items()]
    task = TowerTask(model, PatchTargets(catalog, pixels), named, pixels, params["seed"])
    optim = _optim(options, sum(phase.steps for phase in named))
    schedule = segments_schedule([optim.steps], options["warmup_steps"], options["decay_fraction"])
    log, trained = state / "train_log.jsonl", state / "visual.safetensors"
    if not trained.is_file():  # a resumed run has it
        train(model, task, optim, state, log, save_every_seconds=240, schedule=schedule)
        write_bytes(trained, save(model.visual.state_dict()))
    model.visual.load_state_dict(load_file(trained))
    return log


def make_dev_evaluation(
    folder: Path, checkpoint: Checkpoint, steps: int, params: Mapping[str, Any], state: Path
) -> EvalCallback:
    """The eval callback on the dev scenes: detection metrics by tier of names and by kind of prompt."""
    options, seed = params["dev"], params["seed"]
    found = convert_base("val", folder)
    declared = next(iter(found.declared.values()))
    names = set_names(declared)
    config = records_config(options["prompts"])
    records = [q for r in found.splits["val"] for q in (r, *probes(r, names, config, seed))]
    preparer = SamplePreparer(checkpoint.tokenizer, get_codec("digits"), checkpoint.pixels)
    samples = [preparer.prepare(record) for record in records]
    protocol = STANDARD.model_copy(update={"bootstrap_resamples": options["bootstrap_resamples"]})

    def measure(results: Sequence[ImageResult]) -> dict[str, Any]:
        areas, resampled, by_tier = vocabulary_metrics(results, declared, protocol, seed)
        values = {f"{area}.{key}": v for area, metrics in areas.items() for key, v in metrics.items()}
        bounds = {
            f"interval.{key}": interval(samples_B, values[key], is_share=not key.endswith("_to_seen"))
            for key, samples_B in resampled.items()
        }
        return {**values, **bounds, "by_tier": by_tier}

    longest = 2 * max(len(sample.answer_ids) for sample in samples)
    return EvalCallback(
        checkpoint=checkpoint,
        reader=make_reader(checkpoint),
        samples=samples,
        request=DecodeRequest(params=greedy(longest, "argmax", "coord_logprob"), codec=checkpoint.codec, seed=0),
        image_root=folder,
        batch_images=options["batch_images"],
        every_steps=options["every_steps"],
        steps=steps,
        curve=state / "monitor.tsv",
        folder=state,
        measure=measure,
    )


def convert_base(split: str, coco_folder: Path) -> Converted:
    """The records of one split of a composed folder, with image paths relative to the folder."""
    found = convert_file("coco", coco_folder / ANNOTATIONS.format(split=split), coco_folder / split, split)
    found.splits[split] = RecordStore(replace(r, image=f"{split}/{r.image}") for r in found.splits[split])
    return found


def set_names(declared: Sequence[Category]) -> SetNames:
    """All labels of the embedded world, and those that training text may contain."""
    return SetNames.of([c.name for c in declared], [c.name for c in declared if c.split == "train"])


def records_config(changes: Mapping[str, Any]) -> RecordsConfig:
    """How prompts and views are sampled: the defaults for single files, with these changes."""
    return RecordsConfig.model_validate({**FILE_POLICIES.model_dump(), **changes})


def prepare_base_samples(
    coco_folder: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    pixels: PixelSpec,
    phase: Mapping[str, Any],
    seed: int,
) -> None:
    """Tokenize one composed folder with the digits codec, each scene `draws` times: with a view, a task and a prompt.

    Scenes with labels that training text may not contain get only the tasks `nouns` and `colors`.
    """
    found = convert_base("train", coco_folder)
    names = set_names(next(iter(found.declared.values())))
    config = records_config(phase["prompts"])
    records = list(with_views(repeat_by_weight(found.splits["train"], phase["draws"], seed), config, seed))
    fractions = phase["task_fractions"]
    tasks = np.random.default_rng([seed, 7]).choice(
        [*fractions, "detect"], size=len(records), p=[*fractions.values(), 1.0 - sum(fractions.values())]
    )
    written = frozenset(names.trained)
    asked = [_asked(r, str(task), names, written, config, seed) for r, task in zip(records, tasks, strict=True)]
    preparer = SamplePreparer(tokenizer, get_codec("digits"), pixels, NUMBER_FORMATS)
    write_split(preparer, (record for record, _ in asked), (task for _, task in asked), out)


def _asked(
    record: Record, task: str, names: SetNames, written: frozenset[str], config: RecordsConfig, seed: int
) -> tuple[Record, str]:
    """The record for one task, and that task: `nouns` or `colors` if the training text may not contain a label."""
    if not written.issuperset(o.desc for o in record.objects):
        task = ("nouns", "colors")[record.metadata["image_id"] % 2]
    if task in FORMAT_SUFFIXES:
        return with_prompt(record, "mixed", names, config, seed, training=True), task
    if task == "nouns":
        return replace(record, objects=tuple(replace(o, desc=o.desc.split()[-1]) for o in record.objects)), task
    if task == "colors":  # an object that is not tinted has no color name
        tinted = [(o, o.desc.split()) for o in record.objects]
        return replace(record, objects=tuple(replace(o, desc=w[0]) for o, w in tinted if len(w) > 1)), task
    return record, task


def segment_steps(phases: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Lengths of the schedule's segments in steps: a segment ends with each phase that sets `settle`."""
    lengths = [0]
    for phase in phases.values():
        lengths[-1] += phase["steps"]
        if phase["settle"]:
            lengths.append(0)
    return [steps for steps in lengths if steps]


def finish_base(
    home: Path,
    base: Checkpoint,
    log_path: Path,
    dev_rows: Sequence[Mapping[str, Any]],
    tower_rows: Sequence[Mapping[str, Any]],
    params: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `checkpoint/` in bfloat16 with its curves and metadata, and `metrics.json` next to it."""
    folder = home / "checkpoint"
    save_checkpoint(folder, replace(base, model=base.model.bfloat16()))
    rows = _rows(log_path)
    metrics = _last_means(rows)
    names = sorted(metrics)
    write_curve(log_path, folder / "train_loss.tsv", names, every=CURVE_EVERY)
    points = pd.DataFrame(dev_rows)
    measured = [c for c in points if c in ("step", "f1", "f1_boxes", "parse_rate") or c.startswith("vocabulary")]
    write_text(
        folder / "learning_curve.tsv", points[measured].to_csv(sep="\t", index=False, float_format="%.4f", na_rep="")
    )
    final = {k: v for k, v in dev_rows[-1].items() if k.startswith(("vocabulary", "interval")) or k == "by_tier"}
    write_json(home / "metrics.json", rounded(metrics | _last_means(tower_rows) | {"steps": len(rows), "dev": final}))
    inputs = {name: Path(params["sprites"]) / f"{name}.json" for name in ("catalog", "labels")}
    extra = {"steps": len(rows), "metrics": metrics}
    write_json(folder / "run_metadata.json", run_metadata("base", params, inputs, extra))
    return {
        "steps": len(rows),
        "tower_steps": len(tower_rows),
        "step_seconds": round(sum(row["time/step_s"] for row in [*tower_rows, *rows]), 1),
        "exam_seconds": round(sum(row["seconds"] for row in dev_rows), 1),
        "settings": dict(params),
        "dev": rounded(final),
    }


def _rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _last_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row if name.startswith(("loss/", "accuracy/"))})
    return {name: round(_mean(rows[-AVERAGED_STEPS:], name), 4) for name in names}


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else float("nan")
