from __future__ import annotations

import pytest

from coordexp.evaluation.published import published_tables


def test_the_decision_note_rows_are_consistent():
    """Precision, recall and F1 of each row follow from its counts, so a slip of the pen shows."""
    rows = published_tables()["stage2_decision_note"]["rows"]
    assert [row["step"] for row in rows] == [300, 600, 900, 1200, 1500]
    for row in rows:
        assert row["matched"] + row["fp"] == row["n_pred"]
        assert row["matched"] + row["fn"] == 3657
        precision, recall = row["matched"] / row["n_pred"], row["matched"] / 3657
        assert row["precision"] == pytest.approx(precision, abs=1e-4)
        assert row["recall"] == pytest.approx(recall, abs=1e-4)
        assert row["f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-4)


@pytest.mark.parametrize("name", ["coco_anchors", "lvis_anchors"])
def test_every_anchor_names_a_protocol_and_how_it_is_known(name):
    table = published_tables()[name]
    assert len({row["system"] for row in table["rows"]}) == len(table["rows"])
    for row in table["rows"]:
        assert row["protocol"] in table["protocols"]
        assert row["mark"] in {"paper", "source read", "reported"}
        values = [row[key] for key in ("mAP", "AP50", "AP75", "f1_50", "f1_95", "f1_mean") if key in row]
        assert values
        assert all(0 < value < 1 for value in values)
        assert ("f1_50" in row) == (row["protocol"] == "P1")
