"""From data sets on disk to the splits of a profile: manifest, policies, mixing, and the count of every loss."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import ConfigError, DataError
from coordexp.infra import foreign
from coordexp.records.convert import Converted, convert_datasets
from coordexp.records.images import read_record_rgb
from coordexp.records.manifest import read_manifest, write_manifest
from coordexp.records.mixing import SetNames, split_dev, with_prompt
from coordexp.records.schema import ObjectRecord, Record, parse_record
from coordexp.records.sources import files
from records_folders import (
    LAYOUTS,
    annotation,
    coco_set,
    converted,
    dataset,
    edit,
    picture,
    records_config,
    write_photos,
    write_split,
)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Twelve training and six val images."""
    root = tmp_path / "coco"
    write_split(root, "train2017", 100, 12)
    write_split(root, "val2017", 500, 6)
    return root


def convert(tmp_path: Path, sets, **config) -> Converted:
    result = converted(tmp_path, sets, decode=True, **config)
    for records in result.splits.values():
        for record in records:
            parse_record(json.loads(json.dumps(record.to_json())), "converted")
            assert read_record_rgb(tmp_path / "raw", record.image).size == (record.width, record.height)
    return result


def images(records: list[Record]) -> list[str]:
    return [record.image for record in records]


def test_a_coco_folder_converts_without_a_loss(coco, tmp_path):
    result = convert(tmp_path, {"coco": coco_set(coco)})
    assert {split: len(records) for split, records in result.splits.items()} == {"train": 10, "dev": 2, "val": 6}
    assert result.drops() == {"train": {}, "val": {}}
    assert images(result.splits["val"]) == [f"coco/val2017/{i:012d}.jpg" for i in range(500, 506)]
    assert [r.metadata["image_id"] for r in result.splits["val"]] == list(range(500, 506))
    assert [(c.id, c.name, c.split) for c in result.categories()] == [
        (1, "person", "train"), (2, "traffic light", "train"), (3, "cat", "train"), (4, "red mug", "held_out"),
    ]  # fmt: skip
    assert result.sets() == {"coco": {"train": 10, "dev": 2, "val": 6}}


def test_images_are_never_copied(coco, tmp_path):
    convert(tmp_path, {"coco": coco_set(coco)})
    assert sorted(p.name for p in (tmp_path / "raw").iterdir()) == ["images.parquet", "manifest.json"]
    sets, facts = read_manifest(tmp_path / "raw")
    assert sets == {"coco": coco_set(coco)}
    assert sum(f.n_bytes for f in facts["coco"].values()) == sum(p.stat().st_size for p in coco.rglob("*.jpg"))


def test_the_manifest_does_not_depend_on_the_number_of_workers(coco, tmp_path):
    for workers in (1, 4):
        write_manifest(tmp_path / str(workers), {"coco": coco_set(coco)}, decode=True, workers=workers)
    one, four = ((tmp_path / name / "images.parquet").read_bytes() for name in "14")
    assert one == four


def test_the_manifest_changes_with_any_image(coco, tmp_path):
    before = write_manifest(tmp_path / "raw", {"coco": coco_set(coco)}, decode=False, workers=1)
    assert write_manifest(tmp_path / "raw", {"coco": coco_set(coco)}, decode=False, workers=1) == before
    image = sorted(coco.rglob("*.jpg"))[3]
    image.write_bytes(image.read_bytes()[:-1] + b"\0")
    after = write_manifest(tmp_path / "raw", {"coco": coco_set(coco)}, decode=False, workers=1)
    assert after["images_hash"] != before["images_hash"]
    assert after["sets"]["coco"]["annotation_hashes"] == before["sets"]["coco"]["annotation_hashes"]


def test_changed_annotations_are_detected(coco, tmp_path):
    write_manifest(tmp_path / "raw", {"coco": coco_set(coco)}, decode=False, workers=1)
    edit(coco, "val2017", info={"changed": 1})
    with pytest.raises(DataError, match=r"instances_val2017\.json: changed since the raw stage .*dvc repro --force"):
        convert_datasets(tmp_path / "raw", records_config(), 17)
    (coco / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match="deleted since the raw stage"):
        convert_datasets(tmp_path / "raw", records_config(), 17)


