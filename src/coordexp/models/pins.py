"""The files of a profile's pretrained model, pinned by size and sha256 in `model.files`.

DVC does not track the folder: `dvc exp run` would commit the weights behind a link into git. The pins are tracked, as
parameters. Different weights therefore mean a different run, and a folder with other files than the pinned ones stops
the run.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from coordexp.config.loading import load_profile
from coordexp.config.paths import model_folder
from coordexp.config.profile import FilePin, ModelConfig
from coordexp.errors import CheckpointError
from coordexp.infra.artefacts import file_sha256
from coordexp.infra.files import write_text
from coordexp.infra.foreign import strict_json
from coordexp.infra.provenance import answer_files, weight_files
from coordexp.infra.resume import resume_root

_REMEMBERED_BYTES = 1 << 26  # hashing smaller files is fast
_SETTLED_SECONDS = 2.0  # a file changed more recently may change again without a new timestamp (infra/artefacts.py)


def pinned_folder(model: ModelConfig, profile: str) -> Path:
    """The folder of the profile's pretrained model, after all files were compared with the pins.

    Raises:
        CheckpointError: there are no pins, or the files differ from them.
    """
    if fault := pin_fault(model, profile):
        raise CheckpointError(fault)
    return model_folder(model.path)


def pin_fault(model: ModelConfig, profile: str) -> str:
    """The differences between the folder at `model.path` and the pins, with the remedy; empty if there are none."""
    folder, command = model_folder(model.path), f"`coordexp doctor --pin --profile {profile}`"
    if not folder.is_dir():
        return (
            f"{folder}: no such folder. Put the model of profile {profile} there (a Hugging Face checkpoint or a link "
            f"to one), or set model.path in configs/{profile}.yaml."
        )
    if model.files is None:
        return (
            f"configs/{profile}.yaml: model.files is null, expected size and sha256 of each file in {folder}. Without "
            f"them, a run could start from any model: run {command} to write them, and commit the profile."
        )
    faults = list(_differences(folder, model.files))
    remedy = f"Restore the pinned model; or, if the new files are intended, run {command} and commit the profile."
    return "\n  ".join([f"{folder}: not the model that profile {profile} pins:", *faults, remedy]) if faults else ""


def _differences(folder: Path, pins: dict[str, FilePin]) -> Iterator[str]:
    present = {path.name: path for path in answer_files(folder)}
    for name in sorted(pins.keys() | present.keys()):
        path = folder / name
        if name not in pins:
            yield f"{path}: found a file that would be loaded with the model, but model.files has no pin for it."
            continue
        pin = pins[name]
        expected = f"expected {pin.bytes:,} bytes, sha256 {pin.sha256} (model.files)"
        if not path.is_file():
            yield f"{path}: found no file, {expected}."
        elif (size := path.stat().st_size) != pin.bytes:
            yield f"{path}: found {size:,} bytes, {expected}."
        elif (digest := _Digests().of(path)) != pin.sha256:
            yield f"{path}: found sha256 {digest}, {expected}."


def pins_of(folder: Path) -> dict[str, FilePin]:
    """The pins of the present files of a checkpoint folder; raises CheckpointError if it has no weights."""
    if not weight_files(folder):
        raise CheckpointError(
            f"{folder}: found no *.safetensors, so there is no model to pin. Put a Hugging Face checkpoint there (or a "
            "link to one), or set model.path."
        )
    digests = _Digests()
    return {path.name: FilePin(bytes=path.stat().st_size, sha256=digests.of(path)) for path in answer_files(folder)}


def write_pins(path: Path) -> dict[str, FilePin]:
    """Write the pins of the model at `model.path` into the profile file; comments and other lines stay.

    Raises:
        ConfigError: the profile is invalid.
        CheckpointError: there is no model at that path.
    """
    pins = pins_of(model_folder(load_profile(path).model.path))
    yaml = YAML()
    yaml.width = 1 << 16
    yaml.preserve_quotes = True
    tree = yaml.load(path.read_text(encoding="utf-8"))
    block = tree.setdefault(
        "model", CommentedMap()
    )  # pins are of this profile's model, even where the path is inherited
    if "files" not in block:
        block.insert(list(block).index("path") + 1 if "path" in block else 0, "files", None)
    block["files"] = {name: pin.model_dump() for name, pin in pins.items()}
    text = io.StringIO()
    yaml.dump(tree, text)
    write_text(path, text.getvalue())
    return pins


class _Digests:
    """sha256 of files; those of large files are cached until size, times or inode change (16 GB take a minute)."""

    def __init__(self) -> None:
        self._memory = resume_root() / ".model-digests.json"

    def of(self, path: Path) -> str:
        """The sha256 as 64 hex digits."""
        stat = path.stat()
        if stat.st_size < _REMEMBERED_BYTES:
            return file_sha256(path)
        # A link and its target are one file, so the key is the resolved path.
        key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._read()
        if isinstance(entry := known.get(key), dict) and entry.get("state") == state and "sha256" in entry:
            return str(entry["sha256"])
        digest = file_sha256(path)
        if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS:
            with suppress(OSError):  # the cache only saves time, and a checkout may be read-only
                write_text(self._memory, json.dumps({**known, key: {"state": state, "sha256": digest}}, indent=1))
        return digest

    def _read(self) -> dict[str, Any]:
        try:
            known = strict_json(self._memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no cache yet, or a damaged one: hash again
            return {}
        return known if isinstance(known, dict) else {}
