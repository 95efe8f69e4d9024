"""Composed scenes: named emoji sprites on photo backgrounds with exact boxes, the data of the embedded profiles."""
