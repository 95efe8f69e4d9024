"""The strict parser: round trips, every drop reason, truncation, mutated answers, and linear time."""

from __future__ import annotations

import random
import re
import time
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.errors import ConfigError
from coordexp.geometry.bins import COORD_TOKENS, NUM_BINS
from coordexp.text import parser
from coordexp.text.codecs import Role, TextObject, get_codec, render
from coordexp.text.parser import DROP_REASONS, ParsedAnswer, parse_answer
from coordexp.text.symbols import FIRST_COORD, MARKERS, OTHER, RESERVED_SYMBOL, TokenTable

CODECS = ("json", "digits", "tags")
# Pieces merged across the boundaries of objects and descriptions, as in byte-level BPE.
SCAFFOLD = ('{"objects": [{"desc": "', '", "bbox_2d": ["', '"]}, {"desc": "', '"]}]}', '", "', "]}, {")
FUSED = (*SCAFFOLD, "black cat", ' "', "12")
SPECIAL = {**MARKERS, "<|image_pad|>": OTHER} | {token: chr(FIRST_COORD + k) for k, token in enumerate(COORD_TOKENS)}
SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
TABLE = TokenTable.build([*SINGLE_BYTES, *(piece.encode() for piece in FUSED), *SPECIAL.values()])
ID_OF = {piece: 256 + i for i, piece in enumerate([*FUSED, *SPECIAL])}
FIRST_COORD_ID = ID_OF[COORD_TOKENS[0]]
LONGEST_FIRST = re.compile("|".join(map(re.escape, sorted(FUSED, key=len, reverse=True))) + r"|<\|\w+\|>|(?s:.)")

OPEN = '{"objects": ['
CAT = TextObject("black cat", (110, 310, 410, 705))
DOG = TextObject("yellow dog", (520, 285, 890, 660))


def encode(text: str) -> list[int]:
    """Tokenize with special tokens and merged pieces, and bytes for the rest."""
    return [i for piece in LONGEST_FIRST.findall(text) for i in ([ID_OF[piece]] if piece in ID_OF else piece.encode())]


def answer_ids(codec: str, objects: list[TextObject]) -> list[int]:
    """Ids of the canonical answer; descriptions are data, spelled out in bytes."""
    segments = get_codec(codec).segments(objects)
    return [i for s in segments for i in (s.text.encode() if s.role is Role.DESC else encode(s.text))]


def parse_text(codec: str, text: str) -> ParsedAnswer:
    return parse_answer(encode(text), TABLE, codec)


def as_text_objects(answer: ParsedAnswer) -> list[TextObject]:
    return [TextObject(obj.desc, obj.bins) for obj in answer.objects]


def box_text(codec: str, bins: list[int]) -> str:
    if codec == "json":
        return ", ".join(f'"{COORD_TOKENS[k]}"' for k in bins)
    return ", ".join(map(str, bins)) if codec == "digits" else "".join(COORD_TOKENS[k] for k in bins)


def decode(ids: list[int]) -> str:
    return TABLE.symbols(ids).text


def check_answer(ids: list[int], answer: ParsedAnswer, codec: str) -> None:
    """Check invariants that hold for any ids."""
    report = answer.report
    assert report.n_valid == len(answer.objects)
    assert set(report.dropped) <= set(DROP_REASONS)
    assert all(count > 0 for count in report.dropped.values())
    assert report.container_found or not (answer.objects or report.dropped)
    last = 0
    for obj in answer.objects:
        x1, y1, x2, y2 = obj.bins
        assert 0 <= x1 < x2 <= NUM_BINS
        assert 0 <= y1 < y2 <= NUM_BINS
        assert obj.desc.strip()
        assert not RESERVED_SYMBOL.search(obj.desc)
        obj.desc.encode()
        (start, end), (desc_start, desc_end) = obj.object_span, obj.desc_span
        assert last <= start <= desc_start < desc_end <= end <= len(ids)
        assert list(obj.coord_positions) == sorted(obj.coord_positions)
        assert start <= obj.coord_positions[0] <= obj.coord_positions[3] < end
        if codec != "digits":
            assert [ids[t] - FIRST_COORD_ID for t in obj.coord_positions] == list(obj.bins)
            assert sum(FIRST_COORD_ID <= i < FIRST_COORD_ID + NUM_BINS for i in ids[start:end]) == 4
        last = end - 1  # the boundary token may be shared


