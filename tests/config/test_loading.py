"""Parameter files: what is accepted, and that every way to get a key wrong is answered with its full name."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from coordexp.config.block import Block, expectation, field_specs, named_blocks, nested_block
from coordexp.config.loading import load_params, load_profile, read_yaml
from coordexp.config.profile import DatasetConfig, DatasetsConfig, DatasetsProfile, Profile
from coordexp.config.removed import REMOVED
from coordexp.config.schema import CoordSupervision, Params
from coordexp.errors import ConfigError

COORD_KEYS = tuple(CoordSupervision.model_fields)

ROOT = Path(__file__).parents[2]
FILES: dict[type[Block], tuple[Path, Callable[[Path], Block]]] = {
    Params: (ROOT / "params.yaml", load_params),
    Profile: (ROOT / "configs" / "tiny.yaml", load_profile),
}
PROFILES = sorted((ROOT / "configs").glob("*.yaml"))


def leaves(block: type[Block], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in block.model_fields.items():
        if inner := nested_block(field):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


LEAVES = [
    pytest.param(block, key, field, id=f"{block.__name__}:{key}") for block in FILES for key, field in leaves(block)
]


@cache
def repository_tree(path: Path) -> dict[str, Any]:
    return read_yaml(path)


def with_value(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the tree with one dotted key set (or, for `...`, deleted)."""
    changed = copy.deepcopy(tree)
    *parents, name = key.split(".")
    node = changed
    for parent in parents:
        node = node.setdefault(parent, {})
    if value is ...:
        del node[name]
    else:
        node[name] = value
    return changed


def error_of(folder: Path, block: type[Block], changes: dict[str, Any]) -> str:
    """The message for the repository's file with some keys changed."""
    source, load = FILES[block]
    tree = repository_tree(source)
    for key, value in changes.items():
        tree = with_value(tree, key, value)
    with pytest.raises(ConfigError) as caught:
        load(written(folder / source.name, tree))
    message = str(caught.value)
    assert message.startswith(f"{folder / source.name}: ")
    return message


def written(path: Path, tree: dict[str, Any]) -> Path:
    YAML().dump(tree, path)
    return path


def wrong_types(field: FieldInfo) -> list[Any]:
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
        return [[], [0.5, 1.5], [0.0]]
    step = 1 if field.annotation is int else 0.5
    past = {Ge: lambda m: m.ge - step, Gt: lambda m: m.gt, Le: lambda m: m.le + step, Lt: lambda m: m.lt}
    return [past[type(rule)](rule) for rule in field.metadata if type(rule) in past]


@pytest.mark.parametrize(("block", "key", "field"), LEAVES)
def test_missing_key(tmp_path: Path, block: type[Block], key: str, field: FieldInfo) -> None:
    assert f"  {key}: missing, expected {expectation(field)}." in error_of(tmp_path, block, {key: ...})


@pytest.mark.parametrize(("block", "key", "field"), LEAVES)
def test_unknown_key_names_the_closest(tmp_path: Path, block: type[Block], key: str, field: FieldInfo) -> None:
    message = error_of(tmp_path, block, {f"{key}_": 0.25})
    assert f"  {key}_: unknown key, set to 0.25 (a number). Did you mean '{key.split('.')[-1]}'?" in message


@pytest.mark.parametrize(("block", "key", "field"), LEAVES)
def test_wrong_type(tmp_path: Path, block: type[Block], key: str, field: FieldInfo) -> None:
    for value in wrong_types(field):
        message = error_of(tmp_path, block, {key: value})
        assert f"  {key}: found " in message, value
        assert f", expected {expectation(field)}." in message, value


@pytest.mark.parametrize(("block", "key", "field"), LEAVES)
def test_out_of_range(tmp_path: Path, block: type[Block], key: str, field: FieldInfo) -> None:
    values = out_of_range(field)
    assert values, f"{key} accepts every value of its type; give it a range"
    for value in values:
        message = error_of(tmp_path, block, {key: value})
        assert f"  {key}" in message, value
        assert "expected" in message, value


@pytest.mark.parametrize("removed", sorted(REMOVED))
@pytest.mark.parametrize("block", FILES)
def test_removed_key_is_refused_with_its_remedy(tmp_path: Path, block: type[Block], removed: str) -> None:
    assert f"  {removed}: removed. {REMOVED[removed]}" in error_of(tmp_path, block, {removed: None})
    if "." in removed:  # with a value inside, as old files have it
        message = error_of(tmp_path, block, {f"{removed}.enabled": True})
        assert f"  {removed}: removed. {REMOVED[removed]}" in message


