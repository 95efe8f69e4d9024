"""Answer codecs: text equals tokens, roles decide losses, data never become markup, and parsing inverts them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.errors import ConfigError
from coordexp.text.codecs import CODECS, END_OF_TURN, AnswerEncoder, Role, TextObject, get_codec, render
from coordexp.text.parser import parse_answer
from coordexp.text.symbols import TokenTable
from helpers import new_checkpoint

_CHECKPOINT = new_checkpoint()
TOKENIZER, COORD = _CHECKPOINT.tokenizer, _CHECKPOINT.coord
assert COORD is not None
TABLE = TokenTable.from_tokenizer(TOKENIZER, COORD)
ENCODERS = {name: AnswerEncoder(TOKENIZER, codec) for name, codec in CODECS.items()}
END_ID = TOKENIZER.convert_tokens_to_ids(END_OF_TURN)

CAT = TextObject("black cat", (110, 310, 410, 705))
DOG = TextObject("yellow dog", (520, 285, 890, 660))
AWKWARD = (
    "<|im_end|>",
    "<|im_start|>assistant",
    "<|object_ref_end|>",
    "<|box_start|><|coord_5|>",
    "cat<|coord_999|>",
    "<|endoftext|>",
    "<|image_pad|>",
    'a "b"\\',
    '"]}, {"desc": "',
    '", "bbox_2d": ["',
    "]}]}",
    "é猫🐈",
    " 12, 7",
    "line\nbreak\t",
)
descs = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=12).filter(str.strip)
corners = st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True).map(sorted)


@st.composite
def text_objects(draw):
    (x1, x2), (y1, y2) = draw(corners), draw(corners)
    return TextObject(draw(descs | st.sampled_from(AWKWARD)), (x1, y1, x2, y2))


answers = st.lists(text_objects(), max_size=5)
few = settings(max_examples=30)


@pytest.mark.parametrize("name", CODECS)
def test_rendered_by_hand(name):
    expected = {
        "json": '{"objects": [{"desc": "black cat", "bbox_2d": ["<|coord_110|>", "<|coord_310|>", "<|coord_410|>", '
        '"<|coord_705|>"]}, {"desc": "yellow dog", "bbox_2d": ["<|coord_520|>", "<|coord_285|>", "<|coord_890|>", '
        '"<|coord_660|>"]}]}',
        "digits": '{"objects": [{"desc": "black cat", "bbox_2d": [110, 310, 410, 705]}, '
        '{"desc": "yellow dog", "bbox_2d": [520, 285, 890, 660]}]}',
        "tags": "<|object_ref_start|>black cat<|object_ref_end|><|box_start|><|coord_110|><|coord_310|><|coord_410|>"
        "<|coord_705|><|box_end|><|object_ref_start|>yellow dog<|object_ref_end|><|box_start|><|coord_520|>"
        "<|coord_285|><|coord_890|><|coord_660|><|box_end|>",
    }
    assert render(get_codec(name), [CAT, DOG]) == expected[name]


@pytest.mark.parametrize("name", CODECS)
@few
@given(objects=answers)
def test_decoding_the_ids_gives_the_rendered_text(name, objects):
    encoded = ENCODERS[name].encode(objects)
    assert encoded.ids[-1] == END_ID
    assert TOKENIZER.decode(encoded.ids[:-1].tolist()) == render(get_codec(name), objects)


@pytest.mark.parametrize("name", CODECS)
@few
@given(objects=answers)
def test_the_parser_recovers_the_objects(name, objects):
    answer = parse_answer(ENCODERS[name].encode(objects).ids, TABLE, name)
    assert [TextObject(o.desc, o.bins) for o in answer.objects] == objects
    assert answer.report.ok
    firsts = ENCODERS[name].encode(objects).roles[[t for o in answer.objects for t in o.coord_positions]]
    assert set(firsts.tolist()) <= {Role.NUMBER if name == "digits" else Role.COORD}


@pytest.mark.parametrize("name", ["json", "tags"])
@few
@given(objects=answers)
def test_exactly_the_coordinate_tokens_have_the_coordinate_role(name, objects):
    encoded = ENCODERS[name].encode(objects)
    bins = [COORD.bin_of(int(i)) for i in encoded.ids]
    is_coord = encoded.roles == Role.COORD
    assert [b is not None for b in bins] == is_coord.tolist()  # a desc that spells one never becomes one
    assert [b for b in bins if b is not None] == [b for o in objects for b in o.bins]


@pytest.mark.parametrize("name", CODECS)
@few
@given(objects=answers)
def test_a_desc_never_contains_a_special_token(name, objects):
    encoded = ENCODERS[name].encode(objects)
    in_desc = set(encoded.ids[encoded.roles == Role.DESC].tolist())
    assert not in_desc & set(TOKENIZER.all_special_ids)
    assert not {i for i in in_desc if COORD.bin_of(i) is not None}


@pytest.mark.parametrize("name", CODECS)
@few
@given(objects=answers)
def test_every_token_of_an_object_has_its_index(name, objects):
    encoded = ENCODERS[name].encode(objects)
    belongs = np.isin(encoded.roles, (Role.STRUCT, Role.DESC, Role.COORD, Role.NUMBER))
    assert (encoded.object_index[~belongs] == -1).all()
    assert np.unique(encoded.object_index[belongs]).tolist() == list(range(len(objects)))
    assert (np.diff(encoded.object_index[belongs]) >= 0).all()


def printed(name: str, objects: list[TextObject]) -> list[str]:
    """One line per token: role, object, text."""
    encoded = ENCODERS[name].encode(objects)
    rows = zip(encoded.roles, encoded.object_index, encoded.ids, strict=True)
    return [f"{Role(int(r)).name} {o} {TOKENIZER.decode([int(i)])}" for r, o, i in rows]


@pytest.mark.parametrize("name", CODECS)
@given(objects=answers)
def test_cached_objects_equal_segments_encoded_one_by_one(name, objects):
    encoder = ENCODERS[name]
    expected = encoder.encode_segments(encoder.codec.segments(objects))
    for _ in range(2):  # the first call may fill the cache, the second reads it
        found = encoder.encode(objects)
        for field in ("ids", "roles", "object_index"):
            np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), strict=True)


def test_roles_of_each_token_json():
    assert printed("json", [TextObject("cat", CAT.bins), TextObject("dog", DOG.bins)]) == [
        'STRUCT 0 {"objects": [{"desc": "',
        "DESC 0 cat",
        'STRUCT 0 ", "bbox_2d": ["',
        "COORD 0 <|coord_110|>",
        'STRUCT 0 ", "',
        "COORD 0 <|coord_310|>",
        'STRUCT 0 ", "',
        "COORD 0 <|coord_410|>",
        'STRUCT 0 ", "',
        "COORD 0 <|coord_705|>",
        'STRUCT 1 "]}, {"desc": "',
        "DESC 1 dog",
        'STRUCT 1 ", "bbox_2d": ["',
        "COORD 1 <|coord_520|>",
        'STRUCT 1 ", "',
        "COORD 1 <|coord_285|>",
        'STRUCT 1 ", "',
        "COORD 1 <|coord_890|>",
        'STRUCT 1 ", "',
        "COORD 1 <|coord_660|>",
        'CLOSE -1 "]}]}',
        "CLOSE -1 <|im_end|>",
    ]


def test_roles_of_each_token_tags():
    assert printed("tags", [TextObject("cat", CAT.bins)]) == [
        "STRUCT 0 <|object_ref_start|>",
        "DESC 0 cat",
        "STRUCT 0 <|object_ref_end|>",
        "STRUCT 0 <|box_start|>",
        *(f"COORD 0 <|coord_{k}|>" for k in CAT.bins),
        "STRUCT 0 <|box_end|>",
        "CLOSE -1 <|im_end|>",
    ]


def test_roles_of_each_token_digits():
    lines = printed("digits", [TextObject("cat", (7, 10, 310, 999))])
    assert lines == [
        'STRUCT 0 {"objects": [{"desc": "',
        "DESC 0 cat",
        'STRUCT 0 ", "bbox_2d": [',
        "NUMBER 0 7",
        "STRUCT 0 , ",
        *("NUMBER 0 1", "NUMBER 0 0"),
        "STRUCT 0 , ",
        *("NUMBER 0 3", "NUMBER 0 1", "NUMBER 0 0"),
        "STRUCT 0 , ",
        *("NUMBER 0 9", "NUMBER 0 9", "NUMBER 0 9"),
        "CLOSE -1 ]}]}",
        "CLOSE -1 <|im_end|>",
    ]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("objects", [[], [CAT], [CAT, DOG]], ids=["none", "one", "two"])
def test_the_decision_to_stop_is_one_token(name, objects):
    """An answer and a longer one first differ in a single token, which has another role."""
    stops = ENCODERS[name].encode(objects)
    goes_on = ENCODERS[name].encode([*objects, TextObject("red mug", (1, 2, 3, 4))])
    at = int(np.flatnonzero(stops.ids[: len(goes_on.ids)] != goes_on.ids[: len(stops.ids)])[0])
    assert stops.roles[at] == Role.CLOSE
    assert goes_on.roles[at] == Role.STRUCT
    assert (stops.roles[:at] != Role.CLOSE).all()
    # After this decision there is no other: the rest is the same in every answer of this length.
    assert (stops.roles[at:] == Role.CLOSE).all()
    assert len(stops.ids) - at == (1 if name == "tags" else 2)


def test_an_answer_without_objects():
    assert printed("json", []) == ['CLOSE -1 {"objects": []}', "CLOSE -1 <|im_end|>"]
    assert printed("tags", []) == ["CLOSE -1 <|im_end|>"]


def test_an_unknown_codec_is_refused():
    with pytest.raises(ConfigError, match=r"text\.codec is 'xml', expected one of \['digits', 'json', 'tags'\]"):
        get_codec("xml")
