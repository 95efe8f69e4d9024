"""The schema of `params.yaml`: the parameters that experiments vary.

No field has a default here: `params.yaml` sets every value, so the file alone describes the run. Bins are the 1000
coordinate bins; a `_bins` width of 10 is one percent of the image side.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from coordexp.config.block import Block, Count, Fraction, IouList, PositiveCount, Text, Weight
from coordexp.infra.random_streams import repetition_seed

# A regularizer of either sign: a weight above 0 penalizes the term, one below 0 rewards it.
SignedWeight = Annotated[float, Field(ge=-100, le=100)]

# A checkpoint also stores its default rule and score (models/detection_config.py).
BoxRule = Literal["argmax", "expectation", "local_expectation", "top_k", "median"]
ScoreName = Literal["constant", "coord_logprob", "desc_logprob", "mix", "spread", "expected_iou", "quality"]

# How one value is read out of a distribution over bins; losses/readout.py defines each rule.
ReadoutRule = Literal["argmax", "expectation", "straight_through", "local_expectation", "top_k", "median"]
_READOUT_SYNONYMS = {
    "exp": "expectation",
    "soft": "expectation",
    "st": "straight_through",
    "hard": "argmax",
    "local": "local_expectation",
}


def _full_name(name: object) -> object:
    return _READOUT_SYNONYMS.get(name, name) if isinstance(name, str) else name


_SHORT_NAMES = BeforeValidator(_full_name)

SeedOffset = Annotated[int, Field(ge=0, le=999)]
BinCount = Annotated[int, Field(ge=1, le=1000)]


class CoordSupervision(Block):
    """Weights of the terms that train coordinate tokens, which the text loss leaves out. One must be above 0."""

    softce_weight: Weight = Field(description="cross-entropy against the soft target over the 1000 bins")
    w1_weight: Weight = Field(
        description="Wasserstein-1 distance between predicted and target distribution, in [0, 1] units"
    )
    gate_weight: Weight = Field(description="-log P(any coordinate token) at coordinate slots")
    coord_ce_weight: Weight = Field(description="hard cross-entropy of the target coordinate token")


class CoordWeights(CoordSupervision):
    """Weights of the coordinate objective: the top level of params.yaml for stage 2, the block `stage1` for stage 1."""

    text_gate_weight: Weight = Field(description="-log P(no coordinate token) at text slots")


class AnnealParams(Block):
    """Wider targets and softer distributions at the start of each training stage. A fraction of 0 turns a ramp off."""

    sigma_from: float = Field(gt=0, le=200, description="width at step 0, in bins; truncate widens in proportion")
    sigma_fraction: Fraction = Field(description="fraction of the steps over which the width goes linearly to sigma")
    temperature_from: float = Field(gt=0, le=100, description="temperature at step 0")
    temperature_fraction: Fraction = Field(
        description="fraction of the steps over which it goes linearly to temperature"
    )


class TextParams(Block):
    """The text of the answers."""

    codec: Literal["json", "tags", "digits"] = Field(
        description="answer format: JSON or box markers with coordinate tokens, or JSON with numbers"
    )
    object_order: Literal["top_left", "random"] = Field(description="order of objects in training answers")


class Stage1Params(CoordWeights):
    """Stage 1 has its own weights of the coordinate objective."""

    seed: SeedOffset = Field(description="repetition of stage 1 and the control: the same data in another order")


class Stage2Params(Block):
    """Stage 2: channel schedule, soft self-context (channel A), and rollout targets (channel B)."""

    seed: SeedOffset = Field(description="repetition of stage 2: the same data and rollouts in another order")
    b_ratio: Fraction = Field(description="fraction of steps that train on rollouts (channel B)")
    n_softctx_iter: int = Field(ge=1, le=8, description="forwards of channel A; 1 is plain teacher forcing")
    softctx_grad_mode: Literal["unroll", "em_detach"] = Field(
        description="em_detach cuts the gradient through the context embeddings; unroll keeps it"
    )
    coord_ctx_embed_mode: Annotated[Literal["argmax", "expectation", "straight_through"], _SHORT_NAMES] = Field(
        description="channel A: input embedding of a predicted coordinate (losses/readout.py)"
    )
    coord_decode_mode: Annotated[ReadoutRule, _SHORT_NAMES] = Field(
        description="how box losses read a coordinate from its distribution (losses/readout.py)"
    )
    top_k: BinCount = Field(description="number of bins that coord_decode_mode: top_k keeps")
    a1_coord_weight: Weight = Field(
        description="channel A with several forwards: weight of the coordinate terms of the first one"
    )
    text_ce_weight: Weight = Field(description="cross-entropy of text tokens")
    reordered_ce_weight: Weight = Field(
        description="channel B, two passes: cross-entropy of coordinates of the reordered annotation"
    )
    eos_weight: Weight = Field(description="channel B: factor on the cross-entropy of the stop token")
    passes: Literal["two", "one"] = Field(
        description="channel B: one forward for boxes and one for text, or one for both"
    )
    missed: Literal["append", "sorted"] = Field(
        description="channel B: false negatives go to the end of the target, or into reading order"
    )
    extras: Literal["context", "drop"] = Field(
        description="channel B, one pass: unmatched predictions stay as context, or are dropped"
    )
    over_generation: Literal["keep", "truncate"] = Field(
        description="channel B, too many predictions: add false negatives, or stop after the matched"
    )
    over_close_weight: Weight = Field(
        description="channel B, too many predictions: additional factor on the stop token"
    )
    duplicate_unlikelihood_weight: Weight = Field(
        description="channel B: -log(1 - P) of the first token that makes an object a duplicate"
    )
    refresh_steps: Count = Field(description="channel B: steps between fresh rollouts; 0 is never")
    refresh_samples: PositiveCount = Field(
        description="fresh rollouts: answers per image; the one with the highest matching F1 is used"
    )
    refresh_temperature: float = Field(
        gt=0, le=5, description="fresh rollouts: temperature of all answers but the first, which follows decode"
    )
    curriculum_fraction: Fraction = Field(
        description="channel B: fraction of the steps over which gate and lambda_sem reach matching.*"
    )
    gate_from: Fraction = Field(description="matching.gate_threshold at step 0 of the curriculum")
    lambda_sem_from: Weight = Field(description="matching.lambda_sem at step 0 of the curriculum")


class ControlParams(Block):
    """The control: stage 1 continued, as the reference for stage 2."""

    budget: Literal["compute", "tokens"] = Field(
        description="what the control gets: the compute of stage 2 with rollouts, or its training tokens"
    )


class MatchingParams(Block):
    """Assignment of predicted to annotated objects."""

    lambda_l1: Weight = Field(description="cost weight of the L1 distance between boxes, in [0, 1] units")
    lambda_iou: Weight = Field(description="cost weight of 1 - GIoU")
    lambda_sem: Weight = Field(description="cost weight of the distance between two names")
    semantic: Literal["encoder", "lexical"] = Field(
        description="distance between two names: 1 - cosine of a text encoder, or 1 - shared / all words"
    )
    gate: Literal["iou", "l1"] = Field(description="criterion for pairs that may match, applied before the assignment")
    gate_threshold: Fraction = Field(
        description="minimum IoU (gate: iou) or maximum mean L1 (gate: l1) of an allowed pair"
    )

    @model_validator(mode="after")
    def _cost_is_not_constant(self) -> MatchingParams:
        if not (self.lambda_l1 or self.lambda_iou or self.lambda_sem):
            raise ValueError(
                "lambda_l1, lambda_iou, lambda_sem are all 0: every assignment costs the same; set one above 0."
            )
        return self


class DecodeParams(Block):
    """How answers are generated and scored, in rollouts and in evaluation."""

    max_new_tokens: int = Field(ge=1, le=32768, description="maximum number of tokens in an answer")
    temperature: float = Field(ge=0, le=5, description="sampling temperature; 0 is greedy")
    top_p: float = Field(gt=0, le=1, description="nucleus sampling; 1 keeps the whole vocabulary")
    beams: int = Field(ge=1, le=64, description="number of beams; 1 takes the most probable token at each position")
    repetition_penalty: float = Field(ge=1, le=2, description="penalty on tokens already in the answer; 1 is none")
    score: ScoreName = Field(description="confidence of an object (rollout/confidence.py)")
    box: Annotated[BoxRule, _SHORT_NAMES] = Field(
        description="edge of a box: the emitted bin, or read from its distribution (losses/readout.py)"
    )
    box_top_k: BinCount = Field(description="number of bins that box: top_k keeps")
    grammar: Literal["none", "any", "closed"] = Field(
        description="emit only answers that parse, with any name or only names of the data set"
    )
    corners: Literal["any", "valid"] = Field(description="with a grammar: valid allows only x2 > x1 and y2 > y1")
    duplicate_iou: float = Field(
        gt=0, le=1, description="with a grammar: maximum IoU with an earlier box of the same name; 1 allows any"
    )

    @property
    def needs_walk(self) -> bool:
        """Whether there are geometric constraints, which a context-free grammar cannot express and a walk enforces."""
        return self.corners == "valid" or self.duplicate_iou < 1

    @model_validator(mode="after")
    def _greedy_excludes_nucleus(self) -> DecodeParams:
        if self.temperature == 0 and self.top_p != 1:
            raise ValueError(f"top_p {self.top_p} has no effect at temperature 0; set top_p: 1.0 or raise temperature.")
        return self

    @model_validator(mode="after")
    def _beams_exclude_sampling(self) -> DecodeParams:
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(
                f"beams {self.beams} search for the most probable answer, but temperature "
                f"{self.temperature} samples one; set temperature: 0.0 or beams: 1."
            )
        return self

    @model_validator(mode="after")
    def _constraints_need_a_grammar(self) -> DecodeParams:
        if self.grammar == "none" and self.needs_walk:
            raise ValueError(
                f"corners {self.corners} and duplicate_iou {self.duplicate_iou} need a grammar, which knows where a "
                "coordinate is; set grammar: any or closed, or corners: any and duplicate_iou: 1.0."
            )
        return self


class EvalParams(Block):
    """How predictions are evaluated."""

    bootstrap_resamples: int = Field(
        ge=100, le=100_000, description="bootstrap resamples over images, for 95% intervals"
    )
    f1_ious: IouList = Field(description="IoU thresholds of precision, recall, and F1, in addition to 0.5")
    duplicate_ious: IouList = Field(
        description="IoU thresholds above which two boxes with the same name are duplicates"
    )
    mapping: Literal["exact", "normalised", "semantic"] = Field(
        description="how a description is mapped to a category; semantic needs the text encoder"
    )
    semantic_floor: float = Field(ge=0, lt=1, description="mapping: semantic: minimum cosine with the nearest category")
    semantic_margin: float = Field(
        ge=0, lt=1, description="mapping: semantic: minimum margin of the nearest category over the second nearest"
    )

    @model_validator(mode="after")
    def _thresholds_ascend(self) -> EvalParams:
        for name in ("f1_ious", "duplicate_ious"):
            values = getattr(self, name)
            if any(round(100 * a) >= round(100 * b) for a, b in pairwise(values)):  # metrics are named by hundredths
                raise ValueError(
                    f"{name} is {list(values)}; list each threshold once, in ascending order, at least 0.01 apart."
                )
        return self


class Params(CoordWeights):
    """All of `params.yaml`."""

    profile: Text = Field(description="name of the file in configs/ with data, model, and sizes")
    seed: int = Field(
        ge=0,
        le=2**31 - 1,
        description="seed of data, initialization, order, sampling; plus 1000 x stage1.seed or stage2.seed",
    )
    entropy_weight: SignedWeight = Field(
        description="stage 2: entropy of coordinate distributions; above 0 sharpens, below 0 broadens"
    )
    target: Literal["gaussian", "triangular", "two_bin"] = Field(description="shape of the soft target over bins")
    sigma: float = Field(gt=0, le=200, description="width of the soft target, in bins")
    truncate: int = Field(ge=1, le=999, description="half-width in bins outside which the soft target is 0")
    temperature: float = Field(gt=0, le=100, description="temperature of softCE, W1, gates, entropy, and expectation")
    bbox_smoothl1_weight: Weight = Field(description="stage 2: SmoothL1 of boxes in [0, 1] units")
    bbox_ciou_weight: Weight = Field(description="stage 2: 1 - CIoU")
    bbox_giou_weight: Weight = Field(description="stage 2: 1 - GIoU")
    bbox_l1_weight: Weight = Field(description="stage 2: L1 of boxes in [0, 1] units")
    bbox_log_wh_weight: Weight = Field(description="stage 2: SmoothL1 of log width and log height")
    smoothl1_beta_bins: float = Field(gt=0, le=999, description="error in bins above which SmoothL1 is linear")
    anneal: AnnealParams
    text: TextParams
    stage1: Stage1Params
    stage2: Stage2Params
    control: ControlParams
    matching: MatchingParams
    decode: DecodeParams
    eval: EvalParams

    @property
    def stage1_seed(self) -> int:
        """Seed of everything random in training stage 1. The data depend on `seed` only."""
        return repetition_seed(self.seed, self.stage1.seed)

    @property
    def stage2_seed(self) -> int:
        """Seed of everything random in training stage 2, and its control."""
        return repetition_seed(self.seed, self.stage2.seed)

    @model_validator(mode="after")
    def _coordinates_are_supervised(self) -> Params:
        if self.text.codec == "digits":  # plain numbers are text, and trained as text
            return self
        keys = CoordSupervision.model_fields
        for weights, prefix in ((self, ""), (self.stage1, "stage1.")):
            if not any(getattr(weights, key) for key in keys):
                raise ValueError(
                    f"{', '.join(prefix + key for key in keys)} are all 0, so no loss would train the "
                    "coordinate tokens; set at least one above 0."
                )
        return self

    @model_validator(mode="after")
    def _plain_numbers_have_no_distribution(self) -> Params:
        if self.text.codec == "digits" and (self.stage2.b_ratio > 0 or self.stage2.n_softctx_iter > 1):
            raise ValueError(
                f"stage2.b_ratio {self.stage2.b_ratio} and stage2.n_softctx_iter {self.stage2.n_softctx_iter} need "
                "coordinate tokens, which text.codec digits does not have; set them to 0 and 1, or choose json or tags."
            )
        return self
