"""Losses on logits and on decoded boxes: pure functions that return sums and counts, and the objective over them."""
