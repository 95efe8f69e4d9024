"""The engine that a profile asks for, ready to generate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordexp.config.profile import Profile
from coordexp.config.provenance import code_hash, fingerprint, resume_folder
from coordexp.models.forward import input_table
from coordexp.models.loading import Checkpoint
from coordexp.rollout.engine import Engine
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.journal import Journal
from coordexp.rollout.vllm_client import ServerPool
from coordexp.rollout.vllm_engine import VllmEngine
from coordexp.rollout.vllm_server import vllm_server

# What decides the contents of a decode; an edit there must not reuse older answers.
DECODE_LAYERS = ("models", "packing", "rollout", "text", "geometry")
START = ("start",)  # value of rollout.servers


@contextmanager
def open_engine(
    profile: Profile, checkpoint: Checkpoint, folder: Path, image_root: Path, batch_images: int, max_new_tokens: int
) -> Iterator[Engine]:
    """The engine of `rollout.engine` on a checkpoint that is loaded from `folder`.

    With vLLM and `rollout.servers: [start]`, a server is started on the folder and stopped at the end of the block.
    Answers are kept until the block ends without an error, so that a failed run goes on from them.
    """
    settings = profile.rollout
    key = fingerprint({"code": code_hash(DECODE_LAYERS)}, sorted(folder.glob("*.safetensors")))
    journal = Journal(resume_folder("generations", key) / "generations.jsonl")
    if settings.engine == "hf":
        yield HfEngine(checkpoint, image_root, batch_images, journal)
        journal.remove()
        return

    def engine(urls: tuple[str, ...]) -> VllmEngine:
        pool = ServerPool(urls, settings.timeout_seconds, settings.tries)
        concurrency = settings.requests_per_server * len(urls)
        vocabulary_size = len(input_table(checkpoint.model).weight)
        return VllmEngine(pool, checkpoint.tokenizer, image_root, concurrency, journal, vocabulary_size=vocabulary_size)

    if settings.servers != START:
        yield engine(settings.servers)
    else:
        with vllm_server(Path(settings.vllm_python), folder, checkpoint.pixels, max_new_tokens) as server:
            yield engine((server.url,))
    journal.remove()
