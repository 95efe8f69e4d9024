"""A small world for tests: the embedded tokenizer, a random tiny model, and composed scenes as tokenized samples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from coordexp.config.block import Block
from coordexp.config.loading import load_params, load_profile
from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import HeldOutConfig, OptimConfig, Profile, RolloutConfig, RowsConfig, ScenesConfig
from coordexp.config.schema import Params
from coordexp.geometry.bins import encode_boxes
from coordexp.models.detection_config import BASE, DetectionConfig
from coordexp.models.expand import add_coordinate_tokens
from coordexp.models.loading import Checkpoint, save_checkpoint
from coordexp.models.processor import pixel_spec
from coordexp.packing.collator import Collator
from coordexp.packing.pixels import PixelSpec
from coordexp.packing.planner import plan_packs, write_plan
from coordexp.packing.prepare import SamplePreparer, text_objects, write_split
from coordexp.packing.samples import Sample, SampleSource, SampleStore
from coordexp.records.schema import ObjectRecord, Record, read_records, write_records
from coordexp.rollout.decode import AnswerReader
from coordexp.rollout.engine import DecodeRequest, Generation
from coordexp.rollout.records import Rollout, match_rollouts, parsed_rollout, write_generations
from coordexp.rollout.rescore import rescore
from coordexp.text.codecs import AnswerEncoder, TextObject, get_codec
from coordexp.text.symbols import TokenTable
from coordexp.text.vocabulary import CoordVocabulary, has_coord_tokens
from coordexp.training.distributed import gathered_row, merge_rows
from coordexp.training.loop import MicroBatch
from coordexp.training.step import Criterion
from toyworld.composer import compose_scene
from toyworld.model import build_tiny, tiny_config
from toyworld.sprites import SpriteCatalog, load_catalog
from toyworld.tokenizer import build_tiny_tokenizer

SPRITES = Path(__file__).parents[1] / "data" / "sprites"
Codec = Literal["json", "tags", "digits"]
MIN_PIXELS, MAX_PIXELS = 64 * 64, 128 * 128
SCENES = ScenesConfig(
    kind="scenes",
    sprites=str(SPRITES),
    train_images=7,
    val_images=4,
    seed_offset=0,
    min_side_px=64,
    max_side_px=128,
    min_objects=1,
    max_objects=5,
    count_decay=0.8,
    max_iou=0.35,
    smallest_fraction=0.2,
    largest_fraction=0.5,
    small_fraction=0.1,
    crowd_fraction=0.3,
    rows=RowsConfig(most=1, objects=6, smallest_fraction=0.14, largest_fraction=0.26, closest=0.75, farthest=1.1),
    distractors=2,
    plain_fraction=0.2,
    held_out=HeldOutConfig(strict=0.2, phrase=0.1, plain_only=0.1, never=0.1),
)
NOTHING_HELD_OUT = HeldOutConfig(strict=0.0, phrase=0.0, plain_only=0.0, never=0.0)
# All families of loss terms at once, so that an equality of losses covers them all.
ALL_WEIGHTS = dict(
    text_ce=1.0, text_gate=0.1, softce=1.0, w1=10.0, gate=1.0, coord_ce=0.5, bbox_smoothl1=2.0, bbox_ciou=0.2
)
REPOSITORY = Path(__file__).parents[1]
PARAMS = load_params(REPOSITORY / "params.yaml")
B = TypeVar("B", bound=Block)


def changed(block: B, **changes: Any) -> B:
    """A validated block with changed values; `changed(PARAMS, stage1__softce_weight=2.0)` sets stage1.softce_weight."""
    tree = block.model_dump()
    for key, value in changes.items():
        *blocks, name = key.split("__")
        inner = tree
        for outer in blocks:
            inner = inner[outer]
        assert name in inner
        inner[name] = value
    return type(block).model_validate(tree)


MATCHING = PARAMS.matching


def decode_request(codec: str = "json", seed: int = 3, names: tuple[str, ...] = (), **changes: Any) -> DecodeRequest:
    """A decode request, greedy except for `changes` to the block `decode`."""
    return DecodeRequest(params=changed(PARAMS.decode, **changes), codec=codec, seed=seed, names=names)


def rollout_config(vllm_python: str = "python", **serve: Any) -> RolloutConfig:
    """The block `rollout` of the smoke profile with another interpreter, and other values of `rollout.serve`."""
    rollout = load_profile(REPOSITORY / "configs" / "smoke.yaml").rollout
    return changed(rollout, vllm_python=vllm_python, **{f"serve__{name}": value for name, value in serve.items()})


def asked(request: DecodeRequest, **changes: Any) -> DecodeRequest:
    """The same request with changed values of the block `decode`."""
    return replace(request, params=changed(request.params, **changes))


@cache
def catalog() -> SpriteCatalog:
    """The sprites of the embedded profile."""
    return load_catalog(SPRITES)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded tokenizer before the coordinate tokens are added."""
    return build_tiny_tokenizer(catalog().words)


