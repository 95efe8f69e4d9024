"""Parameter files: which values are accepted, and that every error message has the full name of the key."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from coordexp.config.block import Block, block_kinds, expectation, field_specs, named_blocks, nested_block
from coordexp.config.loading import (
    EXTENDS,
    load_params,
    load_profile,
    parse_params,
    parse_profile,
    profile_names,
    profile_tree,
    read_yaml,
)
from coordexp.config.profile import DatasetConfig, DatasetsConfig, Profile, ScenesConfig
from coordexp.config.removed import REMOVED
from coordexp.config.schema import CoordSupervision, Params
from coordexp.errors import ConfigError

COORD_KEYS = tuple(CoordSupervision.model_fields)

ROOT = Path(__file__).parents[2]
FILES: dict[type[Block], Path] = {Params: ROOT / "params.yaml", Profile: ROOT / "configs" / "tiny.yaml"}


def leaves(block: type[Block], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in block.model_fields.items():
        inner = block_kinds(field).get("scenes") or nested_block(field)
        if inner:
            yield from leaves(inner, f"{prefix}{name}.")
        elif name != "kind":  # the discriminator key has a test of its own
            yield prefix + name, field


LEAVES = [(block, key, field) for block in FILES for key, field in leaves(block)]


@cache
def repository_tree(block: type[Block]) -> dict[str, Any]:
    return read_yaml(FILES[block])


def parse(block: type[Block], tree: dict[str, Any]) -> Any:
    return parse_params("here.yaml", tree) if block is Params else parse_profile(Path("here.yaml"), tree)


def with_value(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the tree with one dotted key set (or deleted, if the value is `...`)."""
    changed = copy.deepcopy(tree)
    *parents, name = key.split(".")
    node = changed
    for parent in parents:
        node = node.setdefault(parent, {})
    if value is ...:
        node.pop(name, None)
    else:
        node[name] = value
    return changed


def error_of(block: type[Block], changes: dict[str, Any], sets: bool = False) -> str:
    """The error message for the repository's file with some keys changed; `sets` gives a profile a datasets source."""
    tree = repository_tree(block)
    if sets:
        changes = {"source": copy.deepcopy(DATASETS), **changes}
    for key, value in changes.items():
        tree = with_value(tree, key, value)
    with pytest.raises(ConfigError) as caught:
        parse(block, tree)
    message = str(caught.value)
    assert message.startswith("here.yaml: ")
    return message


COCO_SET = {
    "format": "coco", "root": "datasets/coco", "train": "instances_train.json", "val": "instances_val.json",
    "train_images": "train", "val_images": "val", "weight": 1.0, "prompt": "open",
}  # fmt: skip
DATASETS = {"kind": "datasets", "verify": "decode", "sets": {"coco": COCO_SET}}


def invalid_types(field: FieldInfo) -> list[Any]:
    if field.annotation is float:
        return ["high", True, None, [1.0], math.nan, math.inf]
    if field.annotation is int:
        return ["high", "3", True, None, 1.5, 2.0]
    if named_blocks(field):
        return [3, 0.5, True, "text", []]
    return [3, 0.5, True, None, {"a": 1}]


def out_of_range(field: FieldInfo) -> list[Any]:
    if get_origin(field.annotation) is Literal:
        return ["no-such-choice", ""]
    if field.annotation is str:
        return [""]
    if named_blocks(field):
        return [{}]
    if get_origin(field.annotation) is tuple:
        may_be_empty = ... in get_args(field.annotation) and not any(isinstance(r, MinLen) for r in field.metadata)
        return [[0.5, 1.5], [0.0]] if may_be_empty else [[], [0.5, 1.5], [0.0]]
    step = 1 if field.annotation is int else 0.5
    past = {Ge: lambda m: m.ge - step, Gt: lambda m: m.gt, Le: lambda m: m.le + step, Lt: lambda m: m.lt}
    return [past[type(rule)](rule) for rule in field.metadata if type(rule) in past]


def test_every_invalid_key_is_reported_in_full() -> None:
    """Missing, unknown, of another type, out of range: the message has the full key and what is expected."""
    for block, key, field in LEAVES:
        expected = f"expected {expectation(field)}."
        if field.is_required():  # a few newer keys have a default, so that older profiles stay valid
            assert f"  {key}: missing, {expected}" in error_of(block, {key: ...})
        message = error_of(block, {f"{key}_": 0.25})
        assert f"  {key}_: unknown key, set to 0.25 (a number). Did you mean '{key.split('.')[-1]}'?" in message
        for value in invalid_types(field):
            message = error_of(block, {key: value})
            assert f"  {key}: found " in message, value
            assert f", {expected}" in message, value
        values = out_of_range(field)
        assert values, f"{key} accepts every value of its type; give it a range"
        for value in values:
            message = error_of(block, {key: value})
            assert f"  {key}" in message, value
            assert "expected" in message, value


