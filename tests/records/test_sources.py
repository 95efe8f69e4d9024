"""Every source format, from files in the layout of its publisher to records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coordexp.errors import DataError
from coordexp.records.manifest import READERS
from coordexp.records.policy import RecordSet
from coordexp.records.sources.base import Reading, SplitFiles
from coordexp.records.sources.coco import patch_path
from coordexp.records.sources.yolo import label_path
from records_folders import annotation, instances, kept, write_photos

COCO_URL = "http://images.cocodataset.org"


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def read(fmt: str, root: Path, annotations: str, images: str, split: str = "train") -> Reading:
    return READERS[fmt](SplitFiles(root, annotations, images, split))


def convert(reading: Reading, **policies: Any) -> RecordSet:
    return kept(reading, size=(100, 80), **policies)


def shown(result: RecordSet) -> list[tuple[str, list[tuple[str, tuple[float, ...]]]]]:
    return [(r.image, [(o.desc, o.bbox_xyxy_px) for o in r.objects]) for r in result.records]


def reasons(result: RecordSet) -> list[str]:
    return [p.reason for p in result.problems]


# LVIS -----------------------------------------------------------------------------------------------------------------


def test_lvis_uses_the_path_in_the_url_and_keeps_the_federated_fields(tmp_path):
    lvis = {
        "images": [
            {
                "id": 391895, "height": 80, "width": 100, "coco_url": f"{COCO_URL}/train2017/000000391895.jpg",
                "neg_category_ids": [3, 2, 999], "not_exhaustive_category_ids": [1],
            }
        ],
        "annotations": [{"id": 1, "image_id": 391895, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12.0}],
        "categories": [
            {"id": 1, "name": "aerosol_can", "synset": "aerosol.n.02", "frequency": "c", "synonyms": ["aerosol_can"]},
            {"id": 2, "name": "bow_(weapon)", "synset": "bow.n.04", "frequency": "r"},
            {"id": 3, "name": "cat", "synset": "cat.n.01", "frequency": "f"},
        ],
    }  # fmt: skip
    dump(tmp_path / "lvis_v1_val.json", lvis)
    reading = read("lvis", tmp_path, "lvis_v1_val.json", ".")
    (record,) = convert(reading).records
    assert record.image == "train2017/000000391895.jpg"
    assert record.metadata == {
        "image_id": 391895,
        "absent": ["bow (weapon)", "cat"],
        "not_exhaustive": ["aerosol can"],
    }
    assert [c.name for c in reading.categories] == ["aerosol can", "bow (weapon)", "cat"]
    assert [c.frequency for c in reading.categories] == ["c", "r", "f"]
    assert record.objects[0].desc == "aerosol can"


# Objects365 -----------------------------------------------------------------------------------------------------------


def test_objects365_finds_images_in_their_patches(tmp_path):
    image = {"id": 7, "file_name": "images/v1/patch8/objects365_v1_00420917.jpg", "width": 100, "height": 80}
    row = annotation(1, 7, 3, [1, 1, 9, 9], isfake=0, area=80.25)
    dump(tmp_path / "zhiyuan_objv2_train.json", instances([image], [row]))
    result = convert(read("objects365", tmp_path, "zhiyuan_objv2_train.json", "train"))
    assert shown(result) == [("train/patch8/objects365_v1_00420917.jpg", [("cat", (1, 1, 10, 10))])]
    assert result.records[0].objects[0].area_px2 == 80.25
    assert patch_path("a.jpg") == "a.jpg"


# RefCOCO --------------------------------------------------------------------------------------------------------------

REF_IMAGE = {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 100, "height": 80}
REFS = [
    {
        "ref_id": 0, "ann_id": 1719310, "category_id": 1, "image_id": 581857, "split": split,
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "sentences": [
            {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady"},
            {"tokens": ["blue", "shirt"], "raw": "blue shirt", "sent_id": 1, "sent": "blue shirt"},
        ],
    }
    for split in ("train", "testA")
]  # fmt: skip
THE_LADY = [
    ("train2014/COCO_train2014_000000581857.jpg", [("the lady", (10, 20, 40, 60))]),
    ("train2014/COCO_train2014_000000581857.jpg", [("blue shirt", (10, 20, 40, 60))]),
]


def write_instances(folder: Path, *more: dict[str, Any]) -> None:
    rows = [annotation(1719310, 581857, 1, [10, 20, 30, 40]), *more]
    dump(folder / "instances.json", instances([REF_IMAGE], rows))


def test_refcoco_is_read_from_a_list_of_refs(tmp_path):
    write_instances(tmp_path / "refcoco")
    dump(tmp_path / "refcoco" / "refs(unc).json", REFS)
    result = convert(read("refcoco", tmp_path, "refcoco/refs(unc).json", "train2014"))
    assert shown(result) == THE_LADY
    assert [r.metadata for r in result.records] == [{"phrase": "the lady"}, {"phrase": "blue shirt"}]


def test_a_ref_without_its_annotation_is_counted(tmp_path):
    write_instances(tmp_path)
    dump(tmp_path / "refs.json", [REFS[0], REFS[0] | {"ann_id": 4, "ref_id": 77}])
    result = convert(read("refcoco", tmp_path, "refs.json", "train2014"))
    assert [(p.reason, p.key) for p in result.problems] == [("unknown_annotation", "ref 77")]
    with pytest.raises(DataError, match="no ref of split 'val'"):
        read("refcoco", tmp_path, "refs.json", "train2014", "val")


def test_refcoco_is_read_in_the_form_of_mdetr(tmp_path):
    image = REF_IMAGE | {"caption": "the lady", "dataset_name": "refcoco", "original_id": 581857, "tokens_negative": []}
    row = annotation(0, 581857, 1, [10, 20, 30, 40], tokens_positive=[[0, 8]])
    source = instances([image], [row]) | {"categories": [{"id": 1, "name": "object"}], "info": []}
    dump(tmp_path / "finetune_refcoco_train.json", source)
    assert shown(convert(read("refcoco", tmp_path, "finetune_refcoco_train.json", "train2014"))) == THE_LADY[:1]


def test_a_phrase_is_dropped_with_its_box(tmp_path):
    write_instances(tmp_path, annotation(2, 581857, 1, [1, 1, 0, 5]), annotation(3, 581857, 1, []))
    dump(tmp_path / "refs.json", [REFS[0] | {"ann_id": i, "ref_id": i} for i in (1719310, 2, 3)])
    result = convert(read("refcoco", tmp_path, "refs.json", "train2014"))
    assert shown(result) == THE_LADY
    assert reasons(result) == ["bbox_too_thin", "bbox_too_thin", "bbox_malformed", "bbox_malformed"]


def test_a_record_without_an_object_yields_no_phrase_prompt(tmp_path):
    objects = {"lost": [{"desc": "cat", "bbox_2d": [1, 1, 1.5, 9]}], "empty": [],
               "crowd": [{"desc": "cat", "bbox_2d": [1, 1, 9, 9], "metadata": {"iscrowd": "1"}}],
               "there": [{"desc": "cat", "bbox_2d": [1, 1, 9, 9]}]}  # fmt: skip
    lines = [{"images": [f"{n}.jpg"], "width": 100, "height": 80, "objects": o} for n, o in objects.items()]
    lines.append(
        lines[1] | {"images": ["absent.jpg"], "metadata": {"phrase": "a dog"}}
    )  # in the prompt, and known to be absent
    (tmp_path / "r.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = kept(read("jsonl", tmp_path, "r.jsonl", "."), prompt="phrase")
    assert [r.image for r in result.records] == ["there.jpg", "absent.jpg"]
    assert reasons(result) == ["bbox_too_thin", "phrase_missing", "crowd"]
    assert len(kept(read("jsonl", tmp_path, "r.jsonl", ".")).records) == 5


@pytest.mark.parametrize("number", [[], {}, None, "x", 1e400], ids=repr)
def test_a_ref_with_an_invalid_id_is_counted(tmp_path, number):
    write_instances(tmp_path)
    dump(tmp_path / "refs.json", [REFS[0], REFS[0] | {"ann_id": number}])
    result = convert(read("refcoco", tmp_path, "refs.json", "train2014"))
    assert (shown(result), reasons(result)) == (THE_LADY, ["unknown_annotation"])


@pytest.mark.parametrize(
    "columns",
    [
        {
            "image_path": ["coco/train2014/COCO_train2014_000000581857.jpg"],
            "captions": [["the lady", "blue shirt"]],
            "bbox": [[10.0, 20.0, 40.0, 60.0]],
            "split": ["train"],
        },
        {
            "question_id": ["1"],
            "file_name": ["COCO_train2014_000000581857_16.jpg"],
            "answer": [["the lady", "blue shirt"]],
            "bbox": [[10.0, 20.0, 30.0, 40.0]],
            "iscrowd": [0],
        },
    ],
    ids=["corners", "width and height"],
)
def test_refcoco_is_read_from_parquet(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert shown(convert(read("refcoco", tmp_path, "train.parquet", "train2014"))) == THE_LADY


@pytest.mark.parametrize("name", ["refs(unc).p", "refs(google).pkl"])
def test_pickles_are_refused_by_their_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"pickles are not read.*parquet"):
        read("refcoco", tmp_path, name, "train2014")


def test_other_parquet_files_are_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"has the columns \['a'\]"):
        read("refcoco", tmp_path, "a.parquet", ".")
    with pytest.raises(DataError, match="not a parquet file"):
        read("refcoco", tmp_path, "b.parquet", ".")


# Visual Genome --------------------------------------------------------------------------------------------------------


def write_image_data(folder: Path) -> None:
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    row = {"image_id": 1, "url": url, "width": 100, "height": 80, "coco_id": None, "flickr_id": None}
    dump(folder / "image_data.json", [row])


def test_visual_genome_objects(tmp_path):
    write_image_data(tmp_path)
    objects = [
        {"object_id": 1058498, "names": ["clock"], "x": 42, "y": 9, "w": 7, "h": 33, "synsets": ["clock.n.01"]},
        {"object_id": 5046, "names": [], "x": 1, "y": 1, "w": 7, "h": 3, "synsets": []},
    ]
    entries = [{"image_id": 1, "objects": objects, "image_url": "x"}, {"image_id": 2, "objects": []}]
    dump(tmp_path / "objects.json", entries)
    result = convert(read("visual_genome", tmp_path, "objects.json", "."))
    assert shown(result) == [("VG_100K_2/1.jpg", [("object", (1, 1, 8, 4)), ("clock", (42, 9, 49, 42))])]
    assert result.records[0].objects[0].metadata == {"iscrowd": 1, "lost": "desc_missing"}
    assert reasons(result) == ["unknown_image", "desc_missing"]
    assert result.records[0].metadata == {"image_id": 1, "absent": []}


def test_visual_genome_regions(tmp_path):
    write_image_data(tmp_path)
    region = {
        "region_id": 1382,
        "image_id": 1,
        "phrase": "the clock is green ",
        "x": 3,
        "y": 4,
        "width": 82,
        "height": 29,
    }
    dump(tmp_path / "region_descriptions.json", [{"id": 1, "regions": [region]}])
    result = convert(read("visual_genome", tmp_path, "region_descriptions.json", "images"))
    assert shown(result) == [("images/VG_100K_2/1.jpg", [("the clock is green", (3, 4, 85, 33))])]


# YOLO -----------------------------------------------------------------------------------------------------------------


def test_yolo(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "images" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "train" / f"{name}.jpg").touch()
    labels = tmp_path / "labels" / "train"
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text("1 0.5 0.5 0.2 0.25\n0 0.1 0.1 0.3 0.1 0.2 0.4\n\n")
    (labels / "b.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.5 0.5\n0 a b c d\n0 0.5 0.5 nan 0.1\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nnames:\n  0: cat\n  1: red mug\n")
    reading = read("yolo", tmp_path, "data.yaml", "images/train")
    result = convert(reading)
    assert [name for name, _ in shown(result)] == [f"images/train/{name}.jpg" for name in ("a", "c")]
    ((cat, cat_box), (mug, mug_box)) = shown(result)[0][1]
    assert (cat, mug) == ("cat", "red mug")
    assert cat_box == pytest.approx((10, 8, 30, 32))
    assert mug_box == pytest.approx((40, 30, 60, 50))
    assert reasons(result) == ["unknown_category", *["bbox_malformed"] * 3, "record_incomplete"]
    assert {Path(p.file).name for p in result.problems} == {"b.txt"}


def write_yolo(root: Path, more: str = "", **labels: str | bytes) -> None:
    """Empty images and their label files below `train`; keys that start with `_` have no image."""
    for name, text in labels.items():
        for folder in ("images", "labels"):
            (root / folder / "train").mkdir(parents=True, exist_ok=True)
        if not name.startswith("_"):
            (root / "images" / "train" / f"{name}.jpg").touch()
        (root / "labels" / "train" / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    (root / "data.yaml").write_text(f"names: [cat]\n{more}", encoding="utf-8-sig")


BOX = "0 0.5 0.5 0.2 0.25"


def test_a_byte_order_mark_loses_no_object(tmp_path):
    write_yolo(tmp_path, a=f"{BOX}\n0 0.1 0.1 0.1 0.1\n".encode("utf-8-sig"))
    result = convert(read("yolo", tmp_path, "data.yaml", "images/train"))
    assert ([len(r.objects) for r in result.records], result.problems) == ([2], [])


def test_labels_without_an_image_are_counted(tmp_path):
    write_yolo(tmp_path, a=BOX, _gone=f"{BOX}\n{BOX}\n", _empty="", _classes="cat\n", _binary=b"\xff\xfe\x00")
    (tmp_path / "images" / "train" / "a.txt").write_text(BOX)  # next to the image, where it is not read
    result = convert(read("yolo", tmp_path, "data.yaml", "images/train"))
    assert [(p.reason, Path(p.file).relative_to(tmp_path).as_posix(), p.detail[:9]) for p in result.problems] == [
        ("label_unused", "images/train/a.txt", "1 objects"),
        ("label_unused", "labels/train/_gone.txt", "2 objects"),
    ]


def test_images_in_linked_folders_are_found(tmp_path):
    write_yolo(tmp_path, a=BOX)
    write_yolo(tmp_path / "other", b=BOX)
    for kind in ("images", "labels"):
        (tmp_path / kind / "train" / "more").symlink_to(tmp_path / "other" / kind / "train", target_is_directory=True)
        (tmp_path / kind / "train" / "up").symlink_to(tmp_path / kind, target_is_directory=True)
    result = convert(read("yolo", tmp_path, "data.yaml", "images/train"))
    assert [(r.image, len(r.objects)) for r in result.records] == [
        ("images/train/a.jpg", 1), ("images/train/more/b.jpg", 1),
    ]  # fmt: skip
    assert result.problems == []


def test_keypoints_after_a_box_are_not_a_polygon(tmp_path):
    points = " 0.9 0.9 0.95 0.95 0 0 0.92 0.9"
    write_yolo(tmp_path, "kpt_shape: [4, 2]\n", a=BOX + points, b=BOX, c=BOX + " 0.9 0.9")
    result = convert(read("yolo", tmp_path, "data.yaml", "images/train"))
    boxes = [[o.bbox_xyxy_px for o in r.objects] for r in result.records]
    assert [list(map(pytest.approx, found)) for found in boxes] == [[(40, 30, 60, 50)]] * 2
    assert reasons(result) == ["bbox_malformed", "record_incomplete"]
    write_yolo(tmp_path, "kpt_shape: 4\n", a=BOX)
    with pytest.raises(DataError, match="kpt_shape is 4; expected"):
        read("yolo", tmp_path, "data.yaml", "images/train")


def test_a_polygon_that_starts_with_a_box_around_its_points_is_refused(tmp_path):
    pose = BOX + " 0.41 0.39 0.59 0.4 0 0 0.42 0.61 0.58 0.6"
    star = "0 0.5 0.5 0.6 0.7 0.3 0.6 0.7 0.4 0.3 0.3"
    circle = "0 " + " ".join(f"{0.5 + 0.3 * math.cos(a)} {0.5 + 0.3 * math.sin(a)}" for a in range(1, 7))
    visible = BOX + " 0.1 0.1 2 0.2 0.2 2"
    write_yolo(tmp_path, pose=pose, visible=visible, star=star, circle=circle)
    result = convert(read("yolo", tmp_path, "data.yaml", "images/train"))
    assert [(p.reason, Path(p.file).stem) for p in result.problems if p.reason != "record_incomplete"] == [
        ("bbox_malformed", "pose"), ("bbox_malformed", "visible"),
    ]  # fmt: skip
    assert len(result.records) == 2


def test_yolo_labels_replace_the_last_folder_named_images():
    assert label_path("images/images/train/a.b.jpg") == "images/labels/train/a.b.txt"
    assert label_path("train/a.png") == "train/a.txt"


@pytest.mark.parametrize("names", ["names: 3", "nc: 2", "names: {a: cat}"])
def test_yolo_without_names_is_an_error(tmp_path, names):
    (tmp_path / "data.yaml").write_text(f"{names}\n")
    with pytest.raises(DataError, match="expected a list of names"):
        read("yolo", tmp_path, "data.yaml", ".")


# VOC ------------------------------------------------------------------------------------------------------------------

VOC = """<annotation><folder>VOC2012</folder><filename>{stem}.jpg</filename>
<size><width>{width}</width><height>80</height><depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"""
VOC_OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>{truncated}</truncated>
<difficult>{difficult}</difficult><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>{xmax}</xmax><ymax>60</ymax></bndbox></object>"""


