"""Tokens and images per second of rollouts: hf and vLLM, `json` and `tags`, grammar off and on, batches of 1 to 64.

    PYTHONPATH=src python -m benchmarks.rollout_tokens --profile tiny

The stage-1 model uses one codec. The rows of codecs therefore force transformers' `generate` to write the annotated
answers, so that codecs differ only in their tokens. Grammar rows generate freely. vLLM rows need `make vllm`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from benchmarks.harness import Figure, Row, measured, side_by_side, unmeasured
from benchmarks.tiny_run import TinyRun
from tests.transformers_generate import model_inputs
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks import harness, tiny_run
from coordexp.models.forward import input_table
from coordexp.models.loading import Checkpoint
from coordexp.packing.samples import Sample, permuted
from coordexp.rollout.engine import DecodeRequest, Engine, Generation, Journal
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.vllm_client import ServerPool
from coordexp.rollout.vllm_command import Weights, server_commands
from coordexp.rollout.vllm_engine import VllmEngine
from coordexp.rollout.vllm_server import vllm_servers
from coordexp.stage import LOG, tune_allocator
from coordexp.text.codecs import CODECS, AnswerEncoder

GRAMMAR_COST, CODEC_GAIN = 1.05, 2.0
# Of the same 64 requests a server on two cores takes between 2 and 7 s: many more of them, and often.
VLLM_IMAGES, VLLM_ROUNDS, NGRAM_TOKENS = 256, 3, 4
BATCHES = (1, 8, 64)


class Dictation(LogitsProcessor):
    """Leaves one token at each step: the next one of the row's answer, then padding."""

    def __init__(self, answers: Sequence[np.ndarray], prompt_length: int, pad_id: int) -> None:
        self._prompt_length = prompt_length
        self._ids = np.full((len(answers), max(map(len, answers)) + 1), pad_id)
        for row, answer in enumerate(answers):
            self._ids[row, : len(answer)] = answer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with all but the dictated tokens at -inf."""
        wanted = torch.from_numpy(self._ids[:, input_ids.shape[1] - self._prompt_length])[:, None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


@torch.inference_mode()
def dictate(checkpoint: Checkpoint, image_root: Path, samples: Sequence[Sample], batch: int) -> None:
    """Write the samples' own answers in batches, and check that they came out."""
    pad_id = int(checkpoint.tokenizer.pad_token_id)
    for first in range(0, len(samples), batch):
        chunk = samples[first : first + batch]
        inputs, answers = model_inputs(checkpoint, image_root, chunk), [sample.answer_ids for sample in chunk]
        width = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList([Dictation(answers, width, pad_id)])
        options = {"max_new_tokens": max(map(len, answers)), "do_sample": False, "pad_token_id": pad_id}
        output = checkpoint.model.generate(
            **inputs, **options, logits_processor=processors, eos_token_id=int(answers[0][-1])
        )
        written = output[:, width:].cpu().numpy()
        assert all((row[: len(answer)] == answer).all() for row, answer in zip(written, answers, strict=True))


class ForgetfulVllm:
    """The vLLM engine with a new journal each time: what was answered before is asked again."""

    def __init__(self, pool: ServerPool, checkpoint: Checkpoint, image_root: Path, concurrency: int) -> None:
        self._parts = (pool, checkpoint.tokenizer, image_root, concurrency)
        self._vocabulary_size = len(input_table(checkpoint.model).weight)

    def generate(self, samples: Sequence[Sample], request: DecodeRequest) -> list[Generation]:
        """One generation per sample."""
        with TemporaryDirectory() as folder:
            journal = Journal(Path(folder) / "journal.jsonl")
            engine = VllmEngine(*self._parts, journal, vocabulary_size=self._vocabulary_size)
            return engine.generate(samples, request)