def test_a_removed_key_is_refused_with_its_remedy() -> None:
    for block, (removed, remedy) in product(FILES, REMOVED.items()):
        line = f"  {removed}: removed. {remedy}"
        assert line in error_of(block, {removed: None})
        if "." in removed:  # with a value inside, as old files have it
            assert line in error_of(block, {f"{removed}.enabled": True})


def test_other_keys_of_a_block_with_a_renamed_key_are_still_checked() -> None:
    message = error_of(Params, {"anneal.sigma_fraction": ..., "anneal.sigma_share": 0.5, "anneal.sigma_from": "wide"})
    assert "  anneal.sigma_share: removed. Use anneal.sigma_fraction, which has the same meaning." in message
    assert "  anneal.sigma_fraction: missing, expected a number in [0, 1]." in message
    assert "  anneal.sigma_from: found 'wide' (text)" in message
    assert "unknown key" not in message


def test_a_removed_block_explains_every_key_in_it() -> None:
    message = error_of(Params, {"custom.coord_loss": {"l1": 1.0}, "custom.other": 3})
    assert "  custom.coord_loss: removed. Stage 1 no longer decodes" in message
    assert "  custom.other: removed. There is no `custom` block" in message
    assert "unknown key" not in message


def test_all_errors_are_reported_at_once() -> None:
    message = error_of(
        Params, {"softce_wt": 0.2, "sigma": "wide", "stage2.b_ratio": 2, "custom.coord_loss": {}, "seed": ...}
    )
    for line in (
        "softce_wt: unknown key, set to 0.2 (a number). Did you mean 'softce_weight'?",
        "sigma: found 'wide' (text), expected a number in (0, 200].",
        "stage2.b_ratio: found 2 (an integer), expected a number in [0, 1].",
        "custom.coord_loss: removed.",
        "seed: missing, expected an integer in [0, 2147483647].",
    ):
        assert f"  {line}" in message


@pytest.mark.parametrize(
    ("block", "key", "places"),
    [
        (Params, "packing", "'packing' is a key of configs/<profile>.yaml."),
        (Params, "stage1.lr", "'lr' is a key of configs/<profile>.yaml: stage1 and of configs/<profile>.yaml: stage2."),
        (Params, "b_ratio", "'b_ratio' is a key of params.yaml: stage2."),
        (Profile, "stage2.softce_weight", "'softce_weight' is a key of params.yaml and of params.yaml: stage1."),
    ],
)
def test_a_misplaced_key_names_its_correct_place(block: type[Block], key: str, places: str) -> None:
    assert f"{key}: unknown key, set to 1 (an integer). {places}" in error_of(block, {key: 1})


def test_unknown_keys_list_the_valid_keys() -> None:
    message = error_of(Params, {"matching.zzz": 1, "qqq": 1})
    assert "(valid keys of matching: lambda_l1, lambda_iou, lambda_sem, semantic, gate, gate_threshold)" in message
    assert "(valid keys at the top level: softce_weight, " in message


