"""Tokens per object of the three codecs with the real Qwen tokenizer, on the annotated answers of a records file.

PYTHONPATH=src python -m benchmarks.codec_tokens data/tiny/records/val.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate
from tests.qwen import qwen3_tokenizer

from coordexp.geometry.bins import COORD_TOKENS, encode_boxes
from coordexp.geometry.boxes import as_boxes
from coordexp.packing.prepare import text_objects
from coordexp.records.schema import Record, read_records
from coordexp.text.codecs import CODECS, AnswerEncoder, TextObject


def objects_of(record: Record) -> list[TextObject]:
    """The annotated objects of a record as text sees them."""
    boxes = encode_boxes(as_boxes([o.bbox_xyxy_px for o in record.objects]), record.width, record.height)
    return text_objects([o.desc for o in record.objects], boxes)


def main() -> None:
    """Print tokens per object and per answer, and their ratio to `json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="records as `convert` writes them")
    answers = [objects_of(record) for record in read_records(parser.parse_args().records)]
    n_objects, tokenizer = sum(map(len, answers)), qwen3_tokenizer()
    tokenizer.add_tokens(list(COORD_TOKENS), special_tokens=True)
    totals = {}
    for name, codec in CODECS.items():
        encoder = AnswerEncoder(tokenizer, codec)
        totals[name] = sum(len(encoder.encode(objects).ids) for objects in answers)
    rows = [[name, total / n_objects, total / len(answers), total / totals["json"]] for name, total in totals.items()]
    print(tabulate(rows, ["codec", "tokens per object", "tokens per answer", "share of json"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
