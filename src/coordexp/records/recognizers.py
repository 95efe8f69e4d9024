"""Recognizers of data set formats, by marks in the files of a folder."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

from coordexp.config.formats import Format
from coordexp.config.profile import AUTO_SPLIT, DatasetConfig
from coordexp.errors import DataError
from coordexp.records.image_files import IMAGE_SUFFIXES, files_below
from coordexp.records.manifest import open_split
from coordexp.records.sources.files import is_readable, opened, opened_parquet, read_yaml
from coordexp.records.sources.tables import opened_table

HEAD_BYTES = 1 << 16
MAX_OPENED = 50  # maximum number of files of one kind to open
_SPLIT_WORDS = {"train": "train", "training": "train", "trainval": "train", "val": "val", "valid": "val",
                "validation": "val", "dev": "val", "test": "test", "testing": "test"}  # fmt: skip
_WORD = re.compile(r"[a-z]+")
_NO_BOXES = ("captions", "panoptic", "image_info", "stuff", "label_descriptions", "attributes")


@dataclass(slots=True)
class Found:
    """The result of a recognizer: annotations and image folder by split, relative to the root."""

    format: Format
    why: str
    train: str
    train_images: str
    val: str = AUTO_SPLIT
    val_images: str = ""
    notes: list[str] = field(default_factory=list)
    prompt: str = "open"


class Folder:
    """The files in a folder, by kind and relative to it, and access to their first and last bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.by_suffix: defaultdict[str, list[str]] = defaultdict(list)
        self.images: list[str] = []
        for path in files_below(root):
            name = path.relative_to(root).as_posix()
            suffix = path.suffix.lower()
            if not any(part.startswith(".") for part in name.split("/")):
                (self.images if suffix in IMAGE_SUFFIXES else self.by_suffix[suffix]).append(name)
        for names in (self.images, *self.by_suffix.values()):
            names.sort(key=lambda name: (name.count("/"), name))

    def ends(self, name: str) -> str:
        """The first and the last bytes of a file as text; empty if it cannot be read."""
        try:
            with opened(self.root / name, "annotations") as handle:
                head = handle.read(HEAD_BYTES)
                size = handle.seek(0, 2)
                handle.seek(max(len(head), size - HEAD_BYTES))
                content = head + b"\n" + handle.read()
        except DataError:
            return ""
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        return content.decode("utf-16" if utf16 else "utf-8", errors="replace")

    @cached_property
    def image_folders(self) -> list[str]:
        """Every folder with images, directly or in subfolders."""
        found: dict[str, None] = {}
        for name in self.images:
            parts = name.split("/")[:-1]
            found |= dict.fromkeys("/".join(parts[:i]) or "." for i in range(len(parts) + 1))
        return sorted(found, key=lambda name: name.count("/") + (name != "."))

    def folder_of(self, image: str, near: str, split: str) -> str:
        """The folder that an annotated image name is relative to; among several, that of the split."""
        image = image.replace("\\", "/").removeprefix("./")
        last = image.rsplit("/", 1)[-1]
        fitting = [f for f in self.image_folders if is_readable(self.root / f / image)]
        if not fitting:
            fitting = [f for f in self.image_folders if is_readable(self.root / f / last)]
        if not fitting:
            stem = f"{last.rsplit('.', 1)[0]}."
            found = (i for i in self.images if i.rsplit("/", 1)[-1].startswith(stem))
            fitting = [folder_name(i) for i in found]
        here = folder_name(near)
        fitting.sort(key=lambda f: (_split_of(f) != split, f != here, not f.startswith(here), f.count("/")))
        return fitting[0] if fitting else "."

    def count(self, *folders: str) -> int:
        """Number of images in any of the folders."""
        starts = tuple("" if f in ("", ".") else f"{f}/" for f in folders)
        return sum(name.startswith(starts) for name in self.images)


def folder_name(name: str) -> str:
    """The folder of a relative path, `.` for the root."""
    return name.rpartition("/")[0] or "."


def _split_of(name: str) -> str:
    """The split in a path, from its last part that names one: train, val, test, or empty."""
    for part in reversed(name.lower().split("/")):
        for word in _WORD.findall(part):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
            prefix = next((s for s in ("train", "valid", "val", "test") if word.startswith(s) and len(word) < 12), None)
            if prefix:
                return _SPLIT_WORDS[prefix]
    return ""


