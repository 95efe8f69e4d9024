"""Generated damage to foreign files: each is refused with a CoordExpError that names it, or read correctly.

No other outcome is allowed: no exception of another class, no hang, no value of another type. Checkpoint folders are
tested in tests/models/test_folder.py, because they are slower, and images in tests/records/test_images.py.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordexp.config.loading import load_params, load_profile, parse_params, parse_profile, parse_value, read_yaml
from coordexp.errors import ConfigError, CoordExpError, DataError
from coordexp.geometry.bins import NUM_BINS
from coordexp.infra.foreign import Gate
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction, read_results
from coordexp.records.prediction_log import PredictionLog, read_rows
from coordexp.rollout.engine import Generation, Journal, TokenProbs
from coordexp.rollout.records import read_generations, write_generations
from mutations import DEEP, broken, damaged, mutated

ROOT = Path(__file__).parents[1]
GATE = Gate("a test's file", DataError, "Do better.", max_bytes=1000, max_depth=4)


def outcome(read: Callable[[], Any], path: Path, kind: type[CoordExpError]) -> Any:
    """The result of a reader, or the message of its error, which must be short and name the file."""
    try:
        return read()
    except kind as error:
        message = str(error)
    assert str(path) in message
    assert len(message) < 20_000
    return message


# --- the gate itself


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"NaN", "NaN is not a number"),
        (b"[1e999]", "too large"),
        (b"9" * 500, "500 digits"),
        (b"[" * 400 + b"]" * 400, "nested deeper than 4"),
        (b"[[[[[]]]]]", "nested deeper than 4"),
        (rb'["\ud800"]', "surrogate"),
        (b'"caf\xe9"', "not UTF-8"),
        ('"x"'.encode("utf-16"), "not UTF-8"),
        (b"", "Expecting value"),
        (b"1 2", "Extra data"),
        (b" " * 2000, "more than the maximum of 1000"),
    ],
)
def test_ambiguous_json_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        GATE.read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("Expected a test's file. Do better.")


def test_valid_json_of_any_writer_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + rb' {"a": [1.5e-3, "\ud83d\ude00", [[]]], "b": -12} ')
    assert GATE.read_json(path) == {"a": [0.0015, "😀", [[]]], "b": -12}


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "missing", "null"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "null":
            path = Path("a\0b")
    with pytest.raises(DataError, match="a test's file"):
        GATE.read_json(path)


def test_a_too_long_line_is_refused_before_it_is_read_completely(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + b"2" * 1001 + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is longer than 1000"):
        list(GATE.json_lines(path))


# --- parameters

PARAMS = ("params.yaml", load_params, lambda path, tree: parse_params(str(path), tree))
PROFILE = ("configs/smoke.yaml", load_profile, parse_profile)
YAML_TRAPS = [
    "a: &a [1]\nb: *a\n",
    "a: &a [*a]\n",
    "a: &a {x: 1}\nb: {<<: *a}\n",
    "".join([f"a{0}: &a0 [x, x]\n", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))]),
    "seed: !!python/object/apply:os.system [true]\n",
    "seed: !!int seventeen\n",
    "seed: !!float ten\n",
    "seed: !!timestamp 2001-99-99\n",
    "seed: 2001-99-99\n",
    "%YAML 1.1\n---\nseed: 1:99:99999999999999999\n",
    "seed: 1\nseed: 2\n",
    "1: 2\n",
    "? [a, b]\n: 1\n",
    "? {a: b}\n: 1\n",
    "null: 1\n",
    "stage1: {1: 2}\n",
    "matching: {null: 2}\n",
    'seed: "\\ud800"\n',
    "seed: " + "9" * 5000 + "\n",
    "seed: " + DEEP + "\n",
    "seed: \x00\n",
    "- 1\n- 2\n",
    "",
    "seed: 1\n...\nseed: 2\n",
    "---\nseed: 1\n---\nseed: 2\n",
    "seed: !!binary caf\xe9\n",
    "seed: !!set {a, b}\n",
    "seed: !!omap [a: 1]\n",
    "seed: !new 3\n",
    "seed: |\n" + "x" * 2_000_000,
]


@pytest.mark.parametrize("text", YAML_TRAPS, ids=range(len(YAML_TRAPS)))
def test_yaml_pitfalls_are_reported_all_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    begin = time.process_time()
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_params(path)
    assert time.process_time() - begin < 3


@pytest.mark.parametrize(
    "value", ["!!int x", "*a", "{1: 2}", "[" * 400, "&a [*a]", "'", "9" * 5000, "!!timestamp 2001-99-99"]
)
def test_command_line_values_are_validated_in_the_same_way(value: str) -> None:
    with pytest.raises(ConfigError):
        parse_value(value)


@pytest.mark.parametrize(("name", "load", "parse"), [PARAMS, PROFILE])
def test_generated_parameter_files_are_refused_or_read_correctly(
    tmp_path: Path, name: str, load: Callable, parse: Callable
) -> None:
    """800 trees with invalid values at every depth; a tenth of them are read from a file (JSON is also YAML)."""
    tree, path = read_yaml(ROOT / name), tmp_path / Path(name).name
    expected = load(ROOT / name)
    for number in range(800):
        rng = random.Random(number)
        wrong = mutated(tree, rng, rng.randrange(1, 4))
        if number % 10 == 0:
            path.write_text(json.dumps(wrong))
            found = outcome(lambda: load(path), path, ConfigError)
        else:
            found = outcome(lambda wrong=wrong: parse(path, wrong), path, ConfigError)
        if not isinstance(found, str):  # in range: then it equals the file and has the required types
            assert type(found) is type(expected)
            assert same_kinds(found.model_dump(), expected.model_dump(), wrong), number


def same_kinds(found: Any, expected: Any, said: Any) -> bool:
    """Values have the types of valid ones, or are null if the file has null."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(
            same_kinds(found[k], expected.get(k), said.get(k) if isinstance(said, dict) else None) for k in found
        )
    if isinstance(found, float):
        return math.isfinite(found) and isinstance(expected, float | None)
    return type(found) is type(expected) or found == said or expected is None