@pytest.mark.parametrize("fmt", [*sorted(LAYOUTS), "refcoco"])
def test_every_file_that_a_reader_opens_is_hashed(fmt, tmp_path, monkeypatch):
    """The hash covers every file that a reader opens (label files, lists, tables), so any change is detected."""
    root = tmp_path / "set"
    write_photos(fmt, root, {"train": 4, "val": 2})
    config = dataset(fmt, root)
    if fmt == "open_images":
        (root / "train-annotations-human-imagelabels.csv").write_text("ImageID,Source,LabelName,Confidence\n")
    opened: set[Path] = set()

    def open_regular(path, max_bytes):
        opened.add(Path(path))
        return foreign.open_regular(path, max_bytes)

    monkeypatch.setattr(files, "open_regular", open_regular)
    first = write_manifest(tmp_path / "raw", {"a": config}, decode=False, workers=1)
    assert opened
    for path in sorted(opened):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        with pytest.raises(DataError, match="changed since the raw stage"):
            read_manifest(tmp_path / "raw")
        if fmt != "hub":  # a broken file
            changed = write_manifest(tmp_path / "raw", {"a": config}, decode=False, workers=1)
            assert changed["sets"]["a"]["annotation_hashes"] != first["sets"]["a"]["annotation_hashes"], path
        path.write_bytes(before)
        assert write_manifest(tmp_path / "raw", {"a": config}, decode=False, workers=1) == first


def test_an_added_or_missing_label_file_is_detected(tmp_path):
    write_photos("yolo", tmp_path / "set", {"train": 4, "val": 2})
    label = tmp_path / "set/labels/train/train001.txt"
    for change in (label.unlink, lambda: label.write_text("0 .5 .5 .5 .5\n")):
        write_manifest(tmp_path / "raw", {"a": dataset("yolo", tmp_path / "set")}, decode=False, workers=1)
        change()
        with pytest.raises(DataError, match=r"data\.yaml, or an annotation file that belongs to it: changed since"):
            read_manifest(tmp_path / "raw")


def test_a_missing_root_is_an_error_with_its_path(tmp_path):
    with pytest.raises(DataError, match=r"source\.sets\.coco\.root: .*nowhere is not a folder.*ln -s"):
        write_manifest(tmp_path / "raw", {"coco": coco_set(tmp_path / "nowhere")}, decode=False, workers=1)


def test_annotations_outside_the_root_are_refused(coco, tmp_path):
    with pytest.raises(DataError, match="leaves the image root"):
        write_manifest(tmp_path / "raw", {"coco": coco_set(coco, train="../x.json")}, decode=False, workers=1)


# Bad images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(coco: Path) -> Path:
    """Seven of the training images cannot be used, each for a different reason."""
    folder = coco / "train2017"
    (folder / f"{100:012d}.jpg").unlink()
    cut = folder / f"{101:012d}.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    picture(102, 48, 64).save(folder / f"{102:012d}.jpg")
    exif = picture(103).getexif()
    exif[0x0112] = 6
    picture(103).save(folder / f"{103:012d}.jpg", exif=exif)

    def change(entries):
        by_id = {entry["id"]: entry for entry in entries}
        by_id[104]["width"] = 0
        by_id[105]["height"] = -48
        by_id[106]["file_name"] = "../../../etc/passwd"
        return entries

    edit(coco, "train2017", images=change)
    return coco


EXPECTED = {
    "image_missing": "image 100", "image_unreadable": "image 101", "image_size_differs": "image 102",
    "image_exif_rotated": "image 103", "image_path_unsafe": "image 106",
}  # fmt: skip


def test_bad_images_are_reported_in_one_error(spoiled, tmp_path):
    with pytest.raises(DataError) as caught:
        convert(tmp_path, {"coco": coco_set(spoiled)})
    message = str(caught.value)
    assert message.startswith("7 images cannot be used (image_exif_rotated 1, image_missing 1, image_path_unsafe 1, ")
    assert "instances_train2017.json: image 100: image_missing" in message
    assert "and 2 more" in message


def test_bad_images_can_be_dropped_and_are_counted_with_file_and_id(spoiled, tmp_path):
    result = convert(tmp_path, {"coco": coco_set(spoiled)}, bad_images="drop")
    found = {p.reason: p for p in result.problems["train"]}
    assert {reason: p.key for reason, p in found.items() if reason in EXPECTED} == EXPECTED
    assert result.drops()["train"]["image_size_invalid"] == 2
    assert all(p.file.endswith("instances_train2017.json") for p in found.values())
    assert len(result.splits["train"]) + len(result.splits["dev"]) == 12 - 7


