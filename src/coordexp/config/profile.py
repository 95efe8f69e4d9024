"""What `configs/<profile>.yaml` holds: where and how big."""

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
# It begins the image paths of the set's records.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
ObjectSide = Annotated[float, Field(gt=0, lt=1)]
LrFactor = Annotated[float, Field(gt=0, le=100)]


class ScenesConfig(Block):
    """Source data: scenes composed of sprites on photo crops, written as a COCO folder."""

    kind: Literal["scenes"] = Field(description="where images and boxes come from")
    sprites: Text = Field(description="folder of the sprites and their names")
    train_images: PositiveCount = Field(description="images of the training split, before dev is taken from it")
    val_images: PositiveCount = Field(description="images of the val split")
    min_side_px: Side = Field(description="shortest image side")
    max_side_px: Side = Field(description="longest image side")
    max_objects: int = Field(ge=1, le=100, description="most objects in one scene")
    smallest_fraction: ObjectSide = Field(description="shortest ordinary object, of the image's shorter side")
    largest_fraction: ObjectSide = Field(description="longest object, of the image's shorter side")
    small_fraction: Fraction = Field(
        description="fraction of objects below smallest_fraction, down to two thirds of it"
    )
    crowd_fraction: Fraction = Field(description="fraction of scenes with a row of neighbours of one name")
    distractors: int = Field(ge=0, le=20, description="most textured shapes without a name in one scene")
    held_out_fraction: Fraction = Field(description="fraction of val objects whose name is never trained on")
    seed_offset: Count = Field(description="added to the seed of composition, so that profiles see other scenes")

    @model_validator(mode="after")
    def _sizes_are_ordered(self) -> ScenesConfig:
        if self.min_side_px > self.max_side_px:
            raise ValueError(f"min_side_px {self.min_side_px} is above max_side_px {self.max_side_px}; swap them.")
        if self.smallest_fraction > self.largest_fraction:
            raise ValueError(
                f"smallest_fraction {self.smallest_fraction} is above largest_fraction {self.largest_fraction}; swap."
            )
        return self


class DatasetConfig(Block):
    """One data set on disk. Paths are relative to `root`; `none` says that the set has no such split.

    `val: auto` takes `records.val_fraction` of the training pictures, chosen by their content.
    """

    format: Format = Field(description="format of the annotations")
    root: Text = Field(description="folder of the data set; a relative one starts at the repository")
    train: Text = Field(description="annotations of the training split, or none")
    val: Text = Field(description="annotations of the val split, none, or auto (taken from train)")
    train_images: Text = Field(description="folder that file names of the training split start from")
    val_images: Text = Field(description="folder that file names of the val split start from")
    weight: float = Field(gt=0, le=100, description="how often each training record is used; a fraction takes a part")
    prompt: Literal["open", "closed", "listed", "phrase"] = Field(description="what training prompts ask for")
    boxes: BoxForm = Field(default="format", description="what the numbers of a box are, if not what the format says")


class DatasetsConfig(Block):
    """Source data: annotated images of the user. Images stay where they are; a manifest names and hashes them.

    `<name>` is chosen by the user, for one or more sets; formats and layouts are in [data.md](data.md).
    """

    kind: Literal["datasets"] = Field(description="where images and boxes come from")
    verify: Literal["decode", "header"] = Field(description="unpack every image once, or read only its header")
    sets: dict[Name, DatasetConfig] = Field(strict=False, min_length=1, description="the data sets by name")

    @model_validator(mode="after")
    def _splits_come_from_somewhere(self) -> DatasetsConfig:
        for name, config in self.sets.items():
            if config.train == AUTO_SPLIT or (config.val == AUTO_SPLIT and config.train == NO_SPLIT):
                raise ValueError(
                    f"sets.{name}: only val may be auto, and it is taken from train; name its annotations."
                )
        return self

    @model_validator(mode="after")
    def _both_splits_are_there(self) -> DatasetsConfig:
        for split in ("train", "val"):
            if all(getattr(config, split) == NO_SPLIT for config in self.sets.values()):
                raise ValueError(f"no set has a {split} split; name the annotations of at least one.")
        return self


SourceConfig = ScenesConfig | DatasetsConfig