def write_voc(root: Path, stem: str, *objects: dict[str, Any], width: int = 100) -> None:
    defaults = {"name": "dog", "truncated": 0, "difficult": 0, "xmax": 40}
    body = "".join(VOC_OBJECT.format(**(defaults | o)) for o in objects)
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / f"{stem}.xml").write_text(VOC.format(stem=stem, width=width, objects=body))
    listing = root / "ImageSets" / "Main" / "train.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text((listing.read_text() if listing.exists() else "") + f"{stem}\n")


def test_voc_boxes_count_from_one_and_difficult_objects_are_ignored(tmp_path):
    write_voc(tmp_path, "2007_000027", {}, {"name": "cat", "difficult": 1, "truncated": 1})
    write_voc(tmp_path, "2007_000032", width=0)
    write_voc(tmp_path, "2007_000033", {"xmax": "nan"})
    result = convert(read("voc", tmp_path, "ImageSets/Main/train.txt", "JPEGImages"))
    assert shown(result) == [
        ("JPEGImages/2007_000027.jpg", [("dog", (10, 20, 40, 60)), ("cat", (10, 20, 40, 60))]),
        ("JPEGImages/2007_000032.jpg", []),
    ]
    assert result.records[0].objects[1].metadata == {"difficult": 1, "iscrowd": 1}
    assert reasons(result) == ["bbox_malformed", "record_incomplete"]
    dropped = convert(read("voc", tmp_path, "ImageSets/Main/train.txt", "JPEGImages"), truncated="drop")
    assert reasons(dropped) == ["truncated", "bbox_malformed", "record_incomplete"]
    assert dropped.records[0].objects[1].metadata == {"iscrowd": 1, "lost": "truncated"}


