"""The JSONL record contract, readers of other formats, and the predictions file between decoding and evaluation."""
