"""The in-memory engine in several processes of this machine, each with the model on its own device.

A group of samples goes to the next free process; results are returned in order. The answers of a group do not depend on
the process, so the number of processes does not change a byte. Each process writes its finished groups to its own
journal.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from coordexp.errors import Interrupted, ProcessError
from coordexp.infra.device import choose_device
from coordexp.infra.threads import usable_cores
from coordexp.infra.workers import begin_worker
from coordexp.models.loading import Checkpoint, ModelFormat, load_format, place_for_inference, vocabulary_size
from coordexp.rollout.engine import DecodeRequest, Generation, Journal
from coordexp.rollout.hf_engine import Group, GroupEngine, answer_group, keep
from coordexp.text.grammar import AnswerGrammar

_SIGNAL_COMES_S = 0.2
_WAITING = 2  # groups per process that are running or queued


def decode_devices(processes: int, wanted: str = "auto") -> list[str]:
    """The devices of the decoding processes on this machine: the GPUs in turn, or the device in `wanted`.

    Args:
        processes: their number (`launch.processes`); 0 means one per GPU, or one if there is none.
        wanted: as in `choose_device`.

    Raises:
        ConfigError: there is no such device.
    """
    spreads = choose_device(wanted).type == "cuda" and wanted in ("auto", "cuda")
    n_gpus = torch.cuda.device_count() if spreads else 0
    n = processes or max(1, n_gpus)
    return [f"cuda:{i % n_gpus}" for i in range(n)] if n_gpus and n > 1 else [wanted] * n


class WorkerEngine(GroupEngine):
    """Generates with the checkpoint in a folder, in one process per device; they start with the first group.

    They hold the model until `close`, or until this process ends.
    """

    def __init__(
        self,
        folder: Path,
        form: ModelFormat,
        image_root: Path,
        batch_images: int,
        devices: Sequence[str],
        journal: Journal | None = None,
    ) -> None:
        super().__init__(image_root, batch_images, journal)
        self._folder = folder
        self._n = len(devices)
        # A fork of this process would copy its threads and GPU context. The fork server imports the libraries once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        places = context.SimpleQueue()
        for number, device in enumerate(devices, 1):
            places.put((device, journal.of_process(number).path if journal else None))
        limits = form.pixels.min_pixels, form.pixels.max_pixels
        # On a CPU the number of threads affects the last bits, so workers use the same number as this process.
        on_cpu = choose_device(devices[0]).type == "cpu"
        threads = torch.get_num_threads() if on_cpu else max(1, usable_cores() // self._n)
        self._pool = ProcessPoolExecutor(self._n, context, _start, (places, folder, limits, threads))

    def close(self) -> None:
        """End the processes after their running groups."""
        self._pool.shutdown(cancel_futures=True)

    def _answers(self, groups: Iterable[Group], request: DecodeRequest) -> Iterator[list[Generation]]:
        coming: deque[Future[list[Generation]]] = deque()
        try:
            for group in groups:
                coming.append(self._pool.submit(_answer, group, request))
                if len(coming) >= _WAITING * self._n:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        except BrokenProcessPool as error:
            time.sleep(_SIGNAL_COMES_S)  # if SIGTERM to all processes was the cause, it interrupts this one now
            raise ProcessError(
                f"one of the {self._n} processes that decode {self._folder} ended before its work was done: it was "
                "killed, ran out of memory, or failed with the error above. A stage keeps the answers of finished "
                "groups: run the same command again, with fewer processes if memory was short."
            ) from error
        except (KeyboardInterrupt, Interrupted):  # do not wait for running groups; the journals have the finished ones
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            for future in coming:
                future.cancel()

    def _vocabulary_size(self) -> int:
        return vocabulary_size(self._folder)


@dataclass(slots=True)
class _Worker:
    """The state of a worker process."""

    checkpoint: Checkpoint
    journal: Journal | None
    asked: DecodeRequest | None = None
    grammar: AnswerGrammar | None = None


_worker: _Worker | None = None  # in a worker process


def _start(places: SimpleQueue[tuple[str, Path | None]], folder: Path, limits: tuple[int, int], threads: int) -> None:
    """Turn this process into a worker: take the next device and load the model there."""
    global _worker
    begin_worker()
    torch.set_num_threads(threads)
    device, path = places.get()
    checkpoint = place_for_inference(folder, load_format(folder, *limits), device)
    _worker = _Worker(checkpoint, Journal(path) if path else None)


def _answer(group: Group, request: DecodeRequest) -> list[Generation]:
    """Answer a group in a worker process."""
    assert _worker
    if request != _worker.asked:
        _worker.asked, _worker.grammar = request, request.grammar(_worker.checkpoint.tokenizer)
    generations = answer_group(_worker.checkpoint, group, request, _worker.grammar)
    keep(group, generations, request, _worker.journal)
    return generations
