"""Each line of the checklist fails when its claim is broken, and only then."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from coordexp.reporting.checklist import Check, run_checks
from coordexp.reporting.inputs import ReportData, ReportInputs, load_report_data
from coordexp.reporting.outcomes import Outcomes, judge
from reporting.synthetic import changed


@pytest.fixture(scope="module")
def loaded(inputs: ReportInputs) -> tuple[ReportData, dict[str, Outcomes]]:
    data = load_report_data(inputs)
    return data, {name: judge(results, data.categories) for name, results in data.results.items()}


def checks_by_claim(data: ReportData, outcomes: dict[str, Outcomes]) -> dict[str, Check]:
    return {check.claim: check for check in run_checks(data, outcomes)}


def edited(data: ReportData, field: str, edit: Callable[[Any], Any]) -> ReportData:
    """A copy of the data with one field edited in place."""
    value = copy.deepcopy(getattr(data, field))
    edit(value)
    return dataclasses.replace(data, **{field: value})


def set_in(*path: str, to: Any) -> Callable[[Any], None]:
    def edit(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = to

    return edit


def set_metric(checkpoint: str, key: str, to: Any) -> Callable[[Any], None]:
    def edit(metrics: Any) -> None:
        metrics.at[key, checkpoint] = to

    return edit


def lose_a_step(logs: Any) -> None:
    logs["stage1"] = logs["stage1"].rename(index={3: 2})


def lose_mass(logs: Any) -> None:
    logs["stage2"]["coord_diag/coord_vocab_mass_mean"] *= 0.5


def raise_softce(logs: Any) -> None:
    logs["stage2"]["raw/softce"] += 0.5


WORSE = {"delta": -0.1, "lo": -0.2, "hi": -0.05, "p_superior": 0.0}


@pytest.mark.parametrize(
    ("claim", "field", "edit"),
    [
        ("The counts in metrics.json", "metrics", set_metric("stage2", "f1.tp_50", 1)),
        ("At least 99 % of the answers", "metrics", set_metric("stage2", "parse.parse_rate", 0.5)),
        ("Every checkpoint predicts at least one box", "metrics", set_metric("stage1", "coco.n_pred", 0)),
        ("In training, coordinate tokens", "logs", lose_mass),
        ("Every step is logged once", "logs", lose_a_step),
        ("softCE minus KL", "logs", raise_softce),
        ("The control trained on at least 90 %", "metadata", set_in("stage1-control", "tokens", to=5)),
        ("No checkpoint exceeds the upper bound", "upper_bound", set_in("mAP", to=0.001)),
        ("Stage 1 is better than the base", "comparison", set_in("stage1_vs_base", "coco.AP50", to=WORSE)),
        ("Stage 2 is not shown to be worse", "comparison", set_in("stage2_vs_stage1", "coco.mAP", to=WORSE)),
    ],
)
def test_a_broken_claim_is_found(
    loaded: tuple[ReportData, dict[str, Outcomes]],
    claim: str,
    field: str,
    edit: Callable[[Any], Any],
) -> None:
    data, outcomes = loaded
    whole = edited(data, "metrics", lambda m: [m.at.__setitem__(("parse.parse_rate", name), 1.0) for name in m])
    before = checks_by_claim(whole, outcomes)
    after = checks_by_claim(edited(whole, field, edit), outcomes)
    (name,) = [c for c in before if c.startswith(claim)]
    assert (before[name].passed, after[name].passed) == (True, False)
    assert before[name].evidence != after[name].evidence
    assert all(before[other].passed == after[other].passed for other in before if other != name)


def test_the_channel_schedule_is_counted(loaded: tuple[ReportData, dict[str, Outcomes]]) -> None:
    data, outcomes = loaded
    run = dataclasses.replace(data.run, params=changed(data.run.params, stage2__b_ratio=0.29))
    check = checks_by_claim(dataclasses.replace(data, run=run), outcomes)["Channel B had its fraction of the steps"]
    assert (check.passed, check.mark) == (False, "✘")
    assert check.evidence == "15 of 30 steps, planned 8"


def test_what_the_files_do_not_determine_has_a_question_mark(loaded: tuple[ReportData, dict[str, Outcomes]]) -> None:
    data, outcomes = loaded
    anonymous = {name: [dataclasses.replace(r, identity={}) for r in rows] for name, rows in data.results.items()}
    checks = checks_by_claim(dataclasses.replace(data, results=anonymous), outcomes)
    assert checks["The trained checkpoints were decoded with the same settings"].mark == "?"
