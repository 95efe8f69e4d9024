"""Read parameter files into typed blocks, or say everything that is wrong with them at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from coordexp.config.block import Block, expectation, list_item, named_blocks, nested_block
from coordexp.config.profile import DatasetsProfile, Profile
from coordexp.config.removed import removed_keys
from coordexp.config.schema import Params
from coordexp.errors import ConfigError, closest

BlockT = TypeVar("BlockT", bound=Block)
Location = tuple[int | str, ...]

_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a block"}


def load_params(path: Path) -> Params:
    """Read `params.yaml`.

    Raises:
        ConfigError: naming the file and, for every wrong key, what was found and what is expected.
    """
    return _parse(path, read_yaml(path), Params)


def parse_params(where: str, tree: dict[str, Any]) -> Params:
    """Check a tree of parameters that was read elsewhere; errors are as for `load_params` and name `where`."""
    return _parse(Path(where), tree, Params)


def load_block(path: Path, block: type[BlockT]) -> BlockT:
    """Read a file that holds one block; raises ConfigError like `load_params`."""
    return _parse(path, read_yaml(path), block)


def load_profile(path: Path) -> Profile:
    """Read one `configs/<profile>.yaml`; raises ConfigError like `load_params`, and lists the profiles there are."""
    if not path.is_file():
        names = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ConfigError(
            f"profile: found {path.stem!r}, but there is no file {path}.{closest(path.stem, names)} "
            f"Profiles there: {', '.join(names) or 'none'}."
        )
    return parse_profile(path, read_yaml(path))


def parse_profile(path: Path, tree: dict[str, Any]) -> Profile:
    """Check the tree of a profile that was read elsewhere; errors are as for `load_profile` and name `path`."""
    source = tree.get("source")
    is_datasets = isinstance(source, dict) and source.get("kind") == "datasets"
    return _parse(path, tree, DatasetsProfile if is_datasets else Profile)


def _parse(path: Path, tree: dict[str, Any], block: type[BlockT]) -> BlockT:
    removed = dict(removed_keys(tree))
    problems = [f"{key}: removed. {remedy}" for key, remedy in removed.items()]
    removed_roots = {key.split(".")[0] for key in removed}
    kept = {key: value for key, value in tree.items() if key not in removed_roots}
    try:
        parsed = block.model_validate(kept)
    except ValidationError as error:
        problems += _problems(error, block)
    if problems:
        raise ConfigError("\n  ".join([f"{path}: wrong parameters.", *problems]))
    return parsed


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file, where 2e-05 is a number (YAML 1.1 parsers read a string); raises ConfigError."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file. Run from the repository root, or name the file.") from error


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML 1.2 text, as `read_yaml` reads it; errors name `where` it stands."""
    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        reason = str(error).split("To suppress", 1)[0].strip()
        raise ConfigError(f"{where}: not valid YAML.\n  {reason}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: holds {_found(tree)}, expected `key: value` lines.")
    return {str(key): value for key, value in tree.items()}


def parse_value(text: str) -> Any:
    """One value in YAML 1.2, as `-S key=value` gives it; raises ConfigError."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"value {text!r}: not YAML. Quote it, or write a plain number, word or list.") from error


def _problems(error: ValidationError, block: type[Block]) -> list[str]:
    errors = error.errors()
    # A list with a wrong item is reported again as too short: the item says it all.
    lists = {e["loc"][:-1] for e in errors if e["loc"] and isinstance(e["loc"][-1], int)}
    lines = [_problem(e, block) for e in errors if e["loc"] not in lists]
    for parent in dict.fromkeys(e["loc"][:-1] for e in errors if e["type"] == "extra_forbidden"):
        valid = ", ".join(_block_at(block, parent).model_fields)
        lines.append(f"(valid keys {'of ' + _dotted(parent) if parent else 'at the top level'}: {valid})")
    return lines


def _problem(error: ErrorDetails, block: type[Block]) -> str:
    location, value = error["loc"], error["input"]
    key = _dotted(location)
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key, set to {_found(value)}.{_hint(location, block)}"
        case "missing":
            return f"{key}: missing, expected {expectation(_field(block, location))}."
        case "value_error":  # a rule over several keys
            return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if location[-1] == "[key]":
        expected = "non-empty text" if location[:2] == ("model", "files") else "small letters, digits, '-' and '_'"
        return f"{_dotted(location[:-1])}: not a name; expected {expected}."
    return f"{key}: found {_found(value)}, expected {expectation(_field(block, location))}."


def _hint(location: Location, block: type[Block]) -> str:
    """Where an unknown key may belong: elsewhere under the same name, or at its side under a similar one."""
    name = str(location[-1])
    siblings = _block_at(block, location[:-1]).model_fields
    places = [
        place
        for file, root in (("params.yaml", Params), ("configs/<profile>.yaml", Profile))
        for place in _places(name, root, file)
    ]
    return f" {name!r} is a key of {' and of '.join(places)}." if places else closest(name, siblings)


def _places(name: str, block: type[Block], where: str) -> Iterator[str]:
    if name in block.model_fields:
        yield where
    for child, field in block.model_fields.items():
        if inner := nested_block(field):
            yield from _places(name, inner, f"{where}: {child}")


def _block_at(block: type[Block], location: Location) -> type[Block]:
    parts = iter(location)
    for name in parts:
        field = block.model_fields[str(name)]
        inner = nested_block(field)
        if inner is None:
            inner = named_blocks(field)
            next(parts, None)  # the name that the user chose
        assert inner, f"{name} is not a block"
        block = inner
    return block


def _field(block: type[Block], location: Location) -> FieldInfo:
    if isinstance(location[-1], int):
        return list_item(_field(block, location[:-1]))
    if len(location) > 1 and _is_named(block, location[:-1]):  # one of the blocks itself is wrong
        return _field(block, location[:-1])
    return _block_at(block, location[:-1]).model_fields[location[-1]]


def _is_named(block: type[Block], location: Location) -> bool:
    *parents, name = location
    field = _block_at(block, tuple(parents)).model_fields.get(str(name)) if isinstance(name, str) else None
    return field is not None and named_blocks(field) is not None


def _dotted(location: Location) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _found(value: Any) -> str:
    """The value and what it is, short enough for one line: "'high' (text)"."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} (not finite)"
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{shown} ({_KINDS.get(type(value), type(value).__name__)})"
