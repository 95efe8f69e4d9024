"""The journal: its keys cover everything that determines an answer, and damage loses only the damaged answer."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from coordexp.errors import DataError
from coordexp.infra.artefacts import sealed_row
from coordexp.rollout.engine import Generation, Journal, TokenProbs, request_key
from helpers import World, asked, decode_request

REQUEST = decode_request(max_new_tokens=8)
PROBS = TokenProbs(
    np.array([-0.1, -1 / 3, -1e-30]), np.random.default_rng(0).dirichlet(np.ones(1000), 2).astype(np.float16)
)
FINISHED = Generation(np.array([4, 5, 6], np.int32), "stop", PROBS)
PACKED = PROBS.to_json()["coord_probs"]


def line(**changes: object) -> bytes:
    """A line of the journal."""
    row = {"key": "b", "ids": [1], "finish_reason": "stop", "probs": {"logprobs": [-0.5], "coord_probs": PACKED}}
    return json.dumps(sealed_row(row | changes)).encode()


VOCABULARY = 10


@pytest.mark.parametrize(
    "damage",
    [
        b'{"key": "b", "ids": [1, 2',
        b"",
        b"\xff\xfe{",
        b"\0" * 50,
        b"null",
        b"[1]",
        b'"text"',
        b"{}",
        b"[" * 100000,
        b'{"key": "b", "ids": ' + b"9" * 5000 + b"}",
        line(more=1),
        line(key=["b"]),
        line(ids=1),
        line(ids=[[1]]),
        line(ids=[True]),
        line(ids=[-1]),
        line(ids=[10]),
        line(ids=[1e30]),
        line(ids=[99999999999999999999]),
        line(finish_reason=["stop"]),
        line(finish_reason=None),
        line(probs=[]),
        line(probs={"logprobs": [-0.5]}),
        line(probs={"logprobs": [], "coord_probs": PACKED}),
        line(probs={"logprobs": ["-0.5"], "coord_probs": PACKED}),
        line(probs={"logprobs": [-0.5], "coord_probs": 5}),
        line(probs={"logprobs": [-0.5], "coord_probs": "?"}),
        line(probs={"logprobs": [-0.5], "coord_probs": PACKED[:-8]}),
        line(probs={"logprobs": [-0.5], "coord_probs": TokenProbs(np.zeros(1), np.ones(9, np.float16)).to_json()}),
    ],
)
@pytest.mark.parametrize("ends", [b"\n", b""])
def test_a_damaged_line_is_dropped_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes, ends: bytes
) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path).append("a", FINISHED)
    with path.open("ab") as out:
        out.write(damage + ends)
    Journal(path).append("c", FINISHED)
    with caplog.at_level(logging.WARNING):
        done = Journal(path).read(VOCABULARY)
    assert {key: g.ids.tolist() for key, g in done.items()} == {"a": [4, 5, 6], "c": [4, 5, 6]}
    if damage or ends:
        assert f"{path}: 1 damaged lines" in caplog.text
        assert "line 2: " in caplog.text


def test_an_answer_with_a_damaged_line_is_generated_again_and_stored(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(line(ids=[VOCABULARY]) + b"\n")
    journal = Journal(path)
    assert journal.read(VOCABULARY) == {}
    journal.append("a", FINISHED)
    assert journal.read(VOCABULARY)["a"].ids.tolist() == [4, 5, 6]


@pytest.mark.parametrize("coord_probs", [PROBS.coord_probs_CK, np.empty((0, 1000), np.float16), None])
def test_generations_are_read_back_bit_for_bit(tmp_path: Path, coord_probs: NDArray | None) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.append("bare", replace(FINISHED, probs=None))
    journal.append("kept", replace(FINISHED, probs=replace(PROBS, coord_probs_CK=coord_probs)))
    done = journal.read(VOCABULARY)
    assert done["bare"].probs is None
    found = done["kept"].probs
    assert found is not None
    assert found.logprobs_A.tobytes() == PROBS.logprobs_A.tobytes()
    if coord_probs is None:
        assert found.coord_probs_CK is None
    else:
        np.testing.assert_array_equal(found.coord_probs_CK, coord_probs, strict=True)


def test_the_key_of_a_request_covers_everything_that_determines_the_answer(world: World, tmp_path: Path) -> None:
    sample = world.samples[0]
    picture = tmp_path / sample.image
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes((world.root / sample.image).read_bytes())

    def key(sample=sample, request=REQUEST) -> str:
        return request_key(sample, request, tmp_path)

    keys = {
        key(),
        key(replace(sample, image_id=7)),
        key(replace(sample, resized_width=64 + sample.resized_width)),
        key(request=asked(REQUEST, temperature=0.5)),
        key(request=replace(REQUEST, seed=4)),
        key(replace(sample, image=f"{sample.image}#flip")),
    }
    assert len(keys) == 6
    assert key(replace(sample, descs=())) in keys
    Image.new("RGB", (sample.width, sample.height)).save(picture, "png")
    assert key() not in keys


def test_a_key_needs_the_image(world: World, tmp_path: Path) -> None:
    sample = replace(world.samples[0], image="a.png")
    with pytest.raises(DataError, match=r"a\.png: no such file"):
        request_key(sample, REQUEST, tmp_path)
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image .it is a named pipe"):
        request_key(sample, REQUEST, tmp_path)
