"""Records written for other programs are equal when they are read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from pycocotools.coco import COCO

from coordexp import cli
from coordexp.records.convert import convert_file
from coordexp.records.schema import Record
from records_folders import LAYOUTS, dataset, write_photos

FORMATS = ("voc", "labelme", "cvat", "csv", "conversations", "yolo", "coco")


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    assert not stopped.value.code


def objects(records: list[Record]) -> list[tuple[str, list[tuple[str, tuple[float, ...]]]]]:
    return sorted(
        (Path(r.image).name, [(o.desc, tuple(round(v, 4) for v in o.bbox_xyxy_px)) for o in r.objects]) for r in records
    )


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("to", ["coco", "yolo"])
def test_every_format_can_be_converted_to_another(fmt, to, tmp_path):
    root, out = tmp_path / "set", tmp_path / ("out.json" if to == "coco" else "out")
    write_photos(fmt, root, {"train": 4, "val": 3})
    images, annotations = LAYOUTS[fmt]
    expected = {}
    for split in ("train", "val"):
        parts = (root / annotations.format(split=split), root / images.format(split=split))
        expected[split] = list(convert_file(dataset(fmt, root).format, *parts, split).splits[split])
        if to == "coco" and split == "val":
            continue
        arguments = ("--annotations", parts[0], "--images", parts[1], "--split", split, "--to", to, "--out", out)
        run("convert", "--source", fmt, *arguments)
    if to == "coco":
        place = (out, root / images.format(split="train"))
        assert len(COCO(str(out)).anns) == 8
        assert objects(list(convert_file("coco", *place, "train").splits["train"])) == objects(expected["train"])
        return
    for split in ("train", "val"):
        result = convert_file("yolo", out / "data.yaml", out, split).splits[split]
        assert objects(list(result)) == objects(expected[split])
