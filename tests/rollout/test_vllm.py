"""The vLLM engine against real servers on CPU: rollouts over HTTP, grammar, parity, and a server killed in the middle.

Needs the environment of `make vllm`; `make test-vllm` runs it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coordexp.config.profile import TuningConfig
from coordexp.errors import ServerError
from coordexp.geometry.boxes import as_boxes, pairwise_iou
from coordexp.models.adapters import apply_tuning
from coordexp.models.forward import input_table
from coordexp.models.loading import Checkpoint, load_checkpoint, save_checkpoint
from coordexp.models.processor import write_processor_files
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeRequest, Generation, Journal
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.vllm_client import ServerPool
from coordexp.rollout.vllm_command import ServerCommand, Weights, server_commands
from coordexp.rollout.vllm_engine import VllmEngine
from coordexp.rollout.vllm_server import VllmServer, vllm_servers
from coordexp.text.parser import parse_answer
from coordexp.text.symbols import TokenTable
from coordexp.training.rollout_pool import engine_of_now
from helpers import Workspace, World, asked, decode_request, new_checkpoint, rollout_config, token_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
GREEDY = decode_request(max_new_tokens=48)
LORA = TuningConfig(
    method="lora",
    vision="train",
    projector="train",
    language="train",
    rank=4,
    alpha=8.0,
    dropout=0.0,
    activations="keep",
    vision_activations="keep",
)
BUDGET = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A random model with coordinate tokens whose adapters moved and were merged, saved and loaded again.

    So every test here is also one that a merged checkpoint is served whole.
    """
    folder = tmp_path_factory.mktemp("checkpoint")
    made = new_checkpoint()
    _move_adapters(made)()
    save_checkpoint(folder, made)
    loaded = load_checkpoint(folder)
    # A base model brings other limits of size than it is asked under.
    write_processor_files(folder, replace(loaded.pixels, min_pixels=32 * 32, max_pixels=32 * 32))
    return loaded, folder