def new_checkpoint(seed: int = 17, init: str = "ordinal", codec: Codec = "json") -> Checkpoint:
    """A random tiny model with coordinate tokens, in float32; new each time, so that a test may train it.

    The weights are scaled up from their initialization: otherwise all images and contexts would give nearly the same
    logits, and an equality of outputs would hold for any input.
    """
    tokenizer = new_tokenizer()
    model = build_tiny(tokenizer, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    vocabulary = add_coordinate_tokens(model, tokenizer, init, seed)
    pixels = pixel_spec(model.config, MIN_PIXELS, MAX_PIXELS)
    detection = DetectionConfig(version=1, codec=codec, object_order="top_left", coordinates=vocabulary)
    return Checkpoint(model=model.eval(), tokenizer=tokenizer, pixels=pixels, detection=detection)


def save_model(
    folder: Path,
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    codec: Codec = "json",
) -> None:
    """Save a checkpoint folder with these image area limits; without coordinate tokens, it is a base model."""
    coord = CoordVocabulary.from_tokenizer(tokenizer) if has_coord_tokens(tokenizer) else None
    detection = BASE.model_copy(update={"codec": codec, "coordinates": coord}) if coord else BASE
    pixels = pixel_spec(model.config, min_pixels, max_pixels)
    save_checkpoint(folder, Checkpoint(model=model, tokenizer=tokenizer, pixels=pixels, detection=detection))


@cache
def tiny_pixels() -> PixelSpec:
    """The image format of the tiny model."""
    return pixel_spec(tiny_config(new_tokenizer()), MIN_PIXELS, MAX_PIXELS)


def criterion_of(checkpoint: Checkpoint, weights: Mapping[str, float] = ALL_WEIGHTS, **changes: Any) -> Criterion:
    """A criterion for this checkpoint's vocabulary, with the default parameters except for `changes`."""
    assert checkpoint.coord is not None
    params = changed(PARAMS, **changes)
    return Criterion(params=params, weights=weights, first_coord_id=checkpoint.coord.first_id, steps=10)


def scene_records(folder: Path) -> list[Record]:
    """Six scenes in `folder`: one has a crowd region, one has no annotation, and one is resized for the model."""
    records = []
    for index in range(6):
        scene = compose_scene(SCENES, catalog(), 14, "train", index)
        image, boxes = Image.fromarray(scene.pixels), [obj.bbox_xyxy_px for obj in scene.objects]
        if index == 5:
            image = image.resize((image.width - 7, image.height))
            boxes = [(min(x1, image.width - 2), y1, min(x2, image.width), y2) for x1, y1, x2, y2 in boxes]
        image.save(folder / f"{index}.png")
        is_crowd = [index == 1 and i == 0 for i in range(len(boxes))]
        objects = [
            ObjectRecord(obj.desc, tuple(map(float, box)), metadata={"iscrowd": 1} if crowd else {})  # type: ignore[arg-type]
            for obj, box, crowd in zip(scene.objects, boxes, is_crowd, strict=True)
        ]
        kept = () if index == 3 else tuple(objects)
        records.append(Record(f"{index}.png", *image.size, kept, metadata={"image_id": 100 + index}))
    return records


@dataclass(frozen=True, slots=True)
class World:
    """Images and samples on disk."""

    root: Path
    store: SampleStore
    codec: Codec = "json"

    @property
    def samples(self) -> list[Sample]:
        """All samples, in order."""
        return list(self.store)

    def collator(self, checkpoint: Checkpoint, pack_tokens: int = 256) -> Collator:
        """A collator over this world's images."""
        return checkpoint.collator(self.root, pack_tokens)

    def encoder(self, checkpoint: Checkpoint) -> AnswerEncoder:
        """The encoder of this world's codec."""
        return AnswerEncoder(checkpoint.tokenizer, get_codec(self.codec))

    def source(self, checkpoint: Checkpoint, object_order: str = "top_left") -> SampleSource:
        """The samples in this object order."""
        return SampleSource(self.store, self.encoder(checkpoint), object_order, seed=17)


def build_world(folder: Path, codec: Codec = "json") -> World:
    """Scenes -> records -> samples, through the files between the stages."""
    tokenizer = new_tokenizer()
    add_coordinate_tokens(build_tiny(tokenizer, 0), tokenizer, "mean", 0)
    write_records(folder / "train.jsonl", scene_records(folder))
    preparer = SamplePreparer(tokenizer, get_codec(codec), tiny_pixels())
    write_split(preparer, read_records(folder / "train.jsonl"), repeat("detect"), folder / "train.parquet")
    return World(folder, SampleStore(folder / "train.parquet"), codec)


# Pixels of a 100 x 100 image, so that a bin is a tenth of a pixel; the corner 30.04 is between two bins.
TRUTH = {"cat": (10.0, 10.0, 30.04, 30.0), "dog": (50.0, 11.0, 80.0, 40.0), "cup": (10.0, 60.0, 40.0, 90.0)}
CROWD = ObjectRecord("crowd", (0.0, 0.0, 99.0, 99.0), metadata={"iscrowd": 1})


def sample_of(checkpoint: Checkpoint, codec: str, names: tuple[str, ...] = tuple(TRUTH)) -> Sample:
    """A sample without an image, annotated with these objects of TRUTH and a crowd box."""
    objects = tuple(ObjectRecord(name, TRUTH[name], metadata={}) for name in names)
    record = Record("x.png", 100, 100, (*objects, CROWD), metadata={"image_id": 1})
    return SamplePreparer(checkpoint.tokenizer, get_codec(codec), tiny_pixels()).prepare(record)


def answer_reader(checkpoint: Checkpoint, codec: str = "json") -> AnswerReader:
    """A reader of this checkpoint's answers."""
    table = TokenTable.from_tokenizer(checkpoint.tokenizer, checkpoint.coord)
    return AnswerReader(table, codec, {"model": "tiny"})


def rollout_of(checkpoint: Checkpoint, sample: Sample, objects: Sequence[TextObject], codec: str = "json") -> Rollout:
    """The matched rollout of a model that answered with these objects."""
    answer = AnswerEncoder(checkpoint.tokenizer, get_codec(codec)).encode(objects)
    generation = Generation(answer.ids, "stop")
    parsed = answer_reader(checkpoint, codec).parse(generation)
    return match_rollouts([parsed_rollout(sample.image_id, generation, parsed)], [sample], PARAMS.matching)[0]


def teacher_rollouts(checkpoint: Checkpoint, world: World) -> dict[int, Rollout]:
    """A rollout of every sample: all objects but the first are off by two bins, the second is doubled; one fails."""
    rollouts = {}
    for sample in world.samples:
        truth = text_objects(sample.descs, encode_boxes(sample.boxes_xyxy_px, sample.width, sample.height))
        n_objects = len(truth) - sum(sample.iscrowd)  # crowds stand last
        moved = [TextObject(o.desc, (o.bins[0] + 2, *o.bins[1:])) for o in truth[1:n_objects]]
        rollouts[sample.image_id] = rollout_of(checkpoint, sample, moved + moved[:1], world.codec)
    broken = world.samples[-1]
    garbage = Generation(broken.answer_ids[1:4], "length")
    parsed = answer_reader(checkpoint).parse(garbage)
    return rollouts | {broken.image_id: parsed_rollout(broken.image_id, garbage, parsed)}


def put_rollouts(paths: ProfilePaths, rollouts: Mapping[int, Rollout]) -> None:
    """Write rollouts to files as the stage does."""
    generations = {i: Generation(np.array(r.ids, np.int32), r.finish_reason) for i, r in rollouts.items()}
    paths.rollouts.parent.mkdir(exist_ok=True)
    write_generations(paths.rollouts, generations)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Six composed scenes with their samples (json codec); see `scene_records`."""
    return build_world(tmp_path_factory.mktemp("world"))


def optim(**changes: Any) -> OptimConfig:
    """Optimizer settings for a small model."""
    block = {
        "optimizer": "adamw", "steps": 8, "lr": 0.01, "coord_row_lr_factor": 1.0, "vision_lr_factor": 1.0,
        "projector_lr_factor": 1.0, "language_lr_factor": 1.0, "betas": (0.9, 0.95),
        "warmup_steps": 2, "weight_decay": 0.0, "precision": "fp32", "max_grad_norm": 1.0, "log_every": 3,
        "grad_monitor_every": 0,
    }  # fmt: skip
    return OptimConfig.model_validate(block | changes)


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders of the smoke profile in a temporary root, with results up to `pack`."""

    params: Params
    profile: Profile
    paths: ProfilePaths

    def set(self, **changes: Any) -> Workspace:
        """The same with other parameters, named as in `changed`."""
        return replace(self, params=changed(self.params, **changes))


def build_workspace(root: Path, world: World) -> Workspace:
    """Samples of the world as train and val, its images as raw, a random initial checkpoint that is also stage 1's."""
    profile, template = (
        load_profile(REPOSITORY / "configs" / "smoke.yaml"),
        world.root.with_name(f"{world.root.name}-workspace"),
    )
    if not template.exists():
        _fill(ProfilePaths("smoke", template), world, profile.packing.pack_tokens)
    shutil.copytree(template, root, dirs_exist_ok=True)
    tree = profile.model_dump()
    tree["model"] |= {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    return Workspace(PARAMS, Profile.model_validate(tree), ProfilePaths("smoke", root))


def _fill(paths: ProfilePaths, world: World, pack_tokens: int) -> None:
    paths.raw.mkdir(parents=True)
    for image in world.root.glob("*.png"):
        shutil.copy(image, paths.raw)
    checkpoint = new_checkpoint(codec=world.codec)
    for folder in (paths.norm1000 / "init", paths.run("stage1")):
        save_checkpoint(folder, checkpoint)
    for split in ("train", "dev", "val"):
        shutil.copy(world.root / "train.parquet", paths.norm1000 / f"{split}.parquet")
    paths.packed.mkdir(parents=True)
    write_plan(paths.packed / "plan.parquet", plan_packs(world.store.lengths(), pack_tokens, PARAMS.seed))


@pytest.fixture
def workspace(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """See `build_workspace`; resume states go to the temporary root too."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return build_workspace(tmp_path, world)


def logs_of(micro: MicroBatch) -> dict[str, Any]:
    """The log of one step on this batch, without timings."""
    row = gathered_row(merge_rows([dict(micro.logs)]))
    return {name: value for name, value in row.items() if not name.startswith("time/")}


def token_logprobs(
    checkpoint: Checkpoint,
    collator: Collator,
    samples: Sequence[Sample],
    generations: Sequence[Generation],
    images_per_forward: int,
) -> list[NDArray[np.float64]]:
    """Log-probability (nats) of each generated token, per sample an array as long as its generation."""
    nothing = [np.zeros((0, 4), np.int64)] * len(samples)
    rescored = rescore(checkpoint, collator, samples, generations, nothing, images_per_forward)
    return [r.logprobs_A for r in rescored]


def on_meta(config: Qwen3VLConfig) -> Qwen3VLForConditionalGeneration:
    """The model on the meta device: all shapes are correct, but nothing can be computed."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    model.tie_weights()  # a tied head shares the embedding, also here, and counts once
    return model