# Round trips

descs = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=12).filter(str.strip)
AWKWARD = ('a "b"\\', "<|im_end|>", "<|coord_5|>", '"]}, {"desc": "', "]}]}", "{[", "é猫🐈", "\x00x")
corner_pairs = st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True).map(sorted)


@st.composite
def text_objects(draw):
    (x1, x2), (y1, y2) = draw(corner_pairs), draw(corner_pairs)
    return TextObject(draw(descs | st.sampled_from(AWKWARD)), (x1, y1, x2, y2))


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None)
@given(objects=st.lists(text_objects(), max_size=5), ends=st.booleans())
def test_round_trip(codec, objects, ends):
    ids = answer_ids(codec, objects) + [ID_OF["<|im_end|>"]] * ends
    answer = parse_answer(ids, TABLE, codec)
    assert as_text_objects(answer) == objects
    assert answer.report.ok
    check_answer(ids, answer, codec)
    for obj in answer.objects if codec == "digits" else ():
        starts = [decode(ids[t:])[: len(str(v))] for t, v in zip(obj.coord_positions, obj.bins, strict=True)]
        assert starts == [str(v) for v in obj.bins]


def test_token_indices_by_hand():
    ids = [
        ID_OF['{"objects": [{"desc": "'],
        ID_OF["black cat"],
        ID_OF['", "bbox_2d": ["'],
        *[FIRST_COORD_ID + 110, ID_OF['", "'], FIRST_COORD_ID + 310, ID_OF['", "']],
        *[FIRST_COORD_ID + 410, ID_OF['", "'], FIRST_COORD_ID + 705],
        ID_OF['"]}]}'],
    ]
    (cat,) = parse_answer(ids, TABLE, "json").objects
    assert cat.bins == CAT.bins
    assert cat.coord_positions == (3, 5, 7, 9)
    assert cat.desc_span == (1, 2)
    assert cat.object_span == (0, 11)


@pytest.mark.parametrize("codec", ["json", "digits"])
def test_valid_json_variants_are_accepted(codec):
    bins = box_text(codec, [1, 2, 3, 4])
    element = f'{{"bbox_2d" :[ {bins} ] ,\t"d\\u0065sc": "\\u00e9\\n7 8"}}'
    text = f'Sure!\n{{ "objects"\n: [ {element} ] }} and more {{"objects": ['
    (obj,) = parse_text(codec, text).objects
    assert obj.desc == "é\n7 8"
    assert obj.bins == (1, 2, 3, 4)
    assert parse_text(codec, text).report.ok
    assert "\\u00e9\\n7 8" in decode(encode(text)[slice(*obj.desc_span)])


def test_everything_after_the_end_token_is_ignored():
    text = render(get_codec("tags"), [CAT]) + "<|im_end|>" + render(get_codec("tags"), [DOG])
    assert as_text_objects(parse_text("tags", text)) == [CAT]


def test_plain_numbers_range_up_to_1000():
    text = '{"objects": [{"desc": "cat", "bbox_2d": [0, 0, 1000, 1000]}]}'
    assert parse_text("digits", text).objects[0].bins == (0, 0, 1000, 1000)


def test_unknown_codec():
    with pytest.raises(ConfigError, match="'jsn'"):
        parse_answer([], TABLE, "jsn")


# Drop reasons