NO_COST = {"matching.lambda_l1": 0, "matching.lambda_iou": 0, "matching.lambda_sem": 0}


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        (Params, dict.fromkeys(COORD_KEYS, 0), f"{', '.join(COORD_KEYS)} are all 0"),
        (
            Params,
            {f"stage1.{term}": 0 for term in COORD_KEYS},
            f"{', '.join(f'stage1.{t}' for t in COORD_KEYS)} are all 0",
        ),
        (
            Params,
            {"text.codec": "digits", "stage2.b_ratio": 0.5},
            "stage2.b_ratio 0.5 and stage2.n_softctx_iter 1 need",
        ),
        (Params, NO_COST, "matching: lambda_l1, lambda_iou, lambda_sem are all 0: every assignment costs the same"),
        (Params, {"decode.temperature": 0, "decode.top_p": 0.9}, "decode: top_p 0.9 has no effect at temperature 0"),
        (Params, {"eval.f1_ious": [0.5, 0.3]}, "eval: f1_ious is [0.5, 0.3]; list each threshold once, in ascending"),
        (Params, {"eval.duplicate_ious": [0.9, 0.9]}, "eval: duplicate_ious is [0.9, 0.9]; list each threshold once"),
        (Params, {"eval.duplicate_ious": [0.9, 0.901]}, "eval: duplicate_ious is [0.9, 0.901]; list each"),
        (Params, {"eval.f1_ious": [0.5, "high"]}, "eval.f1_ious[1]: found 'high' (text), expected a number in (0, 1)."),
        (Params, {"matching": 3}, "matching: found 3 (an integer), expected a block with the keys lambda_l1, "),
        (Params, {"sigma": math.inf}, "sigma: found inf (not finite), expected a number in (0, 200]."),
        (Profile, {"source.min_side_px": 100}, "source.min_side_px: found 100 (an integer), expected an integer in ["),
        (
            Profile,
            {"source.min_side_px": 256, "source.max_side_px": 192},
            "source: min_side_px 256 is above max_side_px 192; swap them.",
        ),
        (
            Profile,
            {"source.smallest_fraction": 0.5, "source.largest_fraction": 0.4},
            "source: smallest_fraction 0.5 is above largest_fraction 0.4; swap.",
        ),
        (
            Profile,
            {"model.min_pixels": 9216, "model.max_pixels": 4096},
            "model: min_pixels 9216 is above max_pixels 4096; swap them.",
        ),
        (
            Profile,
            {"stage1.warmup_steps": 30, "stage1.steps": 30},
            "stage1: warmup_steps 30 is not below steps 30; lower it.",
        ),
        (
            Profile,
            {"stage2.warmup_steps": 31, "stage2.steps": 30},
            "stage2: warmup_steps 31 is not below steps 30; lower it.",
        ),
        (
            Profile,
            {"records.dev_images": 40, "source.train_images": 40},
            "records.dev_images 40 leaves no training images of source.train_images 40; lower it.",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "tuning.method": "lora"},
            "launch.sharding fsdp2 does not support tuning.method lora; set it to full, or launch.sharding to none.",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "tuning.language": "freeze"},
            "launch.sharding fsdp2 does not support tuning.language freeze; set it to train, or launch.sharding",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "stage2.optimizer": "adamw_8bit"},
            "launch.sharding fsdp2 does not support stage2.optimizer adamw_8bit; set it to adamw or muon, or launch",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "stage1.grad_monitor_every": 5},
            "launch.sharding fsdp2 does not support stage1.grad_monitor_every 5; set it to 0, or launch.sharding",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "monitor.every_steps": 5},
            "launch.sharding fsdp2 does not support monitor.every_steps 5; set it to 0, or launch.sharding",
        ),
    ],
)
def test_rules_about_several_values(block: type[Block], changes: dict[str, Any], message: str) -> None:
    assert f"\n  {message}" in error_of(block, changes)


def test_one_coordinate_term_is_enough() -> None:
    for term in COORD_KEYS:
        assert getattr(parse(Params, repository_tree(Params) | dict.fromkeys(COORD_KEYS, 0) | {term: 0.5}), term) == 0.5


def test_integers_are_numbers_and_stay_the_declared_type() -> None:
    sigma = parse(Params, repository_tree(Params) | {"sigma": 3}).sigma
    assert sigma == 3.0
    assert isinstance(sigma, float)


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(re.sub(r"lr: \S+", "lr: 2e-05", FILES[Profile].read_text()))
    assert load_profile(path).stage1.lr == 2e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", 'found duplicate key "seed"'),
        ("- seed\n", "holds ['seed'] (a list), expected `key: value` lines."),
        ("", "holds nothing, expected `key: value` lines."),
        ("seed: [1\n", "not valid YAML."),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"params\.yaml: no such file"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match=r"found 'tinny'.*Did you mean 'tiny'\? Profiles there: .*smoke, tiny"):
        load_profile(ROOT / "configs" / "tinny.yaml")


def test_parameters_are_frozen() -> None:
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        params.sigma = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        params.stage1.w1_weight = 1.0


def test_committed_profiles_set_or_inherit_every_key_once() -> None:
    for name in profile_names(ROOT / "configs"):
        path = ROOT / "configs" / f"{name}.yaml"
        assert load_profile(path).model_dump(mode="json") == profile_tree(path), name
        own = read_yaml(path)
        if EXTENDS in own:
            base = profile_tree(ROOT / "configs" / f"{own.pop(EXTENDS)}.yaml")
            same = {key for key, value in leaf_values(own) if (key, value) in leaf_values(base)}
            assert {key for key in same if not key.startswith("source.sets.")} == set(), (
                "sets a key to the value that it inherits"
            )


def leaf_values(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        leaf
        for key, value in tree.items()
        for leaf in (leaf_values(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)])
    ]


