"""A small world for tests: the embedded tokenizer, a random tiny model, and composed scenes as tokenised samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from coordexp.losses.objective import ObjectiveWeights
from coordexp.losses.soft_targets import SoftTarget
from coordexp.models.expand import add_coordinate_tokens
from coordexp.models.loading import Checkpoint
from coordexp.models.pixel_format import pixel_spec
from coordexp.models.tiny import build_tiny, tiny_config
from coordexp.packing.collator import Collator
from coordexp.packing.pixels import PixelSpec
from coordexp.packing.prepare import SamplePreparer, write_split
from coordexp.packing.samples import Sample, SampleStore
from coordexp.records.scenes.composer import SceneSpec, compose_scene
from coordexp.records.scenes.sprites import SpriteCatalog, load_catalog
from coordexp.records.schema import ObjectRecord, Record, read_records, write_records
from coordexp.text.codecs import get_codec
from coordexp.text.tiny_tokenizer import build_tiny_tokenizer
from coordexp.training.objective_step import Objective

SPRITES = Path(__file__).parents[1] / "data" / "sprites"
MIN_PIXELS, MAX_PIXELS = 64 * 64, 128 * 128
SPEC = SceneSpec(
    min_side_px=64,
    max_side_px=128,
    max_objects=5,
    smallest_share=0.2,
    largest_share=0.5,
    small_share=0.1,
    crowd_share=0.3,
    distractors=2,
    held_out_share=0.3,
)
# Every family of terms at once, so that an equality of losses speaks for all of them.
ALL_WEIGHTS = ObjectiveWeights(
    text_ce=1.0, text_gate=0.1, softce=1.0, w1=10.0, gate=1.0, coord_ce=0.5, bbox_smoothl1=2.0, bbox_ciou=0.2
)


@cache
def catalog() -> SpriteCatalog:
    """The sprites of the embedded profile."""
    return load_catalog(SPRITES)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded tokenizer before the coordinate tokens are added."""
    return build_tiny_tokenizer(catalog().descs)


def new_checkpoint(seed: int = 17, init: str = "ordinal") -> Checkpoint:
    """A random tiny model with coordinate tokens, in float32; a fresh one each time, so that a test may train it.

    The weights are scaled up from their initialisation: otherwise all images and contexts give nearly the same logits,
    and an equality of outputs would hold whatever the inputs.
    """
    tokenizer = new_tokenizer()
    model = build_tiny(tokenizer, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    vocabulary = add_coordinate_tokens(model, tokenizer, init, seed)
    return Checkpoint(model.eval(), tokenizer, pixel_spec(model.config, MIN_PIXELS, MAX_PIXELS), vocabulary)


@cache
def tiny_pixels() -> PixelSpec:
    """The image format of the tiny model."""
    return pixel_spec(tiny_config(new_tokenizer()), MIN_PIXELS, MAX_PIXELS)


def objective(checkpoint: Checkpoint, weights: ObjectiveWeights = ALL_WEIGHTS) -> Objective:
    """An objective for this checkpoint's vocabulary."""
    assert checkpoint.coord is not None
    return Objective(
        weights=weights,
        target=SoftTarget(sigma=2.0),
        temperature=1.0,
        first_coord_id=checkpoint.coord.first_id,
        smoothl1_beta_bins=10.0,
        coord_decode_mode="exp",
    )


def scene_records(folder: Path) -> list[Record]:
    """Six scenes in `folder`: one with a crowd box, one annotated with nothing, one that the model's format resizes."""
    records = []
    for index in range(6):
        scene = compose_scene(SPEC, catalog(), 14, "train", index)
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

    @property
    def samples(self) -> list[Sample]:
        """All samples, in order."""
        return list(self.store)

    def collator(self, checkpoint: Checkpoint, pack_tokens: int = 256) -> Collator:
        """A collator over this world's images."""
        image_id, pad_id = checkpoint.model.config.image_token_id, checkpoint.tokenizer.pad_token_id
        return Collator(self.root, checkpoint.pixels, image_id, pad_id, pack_tokens)


def build_world(folder: Path, codec: str = "json") -> World:
    """Scenes -> records -> samples, by way of the files between the stages."""
    tokenizer = new_tokenizer()
    add_coordinate_tokens(build_tiny(tokenizer, 0), tokenizer, "mean", 0)
    write_records(folder / "train.jsonl", scene_records(folder))
    preparer = SamplePreparer(tokenizer, get_codec(codec), tiny_pixels())
    write_split(preparer, read_records(folder / "train.jsonl"), repeat("detect"), folder / "train.parquet")
    return World(folder, SampleStore(folder / "train.parquet"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Six composed scenes with their samples (json codec); see `scene_records`."""
    return build_world(tmp_path_factory.mktemp("world"))