C4 = box_text("json", [1, 2, 3, 4])
FORGED = "".join(f'"\\ue00{k}", ' for k in range(1, 5))[:-2]
JSON_DROPS = [
    ("malformed", '{"desc": "cat" "bbox_2d": [C4]}'),
    ("malformed", '{"desc": "cat", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]}'),
    ("malformed", '{"desc": "ca\nt", "bbox_2d": [C4]}'),
    ("malformed", '{"desc": "\\ud800", "bbox_2d": [C4]}'),
    ("malformed", '{"desc": "cat", "bbox_2d": [C4], "z": NaN}'),
    ("malformed", '{"desc": "cat", "bbox_2d": ' + "[" * 10_000 + "]" * 10_000 + "}"),
    ("key_invalid", '{"desc": "cat", "desc": "dog", "bbox_2d": [C4]}'),
    ("key_invalid", '{"desc": "cat", "bbox_0d": [C4]}'),
    ("key_invalid", '{"desc": "cat", "bbox_2d": [C4], "score": 1}'),
    ("key_invalid", '{"desc": "a<|image_pad|>b", "bbox_2d": [C4]}'),
    ("key_invalid", '{"desc": "a\\ue005b", "bbox_2d": [C4]}'),
    ("key_invalid", f'{{"desc": "<|coord_1|><|coord_2|><|coord_3|><|coord_4|>", "bbox_2d": [{FORGED}]}}'),
    ("poly_unsupported", '{"desc": "cat", "poly": [C4]}'),
    ("poly_unsupported", '{"desc": "cat", "bbox_2d": [C4], "poly": []}'),
    ("unknown_geom", '{"desc": "cat", "line": [C4]}'),
    ("unknown_geom", '{"desc": "cat", "bbox_3d": [C4]}'),
    ("missing_desc", '{"bbox_2d": [C4]}'),
    ("missing_desc", '{"desc": " ", "bbox_2d": [C4]}'),
    ("missing_desc", '{"desc": 5, "bbox_2d": [C4]}'),
    ("missing_desc", "{}"),
    ("missing_geom", '{"desc": "cat"}'),
    ("wrong_arity", '{"desc": "cat", "bbox_2d": []}'),
    ("wrong_arity", '{"desc": "cat", "bbox_2d": ["<|coord_1|>", "<|coord_2|>", "<|coord_3|>"]}'),
    ("wrong_arity", '{"desc": "cat", "bbox_2d": [C4, "<|coord_5|>"]}'),
    ("wrong_arity", '{"desc": "cat", "bbox_2d": null}'),
    ("wrong_arity", '{"desc": "cat", "bbox_2d": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}}'),
    ("non_coord_token", '{"desc": "cat", "bbox_2d": [1, 2, 3, 4]}'),
    ("non_coord_token", '{"desc": "cat", "bbox_2d": ["<|coord_1|>", "<|coord_2|>", "<|coord_3|>", "猫"]}'),
    ("non_coord_token", '{"desc": "cat", "bbox_2d": ["<|coord_1|>", "<|coord_2|>", "<|coord_3|>", " <|coord_4|>"]}'),
    ("non_coord_token", '{"desc": "cat", "bbox_2d": [["<|coord_1|>"], "<|coord_2|>", "<|coord_3|>", "<|coord_4|>"]}'),
    ("dropped_ambiguous", '{"desc": "cat <|coord_7|>", "bbox_2d": [C4]}'),
    ("dropped_ambiguous", f'{{"desc": "cat", "bbox_2d": [{FORGED}]}}'),
    ("bbox_invalid", '{"desc": "cat", "bbox_2d": ["<|coord_3|>", "<|coord_2|>", "<|coord_3|>", "<|coord_4|>"]}'),
    ("bbox_invalid", '{"desc": "cat", "bbox_2d": ["<|coord_1|>", "<|coord_9|>", "<|coord_3|>", "<|coord_4|>"]}'),
]
DIGIT_DROPS = [
    ("malformed", '{"desc": "cat", "bbox_2d": [01, 2, 3, 4]}'),
    ("malformed", '{"desc": "cat", "bbox_2d": [1, 2, 3, <|coord_4|>]}'),
    ("key_invalid", '{"desc": "cat <|coord_7|>", "bbox_2d": [1, 2, 3, 4]}'),
    ("key_invalid", '{"label": "cat", "bbox_2d": [1, 2, 3, 4]}'),
    ("wrong_arity", '{"desc": "cat", "bbox_2d": [1, 2, 3]}'),
    ("non_coord_token", '{"desc": "cat", "bbox_2d": [1.0, 2, 3, 4]}'),
    ("non_coord_token", '{"desc": "cat", "bbox_2d": [1e999, 2, 3, 4]}'),
    ("non_coord_token", '{"desc": "cat", "bbox_2d": [false, 2, 3, 4]}'),
    ("non_coord_token", '{"desc": "cat", "bbox_2d": ["1", 2, 3, 4]}'),
    ("non_coord_token", '{"desc": "cat", "bbox_2d": [C4]}'),
    ("bbox_invalid", '{"desc": "cat", "bbox_2d": [-1, 2, 3, 4]}'),
    ("bbox_invalid", '{"desc": "cat", "bbox_2d": [1, 2, 1001, 4]}'),
    ("bbox_invalid", '{"desc": "cat", "bbox_2d": [1, 2, ' + "9" * 10_000 + ", 4]}"),
]
S, E, B, X = "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"
K4 = box_text("tags", [1, 2, 3, 4])
TAG_DROPS = [
    ("malformed", f"{S}cat{B}{K4}{X}"),
    ("malformed", f"{S}cat{E}\n{B}{K4}{X}"),
    ("malformed", f"{S}cat"),
    ("malformed", " and a "),
    ("malformed", f"{X}"),
    ("key_invalid", f"{S}a<|image_pad|>b{E}{B}{K4}{X}"),
    ("missing_desc", f"{S}{E}{B}{K4}{X}"),
    ("missing_desc", f"{B}{K4}{X}"),
    ("missing_geom", f"{S}cat{E}"),
    ("missing_geom", f"{S}cat{E}{X}"),
    ("wrong_arity", f"{S}cat{E}{B}{K4}<|coord_5|>{X}"),
    ("wrong_arity", f"{S}cat{E}{B}{X}"),
    ("non_coord_token", f"{S}cat{E}{B}1, 2, 3, 4{X}"),
    ("non_coord_token", f"{S}cat{E}{B}<|coord_1|><|coord_2|>,<|coord_3|>{X}"),
    ("dropped_ambiguous", f"{S}cat <|coord_7|>{E}{B}{K4}{X}"),
    ("bbox_invalid", f"{S}cat{E}{B}<|coord_5|><|coord_2|><|coord_3|><|coord_4|>{X}"),
]


