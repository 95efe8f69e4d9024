"""Publishing a run: results with the ids of the source, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordexp import cli
from coordexp.config.loading import load_params, load_profile
from coordexp.config.paths import ProfilePaths
from coordexp.config.run import RunConfig
from coordexp.errors import CheckpointError, DataError
from coordexp.export.publish import coco_results, export, write_server_results
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult, ParseReport, write_results

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


def test_results_for_a_server_that_keeps_the_annotations(paths: ProfilePaths, tmp_path: Path) -> None:
    predictions, info, out = tmp_path / "out.jsonl", tmp_path / "image_info.json", tmp_path / "results.json"
    row = {"image": "/any/where/a.jpg", "objects": [{"desc": "bottle", "bbox_xyxy_px": [1, 2, 3, 4], "score": 0.5}]}
    superseded = row | {"objects": []}
    predictions.write_text(json.dumps(superseded) + "\n" + json.dumps(row) + "\n")
    info.write_text(json.dumps({"images": [{"file_name": "a.jpg", "id": 91}]}))
    assert write_server_results(predictions, info, paths, out) == (1, 0)
    assert json.loads(out.read_text())[0] | {"score": 0} == {
        "image_id": 91, "category_id": 44, "bbox": [1, 2, 2, 2], "score": 0,
    }  # fmt: skip
    info.write_text(json.dumps({"images": [{"file_name": "b.jpg", "id": 91}]}))
    with pytest.raises(DataError, match=r"a\.jpg: no image of"):
        write_server_results(predictions, info, paths, out)


def test_what_cannot_be_published_is_refused(
    paths: ProfilePaths, tmp_path: Path, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    params, profile = load_params(repository / "params.yaml"), load_profile(repository / "configs" / "smoke.yaml")
    config = RunConfig(params=params, profile=profile, paths=paths)
    run = paths.run("stage2")
    run.mkdir(parents=True)
    (run / "adapter_config.json").touch()
    (run / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="no merged checkpoint"):
        export(config, "stage2", tmp_path / "new")
    (run / "adapter_config.json").unlink()
    with pytest.raises(DataError, match="is not empty"):
        export(config, "stage2", tmp_path)
    with pytest.raises(DataError, match=r"metrics\.json: missing; run the graph"):
        export(config, "stage2", tmp_path / "new")
    with pytest.raises(SystemExit):
        cli.main(["export", "--out", str(tmp_path / "x"), "--image-info", str(repository / "params.yaml")])
    assert "belong together" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("sets", "words"),
    [(("coco",), "with the ids of the source"), (("coco", "mine"), "ids made for this mixture of sets")],
)
def test_the_card_says_whose_ids_the_results_have(
    paths: ProfilePaths, tmp_path: Path, repository: Path, sets: tuple[str, ...], words: str
) -> None:
    params = load_params(repository / "params.yaml")
    profile = load_profile(repository / "configs" / "coco-qwen3vl-2b.yaml")
    mixture = profile.source.model_copy(update={"sets": dict.fromkeys(sets, profile.source.sets["coco"])})
    run = paths.run("stage2")
    for folder in (run, paths.reports, paths.evaluation("stage2")):
        folder.mkdir(parents=True)
    (run / "model.safetensors").touch()
    (run / "run_metadata.json").write_text(
        json.dumps({"steps": 1, "tokens": 2, "git": {"commit": None, "dirty": None}})
    )
    (paths.reports / "metrics.json").write_bytes((repository / "reports" / "tiny" / "metrics.json").read_bytes())
    nothing = ImageResult(
        image_id=7, image="a.jpg", width=9, height=9, gt=(), pred=(), raw_text="", parse=ParseReport(True, 0),
        finish_reason="stop", n_generated_tokens=1, identity={},
    )  # fmt: skip
    write_results(paths.evaluation("stage2") / "gt_vs_pred.jsonl", [nothing])
    config = RunConfig(params=params, profile=profile.model_copy(update={"source": mixture}), paths=paths)
    export(config, "stage2", tmp_path / "new")
    assert words in (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