def _paired(names: Iterable[str]) -> tuple[str, str | None]:
    """(train, val) among annotation files or folders, at least one; a name without a split counts as train."""
    listed = list(names)
    by_split = {split: [n for n in listed if _split_of(n) == split] for split in ("train", "val", "test", "")}
    train = (by_split["train"] or by_split[""] or by_split["val"] or by_split["test"])[0]
    val = next((n for n in by_split["val"] if n != train), None)
    return train, val


# Recognizers ----------------------------------------------------------------------------------------------------------


def _coco(folder: Folder) -> Iterator[Found]:
    found: dict[str, str] = {}
    for name in folder.by_suffix[".json"][:MAX_OPENED]:
        text = folder.ends(name)
        is_instances = '"images"' in text and ('"annotations"' in text or '"categories"' in text)
        if is_instances and not any(word in name.rsplit("/", 1)[-1].lower() for word in _NO_BOXES):
            found[name] = text
    plain = {n: t for n, t in found.items() if "keypoints" not in n.lower()} or found
    listed = sorted(plain, key=lambda n: ("instances" not in n, n.count("/")))
    if not listed:
        return
    train, val = _paired(listed)
    text = plain[train]
    fmt: Format = "coco"
    if "neg_category_ids" in text or "lvis" in train.lower():
        fmt = "lvis"
    elif "zhiyuan" in train.lower() or re.search(r"images/v\d/patch\d", text):
        fmt = "objects365"
    if '"caption"' in text and '"tokens_negative"' in text:
        fmt = "refcoco"
    splits = Found(fmt, f"{train} has images, annotations and categories", train, "")
    splits.train_images = _coco_images(folder, fmt, train, text, "train")
    if val:
        splits.val, splits.val_images = val, _coco_images(folder, fmt, val, plain[val], "val")
    if fmt == "refcoco":
        splits.prompt = "phrase"
    yield splits


def _coco_images(folder: Folder, fmt: Format, name: str, text: str, split: str) -> str:
    key = "coco_url" if fmt == "lvis" and '"coco_url"' in text else "file_name"
    names = re.findall(rf'"{key}"\s*:\s*"([^"]+)"', text)[:20]
    if key == "coco_url":
        names = ["/".join(n.split("/")[-2:]) for n in names]
    if fmt == "objects365":
        names = ["/".join(n.split("/")[-2:]) for n in names]
    votes = Counter(folder.folder_of(n.replace("\\/", "/"), name, split) for n in names)
    return votes.most_common(1)[0][0] if votes else "."


def _yolo(folder: Folder) -> Iterator[Found]:
    for name in [*folder.by_suffix[".yaml"], *folder.by_suffix[".yml"]][:MAX_OPENED]:
        try:
            described = read_yaml(folder.root / name, "YAML")
        except DataError:
            continue
        if "names" not in described:
            continue
        here = folder_name(name)
        splits = Found("yolo", f"{name} has names of classes", name, here)
        has_train = bool(described.get("train"))
        if not has_train:
            below = [f for f in folder.image_folders if _split_of(f) == "train" and f.split("/")[-1] != "labels"]
            splits.train_images = next(iter(below), "images" if "images" in folder.image_folders else here)
        val = described.get("val", described.get("valid"))
        if val and val == described.get("train"):
            splits.notes.append(f"{name} has the same images as train and val: val is taken from train")
        elif val and _resolves(folder, name, here):
            splits.val, splits.val_images = name, here
        elif not has_train and (of_val := [f for f in folder.image_folders if _split_of(f) == "val"]):
            splits.val, splits.val_images = name, of_val[0]
        yield splits
        return
    classes = [n for n in folder.by_suffix[".txt"] + folder.by_suffix[".names"]
               if n.rsplit("/", 1)[-1].lower() in ("classes.txt", "obj.names", "labels.txt", "names.txt")]  # fmt: skip
    labels = {n.rsplit(".", 1)[0].rsplit("/", 1)[-1] for n in folder.by_suffix[".txt"]}
    if classes and any(i.rsplit(".", 1)[0].rsplit("/", 1)[-1] in labels for i in folder.images[:1000]):
        here = "images" if "images" in folder.image_folders else "."
        yield Found("yolo", f"{classes[0]} lists classes, and label files go with the images", classes[0], here)


def _resolves(folder: Folder, name: str, images: str) -> bool:
    """Whether the val images of a data.yaml exist."""
    keys = {"format": "yolo", "root": str(folder.root), "train": "none", "val": name, "train_images": images,
            "val_images": images, "weight": 1.0, "prompt": "open"}  # fmt: skip
    try:
        reading = open_split(DatasetConfig.model_validate(keys), "val")
        return reading is not None and next(iter(reading.images), None) is not None
    except DataError:
        return False