def family(folder: Path, **files: str) -> Path:
    """A copy of tiny.yaml as whole.yaml with some more files next to it; returns the path of child.yaml."""
    (folder / "base").mkdir()
    shutil.copy(FILES[Profile], folder / "whole.yaml")
    for name, text in files.items():
        (folder / f"{name.replace('__', '/')}.yaml").write_text(text)
    return folder / "child.yaml"


def test_a_profile_inherits_what_it_does_not_set(tmp_path: Path) -> None:
    """Over two generations: blocks merge, while a list or a block with user-chosen names replaces the inherited one."""
    pin = f"{{bytes: 1, sha256: '{'0' * 64}'}}"
    child = family(
        tmp_path,
        child="extends: base/middle\nstage1: {steps: 7, warmup_steps: 1}\nrollout: {servers: [b]}\n",
        base__middle=f"extends: whole\nstage1: {{steps: 9, lr: 0.5}}\nmodel: {{files: {{x.json: {pin}}}}}\n",
    )
    whole, profile = load_profile(tmp_path / "whole.yaml"), load_profile(child)
    assert (profile.stage1.steps, profile.stage1.warmup_steps, profile.stage1.lr) == (7, 1, 0.5)
    assert profile.rollout.servers == ("b",)
    assert list(profile.model.files or {}) == ["x.json"]
    merged = whole.model_dump() | {name: getattr(profile, name).model_dump() for name in ("stage1", "rollout", "model")}
    assert profile.model_dump() == merged
    assert profile.stage1.model_copy(update={"steps": 400, "warmup_steps": 20, "lr": 0.003}) == whole.stage1
    assert profile_names(tmp_path) == ["child", "whole"]
    block = json.dumps(DATASETS)  # of another kind, so it replaces the scenes completely
    child.write_text(f"extends: whole\nsource: {block}\nrecords: {{dev_images: 100000}}\n")
    assert isinstance(load_profile(child).source, DatasetsConfig)
    assert profile_tree(child)["source"] == DATASETS


@pytest.mark.parametrize(
    ("child", "middle", "message"),
    [
        ("extends: base/middle", "extends: whole\nstage1: {lr: high}",
         "stage1.lr: found 'high' (text), expected a number in (0, 1]. (in {folder}/base/middle.yaml)"),
        ("extends: base/middle\nstage1: {steps: 9}", "extends: whole\nstage1: {lrr: 1}",
         "stage1.lrr: unknown key, set to 1 (an integer).* (in {folder}/base/middle.yaml)"),
        ("extends: base/middle", "extends: whole\nrollout: {servers: [a, 3]}",
         "rollout.servers[1]: found 3 (an integer), expected non-empty text. (in {folder}/base/middle.yaml)"),
        ("extends: base/middle", "extends: whole\nsource: {small_share: 0.1}",
         "source.small_share: removed. *(in {folder}/base/middle.yaml)"),
        ("extends: base/middle", "extends: whole\nstage1: {warmup_steps: 600}",
         "stage1: warmup_steps 600 is not below steps 400; lower it. (in {folder}/base/middle.yaml)"),
        ("extends: base/middle\nstage1: {steps: 9}", "extends: whole",
         "stage1: warmup_steps 20 is not below steps 9; lower it.\n*"),
        ("extends: whole\nstage1: {lrr: 1}", "{}",
         "stage1.lrr: unknown key, set to 1 (an integer). Did you mean 'lr'?\n*"),
        ("extends: base/middle", "stage1: {steps: 9}", "source: missing, expected a block with the key kind: *"),
        ("extends: base/middle", "extends: child",
         "extends: {folder}/child.yaml extends {folder}/base/middle.yaml extends {folder}/child.yaml: a cycle. *"),
        ("extends: base/midle", "{}",
         "extends: found 'base/midle' (text), expected the name of another *. Did you mean 'base/middle'?"),
        ("extends: [whole]", "{}", "extends: found ['whole'] (a list), expected the name of another profile file in *"),
    ],
)  # fmt: skip
def test_errors_in_inherited_files_name_file_and_key(tmp_path: Path, child: str, middle: str, message: str) -> None:
    path = family(tmp_path, child=child, base__middle=middle)
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    found = str(caught.value) + "\n"
    assert found.startswith(f"{path}: ")
    pattern = ".*".join(re.escape(part) for part in message.format(folder=tmp_path).split("*"))
    assert re.search(pattern, found), found


def test_params_yaml_has_every_key_of_the_schema_once() -> None:
    def keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in node.items():
            yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    assert sorted(keys(read_yaml(ROOT / "params.yaml"))) == sorted(spec.key for spec in field_specs(Params))


