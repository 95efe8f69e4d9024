"""From checked parameters to the objects of a training stage. The only place that knows both sides."""

from __future__ import annotations

from pathlib import Path

from coordexp.config.profile import Profile
from coordexp.config.schema import CoordWeights, Params
from coordexp.errors import CheckpointError
from coordexp.losses.objective import ObjectiveWeights
from coordexp.losses.soft_targets import SoftTarget
from coordexp.models.loading import Checkpoint, ModelFormat, load_checkpoint
from coordexp.packing.collator import Collator
from coordexp.packing.rank_slices import RankSlice
from coordexp.text.codecs import AnswerEncoder, get_codec
from coordexp.training.distributed import world
from coordexp.training.fused_batch import fused_pays
from coordexp.training.objective_step import Annealing, Objective
from coordexp.training.schedule import ramp
from coordexp.training.sharding import will_shard
from coordexp.training.soft_context import SoftContext


def load_for_training(folder: Path, sharding: str) -> Checkpoint:
    """A checkpoint in float32 on the device of this process; on the CPU if it is to be sharded, layer by layer."""
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


def _coordinate_weights(weights: CoordWeights) -> dict[str, float]:
    return {
        "softce": weights.softce_weight,
        "w1": weights.w1_weight,
        "gate": weights.gate_weight,
        "coord_ce": weights.coord_ce_weight,
        "text_gate": weights.text_gate_weight,
    }


def stage1_objective(params: Params, checkpoint: Checkpoint, steps: int) -> Objective:
    """Token cross-entropy on text plus the coordinate objective with stage 1's weights; no box terms.

    `steps` is the length of the run, of which annealing takes its share.
    """
    weights = ObjectiveWeights(text_ce=1.0, **_coordinate_weights(params.stage1))
    return _objective(params, checkpoint, weights, steps)


def stage2_objective(params: Params, checkpoint: Checkpoint, steps: int) -> Objective:
    """The full objective with the top-level weights, for a run of that many steps."""
    weights = ObjectiveWeights(
        text_ce=params.stage2.text_ce_weight,
        duplicate_unlikelihood=params.stage2.duplicate_unlikelihood_weight,
        entropy=params.entropy_weight,
        bbox_smoothl1=params.bbox_smoothl1_weight,
        bbox_l1=params.bbox_l1_weight,
        bbox_giou=params.bbox_giou_weight,
        bbox_ciou=params.bbox_ciou_weight,
        bbox_log_wh=params.bbox_log_wh_weight,
        **_coordinate_weights(params),
    )
    return _objective(params, checkpoint, weights, steps)


def _objective(params: Params, checkpoint: Checkpoint, weights: ObjectiveWeights, steps: int) -> Objective:
    return Objective(
        weights=weights,
        target=SoftTarget(kind=params.target, sigma=params.sigma, truncate=params.truncate),
        temperature=params.temperature,
        first_coord_id=first_coord_id(checkpoint),
        smoothl1_beta_bins=params.smoothl1_beta_bins,
        coord_decode_mode=params.stage2.coord_decode_mode,
        top_k=params.stage2.top_k,
        annealing=_annealing(params, steps),
        fused=fused_pays(checkpoint.model),
    )


def _annealing(params: Params, steps: int) -> Annealing | None:
    """The ramps at the start of a stage of that many steps; None if both are off."""
    anneal = params.anneal
    sigma_steps, temperature_steps = round(anneal.sigma_fraction * steps), round(anneal.temperature_fraction * steps)
    if not (sigma_steps or temperature_steps):
        return None
    return Annealing(
        ramp(anneal.sigma_from, params.sigma, sigma_steps),
        ramp(anneal.temperature_from, params.temperature, temperature_steps),
    )


def soft_context(params: Params, checkpoint: Checkpoint) -> SoftContext:
    """Channel A's self-context settings."""
    return SoftContext(
        n_iter=params.stage2.n_softctx_iter,
        embed_mode=params.stage2.coord_ctx_embed_mode,
        grad_mode=params.stage2.softctx_grad_mode,
        temperature=params.temperature,
        first_coord_id=first_coord_id(checkpoint),
    )