def test_voc_files_that_cannot_be_read_are_counted(tmp_path):
    write_voc(tmp_path, "good", {})
    for stem, text in (
        ("cut", "<annotation><size>"),
        ("bomb", '<!DOCTYPE a [<!ENTITY b "b">]><annotation>&b;</annotation>'),
    ):
        write_voc(tmp_path, stem)
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(text)
    write_voc(tmp_path, "gone")
    (tmp_path / "Annotations" / "gone.xml").unlink()
    write_voc(tmp_path, "good", {})
    result = convert(read("voc", tmp_path, "ImageSets/Main/train.txt", "JPEGImages"))
    assert len(result.records) == 1
    assert [(p.reason, p.key) for p in result.problems] == [
        ("annotation_unreadable", "cut"), ("annotation_unreadable", "bomb"), ("annotation_unreadable", "gone"),
        ("duplicate_id", "good"),
    ]  # fmt: skip


def test_voc_names_may_contain_spaces(tmp_path):
    for stem in ("my photo 1", "my photo", "flag 1"):
        write_voc(tmp_path, stem, {})
    listing = "my photo 1\r\nmy photo -1\nflag 1 1\ngone 1\ngone as well\n"
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(listing, encoding="utf-8-sig")
    result = convert(read("voc", tmp_path, "ImageSets/Main/train.txt", "JPEGImages"))
    assert [r.image for r in result.records] == [f"JPEGImages/{s}.jpg" for s in ("my photo 1", "my photo", "flag 1")]
    assert [(p.reason, p.key) for p in result.problems] == [
        ("annotation_unreadable", "gone"), ("annotation_unreadable", "gone as well"),
    ]  # fmt: skip


