"""The decoder in memory, against transformers' `generate` and against re-scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from coordexp.infra.device import training_plan
from coordexp.models.forward import hidden_states
from coordexp.models.loading import Checkpoint
from coordexp.packing.collator import Collator
from coordexp.packing.samples import Sample
from coordexp.rollout.beam_search import BeamSearch
from coordexp.rollout.engine import DecodeRequest, Generation
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.rescore import Rescored, kept_while_generating, rescore
from coordexp.rollout.scoring import scored
from coordexp.rollout.slot_cache import Decoder, SlotCache, prompt_segment
from coordexp.rollout.slot_decoder import SlotDecoder
from coordexp.rollout.stages import make_reader, read_answers
from coordexp.rollout.token_choice import TokenChoice
from coordexp.text.grammar_walk import AnswerWalk
from helpers import PARAMS, Codec, World, asked, changed, decode_request, new_checkpoint
from transformers_generate import generate, options_of

LONG = decode_request(max_new_tokens=30)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A random model that ends its answers anywhere between the first token and the last one."""
    checkpoint = new_checkpoint(seed=5)
    end = checkpoint.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        checkpoint.model.lm_head.weight[end] *= 2.5
    return checkpoint


def many(world: World, copies: int) -> list[Sample]:
    """The world's samples, the same pictures under different questions: prompts of many lengths."""
    samples = []
    for copy in range(copies):
        for sample in world.samples:
            prompt = np.concatenate([sample.prompt_ids, sample.prompt_ids[-1 - copy % 4 :]])
            samples.append(replace(sample, image_id=len(samples), prompt_ids=prompt))
    return samples


def decoder(checkpoint: Checkpoint, world: World, request: DecodeRequest, slots: int) -> Decoder:
    grammar, kind = request.grammar(checkpoint.tokenizer), SlotDecoder if request.params.beams == 1 else BeamSearch
    return kind(checkpoint, world.collator(checkpoint), request, grammar, slots)


