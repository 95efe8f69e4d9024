"""Reading the logs of a run: JSON lines with an integer `step`, as pandas tables.

pandas is loaded with the first log, so that commands that read no log start fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordexp.errors import DataError
from coordexp.infra.foreign import Gate

if TYPE_CHECKING:
    import pandas as pd

BIN_ERROR = "coord_diag/expected_bin_mae"  # mean |E[k] - target| in bins: comparable under any weights
COORD_SUM = "coord_reg"  # `loss/coord_reg` is the weighted sum of all coordinate terms
LOG = Gate("a log of one JSON object a line", DataError, "If the log was cut, run the stage again.")
END_FRACTION = 0.1  # "first" and "last" are means over this fraction of the rows


def read_log(path: Path) -> pd.DataFrame:
    """Read a train_log.jsonl as a table indexed by step, columns in the order logged; missing values are NaN.

    Raises:
        DataError: the log is empty, or a line is broken or has no step; the message has file and line.
    """
    import pandas as pd

    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path}: the log is empty, expected one JSON object per logged step. Run the stage again.")
    return pd.DataFrame(rows).set_index("step")


def read_rows(path: Path, columns: Set[str] = frozenset(), *, growing: bool = False) -> list[dict[str, Any]]:
    """The rows of a log, each with a `step` and at least `columns`; raises DataError as `read_log`.

    With `growing`, an incomplete last line is ignored: it is still being written.
    """
    lines = [(where, line) for where, line in LOG.lines(path) if line.endswith(b"\n") or not growing]
    return [_row(LOG.parse_json(line, where), columns, where) for where, line in lines]


def _row(row: Any, columns: Set[str], where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise DataError(f"{where}: expected a JSON object with an integer `step`.")
    if missing := columns - row.keys():
        raise DataError(f"{where}: lacks {', '.join(sorted(missing))}. Run the stage again.")
    return row


def without_clock(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Log rows without timing columns, which differ between identical runs."""
    for row in rows:
        yield {name: value for name, value in row.items() if not name.startswith("time/") and name != "seconds"}


def logged(log: pd.DataFrame, column: str) -> pd.Series:
    """The values of a column by step, from the rows that have it; empty if none does."""
    return log.get(column, log.index.to_series().iloc[:0].astype(float)).dropna()


def ends(log: pd.DataFrame, column: str) -> tuple[float, float] | None:
    """Means over the first and the last tenth of the rows that have a column; None if none does."""
    values = logged(log, column)
    if values.empty:
        return None
    n = max(1, round(END_FRACTION * len(values)))
    return float(values.iloc[:n].mean()), float(values.iloc[-n:].mean())


def diagnostic_sums(rows: Iterable[Mapping[str, Any]], context: str, name: str) -> tuple[list[float], list[int]]:
    """Sum of a diagnostic over the coordinates of each image in one context, and how many coordinates it covers.

    `rows` are those of the eval callback, one per image; each holds the mean over the image's coordinates.
    """
    found = [(row["coord_diag"].get(context, {}).get(name), len(row[context])) for row in rows]
    return [n * (mean or 0.0) for mean, n in found], [0 if mean is None else n for mean, n in found]


def smoothed(values: pd.Series, window: int) -> pd.Series:
    """Centered moving mean without isolated spikes; the window shrinks at the ends, so that the length stays."""
    without_spikes = values.rolling(3, center=True, min_periods=1).median()
    return without_spikes.rolling(2 * (window // 2) + 1, center=True, min_periods=1).mean()