class RecordsConfig(Block):
    """Splits, and what is kept of the unusual."""

    dev_images: PositiveCount = Field(description="images taken from the training split for choosing settings")
    crowd: Literal["ignore", "drop", "as_objects"] = Field(
        description="crowd and difficult boxes: ignore regions, dropped, or objects like all others"
    )
    truncated: Literal["keep", "drop"] = Field(description="boxes that the source marks as truncated")
    min_side_px: float = Field(ge=0.01, le=1000, description="shorter side below which a box is dropped, in pixels")
    min_inside: Fraction = Field(description="fraction of a box that must lie inside the image")
    polygons: Literal["keep", "drop"] = Field(description="polygons of the source, kept as metadata.segmentation")
    max_objects: Count = Field(description="most objects of a training record; 0 is no limit")
    over_max: Literal["sample", "drop"] = Field(description="above max_objects: sample objects, or drop the record")
    bad_images: Literal["error", "drop"] = Field(description="images that are missing, broken, or of another size")
    max_lost: Fraction = Field(
        description="fraction of a split's annotations, and of its images, that may be lost; more stops"
    )
    wordings: int = Field(
        ge=1, le=4, description="wordings of each question that training draws from; dev and val use the first"
    )
    listed_names: int = Field(ge=1, le=200, description="prompt listed: most names in one training prompt")
    negative_rate: Fraction = Field(description="prompt listed: fraction of prompts that name only what is absent")
    flip: Fraction = Field(description="fraction of training records that are mirrored, with left and right in words")
    crop: Fraction = Field(description="fraction of training records that are cropped")
    scale_jitter: float = Field(ge=0, le=0.9, description="training records are scaled by 1 - j to 1 + j; 0 is off")
    overlap: Literal["error", "drop_train"] = Field(description="training images that val holds too, by content")
    same_picture: Literal["merge", "first", "file", "keep"] = Field(
        default="merge", description="records of one content in a split: join, keep the first, join by file, keep all"
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="val: auto: fraction of the training pictures that become val"
    )


class FilePin(Block):
    """One file of the pretrained model: only a file of this size and hash is loaded."""

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

    path: Text = Field(description="folder of the pretrained checkpoint; a relative one starts at the repository")
    files: dict[Text, FilePin] | None = Field(
        strict=False,
        min_length=1,
        description="pins of its files, written by `coordexp doctor --pin`; null: none yet, and no stage loads it",
    )
    coord_init: Literal["mean", "digits", "ordinal"] = Field(description="first value of the 1000 coordinate rows")
    min_pixels: PositiveCount = Field(description="smallest image area the model is given, in pixels")
    max_pixels: PositiveCount = Field(description="largest image area the model is given, in pixels")

    @model_validator(mode="after")
    def _pins_are_of_files_in_the_folder(self) -> ModelConfig:
        for name in self.files or {}:
            if name in (".", "..") or any(character in name for character in "/\\\0"):
                raise ValueError(f"files: found {name!r}, expected the name of a file in the folder at path.")
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
    """What of the model trains, in both stages and the control. The coordinate rows always do."""

    method: Literal["full", "lora", "dora"] = Field(description="all weights, or low-rank adapters that are merged")
    vision: Literal["train", "freeze"] = Field(description="the vision tower")
    projector: Literal["train", "freeze"] = Field(description="the mergers between vision and language")
    language: Literal["train", "freeze"] = Field(description="the language model with embedding and head")
    rank: int = Field(ge=1, le=1024, description="lora, dora: rank of an adapter")
    alpha: float = Field(gt=0, le=4096, description="lora, dora: the update is scaled by alpha / rank")
    dropout: float = Field(ge=0, lt=1, description="lora, dora: dropout before an adapter")
    activations: Literal["keep", "recompute"] = Field(
        description="of the language model: recompute in the backward pass: less memory, slower"
    )
    vision_activations: Literal["keep", "recompute"] = Field(description="likewise of the vision tower")

    @model_validator(mode="after")
    def _something_is_adapted(self) -> TuningConfig:
        if self.method != "full" and {self.vision, self.projector, self.language} == {"freeze"}:
            raise ValueError(f"method {self.method} with all parts frozen adapts nothing; set one to train.")
        return self


