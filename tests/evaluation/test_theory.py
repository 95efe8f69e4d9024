"""Data sets made by hand, whose metrics follow from the definitions. Boxes are 40 x 40 px unless said otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordexp.evaluation.categories import MATCHED_BY
from coordexp.evaluation.comparison import compare
from coordexp.evaluation.registry import metric_specs
from coordexp.records.gt_vs_pred import GroundTruth
from evaluation.builders import ANIMALS, CAT, DOG, FAST, box, image, perfect_zoo, pred, run, shifted, with_predictions


def names_found(evaluation):
    return {how: evaluation.metrics["input"][f"names_{how}"] for how in MATCHED_BY}


def test_perfect_predictions_reach_every_maximum():
    metrics = run(perfect_zoo()).metrics
    for key in ("mAP", "AP50", "AP75", "AP90", "APm", "AR1", "AR100"):
        assert metrics["coco"][key] == pytest.approx(1)
    assert metrics["known"]["mAP"] == metrics["held_out"]["mAP"] == pytest.approx(1)
    for key in ("loc_50", "full_50", "full_95", "loc_mean", "full_mean", "full_50_macro", "sem_acc_on_matched_50"):
        assert metrics["f1"][key] == 1
    ones = {"precision": 1, "recall": 1, "f1": 1, "matched_iou_mean": pytest.approx(1)}
    assert metrics["rollout"] == {**ones, "gate_rejected": 0}
    assert metrics["confidence"]["auroc_tp_fp"] is None, "no false positive to be separated from"
    assert metrics["confidence"]["lrp"] == pytest.approx(0)
    assert metrics["coco"]["APs"] is None, "no small object in the data"
    assert set(metrics["set"].values()) == {0}


def test_no_predictions():
    metrics = run(with_predictions(perfect_zoo(), lambda p: [])).metrics
    assert metrics["coco"]["mAP"] == metrics["coco"]["AR100"] == 0
    assert (metrics["f1"]["precision_50"], metrics["f1"]["recall_50"], metrics["f1"]["full_50"]) == (None, 0, 0)
    assert metrics["interval"]["f1.precision_50"] is None
    assert metrics["set"]["over_generation_rate"] is metrics["protocol"]["absent_name_rate"] is None
    assert metrics["f1"]["sem_acc_on_matched_50"] is None
    assert metrics["rollout"]["matched_iou_mean"] is None
    assert metrics["confidence"] == {
        "ece": None,
        "auroc_tp_fp": None,
        "perfect_ranking_mAP": 0,
        "constant_score_mAP": 0,
        "headroom_mAP": 0,
        "best_f1_50": None,
        "best_threshold_50": None,
        **{"lrp": 1, "lrp_loc": None, "lrp_fp": 0, "lrp_fn": 1},
    }
    assert metrics["set"]["omission_rate"] == metrics["parse"]["empty_rate"] == 1
    assert metrics["set"]["count_error_mean"] == -3


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("answered", [False, True])
def test_without_a_counted_object_no_score_is_defined(crowds, answered):
    """An image that is rightly left empty proves nothing about a detector that was shown nothing else."""
    region = GroundTruth("cat", (0.0, 0.0, 200.0, 200.0), iscrowd=True)
    preds = [pred("cat", (20.0, 20.0, 60.0, 60.0)), pred("dog", (300.0, 300.0, 340.0, 340.0))]
    results = [image(i, [region] if crowds else [], preds if answered else []) for i in (1, 2)]
    evaluation = run(results)
    specs = metric_specs(FAST)
    for area, values in evaluation.metrics.items():
        for key, value in values.items():
            if specs[f"{area}.{key}"].better == "higher" and key != "parse_rate":
                assert not value, f"{area}.{key} is {value}"
    for area, key in (("coco", "mAP"), ("f1", "full_50"), ("f1", "full_50_macro"), ("f1", "recall_50")):
        assert evaluation.metrics[area][key] is None
        assert evaluation.metrics["interval"].get(f"{area}.{key}") is None
    assert evaluation.metrics["rollout"]["f1"] is evaluation.metrics["set"]["omission_rate"] is None
    assert set(compare(evaluation, evaluation).values()) == {None}


def test_all_boxes_shifted_by_5_px():
    """IoU = 35^2 / (2 * 40^2 - 35^2) = 0.620: right at .50, .55 and .60, wrong at the other seven thresholds."""
    metrics = run(with_predictions(perfect_zoo(), lambda p: [replace(p, bbox_xyxy_px=shifted(p.bbox_xyxy_px, 5, 5))]))
    metrics = metrics.metrics
    assert metrics["coco"]["mAP"] == pytest.approx(0.3)
    assert (metrics["coco"]["AP50"], metrics["coco"]["AP75"]) == (pytest.approx(1), 0)
    assert metrics["f1"]["loc_mean"] == metrics["f1"]["full_mean"] == pytest.approx(0.3)
    assert metrics["rollout"]["matched_iou_mean"] == pytest.approx(35**2 / (2 * 40**2 - 35**2))


def test_one_class_renamed_to_a_name_outside_the_list():
    evaluation = run(with_predictions(perfect_zoo(), lambda p: [replace(p, desc="wolf") if p.desc == "dog" else p]))
    metrics = evaluation.metrics
    assert metrics["coco"]["mAP"] == pytest.approx(2 / 3)
    assert metrics["known"]["mAP"] == pytest.approx(1 / 2)
    assert metrics["held_out"]["mAP"] == pytest.approx(1)
    assert metrics["f1"]["loc_50"] == 1
    assert metrics["f1"]["full_50"] == metrics["f1"]["sem_acc_on_matched_50"] == pytest.approx(2 / 3)
    assert names_found(evaluation) == {"exact": 8, "normalised": 0, "semantic": 0, "ambiguous": 0, "unmapped": 4}
    assert metrics["f1"]["full_50_class_macro"] == pytest.approx(2 / 3)


def test_swapped_names_keep_class_agnostic_scores():
    swap = {"cat": "dog", "dog": "cat", "barn owl": "barn owl"}
    metrics = run(with_predictions(perfect_zoo(), lambda p: [replace(p, desc=swap[p.desc])])).metrics
    assert (metrics["known"]["mAP"], metrics["held_out"]["mAP"]) == (0, pytest.approx(1))
    assert metrics["f1"]["loc_50"] == metrics["rollout"]["f1"] == 1
    assert metrics["f1"]["full_50"] == pytest.approx(1 / 3)


def test_names_that_differ_in_case_underscore_and_space_are_the_same_name():
    evaluation = run(with_predictions(perfect_zoo(), lambda p: [replace(p, desc=p.desc.upper().replace(" ", "_"))]))
    assert evaluation.metrics["coco"]["mAP"] == evaluation.metrics["f1"]["full_50"] == pytest.approx(1)
    assert names_found(evaluation) == {"exact": 0, "normalised": 12, "semantic": 0, "ambiguous": 0, "unmapped": 0}


def test_every_box_doubled_with_the_copy_ranked_below():
    """One hit and one duplicate per object: precision 1/2, F1 2/3. AP is blind to it, being ranked last."""
    evaluation = run(with_predictions(perfect_zoo(), lambda p: [p, replace(p, score=0.1)]))
    metrics = evaluation.metrics
    assert metrics["coco"]["mAP"] == pytest.approx(1)
    assert (metrics["f1"]["precision_50"], metrics["f1"]["recall_50"]) == (0.5, 1)
    assert metrics["f1"]["full_50"] == metrics["f1"]["full_50_macro"] == pytest.approx(2 / 3)
    assert metrics["set"]["dup_pairs_90"] == metrics["set"]["dup_pairs_95"] == 3
    assert metrics["set"]["dup_image_rate"] == 1
    assert metrics["set"]["count_error_mean"] == 3
    assert metrics["set"]["over_generation_rate"] == 0.5
    assert metrics["confidence"]["auroc_tp_fp"] == 1
    assert (metrics["guarded"]["full_50"], metrics["guarded"]["n_pred"], metrics["guarded"]["n_removed"]) == (1, 12, 12)
    assert metrics["guarded"]["dup_image_rate"] == metrics["guarded"]["count_error_mean"] == 0
    assert [row["pairs"] for row in evaluation.details["worst_duplicates"]] == [3] * 4


def test_every_box_doubled_with_equal_scores():
    """Hits and duplicates alternate: the k-th hit has precision k / (2k - 1), and recall r needs k = ceil(rN) hits."""
    n = 8  # so that no k/n is a rounding error away from a recall point
    results = [image(i, [("cat", box(0, 0))], [pred("cat", box(0, 0))] * 2) for i in range(n)]
    k = np.maximum(np.ceil(np.arange(101) * n / 100), 1)
    metrics = run(results).metrics
    assert metrics["coco"]["mAP"] == pytest.approx((k / (2 * k - 1)).mean())
    assert metrics["confidence"]["constant_score_mAP"] == metrics["coco"]["mAP"]
    assert metrics["confidence"]["perfect_ranking_mAP"] == pytest.approx(1)
    assert metrics["confidence"]["auroc_tp_fp"] == 0.5


def test_half_of_the_objects_missed():
    """Recall stops at 1/2, so 51 of the 101 recall points have precision 1."""
    results = perfect_zoo(4)
    results[2:] = with_predictions(results[2:], lambda p: [])
    metrics = run(results).metrics
    assert metrics["coco"]["mAP"] == pytest.approx(51 / 101)
    assert metrics["coco"]["AR100"] == pytest.approx(0.5)
    assert metrics["f1"]["full_50"] == pytest.approx(2 / 3)
    assert metrics["f1"]["full_50_macro"] == pytest.approx(1 / 2), "two images at 1, two at 0"
    assert metrics["set"]["omission_rate"] == 0.5


@pytest.mark.parametrize(("wrong_score", "ap", "auroc"), [(0.95, 0.5, 0.0), (0.05, 1.0, 1.0), (0.9, None, 0.5)])
def test_as_many_false_positives_as_true_positives(wrong_score, ap, auroc):
    """Ranked first, N inventions cap the precision of all N hits at N / 2N; ranked last they cost nothing."""
    results = [
        image(i, [("cat", box(0, 0))], [pred("cat", box(0, 0)), pred("cat", box(3, 3), wrong_score)]) for i in range(8)
    ]
    metrics = run(results).metrics
    if ap is not None:
        assert metrics["coco"]["mAP"] == pytest.approx(ap)
    assert metrics["confidence"]["auroc_tp_fp"] == auroc
    assert metrics["rollout"]["gate_rejected"] == 8, "the inventions"
    assert metrics["confidence"]["perfect_ranking_mAP"] == pytest.approx(1)


def test_predictions_inside_a_crowd_region_do_not_count():
    crowd = GroundTruth("cat", (100.0, 100.0, 300.0, 300.0), iscrowd=True)
    inside = [pred("cat", (x, 120.0, x + 40, 160.0), 0.99) for x in (110.0, 160.0, 210.0)]
    metrics = run([image(1, [("cat", box(0, 0)), crowd], [*inside, pred("cat", box(0, 0), 0.5)])]).metrics
    assert metrics["coco"]["n_gt"] == 1
    assert metrics["coco"]["mAP"] == pytest.approx(1)
    assert (metrics["f1"]["tp_50"], metrics["f1"]["fp_50"], metrics["f1"]["fn_50"]) == (1, 0, 0)
    assert metrics["confidence"]["auroc_tp_fp"] is None


def test_a_correct_name_can_lose_its_object_to_an_incorrect_one():
    """F1 matches by IoU alone: the dog at IoU 0.9 takes the cat's box from the cat at 0.8. AP does not."""
    cat = (0.0, 0.0, 100.0, 100.0)
    preds = [pred("dog", (0.0, 0.0, 100.0, 90.0)), pred("cat", (0.0, 0.0, 100.0, 80.0))]
    metrics = run([image(1, [("cat", cat)], preds)]).metrics
    assert (metrics["f1"]["tp_50"], metrics["f1"]["fp_50"], metrics["f1"]["fn_50"]) == (0, 2, 1)
    assert metrics["f1"]["loc_50"] == pytest.approx(2 / 3)
    assert metrics["f1"]["full_50"] == metrics["f1"]["sem_acc_on_matched_50"] == 0
    assert metrics["coco"]["AP50"] == pytest.approx(1)


