"""From checked parameters to the objects of a training stage. The only place that knows both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from coordexp.config.profile import Profile
from coordexp.errors import CheckpointError
from coordexp.infra.device import training_plan
from coordexp.models.loading import Checkpoint, ModelFormat, load_checkpoint
from coordexp.packing.collator import Collator, RankSlice
from coordexp.text.codecs import AnswerEncoder, get_codec
from coordexp.training.distributed import world
from coordexp.training.sharding import will_shard


def load_for_training(folder: Path, sharding: str, precision: Literal["bf16", "fp32"]) -> Checkpoint:
    """A checkpoint in float32 on the device of this process; on the CPU if it is to be sharded, layer by layer."""
    training_plan(precision, world().device).adopt()
    checkpoint = load_checkpoint(folder)
    if not will_shard(sharding):
        checkpoint.model.to(world().device)  # type: ignore[arg-type]  # an untyped decorator
    return checkpoint


def first_coord_id(checkpoint: Checkpoint) -> int:
    """Id of bin 0; raises CheckpointError for a checkpoint without coordinate tokens."""
    if checkpoint.coord is None:
        raise CheckpointError("this checkpoint has no coordinate tokens; train on the one norm1000 wrote (init/).")
    return checkpoint.coord.first_id


def make_collator(checkpoint: Checkpoint, image_root: Path, pack_tokens: int) -> Collator:
    """A collator for this checkpoint's vocabulary and image format."""
    return Collator(
        image_root,
        checkpoint.pixels,
        checkpoint.model.config.image_token_id,
        checkpoint.tokenizer.pad_token_id,
        pack_tokens,
    )


def own_slice(profile: Profile) -> RankSlice:
    """The rows of every step that this process runs."""
    return RankSlice(world().rank, world().size, profile.launch.rows_per_forward)


def make_encoder(checkpoint: ModelFormat) -> AnswerEncoder:
    """The encoder of training answers."""
    return AnswerEncoder(checkpoint.tokenizer, get_codec(checkpoint.codec))
