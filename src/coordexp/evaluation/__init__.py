"""Evaluation of a `gt_vs_pred.jsonl`: AP, F1, confidence, set behavior, and the uncertainty of each number."""