def test_greedy_by_iou_and_hungarian_disagree_where_they_should():
    """Two boxes, two objects: the best pair first leaves one of each over, the assignment pairs both."""
    objects = [("cat", (0.0, 0.0, 100.0, 10.0)), ("cat", (40.0, 0.0, 140.0, 10.0))]
    preds = [pred("cat", (35.0, 0.0, 135.0, 10.0)), pred("cat", (75.0, 0.0, 175.0, 10.0))]
    metrics = run([image(1, objects, preds)]).metrics
    # IoU of the first prediction: 65/135 and 95/105; of the second: 25/175 (under the gate) and 65/135.
    assert metrics["f1"]["loc_30"] == 0.5
    assert metrics["rollout"]["f1"] == 1
    assert metrics["rollout"]["matched_iou_mean"] == pytest.approx(65 / 135)


@pytest.mark.parametrize(("score", "n_right", "ece"), [(0.75, 3, 0.0), (1.0, 2, 0.5), (0.0, 1, 0.25), (-0.5, 3, None)])
def test_calibration_error_of_one_confidence(score, n_right, ece):
    """Four predictions of one confidence, n right: the error is |score - n/4|, and None for a score below 0."""
    places = [box(0, 0) if i < n_right else box(3, 3) for i in range(4)]
    results = [image(i, [("cat", box(0, 0))], [pred("cat", at, score)]) for i, at in enumerate(places)]
    assert run(results).metrics["confidence"]["ece"] == ece


