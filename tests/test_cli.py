"""The command line as a user runs it: output, files, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coordexp import __version__, cli
from coordexp.errors import DataError, PictureError
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.registry import metric_specs, view
from coordexp.models.expand import add_coordinate_tokens
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction, write_results
from coordexp.records.images import read_rgb
from coordexp.records.prediction_log import AnswerSource, read_rows
from coordexp.records.schema import read_records
from helpers import NOTHING_HELD_OUT, SCENES, catalog, save_model
from toyworld.composer import compose_scene
from toyworld.model import build_tiny
from toyworld.tokenizer import build_tiny_tokenizer

CAT, DOG = (10.0, 10.0, 50.0, 50.0), (60.0, 20.0, 90.0, 80.0)

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=stopped.value.code or 0, out=out, err=err)

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with coordinate tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = build_tiny_tokenizer(["cat", "dog"])
    model = build_tiny(tokenizer, seed=3)
    add_coordinate_tokens(model, tokenizer, "ordinal", seed=3)
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one composed scene and a file that is not an image."""
    source = SCENES.model_copy(
        update={"min_side_px": 96, "max_side_px": 96, "max_objects": 2, "held_out": NOTHING_HELD_OUT}
    )
    path = tmp_path_factory.mktemp("scenes") / "scene.png"
    Image.fromarray(compose_scene(source, catalog(), 5, "val", 0).pixels).save(path)
    (path.parent / "notes.txt").write_text("not an image", encoding="utf-8")
    return path


def result(image_id: int, preds: Sequence[Prediction]) -> ImageResult:
    gt = (GroundTruth("cat", CAT), GroundTruth("dog", DOG))
    parse = ParseReport(container_found=True, n_valid=len(preds))
    return ImageResult(image_id, f"{image_id}.jpg", 100, 100, gt, tuple(preds), "", parse, "stop", 9)


def found(desc: str, box: tuple[float, float, float, float], score: float | None = 0.9) -> Prediction:
    return Prediction(desc, box, (0, 0, 0, 0), score=score)


@pytest.fixture
def half_right(tmp_path: Path) -> Path:
    """Four images with a cat and a dog each; all cats are found, no dog is."""
    path = tmp_path / "gt_vs_pred.jsonl"
    write_results(path, [result(i, [found("cat", CAT)]) for i in range(1, 5)])
    return path