def codec_rows(checkpoint: Checkpoint, image_root: Path, stored: Sequence[Sample], rounds: int) -> Iterator[Row]:
    """Both codecs write the same answers."""
    encoders = {name: AnswerEncoder(checkpoint.tokenizer, CODECS[name]) for name in ("json", "tags")}
    samples = {
        name: [permuted(s, encoder, np.random.default_rng(0)) for s in stored] for name, encoder in encoders.items()
    }
    tokens = {name: sum(len(s.answer_ids) for s in these) for name, these in samples.items()}
    speed = None
    for batch in BATCHES:
        few = max(batch, len(stored) // 8) if batch < len(stored) else len(stored)
        ways = {n: lambda t=t, b=batch, f=few: dictate(checkpoint, image_root, t[:f], b) for n, t in samples.items()}
        times = side_by_side(ways, rounds, warm_up=False)
        for name, these in samples.items():
            n_tokens = sum(len(s.answer_ids) for s in these[:few])
            per_second = times.of(name).map(lambda seconds, n=n_tokens: n / seconds)
            speed = speed or per_second.value
            beside = f"{per_second.value / speed:.2f} x json at batch 1; {few / times.of(name).value:.1f} images/s"
            yield measured(f"hf {name}, batch {batch}", per_second, "tokens/s", beside)
    beside = f"{tokens['tags'] / tokens['json']:.0%} of the tokens; batch {batch}"
    yield measured(
        "hf tags: images a second, beside json", times.ratio("json", "tags"), "x", beside, at_least=CODEC_GAIN
    )


def grammar_ratio(
    engine: Engine, samples: Sequence[Sample], request: DecodeRequest, rounds: int
) -> tuple[Figure, Figure]:
    """Seconds a token with the grammar beside without it, as answers may differ in length; seconds without it."""
    tokens = {}

    def run(name: str, these: DecodeRequest) -> None:
        tokens[name] = sum(len(g.ids) for g in engine.generate(samples, these))

    free = replace(request, params=request.params.model_copy(update={"grammar": "none", "corners": "any"}))
    times = side_by_side({"free": lambda: run("free", free), "grammar": lambda: run("grammar", request)}, rounds, False)
    fewer = tokens["free"] / tokens["grammar"]
    return times.ratio("grammar", "free").map(lambda ratio: ratio * fewer), times.of("free")


def engine_rows(name: str, engine: Engine, samples: Sequence[Sample], request: DecodeRequest, rounds: int) -> list[Row]:
    """Free generation and what the grammar costs."""
    cost, free = grammar_ratio(engine, samples, request, rounds)
    speed = free.map(lambda seconds: len(samples) / seconds)
    if name == "vLLM":  # another process works
        cost, speed = Figure(cost.rounds), Figure(speed.rounds)
    limit = GRAMMAR_COST if name == "vLLM" else None
    return [
        measured(f"{name}: images a second, free", speed, "images/s", f"{len(samples)} images"),
        measured(f"{name}: grammar, seconds a token", cost, "x", "without grammar", at_most=limit),
    ]


def vllm_rows(
    run: TinyRun, checkpoint: Checkpoint, folder: Path, samples: Sequence[Sample], request: DecodeRequest
) -> list[Row]:
    """The same by a vLLM server, if its environment is there."""
    rollout = run.profile.rollout
    if not Path(rollout.vllm_python).exists():
        return [unmeasured("vLLM: grammar, seconds a token", "needs make vllm", f"<= {GRAMMAR_COST}")]
    decode, pixels, weights = request.params, checkpoint.pixels, Weights.of(folder)
    placed = [rollout.serve.model_copy(update={"devices": "cpu", "ngram_tokens": n}) for n in (0, NGRAM_TOKENS)]
    each = [rollout.model_copy(update={"serve": serve}) for serve in placed]
    commands = [server_commands(one, weights, pixels, decode)[0] for one in each]
    with vllm_servers(commands) as servers:
        plain, drafting = (
            ForgetfulVllm(
                ServerPool((server.url,), rollout.timeout_seconds, rollout.tries, weights),
                checkpoint,
                run.paths.raw,
                rollout.requests_per_server,
            )
            for server in servers
        )
        for engine in (plain, drafting):
            engine.generate(samples[:4], request)
        free = replace(request, params=decode.model_copy(update={"grammar": "none"}))
        ways = {name: lambda e=e: e.generate(samples, free) for name, e in (("plain", plain), ("drafts", drafting))}
        gain = Figure(side_by_side(ways, VLLM_ROUNDS, False).ratio("plain", "drafts").rounds)
        beside = f"{NGRAM_TOKENS} tokens drafted, without grammar; {len(samples)} images"
        rows = engine_rows("vLLM", plain, samples, request, VLLM_ROUNDS)
        return [*rows, measured("vLLM: n-gram drafts, seconds without beside with", gain, "x", beside)]


def measure(arguments: argparse.Namespace) -> list[Row]:
    """The table."""
    run = tiny_run.open_run(arguments)
    folder = run.paths.run("stage1")
    if missing := tiny_run.absent("rollouts", arguments, folder, run.paths.norm1000, run.paths.raw):
        return missing
    tune_allocator(LOG)
    checkpoint = run.checkpoint(folder)
    checkpoint.model.eval()
    rounds, count = (1, 2) if arguments.quick else (3, arguments.images)
    samples = run.samples("val", count)
    decode = run.params.decode.model_copy(update={"grammar": "any"})
    request = DecodeRequest(params=decode, codec=run.params.text.codec, seed=run.params.seed)
    engine = HfEngine(checkpoint, run.paths.raw, max(BATCHES))
    rows = list(codec_rows(checkpoint, run.paths.raw, samples, rounds))
    rows += engine_rows("hf", engine, samples, request, rounds)
    many = run.samples("val", VLLM_IMAGES)
    return rows if arguments.quick else rows + vllm_rows(run, checkpoint, folder, many, request)


def options(parser: argparse.ArgumentParser) -> None:
    """Which run, and how many pictures."""
    tiny_run.options(parser)
    parser.add_argument("--images", type=int, default=64)


if __name__ == "__main__":
    harness.script("rollout_tokens", __doc__, measure, options)
