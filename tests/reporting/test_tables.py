"""Published numbers follow from their own counts and name their protocol."""

from __future__ import annotations

import numpy as np
import pytest

from coordexp.matching.summary import MatchCounts, f1_from_counts
from coordexp.reporting.tables import published_tables


def test_our_f1_reproduces_the_decision_note_from_its_counts():
    for row in published_tables()["stage2_decision_note"]["rows"]:
        assert row["matched"] + row["fn"] == 3657
        counts = MatchCounts(n_pred=row["n_pred"], n_gt=row["matched"] + row["fn"], n_matched=row["matched"])
        assert (counts.n_false_positive, counts.n_false_negative) == (row["fp"], row["fn"])
        published = row["precision"], row["recall"], row["f1"]
        # Half a digit, and a little more: the note rounds 2394 of 3755, which is .637550 less a hair, up.
        assert (counts.precision, counts.recall, counts.f1) == pytest.approx(published, abs=5.1e-5)
        resampled = f1_from_counts(np.array([[row["matched"], row["fp"], row["fn"]]], np.float64))
        assert float(resampled[0]) == pytest.approx(counts.f1)


@pytest.mark.parametrize("name", ["coco_anchors", "lvis_anchors"])
def test_every_published_number_has_a_protocol_and_a_source(name):
    table = published_tables()[name]
    assert len({row["system"] for row in table["rows"]}) == len(table["rows"])
    for row in table["rows"]:
        assert row["protocol"] in table["protocols"]
        assert row["mark"] in {"paper", "source read", "reported"}
        values = [row[key] for key in ("mAP", "AP50", "AP75", "f1_50", "f1_95", "f1_mean") if key in row]
        assert values
        assert all(0 < value < 1 for value in values)
        assert ("f1_50" in row) == (row["protocol"] == "oracle-class")