def answers(generations: Sequence[Generation]) -> list[tuple[list[int], str]]:
    return [(g.ids.tolist(), g.finish_reason) for g in generations]


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("json", {}),
    "one token": ("json", {"max_new_tokens": 1}),
    "penalty": ("json", {"repetition_penalty": 1.6}),
    "grammar": ("json", {"grammar": "any", "corners": "valid", "max_new_tokens": 60}),
    "grammar, tags": ("tags", {"grammar": "any", "max_new_tokens": 40, "repetition_penalty": 1.3}),
    "grammar, digits": ("digits", {"grammar": "any", "max_new_tokens": 60}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_greedy_answers_are_those_of_generate(world: World, checkpoint: Checkpoint, name: str) -> None:
    """More samples than slots, and fewer; answers of many lengths, or all of one."""
    codec, changes = REQUESTS[name]
    request = asked(replace(LONG, codec=codec), **changes)
    samples = many(world, 3)
    expected = generate(checkpoint, world.root, samples, request, 1)
    assert len({len(g.ids) for g in expected}) > 1 or name == "one token"
    for slots in (5, 64):
        assert answers(decoder(checkpoint, world, request, slots).decode(samples)) == answers(expected), slots


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("name", [name for name in REQUESTS if "grammar" not in name])
def test_the_best_beam_is_that_of_generate(world: World, checkpoint: Checkpoint, name: str, beams: int) -> None:
    """Pictures come and go, two at a time, and a beam ends before the search or at the budget."""
    codec, changes = REQUESTS[name]
    request = asked(replace(LONG, codec=codec), **changes, beams=beams)
    samples = many(world, 2)
    expected = generate(checkpoint, world.root, samples, request, 4)
    found = decoder(checkpoint, world, request, 2 * beams + 1).decode(samples)
    assert answers(found) == answers(expected)
    assert name == "one token" or len({len(g.ids) for g in found}) > 1
    assert name == "one token" or answers(found) != answers(decoder(checkpoint, world, LONG, 5).decode(samples))


def logprob(generation: Generation) -> float:
    """Of the whole answer, per token."""
    assert generation.probs is not None
    return float(generation.probs.logprobs_A.mean())


@pytest.mark.parametrize("codec", ["json", "tags"])
def test_beams_follow_a_grammar_and_find_more_probable_answers(
    world: World, checkpoint: Checkpoint, codec: str
) -> None:
    request = asked(replace(LONG, codec=codec), grammar="any", corners="valid", duplicate_iou=0.5, max_new_tokens=40)
    greedy, searched = (
        decoder(checkpoint, world, asked(request, beams=beams), 8).decode(world.samples) for beams in (1, 3)
    )
    reader = replace(make_reader(checkpoint), codec=codec)
    for generation in searched:
        report = reader.parse(generation).report
        assert report.ok
        assert not report.dropped
    assert np.mean([logprob(g) for g in searched]) > np.mean([logprob(g) for g in greedy])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", REQUESTS)
def test_probabilities_kept_while_decoding_equal_those_of_rescoring(
    world: World, checkpoint: Checkpoint, name: str, beams: int
) -> None:
    codec, changes = REQUESTS[name]
    request = asked(replace(LONG, codec=codec), **changes, beams=beams)
    samples = many(world, 3 - min(beams, 2))
    generations = decoder(checkpoint, world, request, 5).decode(samples)
    assert checkpoint.coord is not None
    coord_ids = range(checkpoint.coord.first_id, checkpoint.coord.end_id)
    emitted = [np.flatnonzero(np.isin(g.ids, coord_ids)) for g in generations]
    boxes = [where[: len(where) // 4 * 4].reshape(-1, 4) for where in emitted]
    rescored = rescore(checkpoint, world.collator(checkpoint), samples, generations, boxes, 4)
    for generation, expected, where in zip(generations, rescored, boxes, strict=True):
        found = kept_while_generating(checkpoint, generation, where)
        np.testing.assert_allclose(found.logprobs_A, expected.logprobs_A, atol=1e-5)
        if codec == "digits":
            assert found.coord_probs_N4K is None
            continue
        assert found.coord_probs_N4K is not None
        assert found.coord_probs_N4K.dtype == np.float16
        np.testing.assert_allclose(found.coord_probs_N4K, expected.coord_probs_N4K, atol=1e-5, rtol=1e-3)
    assert beams > 1 or name not in ("grammar", "grammar, tags") or sum(map(len, boxes)) > 1


def test_only_answers_without_probabilities_are_rescored(
    world: World, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a server; the same boxes and scores come out."""
    request = asked(LONG, grammar="any", corners="valid", max_new_tokens=60, temperature=1.5)
    samples = many(world, 4)
    generations = decoder(checkpoint, world, request, 5).decode(samples)
    mixed = [g if i % 3 else replace(g, probs=None) for i, g in enumerate(generations)]
    asked_again: list[int] = []

    def counting(*arguments: Any) -> list[Rescored]:
        asked_again.append(len(arguments[2]))
        return rescore(*arguments)

    monkeypatch.setattr("coordexp.rollout.stages.rescore", counting)
    ours, theirs = (
        [
            scored(a, request.params)
            for a in read_answers(checkpoint, make_reader(checkpoint), samples, g, world.root, 4)
        ]
        for g in (generations, mixed)
    )
    assert asked_again == [8]
    assert sum(len(result.pred) for result in ours[::3]) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert [p.desc for p in own.pred] == [p.desc for p in other.pred]
        for a, b in zip(own.pred, other.pred, strict=True):
            np.testing.assert_allclose(a.bbox_xyxy_px, b.bbox_xyxy_px, atol=0.05)
            assert a.score == pytest.approx(b.score, abs=1e-4)


def test_probabilities_are_kept_only_on_request(world: World, checkpoint: Checkpoint) -> None:
    bare = decoder(checkpoint, world, replace(LONG, keep_probs=False), 5).decode(world.samples)
    assert [g.probs for g in bare] == [None] * len(bare)
    assert answers(bare) == answers(decoder(checkpoint, world, LONG, 5).decode(world.samples))


def test_finished_answers_take_part_in_no_forward(world: World, checkpoint: Checkpoint) -> None:
    """Beside `generate`, whose batches last as long as their longest answer."""
    samples, ours = many(world, 4), decoder(checkpoint, world, LONG, 4)
    lengths = [len(g.ids) for g in ours.decode(samples)]
    by_prompt = sorted(range(len(samples)), key=lambda i: samples[i].prompt_length)
    batches = [[lengths[i] for i in by_prompt[first : first + 4]] for first in range(0, len(samples), 4)]
    assert ours.forwards <= 1.25 * sum(lengths) / 4 + LONG.params.max_new_tokens
    assert ours.forwards < sum(map(max, batches)) - len(batches)


@pytest.mark.parametrize("codec", ["json", "tags", "digits"])
@pytest.mark.parametrize("names", ["any", "closed"])
def test_forced_tokens_share_a_forward(world: World, checkpoint: Checkpoint, codec: Codec, names: str) -> None:
    """The scaffold, and of closed names what is left of a name that no other one continues."""
    request = asked(replace(LONG, codec=codec, names=("red mug", "red racing car")), grammar=names, max_new_tokens=100)
    grammar, alone = request.grammar(checkpoint.tokenizer), decoder(checkpoint, world, request, 1)
    assert grammar
    n_tokens, n_decisions = 0, 0
    for generation in alone.decode(world.samples):
        walk = AnswerWalk(grammar)
        for token in generation.ids.tolist():
            n_tokens, n_decisions = n_tokens + 1, n_decisions + (walk.allowed().sum() > 1)
            walk.advance(token)
    assert alone.forwards <= n_decisions < 0.95 * n_tokens


def test_slots_do_not_leak_into_later_answers(
    world: World, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an earlier answer left in the cache."""
    samples = many(world, 2)
    clean = decoder(checkpoint, world, LONG, 3).decode(samples)
    original = SlotCache._reserve

    def dirty(self: SlotCache, columns: int) -> None:
        before = self.keys.shape[3]
        original(self, columns)
        self.keys[:, :, :, before:], self.values[:, :, :, before:] = 1e4, -1e4

    monkeypatch.setattr(SlotCache, "_reserve", dirty)
    for slots in (3, 1):
        found = decoder(checkpoint, world, LONG, slots).decode(samples)
        assert answers(found) == answers(clean)
        for ours, theirs in zip(found, clean, strict=True):
            assert ours.probs is not None
            assert theirs.probs is not None
            np.testing.assert_allclose(ours.probs.logprobs_A, theirs.probs.logprobs_A, atol=1e-5)


@pytest.mark.parametrize("grammar", ["none", "any"])
def test_a_sampled_answer_does_not_depend_on_its_batch(world: World, checkpoint: Checkpoint, grammar: str) -> None:
    request = asked(LONG, temperature=1.2, top_p=0.9, grammar=grammar, max_new_tokens=60)
    samples = many(world, 2)
    together = decoder(checkpoint, world, request, 7).decode(samples)
    alone = [decoder(checkpoint, world, request, 1).decode([sample])[0] for sample in reversed(samples)]
    assert answers(together) == answers(alone[::-1])
    assert answers(together) != answers(decoder(checkpoint, world, replace(request, seed=4), 7).decode(samples))


def test_several_samples_of_an_image_equal_several_runs_and_load_it_once(
    world: World, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, draws = asked(LONG, temperature=1.2), 3
    samples = [sample for sample in world.samples for _ in range(draws)]
    runs = [
        decoder(checkpoint, world, replace(request, seed=request.seed + k), 7).decode(world.samples)
        for k in range(draws)
    ]
    read: list[str] = []
    original = Collator.patches
    monkeypatch.setattr(Collator, "patches", lambda self, sample: read.append(sample.image) or original(self, sample))
    together = decoder(checkpoint, world, request, len(samples)).decode(samples)
    assert read == [sample.image for sample in world.samples]
    assert answers(together) == [one for of_picture in zip(*map(answers, runs), strict=True) for one in of_picture]
    assert answers(decoder(checkpoint, world, request, 4).decode(samples)) == answers(together)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.01},
        {"temperature": 2.0, "top_p": 0.9, "repetition_penalty": 1.5},
    ],
)
def test_tokens_are_sampled_from_the_distribution_of_transformers(
    checkpoint: Checkpoint, changes: dict[str, Any]
) -> None:
    """The probabilities behind all processors; repeated tokens, logits of both signs and ties among them."""
    decode = changed(PARAMS.decode, **changes)
    config = checkpoint.model.config
    logits = 4 * torch.randn(5, len(checkpoint.model.lm_head.weight), generator=torch.Generator().manual_seed(0))
    logits[:, :40] = logits[:, :1]
    held_ids = torch.randint(0, 500, (5, 30), generator=torch.Generator().manual_seed(1))
    options = options_of(checkpoint, replace(LONG, params=decode))
    prepared = GenerationConfig(**{name: value for name, value in options.items() if value is not None})
    processors = checkpoint.model._get_logits_processor(prepared, input_ids_seq_length=30, device="cpu")
    expected = processors(held_ids, logits.clone())
    choice = TokenChoice(decode, [config.image_token_id, config.video_token_id])
    found = choice.scores(logits, [set(row) for row in held_ids.tolist()])
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))
    assert torch.equal(found.isinf(), expected.isinf())


