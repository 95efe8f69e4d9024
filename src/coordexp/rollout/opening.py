"""Generate the answers of a checkpoint with the engine that the profile selects."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from coordexp.config.profile import Profile, RolloutConfig
from coordexp.infra.code_hash import code_hash
from coordexp.infra.provenance import fingerprint, weight_files
from coordexp.infra.resume import finish, holding, keep_within_budget, resume_folder, resume_root
from coordexp.models.loading import Checkpoint, ModelFormat, place_for_inference, vocabulary_size
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeRequest, Engine, Generation, Journal
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.vllm_client import ServerPool
from coordexp.rollout.vllm_command import Weights, server_commands
from coordexp.rollout.vllm_engine import VllmEngine
from coordexp.rollout.vllm_server import vllm_servers
from coordexp.rollout.worker_engine import WorkerEngine, decode_devices

log = logging.getLogger(__name__)

START = ("start",)  # value of rollout.servers
JOURNAL = "generations.jsonl"


def generate_answers(
    profile: Profile,
    form: ModelFormat,
    folder: Path,
    image_root: Path,
    batch_images: int,
    samples: Sequence[Sample],
    request: DecodeRequest,
) -> tuple[list[Generation], Checkpoint | None, float]:
    """Answers of the checkpoint in `folder`, the loaded checkpoint if this process generated them, and the seconds.

    With `rollout.engine: vllm` this process does not load the model, because it would not fit on a GPU together with a
    server. Answers are kept until all are complete, so a failed run resumes; a second run of the same work waits for
    the first.
    """
    asked = [request.identity(), request.keep_probs, [sample.image_id for sample in samples]]
    key = fingerprint({"code": code_hash(__name__), "asked": asked}, weight_files(folder))
    kept = resume_folder("generations", key)
    with holding(kept, f"{len(samples)} answers of {folder}"):
        keep_within_budget(resume_root())
        journal = Journal(kept / JOURNAL)
        checkpoint = None
        if profile.rollout.engine == "vllm":
            generations, seconds = ask_servers(profile.rollout, form, folder, image_root, journal, samples, request)
        elif len(devices := decode_devices(profile.launch.processes)) > 1:
            with closing(WorkerEngine(folder, form, image_root, batch_images, devices, journal)) as workers:
                generations, seconds = _timed(workers, samples, request)
        else:
            checkpoint = place_for_inference(folder, form)
            generations, seconds = _timed(HfEngine(checkpoint, image_root, batch_images, journal), samples, request)
        finish(kept)
    return generations, checkpoint, seconds


def ask_servers(
    rollout: RolloutConfig,
    form: ModelFormat,
    folder: Path,
    image_root: Path,
    journal: Journal,
    samples: Sequence[Sample],
    request: DecodeRequest,
) -> tuple[list[Generation], float]:
    """Answers of the checkpoint in `folder` from the servers of the profile, and the seconds of generation.

    Servers that this call started have stopped when it returns.
    """
    weights = Weights.of(folder)
    with ExitStack() as running:
        urls = rollout.servers
        if urls == START:
            commands = server_commands(rollout, weights, form.pixels, request.params)
            urls = tuple(server.url for server in running.enter_context(vllm_servers(commands)))
        pool = ServerPool(urls, rollout.timeout_seconds, rollout.tries, weights)
        workers, rows = rollout.requests_per_server * len(urls), vocabulary_size(folder)
        engine = VllmEngine(pool, form.tokenizer, image_root, workers, journal, vocabulary_size=rows)
        return _timed(engine, samples, request)


def _timed(engine: Engine, samples: Sequence[Sample], request: DecodeRequest) -> tuple[list[Generation], float]:
    started = time.monotonic()
    return engine.generate(samples, request), time.monotonic() - started