def _move_adapters(made: Checkpoint) -> Callable[[], None]:
    assert made.coord is not None
    merge = apply_tuning(made.model, LORA, made.coord)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (p for p in made.model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return merge


def commands(loaded: Checkpoint, folder: Path, decode: DecodeRequest, **serve: Any) -> list[ServerCommand]:
    rollout = rollout_config(vllm_python=str(PYTHON), **serve)
    return server_commands(rollout, Weights.of(folder), loaded.pixels, decode.params)


@pytest.fixture(scope="module")
def servers(checkpoint: tuple[Checkpoint, Path]) -> Iterator[list[VllmServer]]:
    """Two servers of the same checkpoint that may be asked for geometry; the last test ends one of them."""
    walked = decode_request(max_new_tokens=400, grammar="any", corners="valid")
    with vllm_servers(commands(*checkpoint, walked, devices="cpu,cpu")) as running:
        yield running


@pytest.fixture(scope="module")
def drafting(checkpoint: tuple[Checkpoint, Path]) -> Iterator[list[VllmServer]]:
    """A server that drafts what followed the same tokens before."""
    with vllm_servers(commands(*checkpoint, decode_request(max_new_tokens=400), ngram_tokens=4)) as running:
        yield running


def engine(
    checkpoint: tuple[Checkpoint, Path], world: World, servers: list[VllmServer], out: Path, concurrency: int = 16
) -> VllmEngine:
    """An engine over these servers, with its journal in `out`."""
    loaded, folder = checkpoint
    pool = ServerPool([server.url for server in servers], timeout_seconds=120, tries=4, weights=Weights.of(folder))
    journal = Journal(out / "generations.jsonl")
    return VllmEngine(pool, loaded.tokenizer, world.root, concurrency, journal, vocabulary_size=vocabulary(loaded))


def vocabulary(loaded: Checkpoint) -> int:
    """Rows of the model's table: a random model also emits those beyond the tokenizer."""
    return len(input_table(loaded.model).weight)


def ids_of(generations: list[Generation]) -> list[list[int]]:
    return [g.ids.tolist() for g in generations]


def copies(world: World, n: int) -> list[Sample]:
    """The world's samples under n ids each: seeds, and so sampled answers, differ."""
    return [replace(s, image_id=i) for i, s in enumerate(world.samples * n)]


def sampled(codec: str, **changes: Any) -> DecodeRequest:
    """Sampling at temperature 1.5 under the grammar."""
    grammar = "closed" if "names" in changes else "any"
    return decode_request(codec, max_new_tokens=BUDGET, temperature=1.5, grammar=grammar, corners="valid", **changes)


def test_greedy_answers_agree_with_hugging_face(
    world: World, checkpoint: tuple[Checkpoint, Path], servers: list[VllmServer], tmp_path: Path
) -> None:
    loaded, _ = checkpoint
    ours = HfEngine(loaded, world.root, 8).generate(world.samples, GREEDY)
    theirs = engine(checkpoint, world, servers[:1], tmp_path).generate(world.samples, GREEDY)
    assert ids_of(theirs) == ids_of(ours)
    assert [g.finish_reason for g in theirs] == [g.finish_reason for g in ours]


def test_logprobs_agree_with_the_rescored_ones(
    world: World, checkpoint: tuple[Checkpoint, Path], servers: list[VllmServer]
) -> None:
    """The server's own log-probability of each token it emitted, against the re-scoring forward: within 1e-3."""
    loaded, folder = checkpoint
    own: list[list[float]] = []

    class Spy(ServerPool):
        def ask(self, index: int, body: dict, read: Callable[[bytes], Generation]) -> Generation:  # type: ignore[override]
            def spy(reply: bytes) -> Generation:
                own.append([token["logprob"] for token in json.loads(reply)["choices"][0]["logprobs"]["content"]])
                return read(reply)

            return super().ask(index, body | {"logprobs": True}, spy)

    spy = Spy([servers[0].url], timeout_seconds=120, tries=2, weights=Weights.of(folder))
    journal = Journal(world.root / "spy" / "generations.jsonl")
    asked = VllmEngine(spy, loaded.tokenizer, world.root, 1, journal, vocabulary_size=vocabulary(loaded))
    generations = asked.generate(world.samples, GREEDY)
    journal.path.unlink()
    rescored = token_logprobs(loaded, world.collator(loaded), world.samples, generations, 8)
    for theirs, ours in zip(own, rescored, strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-3)


@pytest.mark.parametrize("codec", ["json", "tags"])
@pytest.mark.parametrize("n", [50, pytest.param(334, marks=pytest.mark.faults)])  # of six samples each
def test_sampled_answers_parse(
    codec: str, n: int, world: World, checkpoint: tuple[Checkpoint, Path], servers: list[VllmServer], tmp_path: Path
) -> None:
    loaded, _ = checkpoint
    samples = copies(world, n)
    found = engine(checkpoint, world, servers, tmp_path, 64).generate(samples, sampled(codec))
    table = TokenTable.from_tokenizer(loaded.tokenizer, loaded.coord)
    parsed = [parse_answer(g.ids, table, codec) for g in found]
    assert sum(not answer.report.ok for answer in parsed) == 0
    assert any(len(answer.objects) > 1 for answer in parsed)


def test_constrained_greedy_answers_agree_with_hugging_face(
    world: World, checkpoint: tuple[Checkpoint, Path], servers: list[VllmServer], tmp_path: Path
) -> None:
    """The duplicate guard over HTTP and in `generate` are one description, so greedy answers are the same tokens."""
    loaded, _ = checkpoint
    decode = asked(sampled("json", duplicate_iou=0.2, names=("cat", "dog")), temperature=0.0)
    ours = HfEngine(loaded, world.root, 8).generate(world.samples, decode)
    theirs = engine(checkpoint, world, servers, tmp_path).generate(world.samples, decode)
    assert ids_of(theirs) == ids_of(ours)
    table = TokenTable.from_tokenizer(loaded.tokenizer, loaded.coord)
    for g in theirs:
        objects = parse_answer(g.ids, table, "json").objects
        for name in ("cat", "dog"):
            boxes = as_boxes([o.bins for o in objects if o.desc == name])
            assert (pairwise_iou(boxes, boxes)[np.triu_indices(len(boxes), 1)] <= 0.2).all()


def test_sampled_answers_depend_on_neither_server_nor_concurrency(
    world: World, checkpoint: tuple[Checkpoint, Path], servers: list[VllmServer], tmp_path: Path
) -> None:
    samples, decode = copies(world, 4), asked(GREEDY, temperature=0.7)
    both = engine(checkpoint, world, servers, tmp_path / "a", 16).generate(samples, decode)
    one = engine(checkpoint, world, servers[1:], tmp_path / "b", 1).generate(samples, decode)
    assert ids_of(both) == ids_of(one)


@pytest.mark.parametrize("grammar", ["none", "any"])
def test_drafted_answers_are_the_same(
    grammar: str,
    world: World,
    checkpoint: tuple[Checkpoint, Path],
    servers: list[VllmServer],
    drafting: list[VllmServer],
    tmp_path: Path,
) -> None:
    """A draft is kept where it is what the model would have said."""
    decode = asked(GREEDY, grammar=grammar, max_new_tokens=BUDGET)
    plain, drafted = (
        engine(checkpoint, world, one, tmp_path / name).generate(world.samples, decode)
        for name, one in (("plain", servers[:1]), ("drafted", drafting))
    )
    assert ids_of(drafted) == ids_of(plain)


def test_other_weights_are_refused(
    world: World, checkpoint: tuple[Checkpoint, Path], drafting: list[VllmServer], tmp_path: Path
) -> None:
    """Before anything is asked; and by the server itself, whoever asks it for weights that it does not hold."""
    loaded, _ = checkpoint
    save_checkpoint(tmp_path / "other", new_checkpoint(seed=18))
    other = (loaded, tmp_path / "other")
    with pytest.raises(ServerError, match=rf"holds coordexp-.*, expected coordexp-.* of {tmp_path}/other"):
        engine(other, world, drafting, tmp_path).generate(world.samples, GREEDY)
    silent = engine(other, world, drafting, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coordexp.rollout.vllm_client._models", lambda _: [])
        with pytest.raises(ServerError, match=r"HTTP 404.*does not exist"):
            silent.generate(world.samples, GREEDY)


def test_the_weights_in_training_are_served_as_they_are(workspace: Workspace, world: World, tmp_path: Path) -> None:
    """With adapters beside them: what servers answer is what the model in memory answers, before the next step."""
    made, folder = new_checkpoint(), tmp_path / "state"
    _move_adapters(made)
    request = replace(GREEDY, keep_probs=False)
    ours = HfEngine(made, world.root, 8).generate(world.samples, request)
    rollout = rollout_config(vllm_python=str(PYTHON)).model_copy(update={"engine": "vllm"})
    run = replace(workspace, profile=workspace.profile.model_copy(update={"rollout": rollout}))
    theirs = engine_of_now(run, made, folder).generate(world.samples, request)
    assert ids_of(theirs) == ids_of(ours)
    assert list(folder.iterdir()) == []


def test_another_image_size_is_refused(
    world: World, checkpoint: tuple[Checkpoint, Path], servers: list[VllmServer], tmp_path: Path
) -> None:
    wrong = replace(world.samples[0], n_image_tokens=world.samples[0].n_image_tokens + 1)
    with pytest.raises(ServerError, match=r"prompt differs from ours at"):
        engine(checkpoint, world, servers[:1], tmp_path).generate([wrong], GREEDY)


def test_a_server_killed_in_the_middle_loses_nothing(
    world: World, checkpoint: tuple[Checkpoint, Path], servers: list[VllmServer], tmp_path: Path
) -> None:
    """Runs last: it ends one of the two servers."""
    loaded, _ = checkpoint
    samples = copies(world, 20)
    reference = engine(checkpoint, world, servers[1:], tmp_path / "a").generate(samples, GREEDY)
    journal = tmp_path / "b" / "generations.jsonl"

    def kill_when_started() -> None:
        while not journal.is_file() or len(journal.read_text().splitlines()) < 10:
            time.sleep(0.02)
        os.killpg(servers[0].process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_started)
    killer.start()
    survived = engine(checkpoint, world, servers, tmp_path / "b", 4).generate(samples, GREEDY)
    killer.join()
    assert ids_of(survived) == ids_of(reference)
    # With no server left the run stops, and what is on disk is all of it: nothing has to be asked again.
    with pytest.raises(ServerError, match="none of the vLLM servers answers"):
        engine(checkpoint, world, servers[:1], tmp_path / "b").generate(copies(world, 21), GREEDY)
    assert len(Journal(journal).read(vocabulary(loaded))) == len(samples)