def _xml(folder: Folder) -> Iterator[Found]:
    by_root: defaultdict[str, list[str]] = defaultdict(list)
    for name in folder.by_suffix[".xml"][:MAX_OPENED]:
        found = re.search(r"<(annotations?)\b", folder.ends(name))
        if found:
            by_root[found[1]].append(name)
    if cvat := [n for n in by_root["annotations"] if "<image" in folder.ends(n)]:
        train, val = _paired(cvat)
        splits = Found("cvat", f"{train} is an export of CVAT for images", train, _cvat_images(folder, train, "train"))
        if val:
            splits.val, splits.val_images = val, _cvat_images(folder, val, "val")
        yield splits
    if by_root["annotation"]:
        yield _voc(folder, by_root["annotation"])


def _cvat_images(folder: Folder, name: str, split: str) -> str:
    names = re.findall(r'<image\b[^>]*\bname="([^"]+)"', folder.ends(name))[:20]
    votes = Counter(folder.folder_of(n, name, split) for n in names)
    return votes.most_common(1)[0][0] if votes else "."


def _voc(folder: Folder, names: list[str]) -> Found:
    lists = [n for n in folder.by_suffix[".txt"] if "ImageSets/Main/" in f"/{n}"]
    plain = [n for n in lists if n.rsplit("/", 1)[-1] in ("train.txt", "val.txt", "trainval.txt")]
    folders = sorted({folder_name(n) for n in folder.by_suffix[".xml"]}, key=lambda f: (f.count("/"), f))
    images = {f: folder.folder_of(_voc_image(folder, f), f"{f}/x", _split_of(f)) for f in folders}
    train, val = _paired(sorted(plain, key=lambda n: "trainval" in n) or folders)
    of_lists = images[folder_name(names[0])]
    splits = Found("voc", f"{names[0]} is Pascal VOC's XML", train, images.get(train, of_lists))
    if val:
        splits.val, splits.val_images = val, images.get(val, of_lists)
    return splits


def _voc_image(folder: Folder, xml_folder: str) -> str:
    here = "" if xml_folder == "." else f"{xml_folder}/"
    name = next(n for n in folder.by_suffix[".xml"] if n.startswith(here) and "/" not in n[len(here) :])
    try:
        found = ElementTree.fromstring(re.sub(r"<\?xml[^>]*\?>", "", folder.ends(name))).findtext("filename")
    except (ElementTree.ParseError, ValueError):
        found = None
    stem = name[len(here) :].rsplit(".", 1)[0]
    stems = (i.rsplit("/", 1)[-1] for i in folder.images if i.rsplit("/", 1)[-1].rsplit(".", 1)[0] == stem)
    return next(stems, None) or found or stem


def _labelme(folder: Folder) -> Iterator[Found]:
    marked = [n for n in folder.by_suffix[".json"] if n.count("/") < 4]
    found = [n for n in marked[:MAX_OPENED] if '"shapes"' in (text := folder.ends(n)) and '"imagePath"' in text]
    if not found:
        return
    train, val = _paired(sorted({folder_name(n) for n in found}, key=lambda f: (f.count("/"), f)))

    def images_of(place: str) -> str:
        name = next(n for n in found if folder_name(n) == place)
        stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        stems = (i for i in folder.images if i.rsplit("/", 1)[-1].rsplit(".", 1)[0] == stem)
        return next((folder_name(i) for i in stems), place)

    splits = Found("labelme", f"{found[0]} has shapes and imagePath", train, images_of(train))
    if val:
        splits.val, splits.val_images = val, images_of(val)
    yield splits


def _csv(folder: Folder) -> Iterator[Found]:
    tables, open_images = [], []
    for name in folder.by_suffix[".csv"][:MAX_OPENED]:
        head = folder.ends(name)[:200]
        if head.lstrip("\ufeff").startswith("ImageID,Source,LabelName") and "XMin" in head:
            open_images.append(name)
            continue
        try:
            _, rows = opened_table(folder.root / name)
            next(rows, None)
        except DataError:
            continue
        tables.append(name)
    kinds: tuple[tuple[Format, list[str]], ...] = (("open_images", open_images), ("csv", tables))
    for fmt, names in kinds:
        if not names:
            continue
        train, val = _paired(names)
        splits = Found(fmt, f"{train} is a table of boxes", train, _table_images(folder, fmt, train, "train"))
        if val:
            splits.val, splits.val_images = val, _table_images(folder, fmt, val, "val")
        yield splits