@pytest.fixture
def coco(tmp_path: Path) -> SimpleNamespace:
    """Three images with a crowd region, a box that extends beyond its image, and a box outside its image."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (64, 48)).save(images / name)

    def annotation(image_id: int, box: list[float], **more: Any) -> dict[str, Any]:
        return {"image_id": image_id, "category_id": 1, "bbox": box, "iscrowd": 0} | more

    source = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in (1, 2, 3)],
        "annotations": [
            annotation(1, [1, 2, 10, 10], area="unknown"),
            annotation(1, [0, 0, 60, 40], iscrowd=1),
            annotation(2, [50, 40, 30, 30]),
            annotation(2, [70, 10, 5, 5]),
            annotation(2, [1, 1, 5, 5], category_id=9),
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(source), encoding="utf-8")
    out = tmp_path / "new" / "records.jsonl"
    arguments = ("convert", "--annotations", annotations, "--images", images, "--out", out)
    return SimpleNamespace(source=source, annotations=annotations, images=images, out=out, arguments=arguments)


def test_help_imports_no_heavy_library(repository: Path) -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "matplotlib", "PIL", "rich.console")
    script = f"import sys, coordexp.cli; print(*sorted(set({heavy!r}) & sys.modules.keys()))"
    environment = {"PYTHONPATH": str(repository / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_and_version(run: Run) -> None:
    shown = run("--help")
    assert shown.code == 0
    assert all(command in shown.out for command in ("predict", "evaluate", "compare", "convert"))
    assert run("--version").out == f"coordexp {__version__}\n"


def test_the_default_token_budget_equals_that_of_the_detector() -> None:
    from coordexp.detector import MAX_NEW_TOKENS

    assert inspect.signature(cli.predict).parameters["max_new_tokens"].default == MAX_NEW_TOKENS


@pytest.mark.parametrize("on_terminal", [False, True])
def test_predict_prints_only_json_on_stdout(
    run: Run, checkpoint: Path, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal, raising=False)
    picture = tmp_path / "drawn" / "boxes.png"
    done = run("predict", scene, "--checkpoint", checkpoint, "--json", "--save", picture, "--max-new-tokens", 6)
    assert done.code == 0
    row = json.loads(done.out)
    assert row.keys() == {"image", "width", "height", "objects", "parse", "raw_text"}
    assert row["image"] == str(scene)
    with Image.open(scene) as image, Image.open(picture) as drawn:
        assert (row["width"], row["height"]) == image.size
        assert (drawn.width % image.width, drawn.height % image.height) == (0, 0)
    # The weights are random. rich folds long lines on a terminal.
    assert "the answer is not a list of objects" in " ".join(done.err.split())


class FakeDetector:
    """Finds a cat and a red mug in every image."""

    def __init__(self, parse: ParseReport) -> None:
        self.parse = parse
        self.source = AnswerSource("weights", {"max_new_tokens": 512})
        self.asked: list[str] = []

    takes_labels = True

    def identity(self, find: Sequence[str] = (), phrase: str = "") -> AnswerSource:
        return replace(self.source, settings=self.source.settings | {"question": [*find, phrase]})

    def attempt(self, images: Iterable[Path], *, find: Sequence[str] = (), phrase: str = "") -> Iterator[Any]:
        from coordexp.detections import Detections

        for image in images:
            self.asked.append(image.name)
            try:
                read_rgb(image)
            except PictureError as error:
                yield error
                continue
            boxes, scores = np.array([CAT, DOG]), np.array([0.9, 0.4])
            yield Detections(boxes, ("cat", "red mug"), scores, 100, 100, "", self.parse)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDetector:
    detector = FakeDetector(ParseReport(container_found=True, n_valid=2))
    monkeypatch.setattr("coordexp.detector.Detector.from_checkpoint", lambda folder, **options: detector)
    return detector


def test_predict_lists_the_objects(run: Run, fake: FakeDetector, scene: Path) -> None:
    done = run("predict", scene, "--checkpoint", "any")
    assert done.out.splitlines() == [
        f"{scene}: 100 x 100 px, 2 objects",
        "  0.90  cat  [10.0, 10.0, 50.0, 50.0]",
        "  0.40  red mug  [60.0, 20.0, 90.0, 80.0]",
    ]
    assert done.err == ""


@pytest.fixture
def two(scene: Path, tmp_path: Path) -> list[Path]:
    """Two images in a separate folder."""
    paths = [tmp_path / "two" / name for name in ("a.png", "b.png")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(scene.read_bytes())
    return paths


def test_predict_resumes_and_shows_reused_answers_too(
    run: Run, fake: FakeDetector, two: list[Path], tmp_path: Path
) -> None:
    out, coco, drawn = tmp_path / "out.jsonl", tmp_path / "coco.json", tmp_path / "drawn"
    first = run("predict", two[1], "--checkpoint", "any", "--out", out, "--json")
    done = run("predict", *two, "--checkpoint", "any", "--out", out, "--json", "--coco", coco, "--save", drawn)
    assert "1 of 2 images are in" in done.err
    assert fake.asked == ["b.png", "a.png"]
    assert [json.loads(line)["image"] for line in done.out.splitlines()] == [str(path) for path in two]
    assert done.out.splitlines()[1] == first.out.strip()
    assert sorted(path.name for path in drawn.iterdir()) == ["a.png", "b.png"]
    exported = json.loads(coco.read_text())
    assert [image["file_name"] for image in exported["images"]] == [str(path) for path in two]
    assert [a["score"] for a in exported["annotations"]] == [0.9, 0.4] * 2
    assert run("predict", two[0], "--checkpoint", "another", "--out", out).code == 2


def test_the_log_has_complete_answers_regardless_of_filters(
    run: Run, fake: FakeDetector, two: list[Path], tmp_path: Path
) -> None:
    arguments = ("predict", *two, "--checkpoint", "any", "--out", tmp_path / "out.jsonl", "--json")
    assert all(len(json.loads(line)["objects"]) == 1 for line in run(*arguments, "--classes", "cat").out.splitlines())
    done = run(*arguments)
    assert [len(json.loads(line)["objects"]) for line in done.out.splitlines()] == [2, 2]
    assert len(fake.asked) == 2
    assert run(*arguments, "--classes", "dog").err.endswith("no object is labeled dog; the model found cat, red mug.\n")


def test_outdated_answers_are_predicted_again(run: Run, fake: FakeDetector, two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ("predict", *two, "--checkpoint", "any", "--out", out)
    run(*arguments)
    Image.new("RGB", (8, 8)).save(two[1])
    assert "1 of 2 images are in out.jsonl, but are predicted again: image changed" in run(*arguments).err.replace(
        f"{tmp_path}/", ""
    )
    fake.source = AnswerSource("weights", {"max_new_tokens": 64})
    done = run("predict", two[0], "--checkpoint", "any", "--out", out)
    assert "predicted again: settings changed: max_new_tokens" in done.err
    assert "also holds 1 answers from another checkpoint or other settings" in done.err
    fake.source = AnswerSource("others", {"max_new_tokens": 64})
    assert run(*arguments).err.count("predicted again: checkpoint changed") == 2
    assert fake.asked == ["a.png", "b.png", "b.png", "a.png", "a.png", "b.png"]
    assert sorted(json.loads(line)["image"] for line in out.read_text().splitlines()) == [str(path) for path in two]


def test_an_edited_log_is_an_error_that_names_the_line(
    run: Run, fake: FakeDetector, two: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run("predict", *two, "--checkpoint", "any", "--out", out)
    out.write_text(out.read_text().replace('"score": 0.9', '"score": "high"'))
    done = run("predict", *two, "--checkpoint", "any", "--out", out)
    assert (done.code, f"{out}:1: objects[0].score is 'high' (text)" in done.err) == (2, True)


@pytest.fixture
def three(two: list[Path]) -> list[Path]:
    """The same with a truncated file between them."""
    cut = two[0].with_name("aa.png")
    cut.write_bytes(two[0].read_bytes()[:200])
    return [two[0], cut, two[1]]


@pytest.mark.usefixtures("fake")
def test_an_unreadable_image_stops_after_the_images_before_it(run: Run, three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run("predict", *three, "--checkpoint", "any", "--out", out)
    assert (done.code, "aa.png: cannot be read as an image" in done.err) == (2, True)
    assert "--on-error skip" in done.err
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == [str(three[0])]


def test_an_unreadable_image_is_skipped_with_its_reason(
    run: Run, fake: FakeDetector, three: list[Path], tmp_path: Path
) -> None:
    out, coco, drawn = tmp_path / "out.jsonl", tmp_path / "coco.json", tmp_path / "drawn"
    arguments = ("predict", three[0].parent, "--checkpoint", "any", "--on-error", "skip", "--json", "--out", out)
    done = run(*arguments, "--coco", coco, "--save", drawn)
    assert done.code == 3
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in three]
    assert "cannot be read as an image" in rows[1]["error"]
    assert ["objects" in row for row in rows] == [True, False, True]
    assert f"1 of 3 images could not be read: {three[1]}" in done.err
    assert [json.loads(line).get("error") for line in out.read_text().splitlines()] == [None, rows[1]["error"], None]
    assert len(json.loads(coco.read_text())["images"]) == len(list(drawn.iterdir())) == 2
    with pytest.raises(DataError, match="1 of 3 images have no answer"):
        read_rows(out)
    three[1].write_bytes(three[0].read_bytes())  # fixed: only this image is predicted again
    done = run(*arguments)
    assert (done.code, fake.asked[-1], len(fake.asked)) == (0, "aa.png", 4)
    assert len(read_rows(out)) == 3


def test_predict_filters_by_label(run: Run, fake: FakeDetector, scene: Path) -> None:
    done = run("predict", scene, "--checkpoint", "any", "--json", "--classes", "Red Mug, catt")
    assert [o["desc"] for o in json.loads(done.out)["objects"]] == ["red mug"]
    assert done.err == "note: no object is labeled catt; the model found cat, red mug.\n"


def test_predict_reports_unusable_parts_of_an_answer(run: Run, fake: FakeDetector, scene: Path) -> None:
    fake.parse = ParseReport(container_found=True, n_valid=2, dropped={"malformed": 2}, truncated=True)
    done = run("predict", scene, "--checkpoint", "any")
    assert "the answer was truncated (--max-new-tokens 512)" in done.err
    assert "2 invalid objects dropped (malformed 2)" in done.err


def test_predict_accepts_folders_and_glob_patterns(run: Run, fake: FakeDetector, scene: Path, tmp_path: Path) -> None:
    for name in ("a/x.jpg", "b/x.PNG", "b/y.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (100, 100)).save(tmp_path / name)
    (tmp_path / "b" / "notes.txt").touch()
    out = tmp_path / "out"
    done = run("predict", tmp_path / "b", tmp_path / "*/x.*", "--checkpoint", "any", "--json", "--save", out)
    images = [json.loads(line)["image"] for line in done.out.splitlines()]
    assert images == [str(tmp_path / name) for name in ("b/x.PNG", "b/y.webp", "a/x.jpg")]
    assert sorted(p.name for p in out.iterdir()) == ["x-2.png", "x.png", "y.png"]


def test_progress_in_a_log_is_plain_lines(run: Run, fake: FakeDetector, tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02d}.png")
    done = run("predict", tmp_path, "--checkpoint", "any", "--json")
    assert len(done.out.splitlines()) == 20
    assert done.err.splitlines() == [f"predict: {n} of 20" for n in range(2, 21, 2)]


def test_drawings_never_replace_input_images(run: Run, fake: FakeDetector, scene: Path) -> None:
    before = scene.read_bytes()
    for save in (scene, scene.parent):
        assert "would replace the image" in run("predict", scene, "--checkpoint", "any", "--save", save).err
    assert scene.read_bytes() == before


def test_evaluate_writes_every_metric_and_prints_a_few(run: Run, half_right: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "metrics.json"
    done = run("evaluate", half_right, "--out", out)
    assert done.code == 0
    metrics = json.loads(out.read_text(encoding="utf-8"))
    assert {f"{area}.{key}" for area, values in metrics.items() for key in values} == set(metric_specs(STANDARD))
    assert metrics["coco"]["AP50"] == 0.5
    assert (metrics["f1"]["precision_50"], metrics["f1"]["recall_50"]) == (1.0, 0.5)
    assert "4 images, 8 objects, 4 predictions\n" in done.out
    shown = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if "." in line.split()[0]}
    undefined = {"confidence.auroc_tp_fp"}  # no false positive to be separated from
    assert shown["coco.AP50"] == ["0.5000", "0.5000", "..", "0.5000"]
    assert shown["f1.full_50"][0] == "0.6667"
    assert shown.keys() >= {key for key in view("printed", STANDARD) if not key.startswith("lvis.")} - undefined


def test_looping_answers_are_reported_before_any_number(run: Run, half_right: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in half_right.read_text(encoding="utf-8").splitlines()]
    looping = tmp_path / "looping.jsonl"
    for row in rows:
        row["pred"] *= 12
    looping.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = f"{looping}: the scores are not meaningful: 100 % of the answers loop"
    assert run("evaluate", looping, "--out", tmp_path / "m.json").out.startswith(words)
    assert run("compare", looping, half_right).out.startswith(words)
    assert "not evaluated" not in run("compare", half_right, half_right).out


def test_evaluate_with_categories(run: Run, half_right: Path, tmp_path: Path) -> None:
    categories, out = tmp_path / "categories.json", tmp_path / "metrics.json"
    rows = [{"id": 1, "name": "cat", "split": "train"}, {"id": 2, "name": "dog", "split": "held_out"}]
    categories.write_text(json.dumps(rows), encoding="utf-8")
    assert run("evaluate", half_right, "--out", out, "--categories", categories).code == 0
    metrics = json.loads(out.read_text(encoding="utf-8"))
    assert (metrics["known"]["AP50"], metrics["held_out"]["AP50"]) == (1.0, 0.0)
    categories.write_text(json.dumps(rows[:1]), encoding="utf-8")
    done = run("evaluate", half_right, "--out", out, "--categories", categories)
    assert (done.code, "'dog' is none of the 1 categories" in done.err) == (2, True)


def test_evaluate_checks_the_annotations_and_adds_lvis(run: Run, half_right: Path, tmp_path: Path) -> None:
    annotations, out = tmp_path / "instances.json", tmp_path / "metrics.json"
    images = [{"id": i, "width": 64, "height": 64} for i in range(1, 6)]
    rest = {"annotations": [], "categories": []}
    annotations.write_text(json.dumps({"images": images, **rest}), encoding="utf-8")
    done = run("evaluate", half_right, "--out", out, "--annotations", annotations)
    assert (done.code, "4 of the 5 annotated images" in done.err, "lvis.mAP" in done.out) == (0, True, False)
    labelled = [{**i, "neg_category_ids": [], "not_exhaustive_category_ids": []} for i in images]
    names = [{"id": 1, "name": "cat", "frequency": "f"}, {"id": 2, "name": "dog", "frequency": "r"}]
    annotations.write_text(json.dumps({"images": labelled, "categories": names, "annotations": []}), encoding="utf-8")
    assert "lvis.mAP" in run("evaluate", half_right, "--out", out, "--annotations", annotations).out
    metrics = json.loads(out.read_text(encoding="utf-8"))
    assert (metrics["lvis"]["APf"], metrics["lvis"]["APr"], metrics["lvis"]["APc"]) == (1.0, 0.0, None)
    annotations.write_text(json.dumps({"images": images[:2], **rest}), encoding="utf-8")
    done = run("evaluate", half_right, "--out", out, "--annotations", annotations)
    assert (done.code, "Image id 3 is not in the annotations" in done.err) == (2, True)


def test_evaluate_writes_tables(run: Run, half_right: Path, tmp_path: Path) -> None:
    assert run("evaluate", half_right, "--out", tmp_path / "m.json", "--tables", tmp_path / "tables").code == 0
    rows = (tmp_path / "tables" / "per_class.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0].startswith("id,name,split,n_gt,n_pred,AP,AP50")
    assert [row.split(",")[1] for row in rows[1:]] == ["cat", "dog"]
    assert len(json.loads((tmp_path / "tables" / "per_image.json").read_text(encoding="utf-8"))) == 4


def test_compare_shows_the_difference_and_the_changed_images(run: Run, half_right: Path, tmp_path: Path) -> None:
    better = tmp_path / "better.jsonl"
    extra = {3: [found("cat", CAT), found("dog", DOG)]}
    write_results(better, [result(i, extra.get(i, [found("cat", CAT)])) for i in range(1, 5)])
    done = run("compare", half_right, better)
    assert done.code == 0
    [row] = [line.split() for line in done.out.splitlines() if line.startswith("f1.full_50")]
    # 5 of 8 objects without a false positive: F1 = 10 / 13; before, 4 of 8: F1 = 8 / 12
    assert row[1:4] == ["0.6667", "0.7692", f"{10 / 13 - 8 / 12:+.4f}"]
    assert done.out.splitlines()[-1].split() == ["3.jpg", "0.6667", "1.0000", "+0.3333"]


def test_a_file_does_not_differ_from_itself(run: Run, half_right: Path) -> None:
    done = run("compare", half_right, half_right)
    [row] = [line.split() for line in done.out.splitlines() if line.startswith("coco.mAP")]
    assert row[:7] == ["coco.mAP", "0.5000", "0.5000", "+0.0000", "+0.0000", "..", "+0.0000"]
    assert " ".join(row[7:]) == "the same in every resample and seed"
    assert "most changed" not in done.out


def test_compare_refuses_files_of_different_images(run: Run, half_right: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    write_results(other, [result(i, [found("cat", CAT)]) for i in range(2, 6)])
    done = run("compare", half_right, other)
    assert (done.code, done.out) == (2, "")
    assert "different images" in done.err


def test_convert_drops_and_counts_boxes(run: Run, coco: SimpleNamespace) -> None:
    done = run(*coco.arguments)
    assert done.code == 0
    records = list(read_records(coco.out))
    assert [r.image for r in records] == ["1.png", "2.png", "3.png"]
    assert [[o.bbox_xyxy_px for o in r.objects] for r in records] == [
        [(0.0, 0.0, 60.0, 40.0), (1.0, 2.0, 11.0, 12.0)],
        [(1.0, 1.0, 6.0, 6.0), (50.0, 40.0, 64.0, 48.0)],
        [],
    ]
    assert records[1].objects[0].metadata == {"iscrowd": 1, "lost": "unknown_category"}
    assert records[0].objects[0].metadata == {"iscrowd": 1}
    assert done.out.splitlines() == [
        f"{coco.out}: 3 images, 4 objects, 2 of them crowd regions",
        f"  {coco.annotations}: image 1, annotations[0]: area_invalid ('unknown')",
        f"  {coco.annotations}: image 2, annotations[3]: bbox_too_thin (corners 70, 10, 75, 15, image 64 x 48 px)",
        f"  {coco.annotations}: image 2, annotations[4]: unknown_category (category_id 9)",
        "dropped: 2 boxes, area_invalid 1, bbox_too_thin 1, unknown_category 1",
    ]


def test_convert_stops_at_a_missing_image(run: Run, coco: SimpleNamespace) -> None:
    (coco.images / "3.png").unlink()
    done = run(*coco.arguments)
    assert done.code == 2
    assert f"{coco.annotations}: image 3: image_missing (images/3.png" in done.err
    assert not coco.out.exists()
    for image in coco.images.iterdir():
        image.unlink()
    assert "none of the 3 annotated images is there" in run(*coco.arguments).err


def test_convert_stops_at_an_image_of_another_size(run: Run, coco: SimpleNamespace) -> None:
    Image.new("RGB", (48, 64)).save(coco.images / "2.png")
    done = run(*coco.arguments)
    assert (done.code, "2.png is 48 x 64 px, annotated 64 x 48" in done.err) == (2, True)


def test_convert_expects_boxes_in_the_displayed_orientation(run: Run, coco: SimpleNamespace) -> None:
    """EXIF orientation 6: 48 x 64 px are stored and 64 x 48 shown; 64 x 48 are stored and 48 x 64 shown."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(coco.images / "2.png", exif=exif)
    assert run(*coco.arguments).code == 0
    assert [(r.width, r.height) for r in read_records(coco.out)] == [(64, 48)] * 3
    Image.new("RGB", (64, 48)).save(coco.images / "2.png", exif=exif)
    done = run(*coco.arguments)
    assert (done.code, "image_exif_rotated" in done.err) == (2, True)


