"""The grammar: every allowed answer parses, has ordered corners, fits the budget, and repeats no box."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from coordexp.errors import ConfigError
from coordexp.geometry.boxes import as_boxes, pairwise_iou
from coordexp.models.expand import add_coordinate_tokens
from coordexp.text.codecs import AnswerEncoder, TextObject, get_codec
from coordexp.text.grammar import AnswerGrammar, utf8_tail
from coordexp.text.grammar_walk import AnswerWalk
from coordexp.text.parser import ParsedAnswer, parse_answer
from coordexp.text.symbols import TokenTable
from coordexp.text.vocabulary import CoordVocabulary
from helpers import PARAMS, changed, new_tokenizer
from toyworld.model import build_tiny

CODECS = ("json", "tags", "digits")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with coordinate tokens."""
    made = new_tokenizer()
    add_coordinate_tokens(build_tiny(made, 0), made, "mean", 0)
    return made


def new_grammar(codec: str, names: tuple[str, ...] | None = None, **changes: Any) -> AnswerGrammar:
    """A grammar over the tiny tokenizer with ordered corners and 80 tokens, with changes to the block `decode`."""
    wanted = {"grammar": "any" if names is None else "closed", "corners": "valid", "max_new_tokens": 80}
    return AnswerGrammar(tokenizer(), codec, changed(PARAMS.decode, **wanted | changes), names or ())


def sample(grammar: AnswerGrammar, rng: np.random.Generator) -> list[int]:
    """A random answer: any allowed token, with equal probability."""
    walk, ids = AnswerWalk(grammar), []
    while not walk.ended:
        ids.append(int(rng.choice(np.flatnonzero(walk.allowed()))))
        walk.advance(ids[-1])
    return ids


def parsed(ids: list[int], codec: str) -> ParsedAnswer:
    table = TokenTable.from_tokenizer(tokenizer(), CoordVocabulary.from_tokenizer(tokenizer()))
    return parse_answer(ids, table, codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("budget", [32, 80])
def test_random_walks_parse_within_the_budget(codec: str, budget: int) -> None:
    grammar = new_grammar(codec, max_new_tokens=budget)
    rng = np.random.default_rng(5)
    for _ in range(150):
        ids = sample(grammar, rng)
        assert len(ids) <= budget
        answer = parsed(ids, codec)
        assert answer.report.ok, (ids, answer.report)


@pytest.mark.parametrize("codec", CODECS)
def test_training_answers_are_allowed_token_by_token(codec: str) -> None:
    encoder = AnswerEncoder(tokenizer(), get_codec(codec))
    grammar = new_grammar(codec, duplicate_iou=0.9, max_new_tokens=200)
    boxes = ((0, 5, 100, 999), (7, 7, 8, 8), (40, 5, 140, 999))
    objects = [TextObject(desc, box) for desc, box in zip(("red mug", "猫 é", "red mug"), boxes, strict=True)]
    for count in range(len(objects) + 1):
        walk = AnswerWalk(grammar)
        for token in encoder.encode(objects[:count]).ids.tolist():
            assert walk.allowed()[token]
            walk.advance(token)
        assert walk.ended


@pytest.mark.parametrize("codec", CODECS)
def test_a_closed_list_allows_only_its_names(codec: str) -> None:
    names = ("cat", "cat face", "red mug")
    grammar, rng = new_grammar(codec, names, max_new_tokens=120), np.random.default_rng(1)
    answers = [parsed(sample(grammar, rng), codec) for _ in range(60)]
    assert all(answer.report.ok for answer in answers)
    assert {o.desc for answer in answers for o in answer.objects} == set(names)


@pytest.mark.parametrize("codec", ["json", "tags"])
def test_the_duplicate_guard_bounds_the_overlap_of_equal_names(codec: str) -> None:
    # One name, and corners that a random walk chooses near the top left: without the guard, overlaps would be common.
    worst = {}
    for limit in (0.3, 1.0):
        grammar = new_grammar(codec, ("cat",), duplicate_iou=limit, max_new_tokens=400)
        rng = np.random.default_rng(2)
        overlaps = []
        for _ in range(25):
            boxes = as_boxes([o.bins for o in parsed(sample(grammar, rng), codec).objects])
            overlaps += pairwise_iou(boxes, boxes)[np.triu_indices(len(boxes), 1)].tolist()
        worst[limit] = max(overlaps)
    assert worst[0.3] <= 0.3 < worst[1.0]


def test_the_duplicate_guard_ignores_other_names_and_never_blocks() -> None:
    encoder = AnswerEncoder(tokenizer(), get_codec("json"))
    grammar = new_grammar("json", duplicate_iou=0.5, max_new_tokens=200)

    def y2_choices(name: str) -> np.ndarray:
        walk = AnswerWalk(grammar)
        objects = [TextObject("cat", (10, 998, 20, 999)), TextObject(name, (10, 998, 20, 999))]
        ids = encoder.encode(objects).ids.tolist()
        at = [i for i, token in enumerate(ids) if token == grammar.values[999][0]][1]
        for token in ids[:at]:
            walk.advance(token)
        return np.flatnonzero(walk.allowed())

    assert y2_choices("dog").tolist() == y2_choices("Cat ").tolist() == [grammar.values[999][0]]


def test_without_the_corner_constraint_boxes_may_be_inverted() -> None:
    grammar = new_grammar("json", ("cat",), corners="any", max_new_tokens=100)
    rng = np.random.default_rng(3)
    dropped = [parsed(sample(grammar, rng), "json").report.dropped for _ in range(20)]
    assert {reason for d in dropped for reason in d} == {"bbox_invalid"}


def test_a_budget_below_one_object_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens is 12"):
        new_grammar("json", max_new_tokens=12)


def test_an_empty_closed_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="closed list"):
        new_grammar("json", names=())


def test_utf8_tail_is_the_incomplete_character() -> None:
    assert utf8_tail("aé".encode()) == b""
    assert utf8_tail("a€".encode()[:-1]) == "€".encode()[:2]
    assert utf8_tail(b"\xed\xa0") is None  # a surrogate is not text
    assert utf8_tail(b"\xff") is None


def test_the_lark_grammar_has_every_coordinate_and_no_unsafe_text() -> None:
    grammar = new_grammar("json")
    text = grammar.to_lark()
    first = grammar.values[0][0]
    assert f"<[{first}-{first + 999}]>" in text
    assert f"<[{grammar.end_id}]>" not in text  # servers add it