class OptimConfig(Block):
    """How one training stage steps."""

    optimizer: Literal["muon", "adamw", "adamw_8bit"] = Field(
        description="Muon on matrices with AdamW on the rest, or AdamW on all (8-bit: one-byte moments)"
    )
    steps: PositiveCount = Field(description="optimizer steps")
    lr: float = Field(gt=0, le=1, description="peak learning rate")
    coord_row_lr_factor: LrFactor = Field(
        description="factor on lr in embedding and head, whose coordinate rows start far from their place"
    )
    vision_lr_factor: LrFactor = Field(description="factor on lr in the vision tower")
    projector_lr_factor: LrFactor = Field(description="factor on lr in the mergers between vision and language")
    language_lr_factor: LrFactor = Field(description="factor on lr in the language model, its rows left out")
    betas: Betas = Field(description="AdamW: decay of its running means of the gradient and of its square")
    warmup_steps: Count = Field(description="steps of linear warm-up; the rate then falls as a cosine")
    weight_decay: float = Field(ge=0, le=1, description="decoupled weight decay")
    precision: Literal["bf16", "fp32"] = Field(description="number format of the forward (bf16: autocast)")
    max_grad_norm: float = Field(gt=0, le=1000, description="gradient norm above which a step is scaled down")
    log_every: PositiveCount = Field(description="steps between two lines of the training log")
    grad_monitor_every: Count = Field(description="steps between two logs of each term's gradient; 0 is never")

    @model_validator(mode="after")
    def _warmup_ends(self) -> OptimConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is not below steps {self.steps}; lower it.")
        return self


class Stage1Config(OptimConfig):
    """Size of stage 1."""

    packs_per_step: PositiveCount = Field(description="packed sequences of one optimizer step")


class RolloutConfig(Block):
    """What generates, and on how many images of the training split."""

    engine: Literal["hf", "vllm"] = Field(description="what generates, here and in evaluation: transformers or vLLM")
    vllm_python: Text = Field(description="vllm: interpreter that starts a server; make vllm installs it")
    servers: TextList = Field(description="vllm: URLs of running servers, or start: those of rollout.serve")
    requests_per_server: PositiveCount = Field(description="vllm: requests under way at each server")
    timeout_seconds: float = Field(
        gt=0, le=86400, description="vllm: time limit of one attempt, from sending to the last byte"
    )
    tries: PositiveCount = Field(description="vllm: attempts at one request before its server is left out")
    serve: ServeConfig
    images: PositiveCount = Field(description="training images that get a rollout")
    batch_images: PositiveCount = Field(description="hf: images generated together, here and in evaluation")

    @field_validator("servers")
    @classmethod
    def _keys_stay_out_of_git(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("@" in url for url in value):  # the message must not show it either
            raise ValueError(
                "a URL holds a key or a user, and profiles are in git. Leave it out, and set VLLM_API_KEY."
            )
        return value


class Stage2Config(OptimConfig):
    """Size of stage 2, and of the control that continues stage 1 for the same compute."""

    samples_per_step: PositiveCount = Field(description="images of one optimizer step")


class MonitorConfig(Block):
    """The eval callback of training: a fixed few images of dev, decoded, counted and drawn."""

    every_steps: Count = Field(description="optimizer steps between two evaluations, and one at the end; 0 is never")
    images: int = Field(ge=1, le=512, description="images of dev, the same ones every time")
    batch_images: PositiveCount = Field(description="images decoded together")


class EvalConfig(Block):
    """Size of the evaluation."""

    images: Count = Field(description="val images that are evaluated; 0 is all")


class ReportConfig(Block):
    """Size of the report."""

    gallery_images: PositiveCount = Field(description="pictures of ground truth beside prediction")


class LaunchConfig(Block):
    """How stages use the machine."""

    threads: int = Field(
        ge=0,
        le=1024,
        description="CPU threads of the tensor library; 0 is its own choice within what a container grants",
    )
    processes: int = Field(
        ge=0, le=64, description="processes on this machine that train, or decode with engine hf; 0 is one for each GPU"
    )
    rows_per_forward: Count = Field(description="packed sequences in one forward; fewer save memory, 0 is all")
    sharding: Literal["none", "fsdp2"] = Field(
        description="each training process holds all weights and moments, or its fraction of them (fsdp2)"
    )
    save_every_seconds: float = Field(
        ge=0, le=86400, description="least time between two saved states of a training stage"
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
                    f"launch.sharding {self.launch.sharding} does not go with {key} {found}; set it to "
                    f"{' or '.join(map(str, fitting))}, or launch.sharding to none."
                )
        return self

    @model_validator(mode="after")
    def _dev_leaves_training_images(self) -> Profile:
        if isinstance(self.source, ScenesConfig) and self.records.dev_images >= self.source.train_images:
            raise ValueError(
                f"records.dev_images {self.records.dev_images} leaves nothing of source.train_images "
                f"{self.source.train_images} to train on; lower it."
            )
        return self
