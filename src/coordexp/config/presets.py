"""Presets: `configs/presets/<name>.yaml` sets the keys of params.yaml that make up a recipe.

`make preset PRESET=mixture` runs one; `python -m coordexp.config.presets mixture` prints it as arguments of
`dvc exp run`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coordexp.config.loading import parse_params, read_yaml
from coordexp.config.schema import Params
from coordexp.errors import EXIT_DONE, EXIT_USAGE, ConfigError, closest

PRESETS = Path("configs/presets")


def preset_names(root: Path = Path()) -> list[str]:
    """Names of the presets in a repository."""
    return sorted(path.stem for path in (root / PRESETS).glob("*.yaml"))


def read_preset(name: str, root: Path = Path()) -> dict[str, Any]:
    """The changes of a preset by dotted key, validated.

    Raises:
        ConfigError: the preset does not exist, or it has an unknown key or a value that is not accepted.
    """
    names = preset_names(root)
    if name not in names:
        raise ConfigError(f"preset {name!r}: not in {root / PRESETS}.{closest(name, names)} Presets: {names}.")
    changes = dict(leaves(read_yaml(root / PRESETS / f"{name}.yaml")))
    with_changes(read_yaml(root / "params.yaml"), changes, f"{PRESETS / name}.yaml")
    return changes


def with_changes(tree: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> Params:
    """The parameters of a tree (as read from params.yaml) with some dotted keys changed; `where` names the source.

    Raises:
        ConfigError: as for params.yaml itself, under the name `where`.
    """
    return parse_params(where, changed_tree(tree, changes, where))


def changed_tree(tree: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of a tree with some dotted keys set; raises ConfigError if a part of a key is not a block."""
    changed: dict[str, Any] = json.loads(json.dumps(tree))
    for key, value in changes.items():
        *blocks, name = key.split(".")
        node: Any = changed
        for block in blocks:
            node = node.setdefault(block, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: {key}: {block!r} is not a block of parameters. See docs/parameters.md.")
        node[name] = value
    return changed


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """The changes as arguments of `dvc exp run`: ["-S", "stage1.w1_weight=0.0", ...]."""
    return [part for key, value in changes.items() for part in ("-S", f"{key}={json.dumps(value).strip(chr(34))}")]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree of blocks by their dotted keys."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def main(names: list[str]) -> int:
    """Print the arguments of the named preset, or the names of all presets."""
    try:
        print("\n".join(preset_names()) if not names else " ".join(overrides(read_preset(names[0]))))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
