"""From generated ids to lines of the predictions file: boxes in pixels, and probabilities of each object's tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.config.schema import DecodeParams
from coordexp.geometry.bins import NUM_BINS, encode_boxes
from coordexp.packing.prepare import text_objects
from coordexp.records.gt_vs_pred import read_results, write_results
from coordexp.rollout.decode import AnswerReader
from coordexp.rollout.engine import Generation
from coordexp.rollout.rescore import Rescored
from coordexp.rollout.scoring import BOX_RULES, read_bins, scored
from coordexp.text.codecs import AnswerEncoder, Role, TextObject, get_codec
from coordexp.text.symbols import TokenTable
from helpers import PARAMS, answer_reader, new_checkpoint, new_tokenizer

CODECS = ("json", "tags", "digits")


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


def reader_and_encoder(checkpoint, codec: str):
    """For the digits codec, those of a model that knows no coordinate token."""
    if codec != "digits":
        return answer_reader(checkpoint, codec), AnswerEncoder(checkpoint.tokenizer, get_codec(codec))
    tokenizer = new_tokenizer()
    reader = AnswerReader(TokenTable.from_tokenizer(tokenizer, None), codec, {})
    return reader, AnswerEncoder(tokenizer, get_codec(codec))


def truth_of(sample) -> list[TextObject]:
    kept = [i for i, crowd in enumerate(sample.iscrowd) if not crowd]
    bins = encode_boxes(sample.boxes_xyxy_px[kept], sample.width, sample.height)
    return text_objects([sample.descs[i] for i in kept], bins)


def random_logprobs(count: int) -> Rescored:
    """Of a model without distributions, so that the emitted bins count."""
    return Rescored(-np.random.default_rng(5).uniform(0.01, 2.0, count), None)


def read(reader: AnswerReader, sample, generation: Generation, logprobs: Rescored, text: str = ""):
    """The line of the hand-over file, scored under the repository's parameters."""
    return scored(reader.decoded(sample, generation, logprobs, text), PARAMS.decode)


@pytest.mark.parametrize("codec", CODECS)
def test_an_answer_equal_to_the_annotation(world, checkpoint, codec):
    """Every object comes back, in original pixels, within half a bin (one at the far edge) of its annotation."""
    reader, encoder = reader_and_encoder(checkpoint, codec)
    for sample in world.samples:
        objects = truth_of(sample)
        answer = encoder.encode(objects)
        result = scored(
            reader.decoded(sample, Generation(answer.ids, "stop"), random_logprobs(len(answer.ids)), "as text"),
            PARAMS.decode,
        )
        assert [(p.desc, p.bins) for p in result.pred] == [(o.desc, o.bins) for o in objects]
        annotated = [g for g in result.gt if not g.iscrowd]
        size = np.array([sample.width, sample.height] * 2)
        for pred, gt in zip(result.pred, annotated, strict=True):
            assert np.abs(np.subtract(pred.bbox_xyxy_px, gt.bbox_xyxy_px) / size).max() <= 1e-3 + 1e-6
        assert result.parse.ok
        assert (result.raw_text, result.finish_reason, result.n_generated_tokens) == (
            "as text",
            "stop",
            len(answer.ids),
        )
        assert (result.image_id, result.width, result.height) == (sample.image_id, sample.width, sample.height)


@pytest.mark.parametrize("codec", CODECS)
def test_probabilities_are_those_of_the_tokens_of_each_object(world, checkpoint, codec):
    """Against the roles that the encoder gave the same tokens; a coordinate of several digits is their product."""
    reader, encoder = reader_and_encoder(checkpoint, codec)
    sample = world.store[0]
    objects = [*truth_of(sample)[:2], TextObject("cat", (0, 7, 34, 999))]
    answer = encoder.encode(objects)
    logprobs = random_logprobs(len(answer.ids))
    result = read(reader, sample, Generation(answer.ids, "stop"), logprobs)
    for index, (obj, pred) in enumerate(zip(objects, result.pred, strict=True)):
        own = answer.object_index == index
        tokens = np.flatnonzero(own & np.isin(answer.roles, (Role.COORD, Role.NUMBER)))
        digits = [len(str(value)) if codec == "digits" else 1 for value in obj.bins]
        runs = np.split(tokens, np.cumsum(digits)[:-1])
        expected = [logprobs.logprobs_A[run].sum() for run in runs]
        assert pred.coord_logprobs == pytest.approx(expected)
        assert pred.score == pytest.approx(math.prod(map(math.exp, expected)) ** 0.25)
        assert pred.desc_logprob == pytest.approx(logprobs.logprobs_A[own & (answer.roles == Role.DESC)].mean())