# JSONL ----------------------------------------------------------------------------------------------------------------


def test_jsonl_keeps_valid_lines_and_counts_the_others(tmp_path):
    good = {"images": ["a.jpg"], "width": 100, "height": 80, "metadata": {"image_id": 4, "site": "x"}}
    poly = {"desc": "leaf", "poly": [1, 1, 9, 1, 9, 9]}
    tokens = {"desc": "cup", "bbox_2d": [f"<|coord_{k}|>" for k in (100, 200, 300, 400)]}
    lines = [
        good | {"objects": [poly]},
        good | {"objects": [tokens], "metadata": {}},
        good | {"objects": []},
        good | {"objects": [poly, tokens], "metadata": {}},
        good | {"images": ["../../etc/passwd.jpg"], "objects": []},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    result = convert(read("jsonl", tmp_path, "train.jsonl", "pictures"), polygons="keep")
    assert shown(result) == [
        ("pictures/a.jpg", [("leaf", (1, 1, 9, 9))]),
        ("pictures/a.jpg", [("cup", (10, 16, 30, 32))]),
    ]
    assert result.records[0].metadata == {"image_id": 4, "site": "x"}
    assert [(p.reason, p.key) for p in result.problems] == [
        ("duplicate_id", "line 3"),
        ("record_invalid", "line 4"),
        ("record_invalid", "line 5"),
        ("record_invalid", "line 6"),
    ]
    assert "leaves the image root" in result.problems[2].detail


@pytest.mark.parametrize(
    "metadata",
    [
        *({key: value} for key in ("absent", "not_exhaustive") for value in (None, "cat", [1], {"cat": 1}, 3)),
        *({"phrase": value} for value in (None, 3, ["cat"])),
        *({"prompt": value} for value in (None, "cat", {}, {"kind": "listed"}, {"kind": "closed", "names": "cat"})),
        {"prompt": {"kind": "open", "style": "x"}},
    ],
    ids=repr,
)
def test_invalid_metadata_drops_only_its_line(tmp_path, metadata):
    good = {"images": ["a.jpg"], "width": 100, "height": 80, "objects": []}
    lines = [good | {"metadata": metadata}, good | {"images": ["b.jpg"]}]
    (tmp_path / "r.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = convert(read("jsonl", tmp_path, "r.jsonl", "."))
    assert [r.image for r in result.records] == ["b.jpg"]
    (problem,) = result.problems
    assert (problem.reason, f"metadata.{next(iter(metadata))} is " in problem.detail) == ("record_invalid", True)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("fmt", ["jsonl", "conversations"])
def test_lines_may_be_in_any_unicode_encoding(tmp_path, fmt, encoding):
    write_photos(fmt, tmp_path, {"train": 4}, size=(100, 80))
    (file,) = tmp_path.glob("*.jsonl")
    expected = convert(read(fmt, tmp_path, file.name, "pictures")).records
    file.write_bytes(file.read_text().replace("cat", "\u0142").encode(encoding))
    found = convert(read(fmt, tmp_path, file.name, "pictures"))
    assert (len(found.records), found.problems) == (len(expected), [])
    assert {o.desc for r in found.records for o in r.objects} >= {"\u0142"}


@pytest.mark.parametrize("line", ['{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', '{"a": 1e999}'])
def test_a_line_that_cannot_be_decoded_is_counted(tmp_path, line):
    row = json.dumps({"images": ["a.jpg"], "width": 100, "height": 80, "objects": [], "metadata": {}})
    (tmp_path / "r.jsonl").write_text(f"{row}\n{row.replace('{}', line)}\n")
    result = convert(read("jsonl", tmp_path, "r.jsonl", "."))
    assert (len(result.records), reasons(result)) == (1, ["record_invalid"])


# Conversations --------------------------------------------------------------------------------------------------------

CAT = '{"bbox_2d": [100, 100, 500, 500], "label": "cat"}'


def said(tmp_path, answer, **more):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": answer}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": "a.jpg", "conversations": turns} | more) + "\n")
    return convert(read("conversations", tmp_path, "c.jsonl", "."))


