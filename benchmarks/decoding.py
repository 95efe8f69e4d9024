"""Decoding in slots with scores, compared with transformers' `generate` followed by a packed re-scoring forward.

    PYTHONPATH=src python -m benchmarks.decoding --profile tiny

The stage-1 model answers val images; both ways give the same tokens. In a model this small, most of the work is the
prefill of images and prompts, which the re-scoring forward repeats. A real model saves forwards, which are counted for
answers with COCO's number of objects in Qwen's tokens. Codecs are compared by forcing the annotated answers in both.
Times are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heapreplace

import numpy as np
import torch
from benchmarks.harness import Row, measured, side_by_side
from benchmarks.parse_and_match import rollouts
from tests.qwen import qwen3_tokenizer
from tests.transformers_generate import generate
from torch import Tensor

from benchmarks import harness, tiny_run
from coordexp.geometry.bins import COORD_TOKENS
from coordexp.models.loading import Checkpoint
from coordexp.packing.samples import Sample, permuted
from coordexp.rollout.decode import coord_positions
from coordexp.rollout.draft import FormatDraft
from coordexp.rollout.engine import DecodeRequest, Generation
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.rescore import Rescored, rescore
from coordexp.rollout.slot_decoder import OpenAnswer, SlotDecoder
from coordexp.rollout.stages import make_reader
from coordexp.stage import LOG, tune_allocator
from coordexp.text.codecs import CODECS, AnswerEncoder

GAIN, SCORES, FORWARDS, CODECS_APART, GRAMMAR_COST = 2.5, 0.05, 8.0, 1.3, 1.05
OPEN = 64  # answers at a time, of the simulated ones


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Times of the run's model, and forwards of answers with COCO's lengths."""
    run = tiny_run.open_run(arguments)
    folder = run.paths.run("stage1")
    if missing := tiny_run.absent("decoding", arguments, folder, run.paths.norm1000, run.paths.raw):
        return missing + forward_rows(64 if arguments.quick else 1000)
    tune_allocator(LOG)
    checkpoint = run.checkpoint(run.paths.run("stage1"))
    rows = time_rows(run, checkpoint, arguments) + codec_rows(run, checkpoint, arguments)
    return rows + forward_rows(64 if arguments.quick else 1000)


class Dictated(SlotDecoder):
    """Writes the annotated answers instead of the model's choices; a draft is accepted if it matches them."""

    def _chosen(self, answers: Sequence[OpenAnswer], logits_RV: Tensor) -> Tensor:
        del logits_RV
        return torch.tensor([int(self.dictated[a.place].answer_ids[len(a.ids)]) for a in answers])

    def dictate(self, samples: Sequence[Sample]) -> list[Generation]:
        """Their answers."""
        self.dictated = samples
        return self.decode(samples)