def test_crowd_flags_reach_the_predictions_file(world, checkpoint):
    sample = world.store[1]
    result = scored(
        answer_reader(checkpoint).decoded(sample, Generation(sample.answer_ids, "stop"), random_logprobs(200), ""),
        PARAMS.decode,
    )
    assert [g.iscrowd for g in result.gt] == list(sample.iscrowd)
    assert sum(sample.iscrowd) == 1


def test_an_answer_truncated_in_the_second_object_keeps_the_first(world, checkpoint):
    sample = next(s for s in world.samples if len(truth_of(s)) >= 2)
    second = int(np.flatnonzero(sample.answer_objects == 1)[-1])
    cut = Generation(sample.answer_ids[:second], "length")
    result = read(answer_reader(checkpoint), sample, cut, random_logprobs(second))
    assert [(p.desc, p.bins) for p in result.pred] == [(o.desc, o.bins) for o in truth_of(sample)[:1]]
    assert result.parse.truncated
    assert not result.parse.ok


def test_lines_survive_the_file(world, checkpoint, tmp_path):
    reader = answer_reader(checkpoint)
    results = [
        scored(
            reader.decoded(s, Generation(s.answer_ids, "stop"), random_logprobs(len(s.answer_ids)), "größer 猫"),
            PARAMS.decode,
        )
        for s in world.samples
    ]
    assert write_results(tmp_path / "gt_vs_pred.jsonl", results) == len(results)
    back = list(read_results(tmp_path / "gt_vs_pred.jsonl"))
    assert back == results
    assert back[0] != replace(results[0], raw_text="")


def peaks(*masses: dict[int, float]) -> np.ndarray:
    """Distributions at the four slots of one box, (1, 4, K)."""
    probs = np.zeros((1, 4, NUM_BINS))
    for slot, mass in enumerate(masses):
        for k, p in mass.items():
            probs[0, slot, k] = p
    return probs


def test_boxes_under_each_rule_by_hand():
    probs = peaks({100: 0.75, 101: 0.25}, {200: 0.6, 700: 0.4}, {300: 1.0}, {900: 1.0})
    emitted = np.array([[100.0, 200.0, 300.0, 900.0]])
    found = {rule: read_bins(rule, emitted, probs, 1)[0] for rule in BOX_RULES}
    assert found["argmax"].tolist() == emitted[0].tolist()
    np.testing.assert_allclose(found["expectation"], [100.25, 400, 300, 900])
    np.testing.assert_allclose(found["local_expectation"], [100.25, 200, 300, 900])
    np.testing.assert_allclose(found["top_k"], [100, 200, 300, 900])
    # Half the mass lies two thirds into bin 100, and five sixths into bin 200.
    np.testing.assert_allclose(found["median"], [100 - 0.5 + 2 / 3, 200 - 0.5 + 5 / 6, 300, 900])


def test_a_box_that_would_be_inverted_keeps_its_emitted_axis():
    probs = peaks({100: 0.5, 900: 0.5}, {200: 0.5, 202: 0.5}, {300: 0.9, 0: 0.1}, {400: 1.0})
    found = read_bins("expectation", np.array([[100.0, 200.0, 300.0, 400.0]]), probs, 16)
    np.testing.assert_allclose(found, [[100, 201, 300, 400]])


@given(st.integers(0, 2**32 - 1))
def test_any_distribution_gives_an_ordered_box_inside_the_axis(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(NUM_BINS, 0.02), size=(3, 4))
    low, span = rng.integers(0, 900, (3, 2)), rng.integers(1, 100, (3, 2))
    emitted = np.concatenate([low, low + span], axis=1).astype(np.float64)
    for rule in BOX_RULES:
        found = read_bins(rule, emitted, probs, 16)
        assert (found[:, 2:] > found[:, :2]).all()
        assert ((found >= 0) & (found <= NUM_BINS - 1)).all()
        assert read_bins(rule, emitted[:0], probs[:0], 16).shape == (0, 4)


def test_the_parameter_names_every_rule() -> None:
    assert set(get_args(DecodeParams.model_fields["box"].annotation)) == set(BOX_RULES)
