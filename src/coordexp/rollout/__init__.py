"""From a checkpoint and images to parsed, scored predictions: engines, re-scoring, and the files they fill."""
