"""Losses on hidden states, logits and decoded boxes: a registry of terms (losses/terms.py) in the order of the loss."""

from coordexp.losses import vocabulary_terms, coord_terms, box_terms  # noqa: F401, I001  (each declares terms)
