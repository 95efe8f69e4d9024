"""Constrained in-memory generation: all answers of an untrained model at high temperature parse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordexp.geometry.boxes import as_boxes, pairwise_iou
from coordexp.rollout.engine import DecodeRequest
from coordexp.rollout.hf_engine import HfEngine
from coordexp.text.parser import ParsedAnswer, parse_answer
from coordexp.text.symbols import TokenTable
from helpers import World, asked, decode_request, new_checkpoint


def sampled(codec: str, budget: int, **changes: Any) -> DecodeRequest:
    """Sampling at temperature 1.5 under the grammar."""
    grammar = "closed" if "names" in changes else "any"
    return decode_request(codec, max_new_tokens=budget, temperature=1.5, grammar=grammar, corners="valid", **changes)


def answers(world: World, codec: str, request: DecodeRequest, copies: int) -> list[ParsedAnswer]:
    """Parsed answers of an untrained model to copies of the world's samples."""
    checkpoint = new_checkpoint()
    samples = [replace(s, image_id=i) for i, s in enumerate(world.samples * copies)]
    generations = HfEngine(checkpoint, world.root, 64).generate(samples, request)
    table = TokenTable.from_tokenizer(checkpoint.tokenizer, checkpoint.coord)
    assert all(g.finish_reason == "stop" for g in generations)
    return [parse_answer(g.ids, table, codec) for g in generations]


@pytest.mark.parametrize("codec", ["json", "tags"])
def test_every_answer_parses(world: World, codec: str) -> None:
    found = answers(world, codec, sampled(codec, 60), copies=25)
    assert all(answer.report.ok for answer in found)
    assert len({len(answer.objects) for answer in found}) > 1


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("codec", ["json", "tags"])
def test_two_thousand_answers_parse(world: World, codec: str) -> None:
    found = answers(world, codec, sampled(codec, 60), copies=334)
    assert len(found) >= 2000
    assert sum(not answer.report.ok for answer in found) == 0
    assert len({len(answer.objects) for answer in found}) > 1


def test_the_duplicate_constraint_holds_in_generation(world: World) -> None:
    found = answers(world, "tags", sampled("tags", 200, duplicate_iou=0.2, names=("cat",)), copies=3)
    boxes = [as_boxes([o.bins for o in answer.objects]) for answer in found]
    overlaps = [pairwise_iou(b, b)[np.triu_indices(len(b), 1)] for b in boxes]
    assert max(map(len, boxes)) > 2
    assert np.concatenate(overlaps).max() <= 0.2


def test_a_row_is_constrained_independently_of_its_neighbours(world: World) -> None:
    checkpoint = new_checkpoint()
    request = asked(sampled("json", 40), temperature=0.0)
    together = HfEngine(checkpoint, world.root, 6).generate(world.samples, request)
    alone = [HfEngine(checkpoint, world.root, 1).generate([s], request)[0] for s in world.samples]
    assert [g.ids.tolist() for g in together] == [g.ids.tolist() for g in alone]
