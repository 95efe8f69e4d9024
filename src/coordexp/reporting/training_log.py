"""Training logs as columns, what they say smoothed, and the floors that losses cannot go below.

S logged steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.config.schema import Params
from coordexp.errors import DataError
from coordexp.evaluation.table import Bools, Floats, Ints

END_SHARE = 0.1  # "first" and "last" are means over this share of the rows
# The order of their weights in the parameters; terms outside it follow by name.
TERMS = ("total", "text_ce", *(key.removesuffix("_weight") for key in Params.model_fields if key.endswith("_weight")))


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """The rows of a train_log.jsonl as columns; a row that does not log a column holds NaN there."""

    step_S: Ints
    channel_S: tuple[str, ...]  # "A" or "B"; empty where the stage has no channels
    columns: dict[str, Floats]

    def of_channel(self, channel: str) -> TrainingLog:
        """Only the rows of one channel, and only the columns that it logs."""
        keep_S = np.array([name == channel for name in self.channel_S], dtype=bool)
        return self._rows(keep_S)

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that occur, sorted; empty for a stage without channels."""
        return tuple(sorted({name for name in self.channel_S if name}))

    def names(self, prefix: str) -> list[str]:
        """Columns under a prefix such as "loss/": in the order of the objective, then by name."""
        rank = {prefix + term: position for position, term in enumerate(TERMS)}
        return sorted((c for c in self.columns if c.startswith(prefix)), key=lambda c: (rank.get(c, len(rank)), c))

    def series(self, column: str) -> tuple[Ints, Floats]:
        """Steps and values of the rows that log a column."""
        values_S = self.columns.get(column, np.full(len(self.step_S), np.nan))
        logged_S = ~np.isnan(values_S)
        return self.step_S[logged_S], values_S[logged_S]

    def ends(self, column: str) -> tuple[float, float] | None:
        """Means over the first and the last tenth of the rows that log a column; None if none does."""
        _, values_S = self.series(column)
        if not len(values_S):
            return None
        n = max(1, round(END_SHARE * len(values_S)))
        return float(values_S[:n].mean()), float(values_S[-n:].mean())

    def _rows(self, keep_S: Bools) -> TrainingLog:
        kept = {name: values[keep_S] for name, values in self.columns.items()}
        return TrainingLog(
            step_S=self.step_S[keep_S],
            channel_S=tuple(name for name, keep in zip(self.channel_S, keep_S, strict=True) if keep),
            columns={name: values for name, values in kept.items() if not np.isnan(values).all()},
        )


def read_training_log(path: Path) -> TrainingLog:
    """Read a train_log.jsonl.

    Raises:
        DataError: an empty log, a broken line, or a row without a step; named by file and line.
    """
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path}: the log is empty, expected one JSON object per logged step. Run the stage again.")
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, int | float))
    return TrainingLog(
        step_S=np.array([row["step"] for row in rows], dtype=np.int64),
        channel_S=tuple(str(row.get("channel", "")) for row in rows),
        columns={name: np.array([row.get(name, np.nan) for row in rows], float) for name in names if name != "step"},
    )


def read_rows(path: Path, columns: Set[str] = frozenset()) -> list[dict[str, Any]]:
    """Rows of a log of JSON lines, each with an integer `step` and at least `columns`; raises DataError as above."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_row(line, columns, f"{path}:{n}") for n, line in enumerate(lines, 1)]


def _row(line: str, columns: Set[str], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}); the log was cut. Run the stage again.") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(f"{where}: expected a JSON object with an integer `step`.")
    if missing := columns - row.keys():
        raise DataError(f"{where}: lacks {', '.join(sorted(missing))}. Run the stage again.")
    return row


def smoothed(values_S: Floats, window: int) -> Floats:
    """Centred moving mean; at the ends the window shrinks, so that the length stays and nothing is invented."""
    half = window // 2
    total_S = np.concatenate([[0.0], np.cumsum(values_S)])
    index_S = np.arange(len(values_S))
    low_S, high_S = np.maximum(index_S - half, 0), np.minimum(index_S + half + 1, len(values_S))
    return (total_S[high_S] - total_S[low_S]) / (high_S - low_S)


def target_entropy_nats(kind: str, sigma: float, truncate: int) -> float:
    """Entropy of the soft target away from the borders, in nats: the floor of softCE, reached only when p = q.

    A two-bin target has no one entropy; its mean over targets that lie anywhere between two bins is exactly 1/2.
    """
    distance = np.abs(np.arange(-truncate, truncate + 1))
    match kind:
        case "gaussian":
            return entropy_nats(np.exp(-0.5 * (distance / sigma) ** 2))
        case "triangular":
            return entropy_nats(truncate + 1.0 - distance)
        case "two_bin":
            return 0.5
    raise DataError(f"target: found {kind!r}, expected gaussian, triangular or two_bin.")


def entropy_nats(weights: Floats | Sequence[float]) -> float:
    """Entropy of positive weights after normalisation."""
    q = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    return float(-(q * np.log(q)).sum())
