"""Cut large annotated images into tiles for a small model."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil
from pathlib import Path

from coordexp.infra.files import write_bytes
from coordexp.records.augment import cropped
from coordexp.records.categories import Category
from coordexp.records.images import read_record_rgb
from coordexp.records.schema import Record
from coordexp.records.write_back import write_coco

ANNOTATIONS = "annotations/instances_{split}.json"

Tile = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the image


def grid(width: int, height: int, longest_px: int) -> list[list[Tile]]:
    """The minimum number of equal tiles of at most `longest_px` width and height, as rows.

    They cover the image without overlap; their sides differ by at most one pixel.
    """
    lefts, tops = _edges(width, longest_px), _edges(height, longest_px)
    return [[(x1, y1, x2, y2) for x1, x2 in pairwise(lefts)] for y1, y2 in pairwise(tops)]


def _edges(side: int, longest_px: int) -> list[int]:
    count = ceil(side / longest_px)
    return [round(i * side / count) for i in range(count + 1)]


def write_tiles(
    records: Iterable[Record],
    images: Path,
    out: Path,
    split: str,
    longest_px: int,
    categories: Sequence[Category],
) -> list[Record]:
    """Write `out/<split>/<image>-<row>-<column>.png` and `out/annotations/instances_<split>.json`.

    An object at a tile border is clipped; in a tile with less than half of it, it becomes an ignore region.

    Args:
        records: the large images, with names relative to `images`.

    Returns:
        The records of the tiles, row by row, with image names relative to `out/<split>`.
    """
    tiles = [tile for record in records for tile in _tiles(record, images, out / split, longest_px)]
    write_coco(out / ANNOTATIONS.format(split=split), tiles, categories)
    return tiles


def _tiles(record: Record, images: Path, out: Path, longest_px: int) -> Iterator[Record]:
    picture = read_record_rgb(images, record.image)
    for row, tiles in enumerate(grid(record.width, record.height, longest_px)):
        for column, tile in enumerate(tiles):
            name = f"{Path(record.image).stem}-{row:02d}-{column:02d}.png"
            png = io.BytesIO()
            picture.crop(tile).save(png, format="PNG")
            write_bytes(out / name, png.getvalue())
            yield replace(cropped(record, tile), image=name, metadata={})
