"""Logs as columns, smoothing that invents nothing, and the floor of softCE."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coordexp.errors import DataError
from coordexp.losses.coord_terms import soft_target, target_entropy
from coordexp.reporting.training_log import entropy_nats, read_training_log, smoothed, target_entropy_nats


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class TestFloor:
    """The floor in the report is the entropy of the target that the loss is given."""

    @pytest.mark.parametrize("kind", ["gaussian", "triangular"])
    @pytest.mark.parametrize(("sigma", "truncate"), [(2.0, 8), (1.5, 8), (0.5, 4), (6.0, 3)])
    def test_equals_the_entropy_of_the_training_target(self, kind: str, sigma: float, truncate: int) -> None:
        q = soft_target(torch.tensor([500.0]), kind, sigma, truncate, torch.float64)
        assert target_entropy_nats(kind, sigma, truncate) == pytest.approx(float(target_entropy(q)), abs=1e-12)

    def test_of_two_bins_is_the_mean_over_all_fractions(self) -> None:
        targets = 500 + (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        q = soft_target(targets, "two_bin", 2.0, 8, torch.float64)
        assert target_entropy_nats("two_bin", 2.0, 8) == pytest.approx(float(target_entropy(q).mean()), abs=1e-4)

    def test_published_values(self) -> None:
        assert target_entropy_nats("gaussian", 2.0, 8) == pytest.approx(2.112, abs=5e-4)
        assert target_entropy_nats("gaussian", 1.0, 4) == pytest.approx(1.419, abs=5e-4)
        assert entropy_nats([1, 1, 1, 1]) == pytest.approx(np.log(4))

    def test_an_unknown_target_is_refused(self) -> None:
        with pytest.raises(DataError, match="found 'box', expected gaussian"):
            target_entropy_nats("box", 2.0, 8)


class TestReading:
    """Rows may log different things."""

    def test_columns_by_channel(self, tmp_path: Path) -> None:
        rows = [
            {"step": 0, "channel": "A", "loss/total": 3.0, "loss/zzz": 1.0},
            {"step": 1, "channel": "B", "loss/total": 2.0, "loss/softce": 1.5, "stage2_ab/matched_total": 4},
            {"step": 2, "channel": "A", "loss/total": 1.0, "loss/zzz": 0.5},
        ]
        log = read_training_log(write(tmp_path / "log.jsonl", rows))
        assert log.channels == ("A", "B")
        assert log.names("loss/") == ["loss/total", "loss/softce", "loss/zzz"]  # objective order, then by name
        assert [v.tolist() for v in log.series("loss/softce")] == [[1], [1.5]]
        only_a = log.of_channel("A")
        assert only_a.names("loss/") == ["loss/total", "loss/zzz"]
        assert only_a.step_S.tolist() == [0, 2]
        assert only_a.ends("loss/total") == (3.0, 1.0)
        assert only_a.ends("loss/softce") is None

    def test_ends_are_means_of_a_tenth(self, tmp_path: Path) -> None:
        log = read_training_log(write(tmp_path / "log.jsonl", [{"step": s, "x": float(s)} for s in range(40)]))
        assert log.ends("x") == (1.5, 37.5)

    @pytest.mark.parametrize("line", ['{"loss/total": 1}', "[1]", '{"step": 1.5}'])
    def test_a_row_without_a_step_is_named(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "log.jsonl"
        path.write_text(f'{{"step": 0}}\n{line}\n', encoding="utf-8")
        with pytest.raises(DataError, match=r"log\.jsonl:2: expected a JSON object with an integer `step`"):
            read_training_log(path)

    def test_an_empty_log_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="the log is empty"):
            read_training_log(write(tmp_path / "log.jsonl", []))


class TestSmoothing:
    """A moving mean with shrinking ends."""

    def test_equals_the_plain_definition(self) -> None:
        values = np.random.default_rng(0).normal(size=23)
        expected = [values[max(0, i - 3) : i + 4].mean() for i in range(23)]
        np.testing.assert_allclose(smoothed(values, 7), expected, atol=1e-12)

    def test_leaves_a_constant_alone(self) -> None:
        np.testing.assert_allclose(smoothed(np.full(9, 2.5), 5), 2.5)
