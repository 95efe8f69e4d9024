"""Shared by all tests: the repository root, and marks that skip what this machine cannot run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from coordexp.infra.threads import bound_spinning

VLLM_PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test workers are the parallelism
bound_spinning()  # also for the processes that tests start
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when it is imported: kernels then run on the CPU

# Time limits per example would only measure how busy the machine is.
settings.register_profile("repository", deadline=None)
settings.load_profile("repository")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device or vLLM where there is none."""
    missing = {"gpu": _no_cuda, "vllm": lambda: not VLLM_PYTHON.is_file()}
    for mark, is_missing in missing.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and is_missing():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"needs {mark}"))


def _no_cuda() -> bool:
    import torch

    return not torch.cuda.is_available()
