"""What a question declares: arms, what each is compared with, and the rule by which numbers answer it.

One file of `configs/questions/` is one question; `coordexp answer` runs what is missing. The rule is written down
before any number is seen: a claim, and what its interval must show.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from coordexp.config.block import Block, PositiveCount, Text, Texts
from coordexp.config.loading import load_block
from coordexp.errors import ConfigError, closest

QUESTIONS = Path("configs/questions")
# Of every comparison; the first decides, the others are shown beside it.
METRICS = ("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.full_mean", "set.dup_pairs_90")
PRIMARY = METRICS[0]
Trained = Literal["stage1", "stage1-control", "stage2"]
TRAINED: tuple[Trained, ...] = get_args(Trained)
Budget = Literal["tokens", "compute", "decoding", "none"]
# Keys of params.yaml that no question varies, and why.
UNASKED = {
    "profile": "where and how big; a question names its own",
    "seed": "makes other data, so nothing is paired; repetitions are stage1.seed and stage2.seed",
    "stage1.seed": "varied by every question that trains stage 1",
    "stage2.seed": "varied by every question that trains stage 2",
    "decode.max_new_tokens": "a limit, not a choice: above the longest annotated answer it changes nothing that parses",
    "eval.bootstrap_resamples": "precision of the intervals, not of the detector",
    "eval.f1_ious": "which thresholds are listed beside the headline ones",
    "eval.duplicate_ious": "which thresholds are listed",
    "eval.semantic_floor": "tried on COCO's names (evaluation/categories.py); no answer here is near two names",
    "eval.semantic_margin": "as eval.semantic_floor",
}


class Arm(Block):
    """One training recipe, and what it is compared with."""

    presets: Texts = Field(
        default=(), description="recipes of configs/presets that it starts from, the later over the earlier"
    )
    changes: Texts = Field(
        default=(), description="KEY=VALUE as `-S` takes them, `configs/${profile}.yaml:KEY` included"
    )
    checkpoint: Trained = Field(default="stage2", description="what of the run is evaluated")
    baseline: str = Field(
        default="", description="an arm, or a checkpoint of the same run; without one it is only measured"
    )


class Claim(Block):
    """A rule: that a metric of an arm is higher or lower than that of its baseline, or the same within `margin`.

    Without a baseline the value itself is compared with `than`. The three sentences are the answers in words.
    """

    text: Text = Field(description="the claim in words")
    source: Text = Field(description="who says so, or why")
    arm: Text = Field(description="an arm")
    baseline: str = Field(default="", description="another arm, or a checkpoint of the run of `arm`; or none")
    expected: Literal["higher", "lower", "same"] = Field(description="of the arm beside its baseline")
    metric: Text = Field(default=PRIMARY, description="what is higher, lower or the same")
    than: float = Field(default=0.0, description="without a baseline: what the value is compared with")
    margin: float = Field(default=0.0, ge=0, description="with `same`: the largest difference that counts as none")
    yes: str = Field(default="", description="what to say if the interval shows the claim")
    no: str = Field(default="", description="what to say if it shows the contrary")
    open: str = Field(default="", description="what to say if it shows neither")

    @model_validator(mode="after")
    def _same_has_a_margin(self) -> Claim:
        if (self.expected == "same") != (self.margin > 0):
            raise ValueError(f"margin is {self.margin:g}, expected above 0 with `expected: same`, and 0 otherwise.")
        if self.than and self.baseline:
            raise ValueError(f"than is {self.than:g}, but there is a baseline; leave one of the two out.")
        return self


class Question(Block):
    """A question in words, arms in the order of the report, the claims that answer it, and how often arms repeat."""

    question: Text = Field(description="in words")
    source: Text = Field(default="this repository", description="who asks")
    profile: str = Field(default="", description="the profile to run; that of params.yaml if none is named")
    budget: Budget = Field(
        default="tokens",
        description="what both sides get alike: training tokens, these and rollouts, only decoding, or nothing",
    )
    seeds: PositiveCount = Field(default=3, description="repetitions of every arm")
    note: str = Field(default="", description="what the answer does not show")
    changes: Texts = Field(default=(), description="KEY=VALUE of all arms, before their own")
    arms: dict[str, Arm] = Field(description="name -> arm")
    claims: dict[str, Claim] = Field(default_factory=dict, description="name -> claim; the first is the answer's")

    @model_validator(mode="after")
    def _names_are_there(self) -> Question:
        if taken := sorted(self.arms.keys() & {*TRAINED}):
            raise ValueError(f"arms: {taken[0]!r} is the name of a checkpoint; name the arm otherwise.")
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
        """The named arms (all without names), the arms that they are compared with, and the claims about these.

        Raises:
            ConfigError: an unknown name.
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
    """Names of the questions under a repository."""
    return sorted(file.stem for file in (root / QUESTIONS).glob("*.yaml"))


def load_question(name: str, root: Path = Path()) -> Question:
    """Read `configs/questions/<name>.yaml`; raises ConfigError like `load_params`, and lists the questions."""
    path = root / QUESTIONS / f"{name}.yaml"
    if not path.is_file():
        names = question_names(root)
        raise ConfigError(f"question {name!r}: no file {path}.{closest(name, names)} There are: {', '.join(names)}.")
    return load_block(path, Question)