def test_data_sets_are_read_under_their_names() -> None:
    tree = with_value(repository_tree(Profile), "source", copy.deepcopy(DATASETS))
    profile = parse(Profile, with_value(tree, "records.dev_images", 10**6))
    assert isinstance(profile.source, DatasetsConfig)
    assert profile.source.sets == {"coco": DatasetConfig(**COCO_SET)}


DATASET_LEAVES = [
    *((f"source.{name}", field) for name, field in DatasetsConfig.model_fields.items() if name == "verify"),
    *((f"source.sets.coco.{name}", field) for name, field in DatasetConfig.model_fields.items()),
]


def test_every_invalid_key_of_a_data_set_is_reported_in_full() -> None:
    for key, field in DATASET_LEAVES:
        for value in [*invalid_types(field), *out_of_range(field)]:
            message = error_of(Profile, {key: value}, sets=True)
            assert f"  {key}: found " in message, value
            assert f", expected {expectation(field)}." in message, value
        if field.is_required():
            assert f"  {key}: missing, expected {expectation(field)}." in error_of(Profile, {key: ...}, sets=True)
        unknown = error_of(Profile, {f"{key}_": 0.25}, sets=True)
        assert f"  {key}_: unknown key, set to 0.25 (a number). Did you mean" in unknown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source.sets": {}}, "source.sets: found {} (a block), expected a block of one or more names, each a block"),
        ({"source.sets": 3}, "source.sets: found 3 (an integer), expected a block of one or more names"),
        ({"source.sets.coco": 3}, "source.sets.coco: found 3 (an integer), expected a block"),
        ({"source.sets.coco.weight": "high"}, "source.sets.coco.weight: found 'high' (text), expected a number in ("),
        ({"source.sets.coco.weight": 0}, "source.sets.coco.weight: found 0 (an integer), expected a number in (0, "),
        ({"source.sets.coco.format": "coko"}, "source.sets.coco.format: found 'coko' (text), expected one of coco,"),
        ({"source.sets.coco.root": ...}, "source.sets.coco.root: missing, expected non-empty text."),
        ({"source.sets.coco.roots": 1}, "source.sets.coco.roots: unknown key, set to 1 (an integer). Did you"),
        ({"source.sets.coco.roots": "x"}, "(valid keys of source.sets.coco: format, root, train, val,"),
        ({"source.sets.COCO 2017": COCO_SET}, "source.sets.COCO 2017: not a valid name; expected lowercase letters"),
        ({"source.sets.coco.val": "none"}, "source: no set has a val split; set the annotations of at least one."),
        (
            {"source.sprites": "x"},
            "source.sprites: unknown key, set to 'x' (text). 'sprites' is a key of configs/<profile>"
            ".yaml: source of kind scenes.",
        ),
    ],
)
def test_invalid_data_sets_are_refused(changes: dict[str, Any], message: str) -> None:
    assert f"  {message}" in error_of(Profile, changes, sets=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("datasetz", "found 'datasetz' (text), expected one of scenes, datasets."),
        (3, "found 3 (an integer), expected one of scenes, datasets."),
        (None, "found nothing, expected one of scenes, datasets."),
        (..., "missing, expected one of scenes, datasets."),
    ],
)
def test_an_unknown_kind_of_source_is_one_error(kind: Any, message: str) -> None:
    for sets in (True, False):
        problems = error_of(Profile, {"source.kind": kind}, sets=sets).splitlines()[1:]
        assert problems == [f"  source.kind: {message}"]


def test_keys_are_checked_against_the_chosen_kind_only() -> None:
    message = error_of(Profile, {"source.max_objects": 0, "source.sets": {}, "source.verify": "decod"})
    assert "  source.max_objects: found 0 (an integer), expected an integer in [1, 100]." in message
    assert f"  (valid keys of source: {', '.join(ScenesConfig.model_fields)})" in message
    assert message.count("unknown key") == 2
    assert "missing" not in message
    assert "source: found 3 (an integer), expected a block with the key kind: scenes or datasets." in error_of(
        Profile, {"source": 3}
    )


def test_short_names_of_readouts_are_resolved() -> None:
    tree = repository_tree(Params)
    for short, full in (("exp", "expectation"), ("st", "straight_through"), ("hard", "argmax"), ("top_k", "top_k")):
        params = Params.model_validate(with_value(tree, "stage2.coord_decode_mode", short))
        assert params.stage2.coord_decode_mode == full
    params = Params.model_validate(with_value(tree, "stage2.coord_ctx_embed_mode", "soft"))
    assert params.stage2.coord_ctx_embed_mode == "expectation"
    params = Params.model_validate(with_value(tree, "decode.box", "local"))
    assert params.decode.box == "local_expectation"
