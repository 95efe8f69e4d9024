"""Fixtures for all tests: the repository root, and marks that skip tests this machine cannot run."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from coordexp.infra.threads import bound_spinning
from once import made_once, run_folder, run_process
from warm_python import warm_path

GIB = 2**30
VLLM_PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"

MEMORY = Path("/dev/shm")  # a file system in memory


def has_room(folder: Path) -> bool:
    """Whether a run of all tests may keep its files in memory: 8 GiB may be written, and 16 GiB are available."""
    if not os.access(folder, os.W_OK):
        return False
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return shutil.disk_usage(folder).free >= 8 * GIB and available >= 16 * GIB


signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell runs the suite in the background
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test workers are the parallelism
bound_spinning()  # also for the processes that tests start
gc.set_threshold(100_000, 50, 50)  # the modules of torch and transformers are a million objects to walk through
os.fsync = lambda _descriptor: None  # nothing here outlives a power cut, and a busy disk takes its time
if has_room(MEMORY):  # a run creates more than 70,000 files, for which a disk takes many times as long; 2 GB at once
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when it is imported: kernels then run on the CPU

# Tests that take minutes start first, so that no worker runs one at the end while the others are idle. Before
# them, those that fork from their worker, which takes a second once it has grown to gigabytes.
LONG = (
    "records/test_conversion.py", "graph/test_production.py", "graph/test_smoke.py", "graph/test_kill.py",
    "graph/test_commands.py", "graph/test_own_photos.py", "training/test_fsdp.py", "training/test_distributed.py",
    "graph/test_cuts.py", "graph/test_inputs.py", "rollout/test_slot_decoder.py", "rollout/test_hf_engine.py",
    "rollout/test_stages.py", "rollout/test_hf_constraints.py", "benchmarks/test_scripts.py",
    "experiments/test_front_door.py", "experiments/test_runs.py", "invariants/test_reach.py", "text/test_parser.py",
    "benchmarks/test_gpu_check.py", "training/test_launch.py", "graph/test_check_profile.py",
    "training/test_devices.py", "rollout/test_vllm_http.py", "training/test_session.py",
    "reporting/test_nothing_to_judge.py", "doctor/test_init.py", "reporting/test_report.py",
)  # fmt: skip
# Their tests share no expensive fixture, so each may run on any worker. Tests of other files stay together.
SPREAD = ("graph/test_smoke.py", "graph/test_kill.py", "training/test_distributed.py", "benchmarks/test_scripts.py")

# Their slow tests are `thorough`: they wait long, and few changes concern them.
THOROUGH = (
    "benchmarks/test_scripts.py", "graph/test_faults.py", "graph/test_kill.py", "graph/test_own_photos.py",
    "training/test_distributed.py", "training/test_fsdp.py", "training/test_launch.py",
)  # fmt: skip

# Time limits per example would only measure the load of the machine.
settings.register_profile("repository", deadline=None)
settings.load_profile("repository")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a `python` that forks from one server of this run (tests/warm_python.py)."""

    def make(folder: Path) -> None:
        warm_path(folder, {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}, run_process())

    return made_once(run_folder(tmp_path_factory) / "warm", make) / "bin"


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Assign each file to one worker: its fixtures are expensive, its tests may depend on each other. SPREAD by test.

    The groups of `--dist loadgroup` would say so, too, but are lost on pytest 9.2, which keeps node ids as they are.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.removeprefix("tests/") in SPREAD else file

    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """Leave out what is imported by now from later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark thorough tests; skip those that need a missing CUDA device or vLLM; sort those that workers run first."""
    for item in items:
        if item.get_closest_marker("slow") and _file(item) in THOROUGH:
            item.add_marker("thorough")
    missing = {"gpu": _no_cuda, "vllm": lambda: not VLLM_PYTHON.is_file()}
    for mark, is_missing in missing.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and is_missing():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"needs {mark}"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONG.index(_file(item)) if _file(item) in LONG else len(LONG))


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).as_posix()


def _no_cuda() -> bool:
    import torch

    return not torch.cuda.is_available()
