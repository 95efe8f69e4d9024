"""The decoding study's page shows every row with its difference."""

from __future__ import annotations

from coordexp.reporting.decoding_tables import decoding_markdown


def test_rows_differences_and_missing_values() -> None:
    base = {"name": "off", "coco.mAP": 0.25, "tokens_per_second": 900.0}
    other = {"name": "grammar", "coco.mAP": 0.3, "difference": {"coco.mAP": {"delta": 0.05, "lo": 0.01, "hi": 0.09}}}
    rows = [base, other]
    oracle = {"k": 8, "n_gt": 10, "recall_one": 0.5, "recall_any": 0.75, "recoverable": None}
    tables = {"constraints": rows, "boxes": rows, "scores": rows, "best_of_k": rows, "oracle_k": oracle}
    page = decoding_markdown({"stage1": tables})
    assert page.count("| grammar |") == 4
    assert "+0.0500 | [0.0100, 0.0900]" in page
    assert "900.0000" in page
    assert "any of 8 samples 0.7500" in page
    assert "n/a" in page
