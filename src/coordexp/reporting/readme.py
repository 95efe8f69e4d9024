"""The results in README.md: a block rewritten from the committed metrics, so that no number in it can grow old."""

from __future__ import annotations

import json
import re
from pathlib import Path

from coordexp.config.paths import CHECKPOINTS, ProfilePaths
from coordexp.errors import DataError
from coordexp.reporting.markdown import interval, number, table

SHOWN_PROFILE = "tiny"
BEGIN = "<!-- results: written by `python -m coordexp.reporting.reference` -->"
END = "<!-- end of results -->"
_COLUMNS = {
    "coco.mAP": "mAP",
    "coco.AP50": "AP50",
    "coco.AP75": "AP75",
    "f1.full_50": "F1@.5",
    "f1.loc_50": "F1@.5, boxes alone",
    "set.dup_pairs_90": "duplicate pairs an image",
    "parse.parse_rate": "answers that parse",
}


def results_table(profile: str, root: Path) -> str:
    """Headline metrics of the committed run, a row for each checkpoint; mAP with its 95 % interval.

    Raises:
        DataError: the profile has no metrics.json.
    """
    path = ProfilePaths(profile, root).reports / "metrics.json"
    if not path.is_file():
        raise DataError(f"{path}: missing; README.md shows its numbers. Run `make demo`.")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name in CHECKPOINTS:
        areas = metrics[name]["eval"]
        values = [areas[area][key] for area, key in (column.split(".") for column in _COLUMNS)]
        first = f"{number(values[0])} {interval(areas['interval']['coco.mAP'])}".rstrip()
        rows.append([name, first, *map(number, values[1:])])
    return table(["val", *_COLUMNS.values()], rows, "l" + "r" * len(_COLUMNS))


def with_results(readme: str, results: str) -> str:
    """README.md with its block of results replaced; raises DataError if the markers are not there once."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise DataError(f"README.md: expected one block between {BEGIN!r} and {END!r}.")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{results}\n\n{END}", readme)
