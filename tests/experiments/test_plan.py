"""The plan of a study: combinations, seeds of repetitions, and input that is rejected before anything runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordexp.config.block import field_specs
from coordexp.config.loading import load_block, load_params, load_profile
from coordexp.config.presets import leaves
from coordexp.config.question import UNASKED, Arm, Claim, Question, load_question, question_names
from coordexp.config.schema import Params
from coordexp.errors import ConfigError
from coordexp.evaluation.effect import Effect
from coordexp.evaluation.measures import MEASURES
from coordexp.evaluation.registry import metric_specs
from coordexp.experiments.compare import judged
from coordexp.experiments.plan import AS_COMMITTED, Plan, grid_study, plan_study
from coordexp.experiments.questions import question_lines
from coordexp.experiments.readings import READINGS

MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(repository: Path) -> MakePlan:
    def plan(*assignments: str, seeds: int = 1) -> Plan:
        return plan_study(grid_study(assignments, "test").model_copy(update={"seeds": seeds}), repository)

    return plan


def test_all_combinations_in_order_are_compared_with_the_first(plan: MakePlan) -> None:
    arms = plan("softce_weight=0.1,0.2", "sigma=2.0,3.0").study.arms
    names = [f"softce_weight={w}, sigma={s}" for w in ("0.1", "0.2") for s in ("2.0", "3.0")]
    assert list(arms) == names
    assert [arm.baseline for arm in arms.values()] == ["", *[names[0]] * 3]


def test_a_single_value_is_compared_with_the_parameters_as_they_are(plan: MakePlan) -> None:
    found = plan("softce_weight=0.2")
    assert list(found.study.arms) == [AS_COMMITTED, "softce_weight=0.2"]
    assert found.overrides(AS_COMMITTED, 1) == ["stage2.seed=1"]
    assert found.overrides("softce_weight=0.2", 2) == ["softce_weight=0.2", "stage2.seed=2"]


@pytest.mark.parametrize(
    ("key", "seeds"),
    [
        *(
            (key, ("stage2.seed",))
            for key in ("softce_weight=0.1", "stage2.b_ratio=0.25", "matching.gate_threshold=0.4")
        ),
        ("decode.temperature=0.5", ("stage2.seed",)),  # rollouts are decoded too
        ("configs/tiny.yaml:stage2.steps=50", ("stage2.seed",)),
        *((key, ("stage1.seed", "stage2.seed")) for key in ("sigma=1.5", "stage1.w1_weight=1.0", "text.codec=tags")),
        ("configs/tiny.yaml:stage1.steps=50", ("stage1.seed", "stage2.seed")),
        ("eval.mapping=exact", ()),
    ],
)
def test_repetitions_vary_what_the_key_reaches(plan: MakePlan, key: str, seeds: tuple[str, ...]) -> None:
    found = plan(key)
    assert found.seed_keys == seeds
    for checkpoint in ("stage2", "stage1-control"):
        assert found.trained(checkpoint) == ("stage1", checkpoint)[2 - len(seeds) :]
    if not seeds:
        with pytest.raises(ConfigError, match="use --seeds 1"):
            plan(key, seeds=2)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["softce_weight"], "expected key=value"),
        (["softce_weight=0.1,"], "expected key=value"),
        (["softce_weight=0.1,0.1"], "a value occurs twice"),
        (["softce_weight=0.1", "softce_weight=0.2"], "given twice"),
        (["softce_wt=0.1"], "softce_weight"),
        (["softce_weight=high"], "softce_weight: found 'high'"),
        (["softce_weight=-1"], "softce_weight"),
        (["softce_weight.x=1"], "is not a block"),
        (["stage2.seed=1,2"], "use --seeds"),
        (["configs/tiny.yaml:stage2.steps=many"], "stage2.steps: found 'many'"),
        (["configs/tiny.yaml:stage2.step=5"], "stage2.step: unknown key"),
        (["configs/smoke.yaml:stage2.steps=5"], "the stages read only"),
        (["profile=smoke"], "within one profile"),
        (["sigma=[1"], "not YAML"),
    ],
)
def test_invalid_assignments_are_rejected(plan: MakePlan, assignments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(*assignments)


def test_slugs_are_safe_and_unique(repository: Path) -> None:
    found = plan_study(load_question("objective", repository), repository)
    settings = [repr(values) for values in found.settings.values()]
    slugs = [found.slug(arm, 0) for arm in found.study.arms]
    assert len(set(slugs)) == len(slugs) > len(set(settings))  # control and default are one run
    long = grid_study(["configs/tiny.yaml:stage2.steps=50", "sigma=1.5"], "test")
    slug = plan_study(long.model_copy(update={"seeds": 1}), repository).slug([*long.arms][1], 12)
    assert all(c.isalnum() or c in ".-" for c in slug)
    assert len(slug) <= 52


def test_the_arms_of_the_objective_differ_from_the_recipe_in_what_they_are_named_after(repository: Path) -> None:
    found = plan_study(load_question("objective", repository), repository)
    recipe = found.settings["seed_recipe"]
    for name, keys in {
        **{"minus_w1": {"stage1.w1_weight"}, "minus_gate": {"stage1.gate_weight"}, "two_bin": {"target"}},
        **{"sigma_1": {"sigma"}, "sigma_4": {"sigma", "truncate"}, "w1_weight_5": {"stage1.w1_weight"}},
        **{"minus_softce": {"stage1.softce_weight"}, "init_mean": {"configs/tiny.yaml:model.coord_init"}},
    }.items():
        assert {key for key, value in found.settings[name].items() if recipe.get(key) != value} == keys, name
    assert found.seed_keys == ("stage1.seed", "stage2.seed")


def test_choosing_arms_brings_their_baselines_and_claims(repository: Path) -> None:
    study = load_question("objective", repository)
    chosen = study.only(["pure_ce"])
    assert list(chosen.arms) == ["seed_recipe", "pure_ce"]
    assert list(chosen.claims) == ["recipe_loses_to_ce"]
    assert list(study.only(["control"]).arms) == ["seed_recipe", "stage1_default", "control"]
    assert study.only([]) == study
    with pytest.raises(ConfigError, match=r"arm 'pure_c': unknown\. Did you mean 'pure_ce'"):
        study.only(["pure_c"])


CLAIM = {"text": "t", "source": "s", "arm": "a", "baseline": "stage1", "expected": "same", "margin": 0.01}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"a": {"baseline": "b"}}}, "arms.a.baseline: no arm 'b'"),
        ({"arms": {"stage2": {}}}, "'stage2' is the name of a checkpoint"),
        ({"arms": {"a": {"change": ["x=1"]}}}, "arms.a.change: unknown key"),
        ({"arms": {"a": {"checkpoint": "base"}}}, "arms.a.checkpoint: found 'base'"),
        ({"claims": {"c": CLAIM | {"arm": "stage1"}}}, "claims.c.arm: no arm 'stage1'"),
        ({"claims": {"c": CLAIM | {"than": 0.5}}}, "than is 0.5, but there is a baseline"),
        ({"budget": "steps"}, "budget: found 'steps'"),
        ({"claims": {"c": CLAIM | {"margin": 0.0}}}, "margin is 0, expected above 0"),
        ({"seeds": 0}, "seeds: found 0"),
        ({"repeat": "stage1"}, "repeat: found 'stage1'"),
        (
            {"repeat": "stage2", "arms": {"a": {"checkpoint": "stage1"}}},
            "repeat is 'stage2', but all arms evaluate stage 1",
        ),
    ],
)
def test_an_invalid_question_is_rejected(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(str({"question": "t", "arms": {"a": {}}, "claims": {"c": CLAIM}} | changes))
    with pytest.raises(ConfigError, match=words):
        load_block(path, Question)


@pytest.mark.parametrize(
    ("expected", "above", "across", "below"),
    [
        ("higher", "confirmed", "not shown", "refuted"),
        ("lower", "refuted", "not shown", "confirmed"),
        ("same", "refuted", "not shown", "refuted"),
    ],
)
def test_a_claim_is_decided_by_its_interval(expected: Any, above: str, across: str, below: str) -> None:
    margin = 0.005 if expected == "same" else 0.0
    claim = Claim(text="t", source="s", arm="a", baseline="b", metric="coco.mAP", expected=expected, margin=margin)
    for (lo, hi), judgement in (((0.01, 0.02), above), ((-0.01, 0.02), across), ((-0.02, -0.01), below)):
        assert judged(claim, Effect((lo + hi) / 2, lo, hi, 0.5, 0.01, 0.005, None), {}) == judgement
    within = Effect(0.0, -0.004, 0.004, 0.5, 0.01, 0.005, None)
    assert judged(claim, within, {}) == ("confirmed" if expected == "same" else "not shown")
    assert judged(claim, within, {"run": ["loops"]}) == "not evaluated"
    on_annotation = claim.model_copy(update={"metric": "coord.second_peak"})  # not read from the answers
    assert judged(on_annotation, within, {"run": ["loops"]}) == judged(claim, within, {})
    assert judged(claim, Effect(0.5, 0.4, 0.6, 0.5, 0.01, 0.005, None), {}, enough=False) == "not shown"
    assert judged(claim, Effect(0.0, 0.0, 0.0, 0.5, 0.0, 0.0, None), {}) == (
        "confirmed" if expected == "same" else "no effect"
    )
    assert judged(claim, None, {}) == "not defined"


def test_the_goals_over_seeds_are_those_of_the_profile(repository: Path) -> None:
    goals = load_profile(repository / "configs" / "tiny.yaml").report.goals
    claims = [
        c for c in load_question("headline", repository).claims.values() if c.arm == "detector" and not c.baseline
    ]
    assert {claim.expected for claim in claims} == {"higher"}
    assert {f"{claim.metric} >= {claim.than:g}" for claim in claims} == {*goals}


def test_every_question_can_be_planned_and_every_parameter_is_asked_about_or_has_a_reason(repository: Path) -> None:
    params = load_params(repository / "params.yaml")
    committed = dict(leaves(params.model_dump()))
    known = {*metric_specs(params.eval, vocabulary=True), *MEASURES, *READINGS}
    set_by_some: set[str] = set()
    values: dict[str, set[str]] = {}
    for name in question_names(repository):
        question = load_question(name, repository)
        assert {claim.metric for claim in question.claims.values()} <= known, name
        assert question.claims or name == "objective", name
        found = plan_study(question, repository)
        common = {change.partition("=")[0] for change in question.changes} | {"profile"}
        for arm, told in found.params.items():
            own = {change.partition("=")[0] for change in question.arms[arm].changes}
            for key, value in leaves(told.model_dump()):
                values.setdefault(key, set()).add(str(value))
                if key not in common and (key in own or value != committed[key]):
                    set_by_some.add(key)
        trained = question.budget != "decoding"
        assert bool(found.seed_keys) == trained or question.seeds == 1, name
    assert committed.keys() - set_by_some == {*UNASKED}
    assert not set_by_some & UNASKED.keys()
    choices = {s.key: {*s.choices} for s in field_specs(Params) if s.choices}
    assert {key: names - values[key] for key, names in choices.items() if names - values[key]} == {}


def test_an_unknown_metric_is_reported_before_anything_runs(repository: Path) -> None:
    claim = Claim(text="t", source="s", arm="a", metric="geometry.iuo", expected="higher")
    question = Question(question="?", arms={"a": Arm()}, claims={"c": claim})
    with pytest.raises(ConfigError, match=r"claims.c.metric: found 'geometry.iuo'.*Did you mean 'geometry.iou'"):
        plan_study(question, repository)


def test_an_arm_with_committed_values_repeats_the_training_of_its_checkpoint(repository: Path) -> None:
    committed = load_params(repository / "params.yaml").w1_weight
    for checkpoint, seeds in (("stage2", ("stage2.seed",)), ("stage1", ("stage1.seed", "stage2.seed"))):
        arms = {"a": Arm(checkpoint=checkpoint), "b": Arm(changes=(f"w1_weight={committed}",), checkpoint=checkpoint)}
        assert plan_study(Question(question="?", arms=arms), repository).seed_keys == seeds


def test_a_question_may_repeat_stage_2_alone(repository: Path) -> None:
    arms = {"whole": Arm(), "fewer": Arm(changes=("configs/${profile}.yaml:records.missing=0.3",), baseline="whole")}
    for repeat, seeds in (("changed", ("stage1.seed", "stage2.seed")), ("stage2", ("stage2.seed",))):
        assert plan_study(Question(question="?", arms=arms, repeat=repeat), repository).seed_keys == seeds


def test_the_list_of_questions_says_what_is_repeated(repository: Path) -> None:
    lines = question_lines(repository, "tiny")
    for name in question_names(repository):
        question = load_question(name, repository)
        [at] = (n for n, line in enumerate(lines) if line.startswith(f"{name}: "))
        times = "once" if question.seeds == 1 else f"{question.seeds} seeds"
        times += " of stage 2" if question.repeat == "stage2" else ""
        assert f"; {times}; " in lines[at + 1]


def test_another_profile_applies_to_every_arm_with_a_plus_for_inherited_keys(repository: Path, tmp_path: Path) -> None:
    for name in ("params.yaml", "pipelines/inputs.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(repository / name, tmp_path / name)
    shutil.copytree(repository / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "heir.yaml").write_text("extends: smoke\nstage2:\n  lr: 0.5\n")
    changes = ("configs/${profile}.yaml:stage2.steps=50", "configs/${profile}.yaml:stage2.lr=0.25", "sigma=1.5")
    question = Question(question="?", profile="heir", arms={"a": Arm(changes=changes)})
    found = plan_study(question, tmp_path)
    assert found.overrides("a", 2) == [
        "profile=heir", "configs/heir.yaml:+stage2.steps=50", "configs/heir.yaml:stage2.lr=0.25", "sigma=1.5",
        "stage1.seed=2", "stage2.seed=2",
    ]  # fmt: skip
    assert (found.profile, found.params["a"].profile, found.profiles["a"].stage2.steps) == ("heir", "heir", 50)
    with pytest.raises(ConfigError, match="within one profile"):
        plan_study(question.model_copy(update={"arms": {"a": Arm(changes=("profile=tiny",))}}), tmp_path)