def codec_rows(run: tiny_run.TinyRun, checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[Row]:
    """The same objects written in both codecs."""
    batch, stored = run.profile.rollout.batch_images, run.samples("val", 8 if arguments.quick else arguments.images)
    decoders, samples = {}, {}
    for codec in ("json", "tags"):
        encoder = AnswerEncoder(checkpoint.tokenizer, CODECS[codec])
        samples[codec] = [permuted(s, encoder, np.random.default_rng(0)) for s in stored]
        request = DecodeRequest(params=run.params.decode, codec=codec, seed=0)
        decoders[codec] = Dictated(checkpoint, checkpoint.collator(run.paths.raw), request, None, batch)
    for codec, decoder in decoders.items():
        written = decoder.dictate(samples[codec])
        assert all(np.array_equal(g.ids, s.answer_ids) for g, s in zip(written, samples[codec], strict=True))
    ways = {codec: lambda d=d, s=samples[codec]: d.dictate(s) for codec, d in decoders.items()}
    times = side_by_side(ways, 1 if arguments.quick else 5, not arguments.quick)
    apart = times.ratio("json", "tags").by_cpu
    beside = f"the same {len(stored)} answers, {batch} at a time, in the embedded tokenizer"
    return [measured("json beside tags: time of an image", apart, "x", beside, at_most=CODECS_APART)]


def time_rows(run: tiny_run.TinyRun, checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[Row]:
    """Both ways in turns."""
    samples = run.samples("val", 8 if arguments.quick else arguments.images)
    batch = run.profile.rollout.batch_images
    engine = HfEngine(checkpoint, run.paths.raw, batch)
    request = DecodeRequest(params=run.params.decode, codec=run.params.text.codec, seed=run.params.seed)
    reader, collator = (
        make_reader(checkpoint),
        checkpoint.collator(run.paths.raw, run.profile.packing.pack_tokens),
    )

    def reference() -> list[Generation]:
        return generate(checkpoint, run.paths.raw, samples, request, batch)

    def score(generations: Sequence[Generation]) -> list[Rescored]:
        positions = [coord_positions(reader.parse(generation)) for generation in generations]
        return rescore(checkpoint, collator, samples, generations, positions, batch)

    held = replace(request, params=request.params.model_copy(update={"grammar": "any"}), keep_probs=False)
    theirs, ours, constrained = reference(), engine.generate(samples, request), engine.generate(samples, held)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(theirs, ours, strict=True))
    contestants = {
        "both": lambda: score(reference()),
        "generate": reference,
        "rescore": lambda: score(theirs),
        "slots": lambda: engine.generate(samples, request),
        "bare": lambda: engine.generate(samples, replace(request, keep_probs=False)),
        "grammar": lambda: engine.generate(samples, held),
    }
    times = side_by_side(contestants, 1 if arguments.quick else 5, not arguments.quick)
    what = f"{sum(len(g.ids) for g in ours):,} tokens of {len(samples)} images, {batch} at a time; the same answers"
    kept = times.ratio("slots", "bare").by_cpu.map(lambda r: r - 1)
    fewer = sum(len(g.ids) for g in ours) / sum(len(g.ids) for g in constrained)
    cost = times.ratio("grammar", "bare").by_cpu.map(lambda r: r * fewer)
    again, alone = times.ratio("rescore", "generate").by_cpu, times.ratio("generate", "bare").by_cpu
    return [
        measured("decode and score, beside generate", times.ratio("both", "slots").by_cpu, "x", what, at_least=GAIN),
        measured("decode alone, beside generate", alone, "x", "no scores either way"),
        measured("scores: share of decoding", kept, "", "kept on the way", at_most=SCORES),
        measured("grammar, seconds a token", cost, "x", "without one", at_most=GRAMMAR_COST),
        measured("re-scoring: share of generating", again, "", "answers of servers"),
    ]


def forward_rows(n_images: int) -> list[Row]:
    """Forwards that answers of COCO's lengths take, each foretold token being the model's."""
    tokenizer = qwen3_tokenizer()
    tokenizer.add_tokens(list(COORD_TOKENS), special_tokens=True)
    first = tokenizer.convert_tokens_to_ids(COORD_TOKENS[0])
    rows, slots = [], {}
    for codec in ("json", "tags"):
        draft = FormatDraft(tokenizer, codec)
        answers = [r.token_ids.tolist() for r in rollouts(AnswerEncoder(tokenizer, CODECS[codec]), n_images)]
        lengths = [len(ids) for ids in answers]
        padded = sum(max(lengths[i : i + OPEN]) - 1 for i in range(0, n_images, OPEN))
        slots[codec] = in_slots([forwards(ids, draft, first) for ids in answers])
        gain, beside = padded / slots[codec], f"{slots[codec]:,} of {padded:,} in batches of {OPEN}; {n_images} images"
        undrafted = padded / in_slots([n - 1 for n in lengths])
        least = FORWARDS if codec == "json" else None
        beside += f"; {undrafted:.1f} x without drafts"
        rows.append(measured(f"forwards fewer, COCO's lengths, {codec}", gain, "x", beside, at_least=least))
    apart = slots["json"] / slots["tags"]
    return [*rows, measured("forwards of json beside tags", apart, "x", "the same objects", at_most=CODECS_APART)]


def forwards(ids: Sequence[int], draft: FormatDraft, first_coord_id: int) -> int:
    """Forwards behind the prompt of one answer of a model whose tokens these are."""
    is_coord = [first_coord_id <= token < first_coord_id + len(COORD_TOKENS) for token in ids]
    n, at = 0, 1  # the first token is the prompt's
    while at < len(ids):
        n, ahead = n + 1, draft.after(ids[:at], sum(is_coord[:at]), is_coord[at - 1])
        right = next((i for i, token in enumerate(ahead) if ids[at + i : at + i + 1] != [token]), len(ahead))
        at += right + 1
    return n


def in_slots(forwards_of: Sequence[int]) -> int:
    """Steps until all answers are written, the next one beginning where one ends."""
    ends = [0] * OPEN
    heapify(ends)
    for n in forwards_of:
        heapreplace(ends, ends[0] + n)
    return max(ends)


def options(parser: argparse.ArgumentParser) -> None:
    """Which run, and how many pictures."""
    tiny_run.options(parser)
    parser.add_argument("--images", type=int, default=128)


if __name__ == "__main__":
    harness.script("decoding", __doc__, measure, options)