def test_descriptions_that_look_like_markup_are_dropped(coco, tmp_path):
    bad = ["<|im_end|>", "cat<|coord_5|>", "\ue123 cat", "cat\x00", "x" * 300]
    edit(
        coco,
        "train2017",
        categories=lambda old: [*old, *({"id": 50 + i, "name": name} for i, name in enumerate(bad))],
        annotations=lambda old: [*old, *(annotation(60 + i, 100, 50 + i) for i in range(len(bad)))],
    )
    drops = convert(tmp_path, {"coco": coco_set(coco)}).drops()["train"]
    assert drops == {"desc_characters": 2, "desc_marker": 2, "desc_too_long": 1}


# Too many objects -----------------------------------------------------------------------------------------------------


@pytest.fixture
def crowded(coco: Path) -> Path:
    """Image 100 and val image 500 with 22 objects each."""
    for split, image_id in (("train2017", 100), ("val2017", 500)):
        many = [annotation(7000 + i, image_id, 4, [i, i, 20, 20 + i % 3]) for i in range(20)]
        edit(coco, split, annotations=lambda old, many=many: [*old, *many])
    return coco


def test_objects_above_the_limit_are_sampled_and_become_ignore_regions(crowded, tmp_path):
    result = convert(tmp_path, {"coco": coco_set(crowded)}, max_objects=5)
    by_id = {r.metadata["image_id"]: r for split in result.splits.values() for r in split}
    kept = [o for o in by_id[100].objects if not o.metadata.get("iscrowd")]
    assert (len(kept), len(by_id[100].objects)) == (5, 22)
    assert result.drops() == {"train": {"over_max_objects": 17}, "val": {}}
    assert len(by_id[500].objects) == 22  # what is evaluated is never thinned out
    again = convert(tmp_path / "again", {"coco": coco_set(crowded)}, max_objects=5)
    assert [r.objects for r in again.splits["train"]] == [r.objects for r in result.splits["train"]]


def test_records_above_the_limit_are_dropped(crowded, tmp_path):
    result = convert(tmp_path, {"coco": coco_set(crowded)}, max_objects=5, over_max="drop")
    assert result.drops() == {"train": {"record_over_max_objects": 1}, "val": {}}
    assert len(result.splits["train"]) + len(result.splits["dev"]) == 11


# Splits ---------------------------------------------------------------------------------------------------------------


def test_a_training_image_in_val_is_an_error(coco, tmp_path):
    shutil.copy(coco / "val2017" / f"{503:012d}.jpg", coco / "train2017" / f"{104:012d}.jpg")
    with pytest.raises(
        DataError, match=r"1 training images have the same content.*\n  coco/train2017/0+104\.jpg is coco"
    ):
        convert(tmp_path, {"coco": coco_set(coco)})
    result = convert(tmp_path, {"coco": coco_set(coco)}, overlap="drop_train")
    assert result.drops()["train"] == {"image_in_val": 1}
    assert f"coco/train2017/{104:012d}.jpg" not in images([*result.splits["train"], *result.splits["dev"]])


NAMES = st.lists(st.sampled_from([f"images/{i:03d}.jpg" for i in range(60)]), min_size=2, max_size=40)


@given(names=NAMES, dev_images=st.integers(0, 12), twin=st.integers(1, 60), data=st.data())
def test_the_choice_for_dev_depends_on_each_image_alone(names, dev_images, twin, data):
    """A name may be listed twice; names whose number is equal modulo `twin` are the same image."""
    content = {f"images/{i:03d}.jpg": str(i % twin) for i in range(60)}
    records = [Record(name, 64, 64, ()) for name in names]
    pictures = {content[name] for name in names}
    if dev_images >= len(pictures):
        with pytest.raises(DataError, match=rf"records\.dev_images is {dev_images}, but there are {len(pictures)}"):
            split_dev(records, dev_images, content)
        return
    train, dev = split_dev(records, dev_images, content)
    assert sorted(images(train) + images(dev)) == sorted(names)
    of_dev = {content[r.image] for r in dev}
    assert len(of_dev) == dev_images
    assert not of_dev & {content[r.image] for r in train}
    assert split_dev(data.draw(st.permutations(records)), dev_images, content) == (train, dev)
    if dev_images:
        assert {content[r.image] for r in split_dev(records, dev_images - 1, content)[1]} < of_dev
    old = [r for r in records if content[r.image] < max(pictures)]  # without one image
    if dev_images < len({content[r.image] for r in old}):
        assert of_dev - {max(pictures)} <= {content[r.image] for r in split_dev(old, dev_images, content)[1]}


