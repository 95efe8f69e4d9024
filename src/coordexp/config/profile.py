"""The schema of `configs/<profile>.yaml`: data, model, sizes, and machine."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from coordexp.config.block import Betas, Block, Count, Fraction, PositiveCount, Text, TextList
from coordexp.config.formats import BoxForm, Format
from coordexp.config.serving import ServeConfig

Side = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]  # pixels; 32 is one vision token of Qwen3-VL
NO_SPLIT = "none"
AUTO_SPLIT = "auto"
# The image paths of the set's records begin with it.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
ObjectSide = Annotated[float, Field(gt=0, lt=1)]
# "coco.mAP >= 0.4": a metric and the minimum that it should reach.
Goal = Annotated[str, Field(pattern=r"^[a-z0-9_]+\.[A-Za-z0-9_]+ >= [0-9]+(\.[0-9]+)?$")]
Goals = Annotated[tuple[Goal, ...], Field(strict=False)]
LrFactor = Annotated[float, Field(gt=0, le=100)]


class HeldOutConfig(Block):
    """Fractions of val objects with held-out labels, by tier. The other objects have labels seen in training."""

    strict: Fraction = Field(description="fraction of val objects whose label is unseen in text and images")
    phrase: Fraction = Field(
        description="fraction whose label is unseen in text: pretraining renders it but never writes it"
    )
    plain_only: Fraction = Field(description="fraction with a colored noun that training has only without a color")
    never: Fraction = Field(description="fraction with a noun that is unseen in text and images")

    @model_validator(mode="after")
    def _fractions_of_one_whole(self) -> HeldOutConfig:
        if (total := sum(self.model_dump().values())) > 1:
            raise ValueError(f"the fractions add up to {total:g}; expected at most 1.")
        return self


class RowsConfig(Block):
    """Rows of adjacent objects with the same label, which provoke duplicate predictions."""

    most: Count = Field(description="maximum number of rows in a scene; each occurs with probability crowd_fraction")
    objects: int = Field(ge=2, le=40, description="maximum number of objects in a row")
    smallest_fraction: ObjectSide = Field(description="minimum mean object size in a row, of the shorter image side")
    largest_fraction: ObjectSide = Field(description="maximum mean object size in a row")
    closest: Annotated[float, Field(gt=0, le=2)] = Field(
        description="minimum distance from one object to the next, in widths; below 1 they overlap"
    )
    farthest: Annotated[float, Field(gt=0, le=2)] = Field(description="maximum distance, in widths")

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> RowsConfig:
        for low, high in (("smallest_fraction", "largest_fraction"), ("closest", "farthest")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} is above {high} {getattr(self, high)}; swap them.")
        return self


class ScenesConfig(Block):
    """Source data: scenes composed of sprites on photo crops, written as a COCO folder."""

    kind: Literal["scenes"] = Field(description="where images and boxes come from")
    sprites: Text = Field(description="folder of the sprites and their names")
    train_images: PositiveCount = Field(description="images of the training split, before dev is split off")
    val_images: PositiveCount = Field(description="images of the val split")
    min_side_px: Side = Field(description="minimum image side, in pixels")
    max_side_px: Side = Field(description="maximum image side, in pixels")
    min_objects: int = Field(ge=1, le=100, description="minimum number of objects in a scene, space permitting")
    max_objects: int = Field(ge=1, le=100, description="maximum number of objects in a scene")
    count_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        description="probability factor per additional object; 1 makes all counts equally likely"
    )
    max_iou: Fraction = Field(description="maximum IoU of two boxes in a scene")
    smallest_fraction: ObjectSide = Field(description="minimum size of an ordinary object, of the shorter image side")
    largest_fraction: ObjectSide = Field(description="maximum size of an object, of the shorter image side")
    small_fraction: Fraction = Field(
        description="fraction of small objects, from two thirds of smallest_fraction up to it"
    )
    crowd_fraction: Fraction = Field(description="probability of each row of adjacent objects with the same label")
    rows: RowsConfig
    distractors: int = Field(ge=0, le=20, description="maximum number of unlabeled textured shapes in a scene")
    plain_fraction: Fraction = Field(description="fraction of objects with training labels that are not tinted")
    held_out: HeldOutConfig
    seed_offset: Count = Field(description="added to the seed of composition, so that profiles get different scenes")

    @model_validator(mode="after")
    def _sizes_are_ordered(self) -> ScenesConfig:
        if self.min_side_px > self.max_side_px:
            raise ValueError(f"min_side_px {self.min_side_px} is above max_side_px {self.max_side_px}; swap them.")
        if self.min_objects > self.max_objects:
            raise ValueError(f"min_objects {self.min_objects} is above max_objects {self.max_objects}; swap them.")
        if self.smallest_fraction > self.largest_fraction:
            raise ValueError(
                f"smallest_fraction {self.smallest_fraction} is above largest_fraction {self.largest_fraction}; swap."
            )
        return self


class DatasetConfig(Block):
    """One data set on disk. Paths are relative to `root`; `none` means that the set does not have this split.

    `val: auto` takes `records.val_fraction` of the training images, chosen by their content.
    """

    format: Format = Field(description="format of the annotations")
    root: Text = Field(description="folder of the data set; a relative path starts at the repository")
    train: Text = Field(description="annotations of the training split, or none")
    val: Text = Field(description="annotations of the val split, none, or auto (taken from train)")
    train_images: Text = Field(description="folder that the file names of the training split start from")
    val_images: Text = Field(description="folder that the file names of the val split start from")
    weight: float = Field(
        gt=0, le=100, description="how often training records are used; 2.5 is twice, and half of them once more"
    )
    prompt: Literal["open", "closed", "listed", "phrase", "mixed"] = Field(
        description="what training prompts ask for; mixed: open, listed, or phrase, and val has probes"
    )
    boxes: BoxForm = Field(
        default="format", description="what the numbers of a box are, if the file deviates from its format"
    )


class DatasetsConfig(Block):
    """Source data: annotated images of the user. Images stay where they are; a manifest lists and hashes them.

    `<name>` is a name of your choice, for one or more sets. [data.md](data.md) describes formats and layouts.
    """

    kind: Literal["datasets"] = Field(description="where images and boxes come from")
    verify: Literal["decode", "header"] = Field(description="decode every image once, or read only its header")
    sets: dict[Name, DatasetConfig] = Field(strict=False, min_length=1, description="the data sets by name")

    @model_validator(mode="after")
    def _splits_come_from_somewhere(self) -> DatasetsConfig:
        for name, config in self.sets.items():
            if config.train == AUTO_SPLIT or (config.val == AUTO_SPLIT and config.train == NO_SPLIT):
                raise ValueError(
                    f"sets.{name}: only val may be auto, and it is taken from train; set the annotations of train."
                )
        return self

    @model_validator(mode="after")
    def _both_splits_are_there(self) -> DatasetsConfig:
        for split in ("train", "val"):
            if all(getattr(config, split) == NO_SPLIT for config in self.sets.values()):
                raise ValueError(f"no set has a {split} split; set the annotations of at least one.")
        return self


SourceConfig = ScenesConfig | DatasetsConfig


class RecordsConfig(Block):
    """Splits, prompts, augmentation, and the policy for unusual annotations."""

    dev_images: PositiveCount = Field(description="images split off from training, for choosing settings")
    crowd: Literal["ignore", "drop", "as_objects"] = Field(
        description="crowd and difficult boxes: ignore regions, dropped, or ordinary objects"
    )
    truncated: Literal["keep", "drop"] = Field(description="keep or drop boxes that the source marks as truncated")
    min_side_px: float = Field(
        ge=0.01, le=1000, description="boxes with a shorter side below this are dropped, in pixels"
    )
    min_inside: Fraction = Field(description="minimum fraction of a box that must be inside the image")
    polygons: Literal["keep", "drop"] = Field(description="keep polygons as metadata.segmentation, or drop them")
    max_objects: Count = Field(description="maximum number of objects in a training record; 0 is unlimited")
    over_max: Literal["sample", "drop"] = Field(description="above max_objects: sample objects, or drop the record")
    bad_images: Literal["error", "drop"] = Field(
        description="images that are missing, broken, or not of the annotated size: stop, or drop them"
    )
    max_lost: Fraction = Field(description="maximum fraction of annotations, and of images, that a split may lose")
    wordings: int = Field(
        ge=1, le=4, description="number of wordings per prompt in training; dev and val use the first"
    )
    listed_names: int = Field(ge=1, le=200, description="prompt: listed: maximum number of names in a training prompt")
    listed_present: Fraction = Field(description="prompt: listed: fraction of the present names that are listed")
    listed_hard: Fraction = Field(
        description="prompt: listed: fraction of its absent names that share a word with a present name"
    )
    negative_rate: Fraction = Field(
        description="prompt: listed, mixed: fraction of prompts with names whose names are all absent"
    )
    mixed_listed: Fraction = Field(description="prompt: mixed: fraction of training records with a list of names")
    mixed_phrase: Fraction = Field(
        description="prompt: mixed: fraction with a single name; the rest ask for all objects"
    )
    missing: Fraction = Field(
        default=0.0,
        description="fraction of training objects that are removed, to study incomplete annotation",
    )
    flip: Fraction = Field(
        description="fraction of training records that are mirrored, and left and right in their text"
    )
    crop: Fraction = Field(description="fraction of training records that are cropped")
    scale_jitter: float = Field(ge=0, le=0.9, description="training records are scaled by 1 - j to 1 + j; 0 is off")
    overlap: Literal["error", "drop_train"] = Field(
        description="training images whose content is also in val: stop, or drop them from training"
    )
    same_picture: Literal["merge", "first", "file", "keep"] = Field(
        default="merge", description="records with the same image content: join, keep first, join by file, or keep all"
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="val: auto: fraction of the training images that become val"
    )

    @model_validator(mode="after")
    def _fractions_of_mixed(self) -> RecordsConfig:
        if (total := self.mixed_listed + self.mixed_phrase) > 1:
            raise ValueError(f"mixed_listed and mixed_phrase add up to {total:g}; expected at most 1.")
        return self


class FilePin(Block):
    """One file of the pretrained model. A file is loaded only if its size and hash match."""

    bytes: Count = Field(description="size of the file")
    sha256: Text = Field(description="its SHA-256, 64 hexadecimal digits")

    @field_validator("sha256")
    @classmethod
    def _is_a_digest(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError(f"found {value!r}, expected 64 hexadecimal digits in lower case.")
        return value


class ModelConfig(Block):
    """The pretrained model and its image size."""

    path: Text = Field(description="folder of the pretrained checkpoint; a relative path starts at the repository")
    files: dict[Text, FilePin] | None = Field(
        strict=False,
        min_length=1,
        description="pins of its files (`coordexp doctor --pin`); null: none, and no stage loads the model",
    )
    coord_init: Literal["mean", "digits", "ordinal"] = Field(description="initial coordinate embedding rows")
    min_pixels: PositiveCount = Field(description="minimum number of pixels of an input image")
    max_pixels: PositiveCount = Field(description="maximum number of pixels of an input image")

    @model_validator(mode="after")
    def _pins_are_of_files_in_the_folder(self) -> ModelConfig:
        for name in self.files or {}:
            if name in (".", "..") or any(character in name for character in "/\\\0"):
                raise ValueError(f"files: found {name!r}, expected the name of a file in the folder model.path.")
        return self

    @model_validator(mode="after")
    def _areas_are_ordered(self) -> ModelConfig:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}; swap them.")
        return self


class PackingConfig(Block):
    """Packing of samples into sequences of one length."""

    pack_tokens: int = Field(ge=32, le=1_000_000, description="tokens of one packed sequence")


class TuningConfig(Block):
    """Which parts of the model train, in both stages and the control. Coordinate embedding rows always train."""

    method: Literal["full", "lora", "dora"] = Field(
        description="all weights, or low-rank adapters, which are merged after training"
    )
    vision: Literal["train", "freeze"] = Field(description="train or freeze the vision tower")
    projector: Literal["train", "freeze"] = Field(description="train or freeze the mergers between vision and language")
    language: Literal["train", "freeze"] = Field(
        description="train or freeze the language model with embedding and head"
    )
    rank: int = Field(ge=1, le=1024, description="lora, dora: rank of an adapter")
    alpha: float = Field(gt=0, le=4096, description="lora, dora: the update is scaled by alpha / rank")
    dropout: float = Field(ge=0, lt=1, description="lora, dora: dropout before an adapter")
    activations: Literal["keep", "recompute"] = Field(
        description="language model: recompute them in the backward pass (slower, less memory), or keep"
    )
    vision_activations: Literal["keep", "recompute"] = Field(description="the same for the vision tower")

    @model_validator(mode="after")
    def _something_is_adapted(self) -> TuningConfig:
        if self.method != "full" and {self.vision, self.projector, self.language} == {"freeze"}:
            raise ValueError(f"method {self.method} with all parts frozen adapts nothing; set one to train.")
        return self


class OptimConfig(Block):
    """Optimization of one training stage."""

    optimizer: Literal["muon", "adamw", "adamw_8bit"] = Field(
        description="Muon on matrices and AdamW on the rest, or AdamW on all (8bit: one-byte moments)"
    )
    steps: PositiveCount = Field(description="optimizer steps")
    lr: float = Field(gt=0, le=1, description="peak learning rate")
    coord_row_lr_factor: LrFactor = Field(
        description="factor on lr for embedding and head, including the new coordinate rows"
    )
    vision_lr_factor: LrFactor = Field(description="factor on lr for the vision tower")
    projector_lr_factor: LrFactor = Field(description="factor on lr for the mergers between vision and language")
    language_lr_factor: LrFactor = Field(description="factor on lr for the language model without embedding and head")
    betas: Betas = Field(description="AdamW: decay rates of the running means of the gradient and of its square")
    warmup_steps: Count = Field(description="steps of linear warm-up; a cosine decay follows")
    weight_decay: float = Field(ge=0, le=1, description="decoupled weight decay")
    precision: Literal["bf16", "fp32"] = Field(description="precision of the forward (bf16: autocast)")
    max_grad_norm: float = Field(gt=0, le=1000, description="gradients are clipped to this norm")
    log_every: PositiveCount = Field(description="steps between two progress lines on the console")
    grad_monitor_every: Count = Field(description="steps between two logs of the gradient of each term; 0 is never")

    @model_validator(mode="after")
    def _warmup_ends(self) -> OptimConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is not below steps {self.steps}; lower it.")
        return self


class Stage1Config(OptimConfig):
    """Size of stage 1."""

    packs_per_step: PositiveCount = Field(description="packed sequences per optimizer step")


class RolloutConfig(Block):
    """The generation engine, and the rollouts on training images."""

    engine: Literal["hf", "vllm"] = Field(
        description="generation engine, in rollouts and evaluation: transformers or vLLM"
    )
    vllm_python: Text = Field(description="vllm: Python interpreter of the server; make vllm installs it")
    servers: TextList = Field(
        description="vllm: URLs of running servers, or start, which starts those of rollout.serve"
    )
    requests_per_server: PositiveCount = Field(description="vllm: concurrent requests per server")
    timeout_seconds: float = Field(gt=0, le=86400, description="vllm: time limit of one attempt, until the last byte")
    tries: PositiveCount = Field(description="vllm: attempts at one request before its server is dropped")
    serve: ServeConfig
    images: PositiveCount = Field(description="number of training images that get a rollout")
    batch_images: PositiveCount = Field(description="hf: images decoded together, in rollouts and evaluation")

    @field_validator("servers")
    @classmethod
    def _keys_stay_out_of_git(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("@" in url for url in value):  # the message must not show it either
            raise ValueError(
                "a URL contains a key or a user, and profiles are in git. Remove it, and set VLLM_API_KEY."
            )
        return value


class Stage2Config(OptimConfig):
    """Size of stage 2, and of the control, which continues stage 1 for the same compute."""

    samples_per_step: PositiveCount = Field(description="images per optimizer step")


class MonitorConfig(Block):
    """The eval callback: during training, it evaluates a fixed set of a few dev images."""

    every_steps: Count = Field(description="optimizer steps between evaluations, plus one at the end; 0 is never")
    images: int = Field(ge=1, le=512, description="number of dev images, the same every time")
    batch_images: PositiveCount = Field(description="images decoded together")
    keep_every_steps: Count = Field(
        default=0, description="optimizer steps between two checkpoints that are kept; 0 is never"
    )


class EvalConfig(Block):
    """Size of the evaluation."""

    images: Count = Field(description="number of val images; 0 is all")


class ReportConfig(Block):
    """Size of the report."""

    gallery_images: PositiveCount = Field(description="number of gallery panels, ground truth next to prediction")
    goals: Goals = Field(description="minimum values of metrics, which the lower bound of the interval should reach")


class LaunchConfig(Block):
    """How stages use the machine."""

    threads: int = Field(
        ge=0,
        le=1024,
        description="CPU threads of the tensor library; 0 is its own choice within the container limit",
    )
    processes: int = Field(
        ge=0, le=64, description="processes for training, and for decoding with engine hf; 0 is one per GPU"
    )
    rows_per_forward: Count = Field(description="packed sequences per forward; fewer need less memory, 0 is all")
    sharding: Literal["none", "fsdp2"] = Field(
        description="each training process holds all weights and moments, or its shard (fsdp2)"
    )
    save_every_seconds: float = Field(
        ge=0, le=86400, description="minimum time between two saved states of a training stage"
    )


class Profile(Block):
    """All of one `configs/<profile>.yaml`."""

    source: SourceConfig = Field(discriminator="kind")
    records: RecordsConfig
    model: ModelConfig
    packing: PackingConfig
    tuning: TuningConfig
    stage1: Stage1Config
    rollout: RolloutConfig
    stage2: Stage2Config
    monitor: MonitorConfig
    eval: EvalConfig
    report: ReportConfig
    launch: LaunchConfig

    @model_validator(mode="after")
    def _what_trains_can_be_sharded(self) -> Profile:
        if self.launch.sharding == "none":
            return self
        wanted: dict[str, tuple[object, tuple[object, ...]]] = {
            "tuning.method": (self.tuning.method, ("full",)),
            "tuning.language": (self.tuning.language, ("train",)),
        }
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            wanted[f"{name}.optimizer"] = stage.optimizer, ("adamw", "muon")
            wanted[f"{name}.grad_monitor_every"] = stage.grad_monitor_every, (0,)
        wanted["monitor.every_steps"] = self.monitor.every_steps, (0,)
        for key, (found, fitting) in wanted.items():
            if found not in fitting:
                raise ValueError(
                    f"launch.sharding {self.launch.sharding} does not support {key} {found}; set it to "
                    f"{' or '.join(map(str, fitting))}, or launch.sharding to none."
                )
        return self

    @model_validator(mode="after")
    def _dev_leaves_training_images(self) -> Profile:
        if isinstance(self.source, ScenesConfig) and self.records.dev_images >= self.source.train_images:
            raise ValueError(
                f"records.dev_images {self.records.dev_images} leaves no training images of source.train_images "
                f"{self.source.train_images}; lower it."
            )
        return self
