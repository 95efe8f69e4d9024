"""The detector: the same result for every type of image, boxes in original pixels, errors with names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from coordexp.config.schema import TextParams
from coordexp.detections import Detections, class_ids
from coordexp.detector import Detector
from coordexp.errors import CheckpointError, ConfigError, CoordExpError, DataError, PictureError
from coordexp.geometry.bins import encode_boxes
from coordexp.models.detection_config import DetectionConfig, read_detection_config
from coordexp.models.expand import add_coordinate_tokens
from coordexp.models.loading import Checkpoint
from coordexp.packing.pixels import load_rgb
from coordexp.packing.prepare import text_objects
from coordexp.packing.samples import Sample
from coordexp.records.gt_vs_pred import ParseReport
from coordexp.records.images import inspect_image
from coordexp.records.schema import Record
from coordexp.rollout.engine import DecodeRequest, Generation
from coordexp.rollout.hf_engine import GROUP_BATCHES
from coordexp.text.codecs import AnswerEncoder, get_codec
from coordexp.text.prompts import TASKS, question, question_text
from coordexp.text.vocabulary import CoordVocabulary
from helpers import MAX_PIXELS, NOTHING_HELD_OUT, SCENES, catalog, save_model
from toyworld.composer import compose_scene
from toyworld.model import build_tiny
from toyworld.tokenizer import build_tiny_tokenizer

DESCS = ("red mug", "cat")
BOXES_XYXY_PX = np.array([[10.0, 20.0, 50.5, 60.25], [0.0, 5.0, 118.0, 90.0]])
SCENE = SCENES.model_copy(update={"min_side_px": 96, "max_side_px": 160, "held_out": NOTHING_HELD_OUT})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with coordinate tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = build_tiny_tokenizer(DESCS)
    model = build_tiny(tokenizer, seed=3)
    add_coordinate_tokens(model, tokenizer, "ordinal", seed=3)
    save_model(folder, model, tokenizer)
    # Answers are scripted, so the distributions of the random weights do not match them.
    return saying(folder, box="argmax", score="coord_logprob")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A composed scene, stored without loss."""
    pixels = compose_scene(SCENE, catalog(), 5, "val", 0).pixels
    path = tmp_path_factory.mktemp("images") / "scene.png"
    Image.fromarray(pixels).save(path)
    return path


class ScriptedEngine:
    """Answers every image with the same two objects, and records its inputs."""

    def __init__(self, codec: str = "json") -> None:
        self.codec = codec
        self.samples: list[Sample] = []
        self.pixels: list[np.ndarray] = []
        self.on_disk: list[int] = []

    def __call__(self, checkpoint: Checkpoint, image_root: Path, batch_images: int) -> ScriptedEngine:
        """Stand in for the constructor of an engine."""
        self.encoder = AnswerEncoder(checkpoint.tokenizer, get_codec(self.codec))
        return self

    def stream(
        self, parts: Iterable[Sequence[Sample]], request: DecodeRequest, image_root: Path
    ) -> Iterator[list[Generation]]:
        for samples in parts:
            self.samples += samples
            self.pixels += [load_rgb(image_root / s.image, s.resized_width, s.resized_height) for s in samples]
            self.on_disk.append(len(list(image_root.iterdir())))
            bins = [encode_boxes(BOXES_XYXY_PX, s.width, s.height) for s in samples]
            yield [Generation(self.encoder.encode(text_objects(DESCS, rows)).ids, "stop") for rows in bins]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    engine = ScriptedEngine()
    monkeypatch.setattr("coordexp.detector.HfEngine", engine)
    return engine


def two_found() -> Detections:
    return Detections(BOXES_XYXY_PX, DESCS, np.array([0.5, 0.25]), 120, 100, "...", ParseReport(True, 2, {}, False))


