"""The decoding study shows every row with its difference, and is in the report only beside the weights it is about."""

from __future__ import annotations

from coordexp.reporting.decoding_tables import decoding_markdown, decoding_section


def test_rows_differences_and_missing_values() -> None:
    base = {"name": "off", "coco.mAP": 0.25, "tokens_per_second": 900.0}
    other = {"name": "grammar", "coco.mAP": 0.3, "difference": {"coco.mAP": {"delta": 0.05, "lo": 0.01, "hi": 0.09}}}
    rows = [base, other]
    oracle = {"k": 8, "n_gt": 10, "recall_one": 0.5, "recall_any": 0.75, "recoverable": None}
    tables = {"constraints": rows, "boxes": rows, "scores": rows, "best_of_k": rows, "oracle_k": oracle}
    page = decoding_markdown({"stage1": tables})
    assert page.count("| grammar |") == 4
    assert "| +0.05 [+0.01, +0.09] |" in page
    assert "900.0000" in page
    assert "any of 8 samples 0.7500" in page
    assert "n/a" in page


def test_the_report_takes_the_study_of_its_own_weights_only() -> None:
    rows = [{"name": "off", "coco.mAP": 0.25}]
    oracle = {"k": 8, "n_gt": 10, "recall_one": 0.5, "recall_any": 0.75, "recoverable": 0.5}
    tables = {"constraints": rows, "boxes": rows, "scores": rows, "best_of_k": rows, "oracle_k": oracle, "model": "a1"}
    same, other = ({"stage1": {"identity": {"model": model}}} for model in ("a1", "b2"))
    assert "| off |" in decoding_section({"stage1": tables}, same, level=3)
    assert decoding_section({"stage1": tables}, same, level=3).startswith("### Decoding study")
    left_out = decoding_section({"stage1": tables}, other, level=3)
    assert "other weights" in left_out
    assert "| off |" not in left_out
    assert "has not been run" in decoding_section(None, same, level=3)