def test_dev_is_spread_over_the_source():
    names = [f"images/{i:04d}.jpg" for i in range(400)]
    dev = split_dev([Record(name, 64, 64, ()) for name in names], 90, {name: name for name in names})[1]
    thirds = [names.index(name) * 3 // 400 for name in images(dev)]
    assert all(15 <= thirds.count(third) <= 45 for third in range(3))


def test_held_out_marks_of_a_file_are_used_unless_training_contains_the_name(coco, tmp_path):
    for split in ("train2017", "val2017"):
        edit(coco, split, categories=lambda old: [
            *({**c, "supercategory": "held_out"} if c["name"] in ("cat", "red mug") else c for c in old),
            {"id": 9, "name": "dog", "supercategory": "thing"},
        ])  # fmt: skip
    result = convert(tmp_path, {"coco": coco_set(coco)})
    assert {c.name: c.split for c in result.categories()} == {
        "person": "train", "traffic light": "train", "cat": "train", "red mug": "held_out", "dog": "train",
    }  # fmt: skip


def test_a_split_without_records_is_an_error(coco, tmp_path):
    edit(coco, "val2017", images=[], annotations=[])
    with pytest.raises(DataError, match="no val record is left"):
        convert(tmp_path, {"coco": coco_set(coco)})


# Mixing ---------------------------------------------------------------------------------------------------------------


def test_weights_repeat_training_records_and_ids_do_not_clash(coco, tmp_path):
    other = tmp_path / "other"
    write_split(other, "train2017", 100, 12)
    for path in (other / "train2017").iterdir():
        picture(1000 + int(path.stem)).save(path)  # other images under the same names and ids
    sets = {"coco": coco_set(coco, weight=0.5), "mine": coco_set(other, val="none", weight=2.5)}
    result = convert(tmp_path, sets, dev_images=4)
    counts = Counter(images(result.splits["train"]))
    mine = [n for name, n in counts.items() if name.startswith("mine/")]
    assert set(mine) == {2, 3}
    assert {n for name, n in counts.items() if name.startswith("coco/")} == {1}
    assert result.sets()["mine"]["train"] == sum(mine)
    ids = {r.metadata["image_id"]: r.image for split in result.splits.values() for r in split}
    assert len(ids) == sum(map(len, result.splits.values()))
    assert {r.metadata["source_image_id"] for r in result.splits["val"]} == set(range(500, 506))


def test_dev_and_val_are_not_weighted(coco, tmp_path):
    result = convert(tmp_path, {"coco": coco_set(coco, weight=3.0)})
    assert {split: len(records) for split, records in result.splits.items()} == {"train": 30, "dev": 2, "val": 6}


# Prompts --------------------------------------------------------------------------------------------------------------


def prompts(records: list[Record]) -> list[dict]:
    return [record.metadata["prompt"] for record in records if "prompt" in record.metadata]


def present(record: Record) -> set[str]:
    return {o.desc for o in record.objects}


def test_open_prompts_are_paraphrased_in_training_only(coco, tmp_path):
    result = convert(tmp_path, {"coco": coco_set(coco, weight=4.0)})
    assert {p["style"] for p in prompts(result.splits["train"])} == {1, 2, 3}
    assert prompts([*result.splits["dev"], *result.splits["val"]]) == []
    result = convert(tmp_path, {"coco": coco_set(coco, weight=4.0)}, wordings=1)
    assert prompts(result.splits["train"]) == []


def test_closed_prompts_list_every_category(coco, tmp_path):
    result = convert(tmp_path, {"coco": coco_set(coco, prompt="closed")})
    for records in result.splits.values():
        assert all(p["names"] == ["person", "traffic light", "cat", "red mug"] for p in prompts(records))
        assert len(prompts(records)) == len(records)


def test_listed_prompts_mix_present_and_absent_names(coco, tmp_path):
    result = convert(tmp_path, {"coco": coco_set(coco, prompt="listed", weight=20.0)}, negative_rate=0.25)
    records = result.splits["train"]
    asked = [(set(p["names"]), present(r)) for p, r in zip(prompts(records), records, strict=True)]
    assert all(1 <= len(names) <= 3 for names, _ in asked)
    negatives = [names for names, there in asked if not names & there]
    assert len(negatives) / len(asked) == pytest.approx(0.25, abs=0.1)
    positives = [(names, there) for names, there in asked if names & there]
    assert all(names >= there for names, there in positives)
    assert any(names > there for names, there in positives)
    assert all(
        p["names"] == sorted(["person", "traffic light", "cat", "red mug"]) for p in prompts(result.splits["val"])
    )


def test_mixed_prompts_have_the_configured_fractions_and_val_has_probes(coco, tmp_path):
    sets = {"coco": coco_set(coco, prompt="mixed", weight=60.0)}
    fractions = {"mixed_listed": 0.5, "mixed_phrase": 0.2, "negative_rate": 0.25, "wordings": 1}
    splits = convert(tmp_path, sets, **fractions).splits
    asked = [r.metadata.get("prompt", {"kind": "open"}) for r in splits["train"]]
    for kind, fraction in (("open", 0.3), ("listed", 0.5), ("phrase", 0.2)):
        assert sum(p["kind"] == kind for p in asked) / len(asked) == pytest.approx(fraction, abs=0.1)
    assert all("prompt" not in r.metadata for r in splits["dev"])
    own = [r for r in splits["val"] if "probe" not in r.metadata]
    assert all("prompt" not in r.metadata for r in own)
    assert len({r.metadata["image_id"] for r in splits["val"]}) == len(splits["val"])
    for probe in (r for r in splits["val"] if "probe" in r.metadata):
        names, there = set(probe.metadata["prompt"]["names"]), present(probe)
        match probe.metadata["probe"]:
            case "list":
                assert names & there
            case "one":
                assert len(names) == 1
                assert names <= there
            case "easy" | "hard":
                assert not names & there
    assert {r.metadata["probe"] for r in splits["val"] if "probe" in r.metadata} >= {"list", "one", "easy"}


def asked_of(present_names, names, trained=None, **policies):
    """The training prompts of many records with these names."""
    objects = tuple(ObjectRecord(name, (0.0, 0.0, 9.0, 9.0)) for name in present_names)
    set_names = SetNames.of(names, trained or names)
    config = records_config(wordings=1, mixed_listed=1.0, **policies)
    records = [Record(f"{i}.jpg", 64, 64, objects, metadata={"image_id": i}) for i in range(200)]
    return [with_prompt(r, "mixed", set_names, config, 3, True).metadata["prompt"]["names"] for r in records]


def test_similar_absent_names_appear_with_the_configured_frequency():
    names = ["red cat", "red dog", "blue cat", *(f"green {n}" for n in ("hat", "bus", "cup", "pen", "jar", "box"))]
    policies = {"listed_names": 4, "listed_present": 1.0}
    shares = {}
    for hard in (0.0, 1.0):
        absent = [n for asked in asked_of(["red cat"], names, listed_hard=hard, **policies) for n in asked]
        absent = [n for n in absent if n != "red cat"]
        shares[hard] = sum("red" in n or "cat" in n for n in absent) / len(absent)
    assert shares[1.0] > 0.75 > 0.4 > shares[0.0]


def test_listed_prompts_omit_some_present_names():
    there = ["red cat", "blue dog", "green cow", "pink pig"]
    lists = asked_of(there, [*there, "tan hat"], listed_names=5, listed_present=0.5)
    kept = [len(set(asked) & set(there)) for asked in lists]
    assert all(kept)
    assert sum(kept) / len(kept) == pytest.approx(2, abs=0.3)


def test_training_prompts_have_no_held_out_name_and_never_call_cat_absent_next_to_a_red_cat():
    names = ["cat", "red cat", "red dog", "blue dog"]
    for hard in (0.0, 1.0):
        lists = asked_of(["red cat"], names, ["cat", "red cat", "blue dog"], listed_hard=hard, negative_rate=0.5)
        asked = {name for one in lists for name in one}
        assert asked == {"red cat", "blue dog"}


def test_too_many_names_for_a_closed_prompt_are_an_error(coco, tmp_path):
    edit(coco, "val2017", categories=lambda old: old + [{"id": 10 + i, "name": f"thing {i}"} for i in range(300)])
    with pytest.raises(ConfigError, match="closed, but the set has 304 names"):
        convert(tmp_path, {"coco": coco_set(coco, prompt="closed")})
