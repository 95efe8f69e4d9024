"""Read parameter files into typed blocks, or report all errors in them at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from coordexp.config.block import Block, block_kinds, expectation, field_specs, list_item, named_blocks, nested_block
from coordexp.config.profile import Profile
from coordexp.config.removed import removed_keys
from coordexp.config.schema import Params
from coordexp.errors import ConfigError, closest
from coordexp.infra.foreign import Gate, check_text, check_tree, shown

BlockT = TypeVar("BlockT", bound=Block)
Location = tuple[int | str, ...]
Origins = dict[Location, Path]  # the file of each key that the loaded file inherits from another one

EXTENDS = "extends"  # the one key of a profile file that is not a parameter: the file whose keys it inherits
# Blocks with user-chosen names. They replace each other: two lists of data sets or of pinned files must not merge.
NAMED_BLOCKS = {spec.key.split(".<name>")[0] for spec in field_specs(Profile) if "<name>" in spec.key}

PARAMETERS = Gate(
    "a YAML file of parameters", ConfigError, "Run from the repository root, or name the file.", max_bytes=1 << 20
)
_YAML_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)


def load_params(path: Path) -> Params:
    """Read `params.yaml`.

    Raises:
        ConfigError: with the file and, for every invalid key, what was found and what is expected.
    """
    return parse_params(str(path), read_yaml(path))


def parse_params(where: str, tree: dict[str, Any]) -> Params:
    """Validate a tree of parameters that was read elsewhere; errors are those of `load_params` and name `where`."""
    return _parse(Path(where), tree, Params, {})


def load_block(path: Path, block: type[BlockT]) -> BlockT:
    """Read a file that holds one block; raises ConfigError like `load_params`."""
    return _parse(path, read_yaml(path), block, {})


def load_profile(path: Path) -> Profile:
    """Read one `configs/<profile>.yaml`, including the files that it extends.

    Raises:
        ConfigError: like `load_params`, and for an inherited value also its file; a profile that does not exist, with
            the list of profiles; a profile that extends itself.
    """
    if not path.is_file():
        names = profile_names(path.parent)
        raise ConfigError(
            f"profile: found {path.stem!r}, but there is no file {path}.{closest(path.stem, names)} "
            f"Profiles there: {', '.join(names) or 'none'}."
        )
    tree, origins = _inherited(path)
    return _parse(path, tree, Profile, origins)


def parse_profile(path: Path, tree: dict[str, Any]) -> Profile:
    """Validate a complete profile, such as a changed `profile_tree`; errors are those of `load_profile`, for `path`."""
    return _parse(path, tree, Profile, {})


def profile_names(folder: Path) -> list[str]:
    """The profiles of a folder. Files that they extend may be in subfolders and may be incomplete."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def profile_tree(path: Path) -> dict[str, Any]:
    """All keys of a profile file, including inherited ones, unvalidated; raises ConfigError for an unreadable file."""
    return _inherited(path)[0]


def _inherited(path: Path) -> tuple[dict[str, Any], Origins]:
    """The merged tree of a profile, and for every inherited key the file that sets it."""
    chain = [path]
    layers = [read_yaml(path)]
    while EXTENDS in layers[-1]:
        parent = _parent(chain[-1], layers[-1].pop(EXTENDS), path.parent)
        if parent in chain:
            shown = " extends ".join(map(str, [*chain, parent]))
            raise ConfigError(f"{path}: {EXTENDS}: {shown}: a cycle. Remove `{EXTENDS}` from one of them.")
        chain.append(parent)
        layers.append(read_yaml(parent))
    tree: dict[str, Any] = {}
    origins: Origins = {}
    for file, layer in zip(reversed(chain), reversed(layers), strict=True):
        _extend(tree, layer, (), file, origins)
    return tree, {location: file for location, file in origins.items() if file != path}


def _parent(child: Path, name: Any, folder: Path) -> Path:
    """The file that a profile extends; `base/qwen3vl` is in the folder `base` next to the profiles."""
    known = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    if isinstance(name, str) and (parent := folder / f"{name}.yaml").is_file():
        return parent
    hint = closest(str(name), known)
    raise ConfigError(
        f"{child}: {EXTENDS}: found {_found(name)}, expected the name of another profile file in {folder}.{hint}"
    )