def test_convert_reads_other_formats(run: Run, tmp_path: Path) -> None:
    """Image names are relative to --images, regardless of the folders around it."""
    images, labels = tmp_path / "set" / "images" / "val", tmp_path / "set" / "labels" / "val"
    for folder in (images, labels):
        folder.mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(images / "a.png")
    (labels / "a.txt").write_text("0 0.5 0.5 0.25 0.5\n9 0.5 0.5 0.1 0.1\n")
    (tmp_path / "set" / "data.yaml").write_text("names: [cat]\n")
    out = tmp_path / "records.jsonl"
    arguments = ["convert", "--source", "yolo", "--images", images, "--out", out, "--annotations"]
    done = run(*arguments, tmp_path / "set" / "data.yaml")
    assert (done.code, done.err) == (0, "")
    (record,) = read_records(out)
    assert [o.bbox_xyxy_px for o in record.objects if "lost" not in o.metadata] == [(24.0, 12.0, 40.0, 36.0)]
    assert (record.image, len(record.objects)) == ("a.png", 2)
    assert done.out.splitlines()[-1] == "dropped: 1 boxes, unknown_category 1"
    (images / "a.png").write_bytes(b"no image")
    done = run(*arguments, tmp_path / "set" / "data.yaml")
    assert (done.code, "image_unreadable" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"file_name": "1.png"}]}, "expected COCO's instances layout"),
        ({"images": [{"id": 1, "file_name": "../1.png", "width": 64, "height": 48}]}, "leaves the image root"),
        ({"annotations": None}, "annotations is null, expected a list, as in COCO's instances layout"),
        ({"images": [{"id": 1, "file_name": "1.png", "width": 0, "height": 48}]}, "image_size_invalid (0 x 48 px)"),
    ],
)
def test_convert_refuses_files_that_are_not_coco(
    run: Run, coco: SimpleNamespace, change: dict[str, Any], message: str
) -> None:
    coco.annotations.write_text(json.dumps(coco.source | change), encoding="utf-8")
    done = run(*coco.arguments)
    assert (done.code, message in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{notes}", "--checkpoint", "{checkpoint}"], "notes.txt: cannot be read as an image"),
        (["predict", "nowhere.jpg", "--checkpoint", "{checkpoint}"], "nowhere.jpg: no image there"),
        (["predict", "{empty}", "--checkpoint", "{checkpoint}"], "empty: no image there: none of its 0 files ends in"),
        (["predict", "{pipe}", "--checkpoint", "{checkpoint}"], "pipe.jpg: cannot be read as an image (it is a named"),
        (["predict", "{scene}", "--checkpoint", "{empty}"], "empty: no config.json"),
        (["predict", "{scene}"], "Missing option '--checkpoint'"),
        (["predict", "{scene}", "{notes}", "--checkpoint", "{checkpoint}", "--save", "a.png"], "give a folder"),
        (["evaluate", "{blank}", "--out", "{empty}/m.json"], "blank.jsonl: no predictions in the file"),
        (["evaluate", "{scene}", "--out", "{empty}/m.json"], "scene.png:1: not UTF-8 text"),
        (["evaluate", "{unscored}", "--out", "{empty}/m.json"], "pred[0] has score None"),
        (["evaluate", "{half_right}", "--out", "{empty}"], "empty: Is a directory."),
        (["evaluate", "nowhere.jsonl", "--out", "m.json"], "'nowhere.jsonl' does not exist"),
        (["evaluate", "{half_right}", "--out", "m.json", "--categories", "{scene}"], "Expected a categories.json"),
        (["evaluat"], "Did you mean 'evaluate'?"),
        (["convert", "--source", "powerpoint"], "'coco', 'lvis'"),
    ],
)
def test_user_errors_are_messages_without_traceback(
    run: Run, arguments: list[str], message: str, checkpoint: Path, scene: Path, half_right: Path, tmp_path: Path
) -> None:
    empty, blank, unscored = tmp_path / "empty", tmp_path / "blank.jsonl", tmp_path / "unscored.jsonl"
    empty.mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    blank.touch()
    write_results(unscored, [replace(result(1, []), pred=(found("cat", CAT, score=None),))])
    places = {"notes": scene.parent / "notes.txt", "scene": scene, "checkpoint": checkpoint, "half_right": half_right}
    places |= {"empty": empty, "blank": blank, "unscored": unscored, "pipe": tmp_path / "pipe.jpg"}
    done = run(*(argument.format(**places) for argument in arguments))
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, half_right: Path, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("coordexp.evaluation.evaluator.evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", str(half_right), "--out", str(tmp_path / "m.json")])
