"""20,000 damaged annotation files, a quarter by `make test`: each is read, or refused with an error that names it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from coordexp.errors import DataError
from coordexp.records.images import ImageFacts
from coordexp.records.manifest import READERS
from coordexp.records.policy import to_records
from coordexp.records.schema import parse_record
from coordexp.records.sources.base import SplitFiles
from records_folders import LAYOUTS, Annotated, records_config, write_annotations

SIZE = (64, 48)
# Number of files per format; text formats are cheap, YAML and parquet are not.
COUNTS = {
    "coco": 5000, "lvis": 2500, "objects365": 500, "visual_genome": 2000, "refcoco": 1500, "labelme": 2000,
    "jsonl": 2000, "conversations": 1500, "cvat": 800, "voc": 700, "csv": 700,
    "open_images": 400, "yolo": 250, "hub": 150,
}  # fmt: skip
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 1e9, -1e308, 1e400, float("nan"), 10**400, "", " ", "x", "1", "nan", "a/../b", "/etc",
    "\ud800", "\x00", "\ue000", "<|im_end|>", "café", "x" * 5000, [], {}, [[]], [None], {"a": 1}, [1, 2, 3, 4], DEEP,
    {"size": [48, 64], "counts": "\ud800"}, {"size": [1e9, 1e9], "counts": [1]}, {"bytes": None},
)  # fmt: skip


class AllThere(dict[str, ImageFacts]):
    """Facts as if every annotated image existed."""

    def __missing__(self, name: str) -> ImageFacts:
        return ImageFacts(name, 1, name, *SIZE, "RGB")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node of a tree below its root."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries if len(at) < 20 else ():
        yield (*at, key)
        yield from places(inner, (*at, key))


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """One to three nodes replaced, removed or repeated."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        known = list(places(changed))
        if not known:
            return rng.choice(ODD)
        *path, last = rng.choice(known)
        parent = changed
        for key in path:
            parent = parent[key]
        match rng.randrange(4):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[last]))
            case 2 if isinstance(parent, dict):
                parent[rng.choice(list(parent))] = copy.deepcopy(parent[last])
            case _:
                parent[last] = copy.deepcopy(rng.choice(ODD))
    return changed


def mutated_text(text: str, rng: random.Random) -> bytes:
    """A piece of the text removed, repeated, replaced, or in another encoding."""
    begin = rng.randrange(len(text))
    end = min(len(text), begin + rng.choice((1, 1, 2, 5, 20)))
    pieces = (
        "",
        text[begin:end] * 2,
        "\x00",
        "é",
        "\ud7ff",
        "-1",
        "1e400",
        "nan",
        "<",
        "&a;",
        '"',
        ",",
        "\n",
        "<!ENTITY a>",
        "[" * 2000,
    )
    changed = text[:begin] + rng.choice(pieces) + text[end:]
    return changed.encode(rng.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "latin-1")), "replace")


def written(fmt: str, root: Path) -> list[Path]:
    """Small annotations of two images, and the files that may be damaged."""
    boxes = (("cat", (4, 5, 30, 40), False), ("red mug", (32, 0, 60, 44), False))
    pictures = [Annotated(f"{i}.jpg", SIZE, boxes) for i in range(2)]
    if fmt == "refcoco":
        write_annotations("coco", root, "train", pictures)
        (root / "instances.json").write_bytes((root / "annotations/instances_train2017.json").read_bytes())
        sentences = [{"sent": "the cat", "raw": "The Cat"}, {"sent": "a pet"}]
        refs = [{"ref_id": i, "ann_id": i, "split": "train", "sentences": sentences} for i in (1, 2, 3)]
        (root / "refs.json").write_text(json.dumps(refs))
        return [root / "refs.json", root / "instances.json"]
    write_annotations(fmt, root, "train", pictures)
    for p in pictures:
        place = root / LAYOUTS[fmt][0].format(split="train") / p.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    suffixes = (".json", ".jsonl", ".xml", ".csv", ".txt", ".yaml", ".parquet")
    return sorted(p for p in root.rglob("*") if p.suffix in suffixes)


def annotations_of(fmt: str) -> tuple[str, str]:
    images, file = LAYOUTS.get(fmt, (".", "refs.json"))
    return file.format(split="train"), images.format(split="train")


def read_all(fmt: str, root: Path) -> None:
    """Read the files completely, apply the policies, and write the result as the stages do."""
    reading = READERS[fmt](SplitFiles(root, *annotations_of(fmt), "train", polygons=len(str(root)) % 2 == 0))
    result = to_records(reading, AllThere(), records_config(), "train")
    for record in result.records:
        text = json.dumps(record.to_json(), ensure_ascii=False)
        text.encode()
        parse_record(json.loads(text), "converted")
    for problem in result.problems:
        str(problem).encode()
        json.dumps(asdict(problem))
    for category in result.categories:
        json.dumps(category.to_json())


def mutations(file: Path, rng: random.Random) -> Callable[[], bytes]:
    content = file.read_bytes()
    if file.suffix == ".json":
        tree = json.loads(content)
        return lambda: json.dumps(mutated_tree(tree, rng)).encode()
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines()]
        return lambda: b"".join(json.dumps(mutated_tree(row, rng)).encode() + b"\n" for row in rows)
    if file.suffix == ".parquet":

        def flipped() -> bytes:
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 3, 30))):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            return bytes(damaged[: rng.choice((len(damaged), len(damaged), rng.randrange(len(damaged))))])

        return flipped
    text = content.decode()
    return lambda: mutated_text(text, rng)


@pytest.mark.parametrize(("start", "end"), [(0, 0.25), pytest.param(0.25, 1, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("fmt", COUNTS)
def test_damaged_annotations_are_read_or_refused(fmt, start, end, tmp_path):
    first, last = round(start * COUNTS[fmt]), round(end * COUNTS[fmt])
    rng = random.Random(f"mutations of {fmt}")
    files = written(fmt, tmp_path)
    whole = {file: file.read_bytes() for file in files}
    damage = {file: mutations(file, rng) for file in files}
    handles = {file: file.open("r+b", buffering=0) for file in files}  # opening a file takes longer than reading it

    def put(file: Path, content: bytes) -> None:
        handles[file].seek(0)
        handles[file].write(content)
        handles[file].truncate()

    refused: list[str] = []
    for number in range(last):
        file = rng.choice(files)
        content = damage[file]()
        if number < first:
            continue  # of the other part; both draw from one sequence
        put(file, content)
        try:
            read_all(fmt, tmp_path)
        except DataError as error:
            refused.append(str(error))
        except BaseException as error:  # the message names the file
            (tmp_path / "found").write_bytes(content)
            raise AssertionError(f"{fmt} {number} {file.name}: {content[:3000]!r}") from error
        if len(files) > 1:
            put(file, whole[file])
    assert len(refused) < last - first
    assert [message for message in refused if tmp_path.name not in message] == []


def test_the_number_of_mutations_is_sufficient() -> None:
    assert sum(COUNTS.values()) >= 20_000
    assert COUNTS.keys() == READERS.keys()