def test_an_empty_image_scores_one_without_and_zero_with_a_prediction():
    results = [image(1, [], []), image(2, [], [pred("cat", box(0, 0))]), image(3, [("dog", box(0, 0))], [])]
    evaluation = run(results, (CAT, DOG))
    assert [row["f1_full_50"] for row in evaluation.per_image] == [1, 0, 0]
    assert evaluation.metrics["f1"]["full_50_macro"] == pytest.approx(1 / 3)
    assert evaluation.metrics["held_out"]["mAP"] is None
    assert evaluation.metrics["interval"]["held_out.mAP"] is None


def test_only_predictions_of_absent_categories_separate_the_two_protocols():
    """Predictions of categories that the image does not show cost precision, unless the prompt rules them out."""
    results = [image(i, [("cat", box(0, 0))], [pred("cat", box(0, 0)), pred("dog", box(3, 0))]) for i in range(3)]
    evaluation = run(results)
    assert evaluation.metrics["f1"]["full_50"] == pytest.approx(2 / 3)
    assert evaluation.metrics["f1"]["full_50_annotated"] == evaluation.metrics["protocol"]["positive_full_50"] == 1
    assert evaluation.metrics["protocol"]["gap_full_50"] == pytest.approx(1 / 3)
    assert evaluation.metrics["protocol"]["absent_name_rate"] == 0.5


def test_reversed_generation_order_violates_reading_order_everywhere():
    reversed_order = [replace(r, pred=r.pred[::-1]) for r in perfect_zoo()]
    assert run(reversed_order).metrics["set"]["order_violation_rate"] == 1
    assert run(reversed_order).metrics["coco"]["mAP"] == pytest.approx(1)


def test_one_box_around_everything():
    whole = pred("cat", (0.0, 0.0, 400.0, 400.0))
    results = perfect_zoo(2)
    results[0] = replace(results[0], pred=(whole,))
    metrics = run(results).metrics
    assert metrics["set"]["giant_box_rate"] == 0.5
    assert run([image(1, [("cat", box(0, 0))], [whole])], ANIMALS).metrics["set"]["giant_box_rate"] == 0, (
        "one object only"
    )
