"""What a `gt_vs_pred.jsonl` is worth: AP, F1, confidence, set behaviour, and how sure we are of each number."""
