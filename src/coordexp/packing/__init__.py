"""Samples on disk, the packing plan, and the collator that turns packs into model inputs."""
