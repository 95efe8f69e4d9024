"""One thin entry per stage of dvc.yaml."""
