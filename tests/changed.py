"""Run the unit tests of the changes since main, most relevant first, within a time limit: `make quick`.

    PYTHONPATH=src python tests/changed.py [--since main] [--within 60]

The order is: changed test files, test files named after a changed module, test files that import one, and the rules of
the repository (tests/invariants). Slow and thorough tests are left to `make test-all`; after the time limit, the rest
is skipped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from pathlib import Path

import pytest

from source_tree import ROOT, imports

TESTS = ROOT / "tests"
LEFT_OUT = "not slow and not vllm and not faults and not thorough"


def changed_files(since: str) -> list[Path]:
    """Files that differ from the branch point, committed or not.

    Raises:
        SystemExit: there is no such branch.
    """
    for branch in (since, f"origin/{since}"):
        base = _git("merge-base", branch, "HEAD")
        if base:
            names = _git("diff", "--name-only", base[0]) + _git("ls-files", "--others", "--exclude-standard")
            return [Path(name) for name in dict.fromkeys(names)]
    raise SystemExit(f"{since}: no such branch, nor origin/{since}; say another with --since.")


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def tests_of(changed: list[Path]) -> list[Path]:
    """Test files, the most relevant to the changes first."""
    modules = {_module(path) for path in changed if path.suffix == ".py"}
    stems = {f"test_{path.stem}" for path in changed}
    others = {path.name for path in changed if path.suffix != ".py"}
    found: dict[Path, int] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        own = file.relative_to(ROOT)
        if own in changed:
            found[own] = 0
        elif file.stem in stems:
            found[own] = 1
        elif modules.intersection(imports(file)) or any(name in file.read_text(encoding="utf-8") for name in others):
            found[own] = 2
        elif "invariants" in own.parts:
            found[own] = 3
    return sorted(found, key=lambda path: found[path])


def _module(path: Path) -> str:
    """The name by which others import a file of the repository."""
    parts = path.with_suffix("").parts
    return ".".join(parts[1:] if parts[0] in ("src", "tests") else parts).removesuffix(".__init__")


class Deadline:
    """Skips tests that would start after the time limit."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Before any fixture is made."""
        if time.monotonic() > self._ends:
            pytest.skip("the time is over: make test runs it")


def main() -> None:
    """Choose and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", default="main", help="the branch to compare with")
    parser.add_argument("--within", type=float, default=60, help="seconds until no further test begins")
    arguments = parser.parse_args()
    began = time.monotonic()
    chosen = tests_of(changed_files(arguments.since))
    print(f"{len(chosen)} files with tests of what differs from {arguments.since}, and of all rules", flush=True)
    os.chdir(ROOT)
    deadline = Deadline(arguments.within - (time.monotonic() - began))
    code = pytest.main(["-q", "-m", LEFT_OUT, *map(str, chosen)], plugins=[deadline])
    raise SystemExit(0 if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else code)


if __name__ == "__main__":
    main()
