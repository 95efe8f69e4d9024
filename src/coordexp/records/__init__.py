"""The JSONL contract, sources that fill it, and the hand-over file between decoding and evaluation."""
