"""What a study declares: arms, what each is compared with, and the claims of others that the comparison speaks to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from coordexp.config.block import Block, PositiveCount, Text
from coordexp.config.loading import load_block
from coordexp.errors import ConfigError, closest

STUDIES = Path("configs/studies")
Metric = Literal["coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.full_mean", "set.dup_pairs_90"]
METRICS: tuple[Metric, ...] = get_args(Metric)
PRIMARY = METRICS[0]  # decides; the others are shown beside it
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
Trained = Literal["stage1", "stage1-control", "stage2"]
TRAINED: tuple[Trained, ...] = get_args(Trained)


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
    """What others report of `arm` beside `baseline`: that `metric` is higher, lower, or the same within `margin`."""

    text: Text = Field(description="the claim in words")
    source: Text = Field(description="who says so, or why")
    arm: Text = Field(description="an arm")
    baseline: Text = Field(description="another arm, or a checkpoint of the run of `arm`")
    expected: Literal["higher", "lower", "same"] = Field(description="of the arm beside its baseline")
    metric: Metric = Field(default="coco.mAP", description="what is higher, lower or the same")
    margin: float = Field(default=0.0, ge=0, description="with `same`: the largest difference that counts as none")

    @model_validator(mode="after")
    def _same_has_a_margin(self) -> Claim:
        if (self.expected == "same") != (self.margin > 0):
            raise ValueError(f"margin is {self.margin:g}, expected above 0 with `expected: same`, and 0 otherwise.")
        return self


class Study(Block):
    """Arms in the order of the report, the claims, and how often each arm is repeated."""

    title: Text = Field(description="of the report")
    seeds: PositiveCount = Field(default=3, description="repetitions of every arm")
    arms: dict[str, Arm] = Field(description="name -> arm")
    claims: dict[str, Claim] = Field(default_factory=dict, description="name -> claim")

    @model_validator(mode="after")
    def _names_are_there(self) -> Study:
        if taken := sorted(self.arms.keys() & {*TRAINED}):
            raise ValueError(f"arms: {taken[0]!r} is the name of a checkpoint; name the arm otherwise.")
        named = {f"arms.{name}.baseline": arm.baseline for name, arm in self.arms.items() if arm.baseline}
        named |= {f"claims.{name}.baseline": claim.baseline for name, claim in self.claims.items()}
        named = {key: name for key, name in named.items() if name not in TRAINED}
        named |= {f"claims.{name}.arm": claim.arm for name, claim in self.claims.items()}
        for key, name in named.items():
            if name not in self.arms:
                known = ", ".join(self.arms)
                raise ValueError(f"{key}: no arm {name!r}.{closest(name, self.arms)} Arms: {known}.")
        return self

    def only(self, names: Iterable[str]) -> Study:
        """The named arms (all without names), the arms that they are compared with, and the claims about these.

        Raises:
            ConfigError: an unknown name.
        """
        wanted = set(names) or set(self.arms)
        if unknown := sorted(wanted - self.arms.keys()):
            raise ConfigError(f"arm {unknown[0]!r}: unknown.{closest(unknown[0], self.arms)} Arms: {[*self.arms]}.")
        while missing := ({self.arms[name].baseline for name in wanted} & self.arms.keys()) - wanted:
            wanted |= missing
        there = wanted | set(TRAINED)
        claims = {name: c for name, c in self.claims.items() if c.arm in there and c.baseline in there}
        arms = {name: arm for name, arm in self.arms.items() if name in wanted}
        return self.model_copy(update={"arms": arms, "claims": claims})


def load_study(name: str, root: Path = Path()) -> Study:
    """Read `configs/studies/<name>.yaml`; raises ConfigError like `load_params`, and lists the studies there are."""
    path = root / STUDIES / f"{name}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ConfigError(f"study {name!r}: no file {path}.{closest(name, names)} There are: {', '.join(names)}.")
    return load_block(path, Study)