def _table_images(folder: Folder, fmt: Format, name: str, split: str) -> str:
    columns, rows = opened_table(folder.root / name)
    names = [row[columns["image"]] for row in islice(rows, 20) if columns["image"] < len(row)]
    votes = Counter(folder.folder_of(n if fmt == "csv" else f"{n}.jpg", name, split) for n in names if n)
    return votes.most_common(1)[0][0] if votes else "."


def _parquet(folder: Folder) -> Iterator[Found]:
    kinds: defaultdict[Format, list[str]] = defaultdict(list)
    for name in folder.by_suffix[".parquet"][:1000]:
        try:
            with opened_parquet(folder.root / name, "parquet") as table:
                columns = set(table.schema_arrow.names)
        except DataError:
            continue
        if columns & {"image", "img"} and columns & {"objects", "annotations", "detections"}:
            kinds["hub"].append(name)
        elif columns >= {"image_path", "captions", "bbox"} or columns >= {"file_name", "answer", "bbox"}:
            kinds["refcoco"].append(name)
    for fmt, names in kinds.items():
        if not names:
            continue
        train, val = _paired(names)
        splits = Found(fmt, f"{train} is a parquet file of the Hugging Face Hub", _of_shards(train, names), ".")
        if val:
            splits.val, splits.val_images = _of_shards(val, names), "."
        if fmt == "refcoco":
            splits.prompt = "phrase"
            splits.train_images = splits.val_images = next((f for f in folder.image_folders if "train2014" in f), ".")
        yield splits


def _of_shards(name: str, names: list[str]) -> str:
    """A glob pattern for all parts of a split: data/train-00000-of-00004.parquet -> data/train-*.parquet."""
    pattern = re.sub(r"-\d{3,}-of-\d{3,}(-[0-9a-f]+)?\.parquet$", "-*.parquet", name)
    return pattern if pattern != name and len(names) > 1 else name


def _lines(folder: Folder) -> Iterator[Found]:
    kinds: defaultdict[Format, list[str]] = defaultdict(list)
    for name in [*folder.by_suffix[".jsonl"], *folder.by_suffix[".json"]][: 2 * MAX_OPENED]:
        text = folder.ends(name)[:HEAD_BYTES]
        if (
            '"images"' in text
            and '"objects"' in text
            and re.search(r'"(bbox_2d|poly)"\s*:', text)
            and '"messages"' not in text
        ):
            kinds["jsonl"].append(name)
        elif re.search(r'"(messages|conversations)"\s*:\s*\[', text) or ('"query"' in text and '"response"' in text):
            kinds["conversations"].append(name)
    for fmt, names in kinds.items():
        if not names:
            continue
        train, val = _paired(names)
        what = "coordexp records" if fmt == "jsonl" else "conversations about images"
        splits = Found(fmt, f"{train} has {what}", train, _line_images(folder, train, "train"))
        if val:
            splits.val, splits.val_images = val, _line_images(folder, val, "val")
        yield splits


def _line_images(folder: Folder, name: str, split: str) -> str:
    names = re.findall(r'"(?:image|images|path)"\s*:\s*\[?\s*"(?:file://)?([^"]+)"', folder.ends(name))[:20]
    votes = Counter(folder.folder_of(n.replace("\\/", "/"), name, split) for n in names)
    return votes.most_common(1)[0][0] if votes else "."


def _visual_genome(folder: Folder) -> Iterator[Found]:
    places = {folder_name(n) for n in folder.by_suffix[".json"] if n.rsplit("/", 1)[-1] == "image_data.json"}
    known = ("objects.json", "region_descriptions.json")
    found = [n for n in folder.by_suffix[".json"] if n.rsplit("/", 1)[-1] in known and folder_name(n) in places]
    if found:
        train, val = _paired(found)
        parts = (folder_name(f) for f in folder.image_folders if f.split("/")[-1].startswith("VG_100K"))
        images = next(parts, ".")
        yield Found("visual_genome", f"{train} is next to image_data.json", train, images, val or AUTO_SPLIT, images)


def _refs(folder: Folder) -> Iterator[Found]:
    for name in folder.by_suffix[".json"]:
        if name.rsplit("/", 1)[-1].startswith("refs") and '"sentences"' in folder.ends(name):
            images = next((f for f in folder.image_folders if "train2014" in f or f.endswith("images")), ".")
            yield Found("refcoco", f"{name} has refs with sentences", name, images, name, images, prompt="phrase")
            return


RECOGNIZERS: tuple[Callable[[Folder], Iterator[Found]], ...] = (
    _refs, _coco, _yolo, _xml, _labelme, _visual_genome, _parquet, _csv, _lines,
)  # fmt: skip