@pytest.mark.parametrize(
    ("answer", "more"),
    [
        *((text, {}) for text in ("[]", "```json\n[]\n```", '{"objects": []}', "None", "There are no cats.", "")),
        ("<ref-object><bbox>", {"objects": {"ref": [], "bbox": []}}),
    ],
)
def test_an_answer_may_state_that_no_object_is_there(tmp_path, answer, more):
    result = said(tmp_path, answer, **more)
    assert ([r.objects for r in result.records], result.problems) == ([()], [])


@pytest.mark.parametrize(
    "answer", ["A cat on a mat.", '[{"point_2d": [1, 2], "label": "cat"}]', "Norway", "cat: 1 2 3 4"]
)
def test_a_text_answer_without_boxes_does_not_mean_that_no_object_is_there(tmp_path, answer):
    result = said(tmp_path, answer)
    assert (len(result.records), reasons(result)) == (0, ["record_invalid"])


@pytest.mark.parametrize("answer", [f'[{CAT}, {{"bbox_2d": [1, 2', f"[{CAT}, {CAT[:-1]}, 3}}]"])
def test_an_image_with_a_truncated_answer_is_dropped(tmp_path, answer):
    assert reasons(said(tmp_path, answer)) == ["desc_missing", "record_incomplete"]
    assert reasons(said(tmp_path, f"[{CAT}, {CAT.replace('1', '2')}]")) == []


# All ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", READERS)
def test_a_missing_file_is_an_error_with_its_name(tmp_path, fmt):
    with pytest.raises(DataError, match=r"nowhere\.json: not found"):
        read(fmt, tmp_path, "nowhere.json", ".")


@pytest.mark.parametrize("fmt", ["coco", "lvis", "objects365", "refcoco", "visual_genome"])
@pytest.mark.parametrize("content", [b"", b"{", b"7", b"\xff\xfe", b"[" * 100_000, b'{"images": 3}'])
def test_a_file_of_another_format_is_an_error_with_its_name(tmp_path, fmt, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json"):
        read(fmt, tmp_path, "a.json", ".")
