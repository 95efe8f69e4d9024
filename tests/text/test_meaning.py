"""Distance of descriptions: by words (hand-computed), by meaning (real encoder), in matching and its curriculum."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from coordexp.matching.matcher import match
from coordexp.text.meaning import PACKAGE, MiniLM, minilm, name_distance
from coordexp.training.rollout_pool import match_schedule
from helpers import PARAMS, changed

installed = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="the text encoder is not installed")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("cat", "cat", 0.0),
        ("Traffic_Light", "traffic light", 0.0),
        ("black cat", "cat", 0.5),
        ("black cat", "cat black", 0.0),
        ("red old car", "old blue car", 0.5),
        ("cat", "dog", 1.0),
        ("_", "dog", 1.0),
        ("", "", 0.0),
    ],
)
def test_distances_by_hand(a, b, expected):
    assert name_distance([a], [b], "lexical").tolist() == [[expected]]
    assert name_distance([b], [a], "lexical").tolist() == [[expected]]


def test_distances_have_one_entry_per_pair_also_for_empty_sides():
    np.testing.assert_array_equal(
        name_distance(["cat", "dog"], ["dog", "cat", "cup"], "lexical"), [[1, 0, 1], [0, 1, 1]]
    )
    assert name_distance([], ["cat"], "encoder").shape == (0, 1)
    assert name_distance(["cat"], [], "encoder").shape == (1, 0)


def test_vectors_are_cached_on_disk_by_the_hash_of_the_weights(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    runs: list[list[str]] = []

    def run(self, texts):
        runs.append(list(texts))
        return np.array([[len(t), 1.0] for t in texts], dtype=np.float32)

    monkeypatch.setattr(MiniLM, "_run", run)
    first = MiniLM(folder, tmp_path / "cache").encode(["cat", "owl", "cat"])
    again = MiniLM(folder, tmp_path / "cache").encode(["owl", "horse", "cat"])
    assert runs == [["cat", "owl"], ["horse"]]
    np.testing.assert_array_equal(again[[2, 0, 2]], first)
    (folder / "model.safetensors").write_bytes(b"other weights")
    MiniLM(folder, tmp_path / "cache").encode(["cat"])
    assert runs[-1] == ["cat"], "other weights, other vectors"


SYNONYMS = {
    **{"sofa": "couch", "television": "tv", "motorbike": "motorcycle", "mobile phone": "cell phone"},
    **{"automobile": "car", "infant": "baby", "bicycle": "bike", "aeroplane": "airplane"},
}


@installed
def test_the_encoder_recognizes_synonyms_without_common_words(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(minilm(), "cache_folder", tmp_path)
    names, words = [*SYNONYMS.values(), "dining table", "handbag"], [*SYNONYMS]
    distances = name_distance(words, names, "encoder")
    assert [names[k] for k in distances.argmin(axis=1)] == [*SYNONYMS.values()]
    np.testing.assert_allclose(name_distance(names, names, "encoder").diagonal(), 0, atol=1e-6)
    assert (np.diagonal(name_distance(words, names, "lexical"))[[0, 1, 2, 4, 5, 6, 7]] == 1).all()


@installed
def test_synonyms_decide_between_equal_boxes_from_the_step_of_the_curriculum_on(tmp_path, monkeypatch):
    monkeypatch.setattr(minilm(), "cache_folder", tmp_path)
    box = [0.2, 0.2, 0.6, 0.6]
    matching = changed(PARAMS.matching, lambda_sem=0.5, semantic="encoder")
    stage2 = changed(PARAMS.stage2, curriculum_fraction=0.5, lambda_sem_from=0.0)
    schedule = match_schedule(changed(PARAMS, matching=matching, stage2=stage2), steps=10)
    distances = name_distance(["automobile", "couch"], ["sofa", "car"], "encoder")
    pairs = [match([box, box], [box, box], schedule(step), distances).pairs.tolist() for step in (0, 10)]
    assert pairs == [[[0, 0], [1, 1]], [[0, 1], [1, 0]]]