def _extend(tree: dict[str, Any], layer: dict[str, Any], at: Location, file: Path, origins: Origins) -> None:
    """Override a tree with the keys of one file.

    Blocks merge. Values, lists, blocks of another `kind`, and blocks with user-chosen names replace what was there.
    """
    for key, value in layer.items():
        location = (*at, key)
        below = tree.get(key)
        origins[location] = file
        if isinstance(value, dict) and isinstance(below, dict) and _merges(location, value, below):
            _extend(below, value, location, file, origins)
        else:
            tree[key] = value
            for inner in _locations(value, location):
                origins[inner] = file


def _merges(location: Location, block: dict[str, Any], below: dict[str, Any]) -> bool:
    return _dotted(location) not in NAMED_BLOCKS and block.get("kind") in (None, below.get("kind"))


def _locations(value: Any, at: Location) -> Iterator[Location]:
    yield at
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _locations(inner, (*at, key))


def _parse(path: Path, tree: dict[str, Any], block: type[BlockT], origins: Origins) -> BlockT:
    kept, removed = removed_keys(tree)
    problems = [f"{_dotted(at)}: removed. {remedy}{_inherited_from(at, origins)}" for at, remedy in removed.items()]
    try:
        parsed = block.model_validate(kept)
    except ValidationError as error:
        problems += _problems(error, block, origins)
    if problems:
        raise ConfigError("\n  ".join([f"{path}: wrong parameters.", *problems]))
    return parsed