def test_random_numbers_select_tokens_by_probability() -> None:
    choice = TokenChoice(changed(PARAMS.decode, temperature=1.0), [])
    probs = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    numbers = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24])
    assert choice.choose(probs.log().expand(6, -1), numbers).tolist() == [1, 1, 3, 3, 4, 4]
    even = (torch.arange(10000) + 0.5) / 10000
    counts = torch.bincount(choice.choose(probs.log().expand(10000, -1), even), minlength=6)
    torch.testing.assert_close(counts / 10000, probs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bfloat16_keys_and_values_for_a_model_that_computes_in_it(
    world: World, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator; a model in training has float32 weights there."""
    checkpoint, caches = new_checkpoint(), []
    original = SlotCache.__init__
    monkeypatch.setattr(SlotCache, "__init__", lambda cache, *a: original(cache, *a) or caches.append(cache))
    if way == "weights":
        checkpoint.model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        generations = decoder(checkpoint, world, LONG, 4).decode(world.samples)
        answered = world.samples, generations, [np.zeros((0, 4), np.int64)] * 6
    plan = training_plan("bf16", torch.device("cpu"))
    monkeypatch.setattr("coordexp.rollout.rescore.inference_plan", lambda _: plan)
    rescored = rescore(checkpoint, world.collator(checkpoint), *answered, 6)
    for generation, again in zip(generations, rescored, strict=True):
        assert generation.probs is not None
        np.testing.assert_allclose(generation.probs.logprobs_A, again.logprobs_A, atol=0.2)
    assert caches[0].keys.dtype == torch.bfloat16


def test_a_training_step_may_follow_on_the_same_lengths(world: World) -> None:
    """What attention remembers of a packing was made without gradients."""
    checkpoint = new_checkpoint()
    decoder(checkpoint, world, asked(LONG, max_new_tokens=1), 6).decode(world.samples)
    segments = [prompt_segment(sample) for sample in world.samples]
    batch = world.collator(checkpoint).layout(segments, [list(range(6))])
    hidden_states(checkpoint.model, batch).sum().backward()
    assert all(p.grad is not None for p in checkpoint.model.model.language_model.layers.parameters())


def test_generation_does_not_use_torchs_global_generator(world: World, checkpoint: Checkpoint) -> None:
    state = torch.get_rng_state()
    HfEngine(checkpoint, world.root, 4).generate(world.samples, asked(LONG, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)