def between(codec: str, broken: str) -> str:
    """The invalid object between two valid ones."""
    cat, dog = (render(get_codec(codec), [obj]) for obj in (CAT, DOG))
    if codec == "tags":
        return cat + broken + dog
    return f"{cat.removesuffix(']}')}, {broken}, {dog.removeprefix(OPEN)}"


DROPS = [
    *(("json", reason, text.replace("C4", C4)) for reason, text in JSON_DROPS),
    *(("digits", reason, text.replace("C4", C4)) for reason, text in DIGIT_DROPS),
    *(("tags", reason, text) for reason, text in TAG_DROPS),
]
SHORT_DROPS = [drop for drop in DROPS if len(drop[2]) < 1_000]


@pytest.mark.parametrize(("codec", "reason", "broken"), DROPS, ids=[f"{c}-{r}" for c, r, _ in DROPS])
def test_an_invalid_object_is_dropped_for_one_reason_and_alone(codec, reason, broken):
    answer = parse_text(codec, between(codec, broken))
    assert answer.report.dropped == {reason: 1}
    assert as_text_objects(answer) == [CAT, DOG]
    assert not answer.report.truncated


def test_the_cases_above_cover_every_reason():
    assert {reason for reason, _ in JSON_DROPS} == set(DROP_REASONS)


@pytest.mark.parametrize("codec", ["json", "digits"])
@pytest.mark.parametrize(
    ("tail", "dropped", "truncated"),
    [
        (", ]}", 1, False),
        (", 5]}", 1, True),
        (' {"desc": "dog"}]}', 1, True),
        (', {"desc": "dog", "bbox_2d": [5}, {"desc": "dog"}]}', 1, True),
        (', {"desc": "dog", ]}', 1, False),
        ("}", 1, True),
        ("]", 0, True),
        ("", 0, True),
        (", ", 0, True),
        ('], "n": 1}', 0, True),
    ],
)
def test_broken_punctuation_ends_parsing(codec, tail, dropped, truncated):
    answer = parse_text(codec, render(get_codec(codec), [CAT])[:-2] + tail)
    assert as_text_objects(answer) == [CAT]
    assert answer.report.dropped == ({"malformed": dropped} if dropped else {})
    assert answer.report.truncated is truncated


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("text", ["I see a cat.", '{"object": [', "[]", "<|coord_5|>"])
def test_no_container(codec, text):
    report = parse_text(codec, text).report
    assert (report.container_found, report.n_valid, report.dropped, report.ok) == (False, 0, {}, False)


