"""Losses against their floors."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from coordexp.config.loading import load_params
from coordexp.errors import DataError
from coordexp.losses.coord_terms import soft_target, target_entropy
from coordexp.reporting.training import (
    change_above_floor,
    channels,
    correlations_sentence,
    counters_table,
    entropy_nats,
    loss_columns,
    loss_floor,
    of_channel,
    slot_correlations,
    target_entropy_nats,
    term_meaning,
    training_sentence,
    training_table,
    w1_sentence,
)
from reporting.synthetic import REPOSITORY, changed

PARAMS = load_params(REPOSITORY / "params.yaml")


def log(**columns: list[float]) -> pd.DataFrame:
    """A log of ten steps; `a__b` names the column a/b."""
    return pd.DataFrame({k.replace("__", "/"): np.array(v, float) for k, v in columns.items()})


def falling(first: float, last: float) -> list[float]:
    return [first] + [(first + last) / 2] * 8 + [last]


@pytest.mark.parametrize(
    ("first", "last", "floor", "shown"),
    [
        (4.112, 3.112, 2.112, "-50 %"),
        (10.0, 9.9, 0.0, "flat"),
        (1.0, 3.0, 0.0, "+200 %"),
        (2.112, 2.2, 2.112, "n/a"),
        (-0.5, -0.1, 0.0, "n/a"),
    ],
)
def test_change_is_measured_above_the_lower_bound(first: float, last: float, floor: float, shown: str) -> None:
    assert change_above_floor(first, last, floor) == shown


def test_the_lower_bound_of_softce_has_the_weight_of_its_stage() -> None:
    params = changed(PARAMS, softce_weight=0.5, stage1__softce_weight=2.0)
    assert loss_floor("softce", params, "stage2") == pytest.approx(0.5 * 2.1121, abs=1e-3)
    assert loss_floor("softce", params, "stage1-control") == pytest.approx(2.0 * 2.1121, abs=1e-3)
    assert (loss_floor("gate", params, "stage1"), loss_floor("text_ce", params, "stage1")) == (0.0, None)


def test_rows_give_first_and_last_value_and_fraction_of_a_term() -> None:
    columns = {"loss__total": falling(8, 4), "loss__softce": falling(6.112, 3.112), "loss__w1": falling(2, 0.001)}
    rows = training_table(log(**columns), PARAMS, "stage1").splitlines()[2:]
    cells = {row.split(" | ")[0]: row.split(" | ")[2:] for row in rows}
    assert cells["| `loss/total`"] == ["8", "4", "n/a", "-50 %", " |"]
    assert cells["| `loss/softce`"] == ["6.112", "3.112", "2.112", "-75 %", "78 % |"]
    assert cells["| `loss/w1`"][-1] == "under 0.1 % |"


def test_a_term_of_weight_0_shows_its_raw_value() -> None:
    columns = {"loss__total": falling(8, 4), "raw__bbox_giou": falling(0.5, 0.25), "loss__w1": falling(2, 1)}
    rows = training_table(log(**columns, raw__w1=falling(2, 1)), PARAMS, "stage2").splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| `loss/total`", "| `loss/w1`", "| `raw/bbox_giou`"]
    assert rows[-1] == "| `raw/bbox_giou` | stage 2: 1 - GIoU (weight 0) | 0.5 | 0.25 | n/a | -50 % |  |"


def test_a_channel_has_its_rows_and_their_logged_columns() -> None:
    both = log(loss__softce=falling(2, 1), loss__total=falling(3, 2)).assign(channel=["A", "B"] * 5)
    both["loss/bbox_ciou"] = both["loss/total"].where(both["channel"] == "B")
    assert channels(both) == ["A", "B"]
    assert loss_columns(both) == ["loss/total", "loss/softce", "loss/bbox_ciou"], (
        "the total, then the objective's order"
    )
    assert loss_columns(of_channel(both, "A")) == ["loss/total", "loss/softce"]
    assert of_channel(both, "B").index.tolist() == [1, 3, 5, 7, 9]
    assert channels(log(loss__total=falling(3, 2))) == []


def test_meanings_are_those_of_the_parameters() -> None:
    assert term_meaning("text_ce") == "cross-entropy of text tokens"
    assert term_meaning("bbox_ciou") == "stage 2: 1 - CIoU"
    assert term_meaning("coord_reg") == "sum of the coordinate terms"
    assert term_meaning("unheard_of") == ""


def test_losses_are_correlated_with_slots_by_hand() -> None:
    both = pd.DataFrame({"coord_diag/coord_tokens": [4.0, 8.0, 12.0], "raw/softce": [1.0, 2.0, 3.0], "raw/w1": 0.5})
    found = slot_correlations(both)
    assert found["raw/softce"] == pytest.approx(1.0)
    assert found["raw/w1"] is found["raw/gate"] is None
    assert correlations_sentence(both).endswith("in a step: `raw/softce` +1.00.")
    assert correlations_sentence(both.drop(columns="raw/softce")) == ""


def test_sentences_are_empty_where_nothing_was_logged() -> None:
    bare = log(loss__total=falling(2, 1))
    assert training_sentence(bare, PARAMS) == ""
    assert w1_sentence(bare) == ""


def test_the_fraction_of_w1_is_reported_without_a_verdict() -> None:
    assert w1_sentence(log(loss__softce=falling(3, 1.5), loss__w1=falling(1, 0.5))) == (
        "W1 is 25 % of softCE + W1 at the end."
    )
    assert w1_sentence(log(loss__softce=[0.0] * 10, loss__w1=[0.0] * 10)) == "", "a run without coordinate slots"


def test_the_first_forward_has_rows_next_to_the_last() -> None:
    columns = {"coord_diag__expected_bin_mae": falling(40, 30), "coord_diag_a1__expected_bin_mae": falling(20, 10)}
    rows = training_table(log(**columns), PARAMS, "stage2").splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| `coord_diag/expected_bin_mae`",
        "| `coord_diag_a1/expected_bin_mae`",
    ]
    assert "first forward: mean error" in rows[1]
    assert "first forward" not in rows[0]


def test_counters_are_summed_and_other_columns_averaged_at_their_ends() -> None:
    table = counters_table(log(stage2_ab__fallback_total=[1] * 10, rollout__f1=falling(0.5, 0.75), lr=falling(1, 0)))
    assert "| `stage2_ab/fallback_total` | 10 | sum over steps |" in table
    assert "| `rollout/f1` | 0.5 to 0.75 | first to last tenth |" in table
    assert "lr" not in table


@pytest.mark.parametrize("kind", ["gaussian", "triangular"])
@pytest.mark.parametrize(("sigma", "truncate"), [(2.0, 8), (1.5, 8), (0.5, 4), (6.0, 3)])
def test_the_lower_bound_is_the_entropy_of_the_training_target(kind: str, sigma: float, truncate: int) -> None:
    q = soft_target(torch.tensor([500.0]), kind, sigma, truncate, torch.float64)
    assert target_entropy_nats(kind, sigma, truncate) == pytest.approx(float(target_entropy(q)), abs=1e-12)


def test_the_lower_bound_of_two_bins_is_the_mean_over_all_fractions() -> None:
    targets = 500 + (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    q = soft_target(targets, "two_bin", 2.0, 8, torch.float64)
    assert target_entropy_nats("two_bin", 2.0, 8) == pytest.approx(float(target_entropy(q).mean()), abs=1e-4)
    assert entropy_nats([1, 1, 1, 1]) == pytest.approx(np.log(4))
    with pytest.raises(DataError, match="found 'box', expected gaussian"):
        target_entropy_nats("box", 2.0, 8)
