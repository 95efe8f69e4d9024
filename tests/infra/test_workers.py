"""Work shared by processes gives the results of a single process, also after errors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from coordexp.errors import ConfigError, DataError, ProcessError
from coordexp.infra import workers
from coordexp.infra.threads import usable_cores
from coordexp.infra.workers import WORKERS_VARIABLE, begin_worker, map_batches, worker_count


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BATCH", 3)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 50])
def test_results_are_those_of_one_process_in_order(count: int, length: int) -> None:
    table = {i: i * i for i in range(length)}  # the processes inherit it; it is not sent
    found = list(map_batches(lambda items: [table[i] for i in items], iter(range(length)), count))
    assert found == [[i * i for i in range(at, min(at + 3, length))] for at in range(0, length, 3)]


def test_other_processes_do_the_work() -> None:
    here, *others = map_batches(lambda items: os.getpid(), range(30), 2)
    assert here == os.getpid()
    assert os.getpid() not in others


def test_items_are_not_read_further_ahead_than_needed() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for i in range(1000):
            read.append(i)
            yield i

    results = map_batches(len, items(), 2)
    assert [next(results) for _ in range(3)] == [3, 3, 3]
    assert len(read) <= 3 * (3 + 2 + 4)
    results.close()  # type: ignore[attr-defined]


def refuse(items: list[int]) -> list[int]:
    if 20 in items or 26 in items:
        raise DataError(f"{items[0]}: no good")
    return items


def broken(length: int) -> Iterator[int]:
    yield from range(length)
    raise DataError("the file ends")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("length", "message"), [(40, "18: no good"), (22, "18: no good"), (19, "the file ends")])
def test_errors_equal_those_of_a_single_process(count: int, length: int, message: str) -> None:
    found = []
    with pytest.raises(DataError) as raised:
        found += map_batches(refuse, broken(length), count)
    assert str(raised.value) == message


def test_a_killed_worker_is_an_error() -> None:
    def dies(items: list[int]) -> None:
        if 10 in items:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ProcessError, match="one of the 2 processes that read the data ended"):
        list(map_batches(dies, range(40), 2))


def test_the_number_of_workers_comes_from_cores_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKERS_VARIABLE, raising=False)
    assert worker_count() == usable_cores()
    monkeypatch.setenv(WORKERS_VARIABLE, "3")
    assert worker_count() == 3
    for wrong in ("0", "-1", "many", "1000"):
        monkeypatch.setenv(WORKERS_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"{WORKERS_VARIABLE} is '{wrong}'"):
            worker_count()


def _note(path: Path) -> None:
    (path / str(os.getpid())).touch()
    time.sleep(0.5)  # so that each of the workers gets one


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with ProcessPoolExecutor(3, initializer=begin_worker) as pool:
            list(pool.map(_note, [tmp_path] * 3))
            (tmp_path / "ready").touch()
            time.sleep(600)
    ends_at = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < ends_at
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    workers = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(workers) == 3
    while left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
        assert time.monotonic() < ends_at, left
        time.sleep(0.05)
