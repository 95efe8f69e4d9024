"""Build the objects of a training stage from validated parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from coordexp.config.profile import Profile
from coordexp.errors import CheckpointError
from coordexp.infra.device import training_plan
from coordexp.models.loading import Checkpoint, ModelFormat, load_checkpoint
from coordexp.packing.collator import RankSlice
from coordexp.text.codecs import AnswerEncoder, get_codec
from coordexp.training.distributed import world
from coordexp.training.sharding import will_shard


def load_for_training(folder: Path, sharding: str, precision: Literal["bf16", "fp32"]) -> Checkpoint:
    """Load a checkpoint in float32 onto the device of this process, or onto the CPU if it will be sharded by layer."""
    training_plan(precision, world().device).adopt()
    checkpoint = load_checkpoint(folder)
    if not will_shard(sharding):
        checkpoint.model.to(world().device)  # type: ignore[arg-type]  # an untyped decorator
    return checkpoint


def first_coord_id(checkpoint: Checkpoint) -> int:
    """Token id of bin 0; raises CheckpointError for a checkpoint without coordinate tokens."""
    if checkpoint.coord is None:
        raise CheckpointError(
            "the checkpoint has no coordinate tokens, expected the one that the stage norm1000 writes (init/). Train "
            "from that one."
        )
    return checkpoint.coord.first_id


def own_slice(profile: Profile) -> RankSlice:
    """The slice of every step's rows that this process runs."""
    return RankSlice(world().rank, world().size, profile.launch.rows_per_forward)


def make_encoder(checkpoint: ModelFormat) -> AnswerEncoder:
    """The encoder of training answers."""
    return AnswerEncoder(checkpoint.tokenizer, get_codec(checkpoint.codec))