def test_a_removed_block_explains_every_child(tmp_path: Path) -> None:
    message = error_of(tmp_path, Params, {"custom.coord_loss": {"l1": 1.0}, "custom.other": 3})
    assert "  custom.coord_loss: removed. Stage 1 no longer decodes" in message
    assert "  custom.other: removed. There is no `custom` block" in message
    assert "unknown key" not in message


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    message = error_of(
        tmp_path, Params, {"softce_wt": 0.2, "sigma": "wide", "stage2.b_ratio": 2, "custom.coord_loss": {}, "seed": ...}
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
def test_a_key_in_the_wrong_place_names_the_right_one(
    tmp_path: Path, block: type[Block], key: str, places: str
) -> None:
    assert f"{key}: unknown key, set to 1 (an integer). {places}" in error_of(tmp_path, block, {key: 1})


def test_unknown_keys_list_the_valid_ones(tmp_path: Path) -> None:
    message = error_of(tmp_path, Params, {"matching.zzz": 1, "qqq": 1})
    assert "(valid keys of matching: lambda_l1, lambda_iou, lambda_sem, gate, gate_threshold)" in message
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
            "records.dev_images 40 leaves nothing of source.train_images 40 to train on; lower it.",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "tuning.method": "lora"},
            "launch.sharding fsdp2 does not go with tuning.method lora; set it to full, or launch.sharding to none.",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "tuning.language": "freeze"},
            "launch.sharding fsdp2 does not go with tuning.language freeze; set it to train, or launch.sharding",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "stage2.optimizer": "adamw_8bit"},
            "launch.sharding fsdp2 does not go with stage2.optimizer adamw_8bit; set it to adamw or muon, or launch",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "stage1.grad_monitor_every": 5},
            "launch.sharding fsdp2 does not go with stage1.grad_monitor_every 5; set it to 0, or launch.sharding",
        ),
        (
            Profile,
            {"launch.sharding": "fsdp2", "monitor.every_steps": 5},
            "launch.sharding fsdp2 does not go with monitor.every_steps 5; set it to 0, or launch.sharding",
        ),
    ],
)
def test_rules_over_values(tmp_path: Path, block: type[Block], changes: dict[str, Any], message: str) -> None:
    assert f"\n  {message}" in error_of(tmp_path, block, changes)


def test_one_coordinate_term_is_enough(tmp_path: Path) -> None:
    tree = read_yaml(FILES[Params][0])
    for term in COORD_KEYS:
        zeroed = tree | dict.fromkeys(COORD_KEYS, 0) | {term: 0.5}
        assert getattr(load_params(written(tmp_path / "params.yaml", zeroed)), term) == 0.5


def test_integers_are_numbers_and_stay_the_declared_type(tmp_path: Path) -> None:
    tree = with_value(read_yaml(FILES[Params][0]), "sigma", 3)
    sigma = load_params(written(tmp_path / "params.yaml", tree)).sigma
    assert sigma == 3.0
    assert isinstance(sigma, float)


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    text = re.sub(r"lr: \S+", "lr: 2e-05", FILES[Profile][0].read_text())
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
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
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_absent_files(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_load_and_have_the_same_keys(path: Path) -> None:
    profile = load_profile(path)
    tree, like = read_yaml(path), read_yaml(FILES[Profile][0])
    if isinstance(profile, DatasetsProfile):
        del tree["source"], like["source"]  # validated above; its sets have names of the user's choice
    del tree["model"]["files"], like["model"]["files"]  # null, or the names of its files
    assert key_tree(tree) == key_tree(like)


def key_tree(node: Any) -> Any:
    return {key: key_tree(value) for key, value in node.items()} if isinstance(node, dict) else None


def test_params_file_has_every_key_of_the_schema_once() -> None:
    def keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in node.items():
            yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    assert sorted(keys(read_yaml(ROOT / "params.yaml"))) == sorted(spec.key for spec in field_specs(Params))


COCO_SET = {
    "format": "coco", "root": "datasets/coco", "train": "instances_train.json", "val": "instances_val.json",
    "train_images": "train", "val_images": "val", "weight": 1.0, "prompt": "open",
}  # fmt: skip
DATASETS = {"kind": "datasets", "verify": "decode", "sets": {"coco": COCO_SET}}


def datasets_error(folder: Path, changes: dict[str, Any]) -> str:
    tree = with_value(read_yaml(FILES[Profile][0]), "source", copy.deepcopy(DATASETS))
    for key, value in changes.items():
        tree = with_value(tree, key, value)
    with pytest.raises(ConfigError) as caught:
        load_profile(written(folder / "sets.yaml", tree))
    return str(caught.value)


def test_data_sets_are_read_by_name(tmp_path: Path) -> None:
    tree = with_value(read_yaml(FILES[Profile][0]), "source", copy.deepcopy(DATASETS))
    profile = load_profile(written(tmp_path / "sets.yaml", with_value(tree, "records.dev_images", 10**6)))
    assert isinstance(profile, DatasetsProfile)
    assert profile.source.sets == {"coco": DatasetConfig(**COCO_SET)}


DATASET_LEAVES = [
    *((f"source.{name}", field) for name, field in DatasetsConfig.model_fields.items() if name != "sets"),
    *((f"source.sets.coco.{name}", field) for name, field in DatasetConfig.model_fields.items()),
]


@pytest.mark.parametrize(("key", "field"), DATASET_LEAVES, ids=[key for key, _ in DATASET_LEAVES])
def test_every_key_of_a_data_set_can_be_wrong_in_every_way(tmp_path: Path, key: str, field: FieldInfo) -> None:
    for value in [*wrong_types(field), *out_of_range(field)]:
        message = datasets_error(tmp_path, {key: value})
        assert f"  {key}: found " in message, value
        assert f", expected {expectation(field)}." in message, value
    if key != "source.kind":  # without it, the source would be read as composed scenes
        assert f"  {key}: missing, expected {expectation(field)}." in datasets_error(tmp_path, {key: ...})
    assert f"  {key}_: unknown key, set to 0.25 (a number). Did you mean" in datasets_error(tmp_path, {f"{key}_": 0.25})


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
        ({"source.sets.COCO 2017": COCO_SET}, "source.sets.COCO 2017: not a name; expected small letters"),
        ({"source.sets.coco.val": "none"}, "source: no set has a val split; name the annotations of at least one."),
        ({"source.kind": "datasetz"}, "source.kind: found 'datasetz' (text), expected one of scenes, datasets."),
        ({"source.sprites": "x"}, "source.sprites: unknown key"),
    ],
)
def test_wrong_data_sets(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert f"  {message}" in datasets_error(tmp_path, changes)
