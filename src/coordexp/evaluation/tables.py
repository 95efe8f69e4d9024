"""The tables of one evaluation as files: CSV for people and spreadsheets, JSON for the rest."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from coordexp.evaluation.evaluator import Evaluation, rounded
from coordexp.infra.files import write_text

# File name -> table of Evaluation.details.
CSV_TABLES = {
    "per_class.csv": "per_category",
    "by_area.csv": "by_area",
    "by_side_px.csv": "by_side_px",
    "by_gt_count.csv": "by_gt_count",
    "scores.csv": "scores",
    "reliability.csv": "reliability",
    "worst_duplicates.csv": "worst_duplicates",
}


def write_tables(evaluation: Evaluation, folder: Path) -> None:
    """Write the CSV tables, per_image.json and pr_curve.json; undefined values are empty cells."""
    for name, key in CSV_TABLES.items():
        rows = rounded(evaluation.details[key])
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / name, out.getvalue())
    for name, value in (("per_image.json", evaluation.per_image), ("pr_curve.json", evaluation.pr_curve)):
        write_text(folder / name, json.dumps(rounded(value)) + "\n")
