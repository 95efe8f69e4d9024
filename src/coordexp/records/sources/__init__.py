"""Readers of annotation formats; each yields contract records and counts what it dropped, with a reason."""
