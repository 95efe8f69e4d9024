"""Blocks of pages that are rewritten from the code or from the committed report, so that nothing in them grows old."""

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
    """README.md with its block of results replaced."""
    return with_block(readme, BEGIN, END, results, "README.md")


def with_block(page: str, begin: str, end: str, block: str, name: str) -> str:
    """A page with what stands between two markers replaced; raises DataError if they are not there once."""
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise DataError(f"{name}: expected one block between {begin!r} and {end!r}.")
    return pattern.sub(lambda _: f"{begin}\n\n{block}\n\n{end}", page)


def shown_picture(profile: str, root: Path) -> bytes:
    """The picture of README.md: the last of the gallery in the committed report, one of those that chance picks.

    Raises:
        DataError: the report has no gallery.
    """
    folder = ProfilePaths(profile, root).reports / "gallery"
    pictures = sorted(folder.glob("*.png"))
    if not pictures:
        raise DataError(f"{folder}: holds no picture; README.md shows one. Run `make demo`.")
    return pictures[-1].read_bytes()
