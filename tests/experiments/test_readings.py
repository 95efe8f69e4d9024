"""Evaluation by training step with its page, and the readings of a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt

from coordexp.config.paths import KEPT_STEPS, ProfilePaths
from coordexp.errors import DataError
from coordexp.experiments import readings
from coordexp.experiments.readings import READINGS, RunFiles, _begun, _correlation, _in_common
from coordexp.experiments.trajectory import evaluate_steps, step_folders
from coordexp.infra.logs import read_log
from coordexp.infra.provenance import write_json
from coordexp.models.loading import load_checkpoint
from coordexp.packing.samples import SampleStore
from coordexp.records.gt_vs_pred import ImageResult, Prediction
from coordexp.reporting.trajectory import follow_worst, write_trajectory
from coordexp.rollout.hf_engine import HfEngine
from coordexp.training.stage1 import train_stage1
from helpers import Workspace, build_workspace, decode_request, new_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world) -> Workspace:
    """Stage 1 of four steps that kept its second, with categories; its answers hold objects."""
    root = tmp_path_factory.mktemp("steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        space = build_workspace(root, world)
        store = SampleStore(space.paths.norm1000 / "dev.parquet")
        names = sorted({desc for i in range(len(store)) for desc in store[i].descs})
        rows = [{"id": n, "name": name, "split": "train"} for n, name in enumerate(names, 1)]
        write_json(space.paths.records / "categories.json", rows)
        shutil.rmtree(space.paths.run("stage1"))
        train_stage1(space)
    return space.set(decode__grammar="closed", decode__max_new_tokens=60, eval__bootstrap_resamples=100)


def test_a_kept_checkpoint_is_complete_and_keeping_does_not_change_training(
    trained: Workspace, tmp_path, world, monkeypatch
):
    folders = step_folders(trained, "stage1")
    assert [*folders] == [2, 4]
    assert folders[2] == trained.paths.run("stage1") / KEPT_STEPS / "step_000002"
    earlier, last = (load_checkpoint(folder).model.state_dict() for folder in folders.values())
    assert any(not torch.equal(earlier[name], last[name]) for name in last)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    space = build_workspace(tmp_path / "plain", world)
    monitor = space.profile.monitor.model_copy(update={"keep_every_steps": 0})
    plain = replace(space, profile=space.profile.model_copy(update={"monitor": monitor}))
    shutil.rmtree(plain.paths.run("stage1"))
    train_stage1(plain)
    weights = [s.paths.run("stage1") / "model.safetensors" for s in (trained, plain)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (plain.paths.run("stage1") / KEPT_STEPS).exists()
    with pytest.raises(DataError, match="no checkpoint found"):
        step_folders(plain, "stage2")


def test_every_kept_step_is_evaluated_once_and_reported(trained: Workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    said: list[str] = []
    points = evaluate_steps(trained, "stage1", tmp_path / "out", said.append)
    assert [point.step for point in points] == [2, 4]
    assert len(said) == 2
    again = evaluate_steps(trained, "stage1", tmp_path / "out", said.append)
    assert len(said) == 2
    assert [p.results for p in again] == [p.results for p in points]
    shutil.rmtree(tmp_path / "out" / "step_000004")
    evaluate_steps(trained.set(decode__max_new_tokens=50), "stage1", tmp_path / "out", said.append)
    assert len(said) == 4  # another request answers both again

    evaluated = {point.step: (point.results, point.evaluation) for point in points}
    log = read_log(trained.paths.run("stage1") / "train_log.jsonl")
    page = write_trajectory(trained, "stage1", evaluated, log)
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert [row["step"] for row in numbers["steps"]] == [2, 4]
    for row, point in zip(numbers["steps"], points, strict=True):
        assert row["coco.n_pred"] == point.evaluation.value("coco.n_pred")
    worst = follow_worst(evaluated)
    assert worst[0]["steps"][-1]["f1_full_50"] == min(
        row["f1_full_50"] for row in points[-1].evaluation.per_image if row["n_gt"]
    )
    counted = {r.image_id: len(r.pred) for r in points[0].results}
    for row in worst:
        assert sum(row["steps"][0]["labels"].values()) == row["steps"][0]["n_pred"] == counted[row["image_id"]]
    text = page.read_text()
    assert MarkdownIt("commonmark").enable("table").render(text).count("<table>") == 5 + len(worst)
    first, last = numbers["logged"]
    assert first["loss/coord_reg"] == pytest.approx(log["loss/coord_reg"][1], abs=1e-4)
    assert last["raw/gate"] == pytest.approx(log["raw/gate"][3], abs=1e-4)
    assert page.with_suffix(".png").is_file()
    assert page.with_name("stage1_worst.jpg").is_file()


def run_files(trained: Workspace, root: Path) -> RunFiles:
    """The run as if it lay in the cache of a revision: fetched files are where they are."""
    at = trained.paths.root
    fetched = SimpleNamespace(root=root, fetch=lambda _revision, path: at / path, say=lambda _line: None)
    return RunFiles(fetched, "revision", trained.params, trained.profile, trained.params)


def test_f1_and_map_over_the_steps_of_a_run(trained: Workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(RunFiles, "config", lambda self: trained)
    files = run_files(trained, tmp_path)
    found = READINGS["trajectory.f1_with_map"].read(files, "stage1")
    points = evaluate_steps(trained, "stage1", files.root / "steps" / "stage1", lambda _line: None)
    f1, mean_ap = ([p.evaluation.value(key) for p in points] for key in ("f1.full_50", "coco.mAP"))
    if f1[0] == f1[1] or mean_ap[0] == mean_ap[1]:
        assert found is None
    else:
        assert found.value == pytest.approx(np.corrcoef(f1, mean_ap)[0, 1])


def test_the_correlation_over_steps_is_pearsons():
    values = np.random.default_rng(0).normal(size=(7, 3, 2))
    expected = [np.corrcoef(values[:, b, 0], values[:, b, 1])[0, 1] for b in range(3)]
    np.testing.assert_allclose(_correlation(values), expected)
    assert np.isnan(_correlation(np.zeros((4, 2, 2)))).all()


def test_drift_is_read_from_the_last_evaluation_of_the_eval_callback(tmp_path, trained: Workspace):
    paths = ProfilePaths(trained.params.profile, tmp_path)
    rows = [
        {"step": 50, "image_id": 1, "A1": [9.0], "A2": [1.0], "own": [None]},
        {"step": 100, "image_id": 1, "A1": [1.0, 3.0], "A2": [2.0, 6.0], "own": [None, 1.0]},
        {"step": 100, "image_id": 2, "A1": [], "A2": [], "own": []},
        {"step": 100, "image_id": 3, "A1": [5.0], "A2": [4.0], "own": [2.0]},
    ]
    path = paths.run("stage2") / "context_errors.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = READINGS["context.drift"].read(run_files(replace(trained, paths=paths), tmp_path), "stage2")
    assert found.value == pytest.approx((1 + 3 + 0 - 1) / 3)
    assert len(found.samples_B) == 100
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "A2"}) + "\n" for row in rows))
    assert READINGS["context.drift"].read(run_files(replace(trained, paths=paths), tmp_path), "stage2") is None


def test_a_diagnostic_is_the_mean_over_the_coordinates_of_the_last_evaluation(tmp_path, trained: Workspace):
    paths = ProfilePaths(trained.params.profile, tmp_path)
    path = paths.run("stage1") / "context_errors.jsonl"
    path.parent.mkdir(parents=True)
    found = [{"A1": {"p_gt_mean": 0.5}}, {"A1": {}}, {"A1": {"p_gt_mean": 0.2}, "A2": {"p_gt_mean": 0.9}}]
    rows = [{"step": 5, "image_id": 1, "A1": [9.0], "coord_diag": {"A1": {"p_gt_mean": 0.0}}}]
    objects = [[1.0], [], [1.0, 2.0]]
    rows += [{"step": 9, "image_id": n, "A1": objects[n], "coord_diag": found[n]} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = READINGS["coord.p_gt_mean"].read(run_files(replace(trained, paths=paths), tmp_path), "stage1")
    assert read.value == pytest.approx((0.5 + 2 * 0.2) / 3)
    assert len(read.samples_B) == 100
    assert READINGS["coord.gate"].read(run_files(replace(trained, paths=paths), tmp_path), "stage1") is None


def test_training_writes_every_diagnostic_that_questions_use(trained: Workspace, tmp_path):
    paths = ProfilePaths(trained.params.profile, tmp_path)
    paths.run("stage1").mkdir(parents=True)
    shutil.copy(trained.paths.run("stage1") / "context_errors.jsonl", paths.run("stage1"))
    for name in (name for name in READINGS if name.startswith("coord.")):
        found = READINGS[name].read(run_files(replace(trained, paths=paths), tmp_path), "stage1")
        assert np.isfinite(found.value), name


def test_an_answer_continues_a_prompt_that_ends_with_its_beginning(world):
    """With greedy decoding, the continuation of the model's own beginning is the rest of its answer."""
    checkpoint = new_checkpoint()
    engine, request = HfEngine(checkpoint, world.root, 4), decode_request(seed=17, max_new_tokens=24)
    whole = engine.generate(world.samples, request)
    begun = [
        replace(sample, prompt_ids=np.concatenate([sample.prompt_ids, generation.ids[:9]]))
        for sample, generation in zip(world.samples, whole, strict=True)
    ]
    rest = engine.generate(begun, decode_request(seed=17, max_new_tokens=15))
    assert [r.ids.tolist() for r in rest] == [g.ids[9:].tolist() for g in whole]