# Truncation, mutation, size


@pytest.mark.parametrize("codec", CODECS)
def test_cut_at_every_token(codec):
    objects = [CAT, TextObject('a "q" \\ 猫🐈', (0, 1, 998, 999)), DOG, CAT]
    ids = answer_ids(codec, objects)
    counts = []
    for cut in range(len(ids)):
        answer = parse_answer(ids[:cut], TABLE, codec)
        check_answer(ids[:cut], answer, codec)
        counts.append(len(answer.objects))
        assert as_text_objects(answer) == objects[: counts[-1]]
        assert not answer.report.dropped
        at_border = codec == "tags" and (cut == 0 or ids[cut - 1] == ID_OF[X])
        assert answer.report.ok is at_border
    assert counts == sorted(counts)
    assert set(counts) >= {0, 1, 2, 3}


def random_object(rng: random.Random) -> TextObject:
    (x1, x2), (y1, y2) = (sorted(rng.sample(range(1000), 2)) for _ in "xy")
    return TextObject(rng.choice(["cat", "black cat", 'a "q"', "猫", "{[,", "\\"]), (x1, y1, x2, y2))


def random_answer(rng: random.Random, codec: str) -> list[int]:
    """A canonical answer, or one with an invalid object."""
    if rng.random() < 0.3:
        return encode(between(codec, rng.choice([text for name, _, text in SHORT_DROPS if name == codec])))
    return answer_ids(codec, [random_object(rng) for _ in range(rng.randrange(5))])


def random_tokens(rng: random.Random) -> list[int]:
    """A few tokens worth inserting: structure, markers, coordinates, broken UTF-8, whole drops, unknown ids."""
    kind = rng.randrange(6)
    if kind == 0:
        return encode(rng.choice(['"', "\\", "{", "}", "[", "]", ",", ":", " ", "\\u", '{"objects": [', "1e9", "-0"]))
    if kind == 1:
        return [rng.choice([ID_OF[token] for token in MARKERS])]
    if kind == 2:
        return [FIRST_COORD_ID + rng.randrange(NUM_BINS) for _ in range(rng.choice([1, 1, 4, 40]))]
    if kind == 3:
        return [rng.randrange(256) for _ in range(rng.randrange(1, 4))]
    if kind == 4:
        return encode(rng.choice(SHORT_DROPS)[2])
    return [rng.choice([-5, 10**6, len(TABLE.pieces)])]


def mutate(rng: random.Random, ids: list[int]) -> list[int]:
    ids = list(ids)
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        at = rng.randrange(len(ids) + 1)
        end = min(len(ids), at + rng.choice([1, 1, 2, 5, 20]))
        action = rng.randrange(5)
        if action == 0:
            del ids[at:end]
        elif action == 1:
            ids[at:at] = random_tokens(rng)
        elif action == 2:
            ids[at:end] = random_tokens(rng)
        elif action == 3:
            ids[at:at] = ids[at:end] * rng.choice([1, 2, 30])
        else:
            ids[at:end] = rng.sample(ids[at:end], end - at)
    return ids


def run_mutations(n_answers: int, seed: int) -> dict[str, int]:
    """Parse mutated answers of all codecs with all parsers; returns the count of each outcome."""
    rng = random.Random(seed)
    seen = dict.fromkeys([*DROP_REASONS, "valid", "truncated"], 0)
    for _ in range(n_answers):
        codec = rng.choice(CODECS)
        ids = mutate(rng, random_answer(rng, codec))
        reader = codec if rng.random() < 0.9 else rng.choice(CODECS)
        answer = parse_answer(ids, TABLE, reader)
        check_answer(ids, answer, reader)
        for reason, count in answer.report.dropped.items():
            seen[reason] += count
        seen["valid"] += len(answer.objects)
        seen["truncated"] += answer.report.truncated
        before = parse_answer(ids[: rng.randrange(len(ids) + 1)], TABLE, reader).objects
        assert before == answer.objects[: len(before)]
    return seen


def test_mutated_answers():
    seen = run_mutations(3_000, seed=17)
    assert min(seen.values()) > 0, seen