def saying(folder: Path, target: Path | None = None, **changes: object) -> Path:
    """The folder, or a copy of it, with another coordexp.json."""
    target = Path(shutil.copytree(folder, target)) if target else folder
    config = json.loads((target / "coordexp.json").read_text())
    (target / "coordexp.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return target


def test_files_pil_images_and_arrays_give_the_same_result(folder: Path, scene: Path) -> None:
    detector = Detector.from_checkpoint(folder, max_new_tokens=8, batch_images=2)
    with Image.open(scene) as opened:
        image = opened.copy()
    answers = detector.predict([scene, str(scene), image, np.asarray(image)])
    assert len({found.raw_text for found in answers}) == 1
    assert answers[0].raw_text
    assert {(found.width, found.height) for found in answers} == {image.size}
    (shorter,) = Detector.from_checkpoint(folder, max_new_tokens=4).predict([scene])
    assert answers[0].raw_text.startswith(shorter.raw_text)
    assert answers[0].raw_text != shorter.raw_text


def test_boxes_are_in_pixels_of_the_original_image(folder: Path, engine: ScriptedEngine) -> None:
    big, small = np.full((900, 1200, 3), 90, np.uint8), np.full((100, 120, 3), 90, np.uint8)
    for found, picture in zip(Detector.from_checkpoint(folder).predict([big, small]), (big, small), strict=True):
        half_bin_px = np.tile([picture.shape[1], picture.shape[0]], 2) / 2000
        assert (np.abs(found.boxes_xyxy_px - BOXES_XYXY_PX) <= half_bin_px + 1e-4).all()
        assert found.boxes_xyxy_px.dtype == np.float64
        assert found.descs == DESCS
        assert found.scores.shape == (2,)
        assert ((found.scores > 0) & (found.scores <= 1)).all()
        assert found.parse.ok
    assert all(s.resized_width * s.resized_height <= MAX_PIXELS for s in engine.samples)


def test_exif_orientation_is_applied(folder: Path, tmp_path: Path, engine: ScriptedEngine) -> None:
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[:, :64] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated clockwise for display: the left half becomes the upper one
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        answers = Detector.from_checkpoint(folder).predict([path, image])
    assert [(found.width, found.height) for found in answers] == [(96, 128)] * 2
    for seen in engine.pixels:
        assert seen.shape == (128, 96, 3)
        assert seen[:60].min() == 255
        assert seen[68:].max() == 0


def test_an_empty_input_gives_an_empty_result(folder: Path) -> None:
    assert Detector.from_checkpoint(folder).predict([]) == []


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((40, 40, 3), np.float32), r"array of shape \(40, 40, 3\) and type float32: expected an RGB array"),
        (np.zeros((40, 40), np.uint8), r"array of shape \(40, 40\)"),
        (np.zeros((0, 40, 3), np.uint8), r"array of shape \(0, 40, 3\)"),
        (np.zeros((2, 500, 3), np.uint8), r"array of shape \(2, 500, 3\).*aspect ratio above 200"),
        (Path("nowhere.jpg"), "nowhere.jpg: no such file"),
        (Image.new("F", (40, 40)), "PIL image of mode F: .*no known range"),
    ],
)
def test_inputs_that_are_not_images_are_refused(folder: Path, picture: Path | np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Detector.from_checkpoint(folder).predict([picture])


def test_errors_name_the_damaged_file(folder: Path, scene: Path, tmp_path: Path) -> None:
    text, half = tmp_path / "text.png", tmp_path / "half.png"
    text.write_text("not an image", encoding="utf-8")
    half.write_bytes(scene.read_bytes()[: scene.stat().st_size // 2])
    for path in (text, half):
        with pytest.raises(DataError, match=f"{path.name}: cannot be read as an image"):
            Detector.from_checkpoint(folder).predict([scene, path])


def test_results_of_a_folder_are_streamed(folder: Path, scene: Path, tmp_path: Path, engine: ScriptedEngine) -> None:
    """Answers come in order while images are taken, of which never more lie about than two parts; the answers before
    an image that cannot be read come before its error."""
    taken: list[int] = []
    (tmp_path / "broken.png").write_text("not an image", encoding="utf-8")

    def pictures(n: int) -> Iterator[Path]:
        for i in range(n):
            taken.append(i)
            yield scene
        yield tmp_path / "broken.png"

    stream, found = Detector.from_checkpoint(folder, batch_images=1).stream(pictures(50)), list[Detections]()
    for one in islice(stream, 50):
        found.append(one)
        assert len(taken) <= len(found) + 1 + 3 * GROUP_BATCHES
    with pytest.raises(DataError, match=r"broken\.png: cannot be read"):
        next(stream)
    assert [one.descs for one in found] == [DESCS] * 50
    assert max(engine.on_disk) <= 3 * GROUP_BATCHES
    assert [sample.image_id for sample in engine.samples] == list(range(50))


def test_several_processes_give_the_same_results(folder: Path, scene: Path) -> None:
    with Image.open(scene) as image:
        pictures = [image.rotate(7 * i) for i in range(9)]
    options: dict[str, Any] = {"max_new_tokens": 12, "batch_images": 1}
    alone = Detector.from_checkpoint(folder, **options).predict(pictures)
    detector = Detector.from_checkpoint(folder, **options, processes=2)
    with closing(detector):
        together = detector.predict(pictures)
    assert [found.to_json() for found in together] == [found.to_json() for found in alone]
    assert len({found.raw_text for found in alone}) > 1


def test_one_image_gives_one_result_and_a_list_gives_a_list(folder: Path, scene: Path, engine: ScriptedEngine) -> None:
    detector = Detector.from_pretrained(str(folder))
    with Image.open(scene) as image:
        for picture in (scene, str(scene), image, np.asarray(image.convert("RGB"))):
            found = detector.predict(picture)
            assert (found.descs, found.width) == (DESCS, image.width)
    for several in ([scene], (scene,), scene.parent.glob("*.png")):
        assert [found.descs for found in detector.predict(several)] == [DESCS]


@pytest.mark.parametrize("picture", [None, 3, [None], b"a.png"])
def test_other_types_are_refused(folder: Path, picture: object) -> None:
    with pytest.raises(DataError, match=r"image of type (NoneType|int): expected a file name"):
        Detector.from_checkpoint(folder).predict(picture)  # type: ignore[call-overload]


def test_checkpoints_are_accepted_as_strings_and_paths(folder: Path) -> None:
    for name in (str(folder), folder, os.fspath(folder) + "/"):
        assert Detector.from_checkpoint(name).predict([]) == []
    with pytest.raises(CheckpointError, match=r"nowhere: no config\.json"):
        Detector.from_pretrained("nowhere")


def test_the_package_exports_the_detector_and_loads_it_lazily(repository: Path) -> None:
    script = (
        "import sys, coordexp\n"
        "assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys()\n"
        "from coordexp import Detections, Detector\n"
        "print(Detector.__module__, Detections.__module__, hasattr(coordexp, 'nothing'))\n"
    )
    environment = {"PYTHONPATH": str(repository / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["coordexp.detector", "coordexp.detections", "False"]


def picture_files(folder: Path) -> list[Path]:
    """The same kinds of files that a training set may contain."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 65536, (120, 100), dtype=np.uint16)
    rgba = Image.fromarray(rng.integers(0, 256, (120, 100, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 8
    rgba.save(folder / "rgba.png")
    Image.fromarray(grey).save(folder / "deep.png", exif=exif)
    Image.fromarray(grey).save(folder / "deep.tif", exif=exif)
    rgba.convert("LA").save(folder / "la.png")
    rgba.quantize(32).save(folder / "palette.gif")
    rgba.convert("RGB").convert("CMYK").save(folder / "cmyk.jpg", exif=exif)
    return sorted(folder.iterdir())


def test_prediction_uses_the_pixels_of_training(folder: Path, tmp_path: Path, engine: ScriptedEngine) -> None:
    files = picture_files(tmp_path)
    answers = Detector.from_checkpoint(folder).predict(files)
    for path, found, sample, pixels in zip(files, answers, engine.samples, engine.pixels, strict=True):
        trained = load_rgb(path, sample.resized_width, sample.resized_height)
        np.testing.assert_array_equal(pixels, trained, err_msg=path.name)
        facts = inspect_image(tmp_path, path.name)
        assert (found.width, found.height) == (facts.width, facts.height)


def test_the_identity_covers_everything_that_determines_an_answer(folder: Path, tmp_path: Path) -> None:
    first = Detector.from_checkpoint(folder).identity()
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "train_log.jsonl").write_text("{}")
    assert Detector.from_checkpoint(copy).identity() == first
    assert Detector.from_checkpoint(copy, max_new_tokens=9).identity().settings != first.settings
    named = saying(folder, tmp_path / "named", prompts=["closed"], names=list(DESCS))
    assert Detector.from_checkpoint(named).identity().settings["question"].endswith("red mug, cat.")
    for name in ("model.safetensors", "tokenizer_config.json", "preprocessor_config.json", "coordexp.json"):
        other = shutil.copytree(folder, tmp_path / name)
        if name == "model.safetensors":
            weights = load_file(other / name)
            save_file({key: value * 2 for key, value in weights.items()}, other / name, {"format": "pt"})
        else:
            content = json.loads((other / name).read_text()) if (other / name).exists() else {}
            (other / name).write_text(json.dumps(content, indent=1))
        identity = Detector.from_checkpoint(other).identity()
        assert (identity.settings, identity.checkpoint != first.checkpoint) == (first.settings, True), name


def test_the_checkpoint_defines_its_prompt_and_readout(folder: Path, tmp_path: Path, engine: ScriptedEngine) -> None:
    picture, engine.codec = np.full((300, 320, 3), 90, np.uint8), "tags"
    tags = saying(folder, tmp_path / "tags", codec="tags", prompts=["listed"], names=["cat", "dog"])
    detector = Detector.from_checkpoint(tags)
    assert detector.predict([picture])[0].descs == DESCS
    assert Detector.from_checkpoint(folder).predict([picture])[0].descs == ()
    listed, everything = (detector._checkpoint.tokenizer.decode(sample.prompt_ids) for sample in engine.samples)
    assert question({"kind": "listed", "names": ["cat", "dog"]}) in listed
    assert TASKS["detect"] in everything


def test_labels_are_in_the_prompt_if_trained_with_label_lists(
    folder: Path, tmp_path: Path, engine: ScriptedEngine
) -> None:
    picture = np.full((100, 120, 3), 90, np.uint8)
    detector = Detector.from_checkpoint(saying(folder, tmp_path / "lists", prompts=["open", "listed"], names=["cat"]))
    found = detector.predict(picture, find=[DESCS[0], "zebra"])
    assert found.descs == DESCS[:1], "what nobody asked for is left out"
    words = question_text(detector._checkpoint.tokenizer, engine.samples[-1].prompt_ids)
    assert words == question({"kind": "listed", "names": [DESCS[0], "zebra"]})
    assert detector.takes_labels
    assert detector.identity(find=["a"]) != detector.identity(find=["b"]) != detector.identity()
    everything = Detector.from_checkpoint(saying(folder, tmp_path / "everything", prompts=["open"]))
    assert not everything.takes_labels
    assert everything.predict(picture, find=["zebra"]).descs == ()
    assert question_text(everything._checkpoint.tokenizer, engine.samples[-1].prompt_ids) == TASKS["detect"]


def test_a_phrase_is_a_separate_kind_of_prompt(folder: Path, tmp_path: Path, engine: ScriptedEngine) -> None:
    picture = np.full((100, 120, 3), 90, np.uint8)
    detector = Detector.from_checkpoint(saying(folder, tmp_path / "phrases", prompts=["open", "phrase"]))
    assert detector.predict(picture, phrase="the left one").descs == DESCS
    words = question_text(detector._checkpoint.tokenizer, engine.samples[-1].prompt_ids)
    assert words == question({"kind": "phrase", "names": ["the left one"]})
    with pytest.raises(ConfigError, match="at most one of them"):
        detector.predict(picture, phrase="the left one", find=["cat"])
    everything = Detector.from_checkpoint(saying(folder, tmp_path / "everything", prompts=["open"]))
    with pytest.raises(ConfigError, match="was trained with the prompts open"):
        everything.predict(picture, phrase="the left one")


def test_a_checkpoint_trained_with_mixed_prompts_accepts_all_kinds(
    folder: Path, tmp_path: Path, engine: ScriptedEngine
) -> None:
    """The checkpoint was trained with records that prompt for labels, for a phrase, or for all objects."""
    listed, phrase = {"kind": "listed", "names": ["cat", "zebra"]}, {"kind": "phrase", "names": ["the left one"]}
    records = [Record("a.png", 9, 9, (), metadata={"prompt": p}) for p in (listed, phrase, {"kind": "open"})]
    plain = read_detection_config(folder, CoordVocabulary.from_tokenizer(AutoTokenizer.from_pretrained(folder)))
    text = TextParams(codec=plain.codec, object_order=plain.object_order)
    mixed = DetectionConfig.of_training(text, records, plain.coordinates)
    detector = Detector.from_checkpoint(saying(folder, tmp_path / "mixed", prompts=mixed.prompts, names=mixed.names))
    assert (detector.takes_labels, detector.takes_phrases) == (True, True)
    picture, asked = np.full((100, 120, 3), 90, np.uint8), [{"find": ["zebra"]}, {"phrase": "the left one"}, {}]
    for keywords in asked:
        detector.predict(picture, **keywords)
    words = [question_text(detector._checkpoint.tokenizer, sample.prompt_ids) for sample in engine.samples]
    assert words == [question({"kind": "listed", "names": ["zebra"]}), question(phrase), TASKS["detect"]]


def test_folders_and_patterns_mean_several_images_and_urls_are_downloaded_on_request(
    folder: Path, scene: Path, tmp_path: Path, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector.from_checkpoint(folder)
    for name in ("a.png", "b.png", "c[1].png"):
        shutil.copy(scene, tmp_path / name)
    assert [found.picture for found in detector.predict(tmp_path)] == sorted(tmp_path.iterdir())
    assert len(detector.predict(f"{tmp_path}/[ab].png")) == 2
    assert len(detector.predict(tmp_path / "c[1].png")) == len(DESCS)  # a file of this name: one answer, its objects
    monkeypatch.setattr("coordexp.detector.fetched_rgb", lambda address: Image.open(scene).convert("RGB"))
    assert detector.predict("https://example.org/a.png", fetch=True).draw().width > 0
    assert len(detector.predict(["https://example.org/a.png", scene], fetch=True)) == 2
    with pytest.raises(PictureError, match="only on request"):
        detector.predict("https://example.org/a.png")


def test_a_hub_model_is_found_by_its_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def snapshot(name: str, **_: object) -> str:
        fetched.append(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert Detector.from_pretrained("somebody/detector").identity() == Detector.from_checkpoint(folder).identity()
    assert fetched == ["somebody/detector"]
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="somebody/detector: no such folder, and not available from the Hub"):
        Detector.from_pretrained("somebody/detector")


def test_a_model_without_coordinate_tokens_answers_in_digits(tmp_path: Path, engine: ScriptedEngine) -> None:
    tokenizer = build_tiny_tokenizer(DESCS)
    save_model(tmp_path, build_tiny(tokenizer, seed=3), tokenizer)
    engine.codec = "digits"
    (found,) = Detector.from_checkpoint(tmp_path).predict([np.full((100, 120, 3), 90, np.uint8)])
    assert found.descs == DESCS


def test_invalid_checkpoint_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Detector.from_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="codec is 'xml'"):
        Detector.from_checkpoint(saying(folder, tmp_path / "odd", codec="xml"))
    assert issubclass(CheckpointError, CoordExpError)


def test_named_keeps_only_the_given_labels() -> None:
    found = two_found().named(["Red_Mug", "dog"])
    assert found.descs == ("red mug",)
    np.testing.assert_array_equal(found.boxes_xyxy_px, BOXES_XYXY_PX[:1])
    np.testing.assert_array_equal(found.scores, [0.5])
    nothing = two_found().named([])
    assert len(nothing) == 0
    assert nothing.boxes_xyxy_px.shape == (0, 4)


def test_indexing_selects_objects(scene: Path) -> None:
    found = replace(two_found(), picture=scene)
    assert [(one.desc, one.score) for one in found] == list(zip(DESCS, (0.5, 0.25), strict=True))
    assert found[0].descs == found[:1].descs == found[[0]].descs == found[found.scores > 0.3].descs == DESCS[:1]
    assert found[::-1].sorted().descs == DESCS
    assert found.above(0.25).descs == DESCS
    assert found.above(0.6).descs == ()
    assert found[:0].boxes_xyxy_px.shape == (0, 4)
    assert found[1].raw_text == found.raw_text
    [first, second] = found.to_coco(7, {DESCS[0].upper(): 3, DESCS[1]: 9})
    x1, y1, x2, y2 = BOXES_XYXY_PX[0].tolist()
    assert first == {"image_id": 7, "category_id": 3, "bbox": pytest.approx([x1, y1, x2 - x1, y2 - y1]), "score": 0.5}
    assert second["category_id"] == 9
    with pytest.raises(DataError, match="category_ids lack"):
        found.to_coco(7, {DESCS[0]: 3})


def test_a_result_can_draw_itself(scene: Path, tmp_path: Path) -> None:
    found = replace(two_found(), picture=scene)
    with Image.open(scene) as plain:
        assert found.draw().size[0] >= plain.width
        assert found.draw().tobytes() != plain.convert("RGB").tobytes()
    found.save(tmp_path / "drawn.png")
    assert (found._repr_png_() or b"").startswith(b"\x89PNG")
    assert two_found()._repr_png_() is None
    with pytest.raises(DataError, match="was read from a file and has no image"):
        two_found().draw()


def test_json_form() -> None:
    found = replace(two_found(), parse=ParseReport(True, 2, {"malformed": 1}, True))
    row = json.loads(json.dumps(found.to_json()))
    assert row["objects"][1] == {"desc": "cat", "bbox_xyxy_px": [0.0, 5.0, 118.0, 90.0], "score": 0.25}
    assert (row["width"], row["height"], row["raw_text"]) == (120, 100, "...")
    assert row["parse"]["n_valid"] == 2
    for answer in (found, found.named([])):
        again = Detections.from_json(answer.to_json() | {"image": "a.jpg"})
        assert again.to_json() == answer.to_json()
        assert (again.boxes_xyxy_px.shape, again.parse) == ((len(answer), 4), found.parse)
    for broken in (row | {"objects": [{}]}, row | {"width": None}, row | {"parse": {}}, {}):
        with pytest.raises(DataError, match="no answer as"):
            Detections.from_json(broken)


def test_class_ids_are_indices_in_the_given_list() -> None:
    found = replace(two_found(), descs=("red mug", "Cat", "cat"))
    assert class_ids(found.descs).tolist() == [1, 0, 0]
    assert class_ids(found.descs, ["dog", "CAT", "Red_Mug"]).tolist() == [2, 1, 1]
    assert class_ids((), ["dog"]).shape == class_ids(()).shape == (0,)
    with pytest.raises(DataError, match="class_names lacks red mug"):
        class_ids(found.descs, ["cat"])
    with pytest.raises(DataError, match="class_names holds cat more than once"):
        class_ids(found.descs, ["cat", "Cat", "red mug"])


def test_supervision_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=lambda **columns: columns))
    columns = two_found().to_supervision()
    np.testing.assert_array_equal(columns["xyxy"], BOXES_XYXY_PX.astype(np.float32))
    np.testing.assert_array_equal(columns["confidence"], np.float32([0.5, 0.25]))
    assert columns["data"]["class_name"].tolist() == list(DESCS)
    assert (columns["class_id"].tolist(), columns["class_id"].dtype) == ([1, 0], np.int64)
    assert two_found().to_supervision(["dog", "cat", "red mug"])["class_id"].tolist() == [2, 1]


def test_metrics_of_supervision_accept_the_conversion() -> None:
    sv = pytest.importorskip("supervision")
    names = ["cat", "dog", "red mug"]
    found = two_found().to_supervision(names)
    matrix = sv.ConfusionMatrix.from_detections([found], [found], names)
    assert np.trace(matrix.matrix) == 2
    metrics = pytest.importorskip("supervision.metrics")
    assert metrics.MeanAveragePrecision().update([found], [found]).compute().map50 == pytest.approx(1.0, abs=0.01)


def test_a_missing_supervision_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        two_found().to_supervision()
