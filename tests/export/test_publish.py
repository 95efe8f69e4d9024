"""Publishing a run: results with the ids of the source, and refused cases."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from coordexp import cli
from coordexp.config.loading import load_profile
from coordexp.config.paths import RUN_METADATA, ProfilePaths
from coordexp.config.run import RunConfig
from coordexp.detector import Detector
from coordexp.errors import CheckpointError, DataError
from coordexp.evaluation.evaluator import evaluate, rounded
from coordexp.export.publish import coco_results, export, publish, write_server_results
from coordexp.infra.artefacts import damage, sealing
from coordexp.infra.provenance import run_metadata, write_json
from coordexp.models.loading import load_format, save_checkpoint
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult, ParseReport, Prediction, write_results
from coordexp.records.schema import Record, write_records
from helpers import new_checkpoint

CATEGORIES = [Category(13, "stop sign"), Category(44, "bottle")]


@pytest.fixture
def paths(tmp_path: Path) -> ProfilePaths:
    found = ProfilePaths("mine", tmp_path)
    found.records.mkdir(parents=True)
    (found.records / "categories.json").write_text(json.dumps([c.to_json() for c in CATEGORIES]))
    return found


def test_results_have_the_ids_of_the_source() -> None:
    predictions = [("Stop_sign", (10.0, 20.0, 30.5, 50.0), 0.75), ("a car", (0.0, 0.0, 1.0, 1.0), 0.5)]
    results, unmapped = coco_results([(397133, predictions)], CATEGORIES)
    assert results == [{"image_id": 397133, "category_id": 13, "bbox": [10.0, 20.0, 20.5, 30.0], "score": 0.75}]
    assert unmapped == 1


def test_results_load_into_pycocotools(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    results, _ = coco_results([(7, [("bottle", (1.0, 2.0, 11.0, 22.0), 0.9)])], CATEGORIES)
    truth = COCO()
    truth.dataset = {"images": [{"id": 7}], "annotations": [], "categories": [{"id": 44, "name": "bottle"}]}
    truth.createIndex()
    loaded = truth.loadRes(results)
    assert [a["area"] for a in loaded.dataset["annotations"]] == [200.0]


def test_results_for_an_evaluation_server(paths: ProfilePaths, tmp_path: Path) -> None:
    predictions, info, out = tmp_path / "out.jsonl", tmp_path / "image_info.json", tmp_path / "results.json"
    row = {"image": "/any/where/a.jpg", "objects": [{"desc": "bottle", "bbox_xyxy_px": [1, 2, 3, 4], "score": 0.5}]}
    superseded = row | {"objects": []}
    predictions.write_text(json.dumps(superseded) + "\n" + json.dumps(row) + "\n")
    info.write_text(json.dumps({"images": [{"file_name": "a.jpg", "id": 91}]}))
    assert write_server_results(predictions, info, paths, out) == (1, 0)
    assert json.loads(out.read_text())[0] | {"score": 0} == {
        "image_id": 91, "category_id": 44, "bbox": [1, 2, 2, 2], "score": 0,
    }  # fmt: skip
    own = [{"id": 5, "name": "Bottle"}]  # the server's ids take precedence over those of the profile
    info.write_text(json.dumps({"images": [{"file_name": "a.jpg", "id": 91}], "categories": own}))
    assert write_server_results(predictions, info, paths, out) == (1, 0)
    assert json.loads(out.read_text())[0]["category_id"] == 5
    numbered = [Category(1, "stop sign"), Category(2, "bottle")]
    (paths.records / "categories.json").write_text(json.dumps([c.to_json() for c in numbered]))
    info.write_text(json.dumps({"images": [{"file_name": "a.jpg", "id": 91}]}))
    with pytest.raises(DataError, match="numbered 1 to 2 by this project"):
        write_server_results(predictions, info, paths, out)
    info.write_text(json.dumps({"images": [{"file_name": "b.jpg", "id": 91}]}))
    with pytest.raises(DataError, match=r"a\.jpg: no image in"):
        write_server_results(predictions, info, paths, out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> RunConfig:
    """An evaluated run of the smoke profile: a checkpoint, one answer, the metrics of another run."""
    run = RunConfig.read(repository / "params.yaml", "smoke", tmp_path_factory.mktemp("finished"))
    paths, checkpoint = run.paths, new_checkpoint(codec="tags")
    folder = paths.run("stage2")
    with sealing(folder):
        save_checkpoint(folder, checkpoint)
        (folder / "train_log.jsonl").touch()
        write_json(folder / RUN_METADATA, run_metadata("stage2", {}, {}, {"steps": 1, "tokens": 2}))
    write_json(paths.records / "categories.json", [c.to_json() for c in CATEGORIES])
    nothing = ImageResult(
        image_id=7, image="a.jpg", width=9, height=9, gt=(), pred=(), raw_text="", parse=ParseReport(True, 0),
        finish_reason="stop", n_generated_tokens=1, identity={},
    )  # fmt: skip
    evaluation = evaluate([nothing], CATEGORIES, run.params.eval, run.params.matching, run.params.seed)
    metrics = {"eval": rounded(evaluation.metrics)}
    write_json(paths.metrics, {"stage2": metrics, "base": metrics})
    paths.evaluation("stage2").mkdir(parents=True)
    write_results(paths.evaluation("stage2") / "gt_vs_pred.jsonl", [nothing])
    return run


def with_decode(run: RunConfig, **changes: object) -> RunConfig:
    decode = run.params.decode.model_copy(update=changes)
    return replace(run, params=run.params.model_copy(update={"decode": decode}))


def test_an_export_is_a_copy_with_the_readout_of_the_evaluation(finished: RunConfig, tmp_path: Path) -> None:
    export(with_decode(finished, box="argmax", score="mix"), "stage2", tmp_path / "new")
    source, exported = finished.paths.run("stage2"), load_format(tmp_path / "new")
    assert exported.pixels == load_format(source).pixels
    assert (exported.codec, exported.detection.box, exported.detection.score) == ("tags", "argmax", "mix")
    assert not (tmp_path / "new" / "train_log.jsonl").exists()
    assert list(damage(tmp_path / "new")) == []
    assert {path.stat().st_nlink for path in (tmp_path / "new").iterdir()} == {1}


def test_the_snippet_of_the_card_gives_the_answer_of_the_detector(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(with_decode(finished, max_new_tokens=12), "stage2", tmp_path / "new")
    noise = np.random.default_rng(1).integers(0, 255, (150, 130, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = snippet.replace("<this folder>", str(tmp_path / "new")).replace("photo.jpg", str(tmp_path / "photo.png"))
    capsys.readouterr()
    exec(code, {})
    found = Detector.from_pretrained(tmp_path / "new", max_new_tokens=12).predict(noise)
    assert capsys.readouterr().out.rstrip("\n") == found.raw_text


def test_runs_that_cannot_be_published_are_refused(
    finished: RunConfig, tmp_path: Path, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="not empty"):
        export(finished, "stage2", finished.paths.root)
    with pytest.raises(CheckpointError, match="no merged checkpoint"):
        export(finished, "stage1", tmp_path / "new")
    other = replace(finished, paths=ProfilePaths("smoke", tmp_path))
    shutil.copytree(finished.paths.run("stage2"), other.paths.run("stage2"))
    with pytest.raises(DataError, match=r"metrics\.json: no such file.*Run the graph"):
        export(other, "stage2", tmp_path / "new")
    (other.paths.run("stage2") / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match="no merged checkpoint"):
        export(other, "stage2", tmp_path / "new")
    with pytest.raises(SystemExit):
        cli.main(["export", "--out", str(tmp_path / "x"), "--image-info", str(repository / "params.yaml")])
    assert "belong together" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("sets", "words"),
    [(("coco",), "with the ids of the source"), (("coco", "mine"), "ids assigned for this mixture of data sets")],
)
def test_the_card_states_the_origin_of_the_ids(
    finished: RunConfig, tmp_path: Path, repository: Path, sets: tuple[str, ...], words: str
) -> None:
    profile = load_profile(repository / "configs" / "coco-qwen3vl-2b.yaml")
    mixture = profile.source.model_copy(update={"sets": dict.fromkeys(sets, profile.source.sets["coco"])})
    export(replace(finished, profile=profile.model_copy(update={"source": mixture})), "stage2", tmp_path / "new")
    assert words in (tmp_path / "new" / "README.md").read_text(encoding="utf-8")


def test_each_set_of_a_mixture_gets_results_with_its_own_ids(
    finished: RunConfig, tmp_path: Path, repository: Path
) -> None:
    """Two sets have their own image and category ids; the third has no ids, and the fourth was deleted."""
    profile, sets, records = load_profile(repository / "configs" / "coco-qwen3vl-2b.yaml"), {}, []
    for place, name in enumerate(("a", "b"), 1):
        (tmp_path / name).mkdir()
        file = {
            "images": [{"id": 70 + place, "file_name": "x.jpg", "width": 9, "height": 9}], "annotations": [],
            "categories": [{"id": 10 * place, "name": "bottle"}],
        }  # fmt: skip
        (tmp_path / name / "val.json").write_text(json.dumps(file))
        ids = {"image_id": 2**40 + place, "source_image_id": 70 + place}
        records.append(Record(f"{name}/x.jpg", 9, 9, (), metadata=ids))
    records += [
        Record("c/x.jpg", 9, 9, (), metadata={"image_id": 2**40 + 3}),
        Record("gone/x.jpg", 9, 9, (), metadata={"image_id": 2**40 + 4, "source_image_id": 7}),
    ]
    for name in ("a", "b", "c", "gone"):
        changes = {"root": str(tmp_path / name), "val": "val.json", "train": "none", "val_images": "."}
        sets[name] = profile.source.sets["coco"].model_copy(update=changes)
    source = profile.source.model_copy(update={"sets": sets})
    paths = ProfilePaths("smoke", tmp_path / "run")
    run = replace(finished, profile=profile.model_copy(update={"source": source}), paths=paths)
    shutil.copytree(finished.paths.root, tmp_path / "run")
    write_records(run.paths.records / "val.jsonl", records)
    pred = (Prediction("bottle", (1.0, 2.0, 5.0, 8.0), score=0.5),)
    write_results(
        run.paths.evaluation("stage2") / "gt_vs_pred.jsonl",
        [ImageResult(r.metadata["image_id"], r.image, 9, 9, (), pred, "", ParseReport(True, 1)) for r in records],
    )
    (note,) = export(run, "stage2", tmp_path / "new").notes
    assert note.startswith("no results of set gone: source.sets.gone.root")
    found = {
        file.stem: [(row["image_id"], row["category_id"]) for row in json.loads(file.read_text())]
        for file in (tmp_path / "new").glob("coco_results*.json")
    }
    assert found["coco_results-a"] == [(71, 10)]
    assert found["coco_results-b"] == [(72, 20)]
    assert [image - 2**40 for image, _ in found["coco_results"]] == [1, 2, 3, 4]
    assert found.keys() == {"coco_results", "coco_results-a", "coco_results-b"}


class StandIn(BaseHTTPRequestHandler):
    """A stand-in for the few Hub requests of an upload of small files; it records the committed files."""

    committed: ClassVar[dict[str, bytes]] = {}
    refuse = False

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if type(self).refuse:
            self.answer({"error": "no such user"}, 403)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": "https://huggingface.co/somebody/detector"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            rows = [json.loads(line) for line in body.splitlines()]
            files = [row["value"] for row in rows if row["key"] == "file"]
            type(self).committed = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.answer({"commitUrl": "https://huggingface.co/somebody/detector/commit/abc", "commitOid": "abc"})
        else:
            self.answer({})

    def do_GET(self) -> None:
        status = 403 if type(self).refuse else 200
        self.answer({"id": "somebody/detector", "sha": "abc", "siblings": []}, status)

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    """A stand-in for the Hub on this machine, with a user logged in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)  # read from HF_ENDPOINT at import
    StandIn.refuse = False
    yield StandIn
    server.shutdown()
    server.server_close()


def test_a_push_uploads_every_file_of_the_export(finished: RunConfig, tmp_path: Path, hub: type[StandIn]) -> None:
    said = publish(finished, "stage2", tmp_path / "new", None, None, "apache-2.0", "somebody/detector")
    assert said[-1] == "uploaded: https://huggingface.co/somebody/detector/commit/abc"
    here = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert hub.committed == here
    front = here["README.md"].decode().split("---")[1]
    assert {"license: apache-2.0", "pipeline_tag: image-text-to-text"} <= set(front.splitlines())
    assert "model-index:" in front
    assert str(tmp_path) not in front


def test_a_refused_upload_keeps_the_folder_and_states_what_to_do(
    finished: RunConfig, tmp_path: Path, hub: type[StandIn]
) -> None:
    hub.refuse = True
    with pytest.raises(DataError, match="is written, but somebody/detector could not be uploaded"):
        publish(finished, "stage2", tmp_path / "new", None, None, None, "somebody/detector")
    assert (tmp_path / "new" / "README.md").is_file()