@pytest.mark.parametrize("numbers", [range(50), pytest.param(range(50, 200), marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize(("name", "load", "parse"), [PARAMS, PROFILE])
def test_damaged_parameter_files_are_refused_or_read_correctly(
    tmp_path: Path, name: str, load: Callable, parse: Callable, numbers: range
) -> None:
    """Damaged files (truncated, flipped bits, another encoding) with few lines, because YAML is slow to parse."""
    lines, path = (ROOT / name).read_bytes().splitlines(keepends=True), tmp_path / Path(name).name
    for number in numbers:
        rng = random.Random(number)
        first = rng.randrange(len(lines) // 2)
        path.write_bytes(damaged(b"".join(lines[first : first + len(lines) // 4]), rng))
        outcome(lambda: load(path), path, ConfigError)


# --- predictions

BOX = (1.0, 2.0, 30.5, 40.25)
RESULT = ImageResult(
    image_id=7,
    image="a/b.png",
    width=64,
    height=48,
    gt=(GroundTruth("cat", BOX, area_px2=12.5), GroundTruth("red mug", BOX, iscrowd=True)),
    pred=(
        Prediction("cat", BOX, (1, 2, 3, 4), (-0.5, -0.25, 0.0, -1.5), -0.75, 0.5, (1.0, 2.0, 3.0, 4.0),
                   {"median": BOX}, {"quality": 0.5}),
        Prediction("ein Hund", BOX, (1, 2, 3, 999)),
    ),
    raw_text='{"objects": []}',
    parse=ParseReport(True, 2, {"wrong_arity": 1}),
    finish_reason="stop",
    n_generated_tokens=40,
    identity={"model": "ab12"},
)  # fmt: skip


def test_generated_gt_vs_pred_lines_are_refused_or_read_correctly(tmp_path: Path) -> None:
    path, row = tmp_path / "r.jsonl", json.loads(json.dumps(RESULT.to_json()))
    accepted = 0
    for number in range(1000):
        path.write_bytes(broken(row, random.Random(number)))
        found = outcome(lambda: list(read_results(path)), path, DataError)
        if isinstance(found, str):
            continue
        accepted += 1
        (result,) = found
        assert path.read_bytes().decode("utf-8-sig")
        check_result(result)
    assert accepted < 400


def check_result(result: ImageResult) -> None:
    assert type(result.image_id) is type(result.width) is type(result.height) is int
    assert isinstance(result.image, str)
    assert result.width > 0 < result.height
    for obj in (*result.gt, *result.pred):
        assert isinstance(obj.desc, str)
        assert all(type(v) is float and math.isfinite(v) for v in obj.bbox_xyxy_px)
        assert obj.bbox_xyxy_px[0] <= obj.bbox_xyxy_px[2]
    for gt in result.gt:
        assert type(gt.iscrowd) is bool
        assert gt.area_px2 is None or (type(gt.area_px2) is float and gt.area_px2 >= 0)
    for pred in result.pred:
        assert pred.score is None or type(pred.score) is float
        assert pred.bins is None or [type(b) for b in pred.bins] == [int] * 4
        for four in (pred.coord_logprobs, pred.coord_sd_bins):
            assert four is None or [type(v) for v in four] == [float] * 4
        assert all(type(v) is float for v in pred.scores.values())
    assert result.parse is None or all(type(n) is int and n >= 0 for n in result.parse.dropped.values())


LINE = {
    "image": "a.png",
    "checkpoint": "runs/a",
    "key": {"checkpoint": "ff", "settings": {"seed": 0}, "picture_sha256": "ee"},
    "width": 64,
    "height": 48,
    "objects": [{"desc": "cat", "bbox_xyxy_px": list(BOX), "score": 0.5}],
    "parse": asdict(RESULT.parse),
    "raw_text": "{}",
}


def test_generated_prediction_logs_are_refused_or_read_correctly(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for number in range(500):
        rng = random.Random(number)
        path.write_bytes(broken(LINE | ({"error": "no"} if number % 5 == 0 else {}), rng) + b"\n")
        rows = outcome(lambda: read_rows(path), path, DataError)
        for row in rows if isinstance(rows, list) else ():
            for obj in row["objects"]:
                assert isinstance(obj["desc"], str)
                assert len([float(v) for v in obj["bbox_xyxy_px"]]) == 4
        outcome(lambda: PredictionLog(path, Path("runs/a")), path, DataError)


# --- journals


def test_damaged_lines_of_journals_are_dropped(tmp_path: Path) -> None:
    """Damaged lines are dropped; other lines are read as written, or as a valid answer of the same form."""
    path, vocabulary_size = tmp_path / "journal.jsonl", 2000
    rng = np.random.default_rng(0)
    probs = TokenProbs(rng.random(5), rng.random((4, NUM_BINS)).astype(np.float16))
    Journal(path).append("k", Generation(np.arange(5, dtype=np.int32), "stop", probs))
    row = json.loads(path.read_bytes())
    for number in range(500):
        path.write_bytes(broken(row, random.Random(number)) + b"\n")
        for key, generation in Journal(path).read(vocabulary_size).items():
            assert isinstance(key, str)
            assert generation.ids.dtype == np.int32
            assert (generation.ids < vocabulary_size).all()
            if generation.probs:
                assert len(generation.probs.logprobs_A) == len(generation.ids)
                assert generation.probs.coord_probs_CK is None or generation.probs.coord_probs_CK.shape[1] == NUM_BINS


def test_a_distribution_that_decompresses_to_gigabytes_is_dropped(tmp_path: Path) -> None:
    import base64
    import zlib

    packed = base64.b64encode(zlib.compress(b"\0" * (1 << 24))).decode()
    row = {"key": "k", "ids": [1], "finish_reason": "stop", "probs": {"logprobs": [-1.0], "coord_probs": packed}}
    (tmp_path / "j").write_text(json.dumps(row) + "\n")
    assert Journal(tmp_path / "j").read(10) == {}


def test_generated_rollout_files_are_refused_or_read_correctly(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_generations(path, {3: Generation(np.arange(5, dtype=np.int32), "stop")})
    row = json.loads(path.read_bytes())
    for number in range(300):
        path.write_bytes(broken(row, random.Random(number)))
        found = outcome(lambda: read_generations(path, 2000), path, DataError)
        assert isinstance(found, str) or all(type(image_id) is int for image_id in found)


def test_mutations_do_not_change_their_input() -> None:
    before = copy.deepcopy(LINE)
    for number in range(50):
        mutated(LINE, random.Random(number), 3)
    assert before == LINE
