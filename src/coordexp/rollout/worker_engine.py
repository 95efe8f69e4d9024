"""The engine in memory, several times: processes of this machine, each with the model on a device of its own.

Groups of samples go to whichever process is free, and come back in their order; a group is answered alike by all of
them, so that the number of processes changes no byte. Each process keeps its finished groups in a journal of its own.
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
_WAITING = 2  # groups for each process that are under way or wait for it


def decode_devices(processes: int, wanted: str = "auto") -> list[str]:
    """The devices of the processes that decode on this machine; the GPUs in turn, or the device that is wanted.

    Args:
        processes: how many (`launch.processes`); 0 is one for each GPU, or one without any.
        wanted: as of `choose_device`.

    Raises:
        ConfigError: there is no such device.
    """
    spreads = choose_device(wanted).type == "cuda" and wanted in ("auto", "cuda")
    n_gpus = torch.cuda.device_count() if spreads else 0
    n = processes or max(1, n_gpus)
    return [f"cuda:{i % n_gpus}" for i in range(n)] if n_gpus and n > 1 else [wanted] * n


class WorkerEngine(GroupEngine):
    """Answers of the checkpoint in a folder by a process on each of `devices`, which start with the first group.

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
        # A fork of this process would take its threads and its GPU along; one server imports the libraries for all.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        places = context.SimpleQueue()
        for number, device in enumerate(devices, 1):
            places.put((device, journal.of_process(number).path if journal else None))
        limits = form.pixels.min_pixels, form.pixels.max_pixels
        # On a CPU the number of threads decides the last bits: there it is that of this process.
        on_cpu = choose_device(devices[0]).type == "cpu"
        threads = torch.get_num_threads() if on_cpu else max(1, usable_cores() // self._n)
        self._pool = ProcessPoolExecutor(self._n, context, _start, (places, folder, limits, threads))

    def close(self) -> None:
        """End the processes, after the groups that are under way."""
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
            time.sleep(_SIGNAL_COMES_S)  # if SIGTERM to all of them ended it, this process is interrupted by now
            raise ProcessError(
                f"one of the {self._n} processes that decode {self._folder} ended before its work was done: killed, "
                "out of memory, or by a fault that is printed above. A stage keeps the answers of whole groups: run "
                "the same command again, with fewer processes if memory was short."
            ) from error
        except (KeyboardInterrupt, Interrupted):  # what is under way is not waited for: the journals have the rest
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
    """What a worker process holds."""

    checkpoint: Checkpoint
    journal: Journal | None
    asked: DecodeRequest | None = None
    grammar: AnswerGrammar | None = None


_worker: _Worker | None = None  # in a worker process


def _start(places: SimpleQueue[tuple[str, Path | None]], folder: Path, limits: tuple[int, int], threads: int) -> None:
    """Make this process a worker: it takes the next device, and loads the model there."""
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