def test_fast_and_general_path_give_the_same_result(monkeypatch):
    rng = random.Random(19)
    drawn = [rng.choice(CODECS) for _ in range(3_000)]
    answers = [(codec, random_answer(rng, codec) if rng.random() < 0.2 else mutate(rng, random_answer(rng, codec)))
               for codec in drawn]  # fmt: skip
    at_once = [parse_answer(ids, TABLE, codec) for codec, ids in answers]
    bytes_only = replace(TABLE, texts=(None,) * len(TABLE.texts))
    monkeypatch.setattr(parser, "_PLAIN_RECORD", re.compile("(?!)"))
    monkeypatch.setitem(parser._WALKS, "json", partial(parser._walk_json, read_coords=parser._read_coord_tokens))
    assert [parse_answer(ids, bytes_only, codec) for codec, ids in answers] == at_once


@pytest.mark.slow
@pytest.mark.faults
def test_a_hundred_thousand_mutated_answers():
    seen = run_mutations(100_000, seed=18)
    assert min(seen.values()) > 0, seen


odd_tokens = [*encode('{}[],:"\\ e19'), *range(256, FIRST_COORD_ID + 3), 0xE2, 0x8C, -1, 10**6]


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=200, deadline=None)
@given(soup=st.lists(st.sampled_from(odd_tokens)), n_kept=st.integers(0, 80))
def test_arbitrary_tokens_never_raise(codec, soup, n_kept):
    ids = answer_ids(codec, [CAT, DOG])[:n_kept] + soup
    check_answer(ids, parse_answer(ids, TABLE, codec), codec)


LIST = OPEN + '{"desc": "cat", "bbox_2d": ['
SCALING = {
    "objects": ("json", lambda n: encode(OPEN) + encode(f'{{"desc": "cat", "bbox_2d": [{C4}]}},') * (n // 40)),
    "tag records": ("tags", lambda n: answer_ids("tags", [CAT]) * (n // 20)),
    "long desc": ("digits", lambda n: answer_ids("digits", [TextObject("x" * n, CAT.bins)])),
    "open braces": ("json", lambda n: encode("{") * n),
    "open brackets": ("json", lambda n: encode(OPEN + "{") + encode("[") * n),
    "closed brackets": ("json", lambda n: encode(OPEN + "{") + encode("[") * n + encode("]") * n),
    "containers": ("json", lambda n: encode(OPEN) * (n // 13)),
    "almost containers": ("json", lambda n: encode('{"objects": ') * (n // 12)),
    "space": ("json", lambda n: encode("{") + encode(" ") * n),
    "escaped quotes": ("json", lambda n: encode(OPEN + '{"') + encode('\\"') * n),
    "quotes": ("json", lambda n: encode(OPEN + "{") + encode('"') * n),
    "long number": ("digits", lambda n: encode(LIST) + encode("9") * n + encode("]}]}")),
    "long float": ("digits", lambda n: encode(LIST + "0.") + encode("9") * n + encode("]}]}")),
    "many keys": ("json", lambda n: encode(OPEN + "{") + encode('"a": 1, ') * (n // 8) + encode('"a": 1}]}')),
    "broken utf-8": ("json", lambda n: encode(OPEN) + [0xE2] * n),
    "coordinates": ("json", lambda n: encode(OPEN + '{"desc": "') + [FIRST_COORD_ID] * n),
    "record starts": ("tags", lambda n: [ID_OF[S]] * n),
    "box starts": ("tags", lambda n: [ID_OF[S], ID_OF[E]] + [ID_OF[B]] * n),
    "box ends": ("tags", lambda n: [ID_OF[X]] * n),
    "one long record": ("tags", lambda n: encode(S + "cat" + E + B) + [FIRST_COORD_ID] * n + [ID_OF[X]]),
}


def cpu_seconds(ids: list[int], codec: str) -> float:
    best = float("inf")
    for _ in range(2):
        start = time.process_time()
        parse_answer(ids, TABLE, codec)
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize("case", SCALING)
def test_time_is_linear(case):
    codec, make = SCALING[case]
    small, large = (cpu_seconds(make(n), codec) for n in (10_000, 160_000))
    # 16 times the tokens: linear work takes 16 times as long, quadratic work 256 times.
    assert large < 64 * max(small, 1e-3)