def test_the_beginning_is_the_first_half_in_another_order_up_to_its_last_coordinate(world):
    checkpoint = new_checkpoint()
    encoder, sample = world.encoder(checkpoint), world.samples[0]
    boxes = [(10, 20, 30, 40), (50, 60, 70, 80), (1, 2, 3, 4), (5, 6, 7, 8)]
    preds = tuple(Prediction(f"cat {i}", (0, 0, 1, 1), bins) for i, bins in enumerate(boxes))
    result = ImageResult(sample.image_id, sample.image, sample.width, sample.height, (), preds)
    told, ids = _begun(sample, result, encoder, seed=3)
    np.testing.assert_array_equal(told.prompt_ids, [*sample.prompt_ids, *ids])
    text = checkpoint.tokenizer.decode(ids)
    assert text.index("cat 1") < text.index("cat 0")  # of two objects there is one other order
    assert "cat 2" not in text
    assert text.endswith("<|coord_40|>")


def test_what_two_rests_have_in_common():
    a = [("cat", (0, 0, 100, 100)), ("cat", (0, 0, 100, 100)), ("dog", (500, 500, 600, 600))]
    b = [("Cat", (0, 0, 100, 90)), ("dog", (0, 0, 100, 100)), ("dog", (590, 590, 700, 700))]
    assert _in_common(a, b) == 1
    assert _in_common(a, a) == 3
    assert _in_common(a, []) == _in_common([], b) == 0


