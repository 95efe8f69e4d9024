"""Readers of annotation formats; each yields records and counts what it drops by reason."""
