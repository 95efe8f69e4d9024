"""The schema of a question: arms, their baselines, and the rule by which numbers answer the question.

One file of `configs/questions/` is one question; `coordexp answer` runs what is missing. The rule is fixed before any
number is seen: a claim, and what its interval must show.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from coordexp.config.block import Block, PositiveCount, Text, Texts
from coordexp.config.loading import load_block
from coordexp.config.presets import overrides, read_preset
from coordexp.errors import ConfigError, closest

QUESTIONS = Path("configs/questions")
# Shown for every comparison. The first one decides.
METRICS = ("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.full_mean", "set.dup_pairs_90")
PRIMARY = METRICS[0]
Trained = Literal["stage1", "stage1-control", "stage2"]
TRAINED: tuple[Trained, ...] = get_args(Trained)
Budget = Literal["tokens", "compute", "decoding", "none"]
# Keys of params.yaml that no question varies, and the reason.
UNASKED = {
    "profile": "a question sets its own profile",
    "seed": "changes the data, so runs are no longer paired; repetitions vary stage1.seed and stage2.seed",
    "stage1.seed": "varied by every question that trains stage 1",
    "stage2.seed": "varied by every question that trains stage 2",
    "decode.max_new_tokens": "a limit: above the longest annotated answer it does not change an answer that parses",
    "eval.bootstrap_resamples": "affects the precision of the intervals, not the detector",
    "eval.f1_ious": "selects the thresholds that are reported in addition to the headline ones",
    "eval.duplicate_ious": "selects the thresholds that are reported",
    "eval.semantic_floor": "tested on COCO's names (evaluation/categories.py); no answer here is near two names",
    "eval.semantic_margin": "as eval.semantic_floor",
}


class Arm(Block):
    """One training recipe, and its baseline."""

    presets: Texts = Field(
        default=(), description="presets of configs/presets that it starts from; later ones override earlier ones"
    )
    changes: Texts = Field(default=(), description="KEY=VALUE as for `-S`, including `configs/${profile}.yaml:KEY`")
    checkpoint: Trained = Field(default="stage2", description="the checkpoint that is evaluated")
    baseline: str = Field(
        default="", description="another arm, or a checkpoint of the same run; without one the arm is only measured"
    )

    def stated(self, root: Path) -> list[str]:
        """Its values as KEY=VALUE: of its presets, then its changes; a later value of a key replaces an earlier one.

        Raises:
            ConfigError: a preset does not exist or is invalid.
        """
        presets = [value for name in self.presets for value in overrides(read_preset(name, root))[1::2]]
        return [*presets, *self.changes]


class Claim(Block):
    """A claim: a metric of an arm is higher than, lower than, or the same as its baseline, the last within `margin`.

    Without a baseline, the value itself is compared with `than`. The three sentences are the answers in words.
    """

    text: Text = Field(description="the claim in words")
    source: Text = Field(description="who claims it, or why")
    arm: Text = Field(description="an arm")
    baseline: str = Field(default="", description="another arm, or a checkpoint of the run of `arm`, or none")
    expected: Literal["higher", "lower", "same"] = Field(description="how the arm compares with its baseline")
    metric: Text = Field(default=PRIMARY, description="the metric that is compared")
    than: float = Field(default=0.0, description="without a baseline: the value to compare with")
    margin: float = Field(default=0.0, ge=0, description="with `same`: the maximum difference that counts as none")
    yes: str = Field(default="", description="the answer if the interval shows the claim")
    no: str = Field(default="", description="the answer if it shows the opposite")
    open: str = Field(default="", description="the answer if it shows neither")

    @model_validator(mode="after")
    def _same_has_a_margin(self) -> Claim:
        if (self.expected == "same") != (self.margin > 0):
            raise ValueError(f"margin is {self.margin:g}, expected above 0 with `expected: same`, and 0 otherwise.")
        if self.than and self.baseline:
            raise ValueError(f"than is {self.than:g}, but there is a baseline; remove one of the two.")
        return self


class Question(Block):
    """A question in words, its arms in the order of the report, the claims that answer it, and the number of seeds."""

    question: Text = Field(description="the question in words")
    source: Text = Field(default="this repository", description="where the question comes from")
    profile: str = Field(default="", description="the profile to run; by default the one of params.yaml")
    budget: Budget = Field(
        default="tokens",
        description="what both sides have in common: training tokens, also rollouts, only decoding, or nothing",
    )
    seeds: PositiveCount = Field(default=3, description="repetitions of every arm")
    repeat: Literal["changed", "stage2"] = Field(
        default="changed",
        description="what a repetition trains again: the stages that differ between arms, or stage 2 and control alone",
    )
    note: str = Field(default="", description="limits of the answer")
    changes: Texts = Field(default=(), description="KEY=VALUE of all arms, applied before their own")
    arms: dict[str, Arm] = Field(description="name -> arm")
    claims: dict[str, Claim] = Field(default_factory=dict, description="name -> claim; the first one gives the answer")

    @model_validator(mode="after")
    def _fits_together(self) -> Question:
        if taken := sorted(self.arms.keys() & {*TRAINED}):
            raise ValueError(f"arms: {taken[0]!r} is the name of a checkpoint; rename the arm.")
        if self.repeat == "stage2" and all(arm.checkpoint == "stage1" for arm in self.arms.values()):
            raise ValueError("repeat is 'stage2', but all arms evaluate stage 1: repetitions would be identical.")
        named = {f"arms.{name}.baseline": arm.baseline for name, arm in self.arms.items()}
        named |= {f"claims.{name}.baseline": claim.baseline for name, claim in self.claims.items()}
        named = {key: name for key, name in named.items() if name not in ("", *TRAINED)}
        named |= {f"claims.{name}.arm": claim.arm for name, claim in self.claims.items()}
        for key, name in named.items():
            if name not in self.arms:
                known = ", ".join(self.arms)
                raise ValueError(f"{key}: no arm {name!r}.{closest(name, self.arms)} Arms: {known}.")
        return self

    def only(self, names: Iterable[str]) -> Question:
        """The question with only the named arms (all without names), their baselines, and the claims about these.

        Raises:
            ConfigError: a name is unknown.
        """
        wanted = set(names) or set(self.arms)
        if unknown := sorted(wanted - self.arms.keys()):
            raise ConfigError(f"arm {unknown[0]!r}: unknown.{closest(unknown[0], self.arms)} Arms: {[*self.arms]}.")
        while missing := ({self.arms[name].baseline for name in wanted} & self.arms.keys()) - wanted:
            wanted |= missing
        there = wanted | {*TRAINED, ""}
        claims = {name: c for name, c in self.claims.items() if c.arm in there and c.baseline in there}
        arms = {name: arm for name, arm in self.arms.items() if name in wanted}
        return self.model_copy(update={"arms": arms, "claims": claims})

    def checkpoints(self, arm: str) -> list[Trained]:
        """The checkpoints of an arm's runs that are evaluated."""
        baselines = [self.arms[arm].baseline, *(claim.baseline for claim in self.claims.values() if claim.arm == arm)]
        return [name for name in TRAINED if name in (self.arms[arm].checkpoint, *baselines)]


def question_names(root: Path = Path()) -> list[str]:
    """Names of the questions in a repository."""
    return sorted(file.stem for file in (root / QUESTIONS).glob("*.yaml"))


def load_question(name: str, root: Path = Path()) -> Question:
    """Read `configs/questions/<name>.yaml`; raises ConfigError like `load_params`, and lists the questions."""
    path = root / QUESTIONS / f"{name}.yaml"
    if not path.is_file():
        names = question_names(root)
        raise ConfigError(f"question {name!r}: no file {path}.{closest(name, names)} Questions: {', '.join(names)}.")
    return load_block(path, Question)