def _inherited_from(location: Location, origins: Origins) -> str:
    """The file of an invalid value, if it is not the one that the message is about."""
    known = (origins[location[:end]] for end in range(len(location), 0, -1) if location[:end] in origins)
    file = next(known, None)
    return f" (in {file})" if file else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file, where 2e-05 is a number (YAML 1.1 parsers read a string); raises ConfigError."""
    return parse_yaml(PARAMETERS.read_text(path), str(path))


def parse_yaml(text: str, where: str, any_keys: bool = False) -> dict[str, Any]:
    """The mapping in a YAML 1.2 text, as `read_yaml` reads it; errors name its place `where`.

    Keys of parameters are text. With `any_keys` they may also be numbers, as in foreign files.
    """
    tree = _yaml_value(text, where, any_keys)
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: holds {_found(tree)}, expected `key: value` lines.")
    return tree


def parse_value(text: str) -> Any:
    """One value in YAML 1.2, as in `-S key=value`; raises ConfigError."""
    try:
        return _yaml_value(text, "it")
    except ConfigError as error:
        raise ConfigError(
            f"value {text[:60]!r}: not YAML. Quote it, or write a plain number, word, or list.\n  {error}"
        ) from error


def _yaml_value(text: str, where: str, any_keys: bool = False) -> Any:
    """The value of a YAML text: plain values, lists, and mappings with text keys, without aliases."""
    try:
        if "&" in text and any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(text)):
            # A few lines of aliases can expand to more values than fit into memory, or refer to themselves.
            raise ConfigError(
                f"{where}: contains an alias (*name), which is not supported. Write the value out in each place."
            )
        value = _parsed(text)
        check_tree(value, PARAMETERS.max_depth)
        check_text(value)
    except YAMLError as error:
        reason = str(error).split("To suppress", 1)[0].strip()
        raise ConfigError(
            f"{where}: not valid YAML. Quote text that contains special characters.\n  {reason}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested deeper than {PARAMETERS.max_depth}, expected blocks and lists.") from error
    except _YAML_FAULTS as error:  # a value that contradicts its tag, or digits that are not a number
        raise ConfigError(f"{where}: not valid YAML ({error}). Quote the value, or correct it.") from error
    if not any_keys:
        _check_keys(value, where, ())
    return deepcopy(value)  # callers change what they read


@lru_cache(maxsize=32)  # one command reads params.yaml, a profile or dvc.lock up to four times
def _parsed(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def _check_keys(value: Any, where: str, at: Location) -> None:
    if isinstance(value, list):
        for number, inner in enumerate(value):
            _check_keys(inner, where, (*at, number))
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                place = f" in {_dotted(at)}" if at else ""
                raise ConfigError(f"{where}: found the key {_found(key)}{place}, expected text. Quote it.")
            _check_keys(inner, where, (*at, key))


def _problems(error: ValidationError, block: type[Block], origins: Origins) -> list[str]:
    errors = error.errors()
    # pydantic also reports a list with an invalid item as too short; the message about the item is enough.
    lists = {e["loc"][:-1] for e in errors if e["loc"] and isinstance(e["loc"][-1], int)}
    lines = [
        _problem(e, block) + _inherited_from(_in_file(e["loc"], block), origins)
        for e in errors
        if e["loc"] not in lists
    ]
    for parent in dict.fromkeys(e["loc"][:-1] for e in errors if e["type"] == "extra_forbidden"):
        valid = ", ".join(_block_at(block, parent).model_fields)
        lines.append(
            f"(valid keys {'of ' + _dotted(_in_file(parent, block)) if parent else 'at the top level'}: {valid})"
        )
    return lines


def _problem(error: ErrorDetails, block: type[Block]) -> str:
    location, value = error["loc"], error["input"]
    key = _dotted(_in_file(location, block))
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key, set to {_found(value)}.{_hint(location, block)}"
        case "missing":
            return f"{key}: missing, expected {expectation(_field(block, location))}."
        case "union_tag_not_found" | "union_tag_invalid":
            return _unknown_kind(key, _field(block, location), value)
        case "value_error":  # a rule about several keys
            return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if location[-1] == "[key]":
        expected = "non-empty text" if location[:2] == ("model", "files") else "lowercase letters, digits, '-', '_'"
        return f"{_dotted(_in_file(location[:-1], block))}: not a valid name; expected {expected}."
    return f"{key}: found {_found(value)}, expected {expectation(_field(block, location))}."


def _unknown_kind(key: str, field: FieldInfo, value: dict[str, Any]) -> str:
    """The message for a block whose discriminator key is missing or invalid."""
    name, expected = str(field.discriminator), f"expected one of {', '.join(block_kinds(field))}."
    return f"{key}.{name}: " + (f"found {_found(value[name])}, {expected}" if name in value else f"missing, {expected}")


def _hint(location: Location, block: type[Block]) -> str:
    """Where an unknown key may belong: in another block under the same name, or in this one under a similar name."""
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
        for kind, inner in block_kinds(field).items():
            yield from _places(name, inner, f"{where}: {child} of {field.discriminator} {kind}")


def _block_at(block: type[Block], location: Location) -> type[Block]:
    parts = iter(location)
    for name in parts:
        field = block.model_fields[str(name)]
        inner = nested_block(field)
        if kinds := block_kinds(field):
            inner = kinds[str(next(parts))]
        elif inner is None:
            inner = named_blocks(field)
            next(parts, None)  # the user-chosen name
        assert inner, f"{name} is not a block"
        block = inner
    return block


def _field(block: type[Block], location: Location) -> FieldInfo:
    if isinstance(location[-1], int):
        return list_item(_field(block, location[:-1]))
    if len(location) > 1 and _is_named(block, location[:-1]):  # one of the blocks itself is invalid
        return _field(block, location[:-1])
    return _block_at(block, location[:-1]).model_fields[location[-1]]


def _is_named(block: type[Block], location: Location) -> bool:
    if len(location) == 2 and _has_kinds(block, location):
        return False
    *parents, name = location
    field = _block_at(block, tuple(parents)).model_fields.get(str(name)) if isinstance(name, str) else None
    return field is not None and named_blocks(field) is not None


def _in_file(location: Location, block: type[Block]) -> Location:
    """The location in the file; pydantic's also contains the kind of a block that is one of several."""
    return location[:1] + location[2:] if _has_kinds(block, location) else location


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _has_kinds(block: type[Block], location: Location) -> bool:
    """Whether a location leads into a block that is one of several kinds; only top-level blocks are."""
    field = block.model_fields.get(str(location[0])) if len(location) > 1 else None
    return field is not None and bool(block_kinds(field))


def _found(value: Any) -> str:
    """The value and its type, short enough for one line: "'high' (text)"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} (not finite)"
    return shown(value)