def test_the_rests_of_answers_with_enough_objects_are_compared(trained: Workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    free = trained.set(decode__grammar="none", decode__max_new_tokens=60)
    store = SampleStore(trained.paths.norm1000 / "val.parquet")
    results = [
        ImageResult(s.image_id, s.image, s.width, s.height, (), tuple(
            Prediction(desc, (0, 0, 1, 1), (100 * i, 100, 100 * i + 90, 200)) for i, desc in enumerate(s.descs[:4])
        ))
        for s in (store[i] for i in range(len(store)))
    ]  # fmt: skip
    rows = readings._permuted_rests(free, "stage1", results, seed=1)
    enough = {str(r.image_id) for r in results if len(r.pred) >= readings.FEWEST_OBJECTS}
    assert rows.keys() == enough
    assert all(0 <= 2 * common <= said for common, said in rows.values())


def test_sampled_answers_are_generated_once_and_give_both_gains(trained: Workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(readings, "SAMPLES", 3)
    monkeypatch.setattr(RunFiles, "config", lambda self: trained)
    answers = readings._sampled_answers(run_files(trained, tmp_path), "stage1")
    assert len(answers) == 3
    monkeypatch.setattr(readings, "read_answers", lambda *_: answers[0])
    recall, vote = (
        READINGS[f"samples.{name}_gain"].read(run_files(trained, tmp_path), "stage1") for name in ("recall", "vote")
    )
    found = readings.oracle_k(answers)
    assert recall.value == pytest.approx((found.any_I - found.one_I).sum() / found.n_gt_I.sum())
    assert recall.value >= 0
    assert len(recall.samples_B) == len(vote.samples_B) == 100
    assert -1 <= vote.value <= 1
