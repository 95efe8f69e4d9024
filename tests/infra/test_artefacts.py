"""Stored artifacts: every flipped bit and every truncation is detected, in every file and by every reader.

`make test` changes a few bits of each kind of artifact, `make test-faults` 2,000.
"""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coordexp.errors import CoordExpError, DamagedArtefactError
from coordexp.infra import artefacts
from coordexp.infra.artefacts import (
    HASHES,
    damage,
    let_go,
    sealed_row,
    sealing,
    unsealed_row,
    verified,
    verify_files,
    write_sealed,
)
from coordexp.infra.logs import read_log
from coordexp.infra.provenance import decides_answer, write_json
from coordexp.models.loading import load_format, save_checkpoint
from coordexp.packing.planner import plan_packs, read_packs, write_plan
from coordexp.packing.samples import SampleStore
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import read_results
from coordexp.records.prediction_log import AnswerSource, PredictionLog, read_rows
from coordexp.records.schema import read_records
from coordexp.reporting.inputs import read_json
from coordexp.rollout.engine import Generation, Journal, TokenProbs
from coordexp.rollout.records import read_generations, write_generations
from coordexp.rollout.scoring import read_decoded, score_folder, write_decoded
from coordexp.rollout.stages import read_answers
from coordexp.training.checkpoint import load_state, save_state
from coordexp.training.stage1 import COMPUTE
from helpers import PARAMS, World, answer_reader, build_world, new_checkpoint, teacher_rollouts

FEW, MANY = 40, 2000
VOCABULARY = 10**6


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of artifact: its folder and reader; `loses`: its damaged parts are dropped and made again."""

    folder: Path
    read: Callable[[Path], Any]
    loses: bool = False


def test_a_list_of_hashes_is_read_by_sha256sum(tmp_path: Path) -> None:
    with sealing(tmp_path) as folder:
        (folder / "a b.txt").write_text("a")
        (folder / "deep").mkdir()
        (folder / "deep" / "b.bin").write_bytes(bytes(range(256)))
    done = subprocess.run(["sha256sum", "--check", "--strict", HASHES], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a b.txt: OK\ndeep/b.bin: OK\n")
    assert list(damage(tmp_path)) == []
    assert verified(tmp_path / "deep" / "b.bin") == tmp_path / "deep" / "b.bin"


def test_equal_files_give_equal_lists(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with sealing(tmp_path / name) as folder:
            for inner in ("b", "a") if name == "one" else ("a", "b"):
                (folder / inner).write_text(inner)
    assert (tmp_path / "one" / HASHES).read_bytes() == (tmp_path / "two" / HASHES).read_bytes()


def test_errors_of_a_damaged_folder_name_the_files(tmp_path: Path) -> None:
    with sealing(tmp_path) as folder:
        for name in ("changed", "gone", "whole"):
            (folder / name).write_text(name)
    (tmp_path / "changed").write_text("other")
    (tmp_path / "gone").unlink()
    (tmp_path / "added").touch()
    for name, words in (
        ("changed", "sha256 .*, but coordexp.sha256 records .*coordexp verify --repair"),
        ("gone", "no such file, but coordexp.sha256 records"),
        ("added", "not in the list .*"),
    ):
        with pytest.raises(DamagedArtefactError, match=rf"/{name}: {words}"):
            verified(tmp_path / name)
    assert [line.partition(":")[0] for line in damage(tmp_path)] == [str(tmp_path / n) for n in ("changed", "gone")]
    assert verified(tmp_path / "neither written nor there")
    (tmp_path / HASHES).unlink()
    assert [line.rpartition(": ")[2] for line in damage(tmp_path)] == [
        f"has no {HASHES}, which is written last; its stage did not finish."
    ]
    assert verified(tmp_path / "added"), "a folder without the list is somebody else's"


def test_a_folder_whose_writer_failed_has_no_list(tmp_path: Path) -> None:
    with sealing(tmp_path):
        (tmp_path / "a").write_text("first")
    with pytest.raises(FileNotFoundError), sealing(tmp_path):
        (tmp_path / "nowhere" / "b").write_text("second")
    assert not (tmp_path / HASHES).exists()


def test_a_file_removed_on_purpose_is_not_missing_but_a_deleted_one_is(tmp_path: Path) -> None:
    with sealing(tmp_path) as folder:
        for name in ("large", "small"):
            (folder / name).write_text(name)
    let_go(tmp_path / "large")
    assert list(damage(tmp_path)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [HASHES, "small"]
    (tmp_path / "small").unlink()
    assert len(list(damage(tmp_path))) == 1


def test_a_reader_of_a_checkpoint_does_not_read_the_checkpoints_kept_in_it(tmp_path: Path) -> None:
    with sealing(tmp_path) as folder, sealing(folder / "kept" / "step_2") as kept:
        for place in (folder, kept):
            (place / "model.safetensors").write_text("weights")
    (kept / "model.safetensors").write_text("damaged")
    assert list(verify_files(folder, decides_answer)) == ["model.safetensors"]
    with pytest.raises(DamagedArtefactError):
        verify_files(kept, decides_answer)
    assert len(list(damage(folder))) == 1


def test_a_pipe_in_place_of_a_file_is_damage(tmp_path: Path) -> None:
    with sealing(tmp_path):
        (tmp_path / "a").write_text("a")
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    with pytest.raises(DamagedArtefactError, match="cannot be read"):
        verified(tmp_path / "a")


def test_a_file_is_hashed_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sealing(tmp_path):
        (tmp_path / "a").write_text("a")
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr(artefacts, "_SETTLED_S", -1.0)
    hashed = []
    digest = artefacts.hashlib.file_digest
    monkeypatch.setattr(artefacts.hashlib, "file_digest", lambda *a: hashed.append(a) or digest(*a))
    for _ in range(3):
        verified(tmp_path / "a")
    assert len(hashed) == 1
    os.utime(tmp_path / "a", (2, 2))
    verified(tmp_path / "a")
    assert len(hashed) == 2


@pytest.mark.parametrize("row", [{}, {"a": 1.5, "b": [1, None, "ü\u2028"], "c": {"d": True}}])
def test_a_sealed_row_is_accepted_only_unchanged(row: dict[str, Any]) -> None:
    line = json.dumps(sealed_row(row))
    assert unsealed_row(json.loads(line)) == row
    for other in (row, sealed_row(row) | {"more": 1}, [], None):
        with pytest.raises(ValueError, match="sha256"):
            unsealed_row(other)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, world: World) -> dict[str, Kind]:
    """Each kind of artifact, written by the code of the stages."""
    root, checkpoint = tmp_path_factory.mktemp("artefacts"), new_checkpoint()
    rollouts = teacher_rollouts(checkpoint, world)
    generations = {i: Generation(np.array(r.ids, np.int32), "stop") for i, r in rollouts.items()}
    with sealing(root / "checkpoint") as folder:
        save_checkpoint(folder, checkpoint)
    with sealing(root / "samples") as folder:
        (folder / "train.parquet").write_bytes((world.root / "train.parquet").read_bytes())
    with sealing(root / "plan") as folder:
        write_plan(folder / "plan.parquet", plan_packs(world.store.lengths(), 256, 1))
    with sealing(root / "records") as folder:
        (folder / "train.jsonl").write_bytes((world.root / "train.jsonl").read_bytes())
        write_json(folder / "categories.json", [{"id": 1, "name": "cat", "split": "train"}])
    with sealing(root / "rollouts") as folder:
        write_generations(folder / "rollouts.jsonl", generations)
    _write_answers(root, world, checkpoint, generations)
    with sealing(root / "log") as folder:
        rows = [{"step": step, "loss/total": 1.0 / (step + 1)} for step in range(9)]
        (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = torch.nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    save_state(root / "state", 5, model, optimizer, "weights")
    write_sealed(root / "compute" / "compute.json", {"steps": 4, "tokens": 20481})
    return {
        "checkpoint": Kind(root / "checkpoint", _format),
        "samples": Kind(root / "samples", lambda folder: list(map(repr, SampleStore(folder / "train.parquet")))),
        "plan": Kind(root / "plan", lambda folder: read_packs(folder / "plan.parquet")),
        "records": Kind(
            root / "records",
            lambda folder: (list(read_records(folder / "train.jsonl")), read_categories(folder / "categories.json")),
        ),
        "rollouts": Kind(
            root / "rollouts", lambda folder: _ids(read_generations(folder / "rollouts.jsonl", VOCABULARY))
        ),
        "answers": Kind(root / "answers", _decoded),
        "gt_vs_pred": Kind(root / "eval" / "stage2", lambda folder: list(read_results(folder / "gt_vs_pred.jsonl"))),
        "metrics": Kind(root / "eval", lambda folder: read_json(folder / "metrics.json", "coco-eval")),
        "training log": Kind(root / "log", lambda folder: read_log(folder / "train_log.jsonl").to_dict()),
        "resume state": Kind(root / "state", _state),
        "compute": Kind(root / "compute", lambda folder: COMPUTE.read_sealed(folder / "compute.json")),
        "journal": Kind(
            root / "journal", lambda folder: _ids(Journal(folder / "j.jsonl").read(VOCABULARY)), loses=True
        ),
        "predictions": Kind(root / "predictions", lambda folder: _objects(folder / "p.jsonl")),
    }


def _write_answers(root: Path, world: World, checkpoint: Any, generations: dict[int, Generation]) -> None:
    rng, span = np.random.default_rng(0), range(checkpoint.coord.first_id, checkpoint.coord.end_id)
    journal, log = Journal(root / "journal" / "j.jsonl"), PredictionLog(root / "predictions" / "p.jsonl", Path("a"))
    known = []
    for sample in world.samples:
        ids = generations[sample.image_id].ids
        n_coords = sum(token in span for token in ids.tolist())
        probs = TokenProbs(-rng.random(len(ids)), rng.dirichlet(np.ones(1000), n_coords).astype(np.float16))
        known.append(Generation(ids, "stop", probs))
        journal.append(str(sample.image_id), known[-1])
    decoded = read_answers(checkpoint, answer_reader(checkpoint), world.samples, known, world.root, 4)
    for sample, answer in zip(world.samples, decoded, strict=True):
        objects = [{"desc": p.desc, "bbox_xyxy_px": list(p.bbox_xyxy_px), "score": 0.5} for p in answer.result.pred]
        row = {"width": sample.width, "height": sample.height, "objects": objects}
        log.add(sample.image, AnswerSource("0123", {"codec": "json"}), "ff", row)
    write_decoded(root / "answers", decoded, {"codec": "json", "images": len(decoded)})
    with sealing(root / "eval"):
        score_folder(root / "answers", PARAMS.decode, root / "eval" / "stage2")
        write_json(root / "eval" / "metrics.json", {"stage2": {"eval": {"coco": {"mAP": 0.3719}}}})


def _format(folder: Path) -> Any:
    form = load_format(folder)
    return form.pixels, form.detection, form.tokenizer.get_vocab()


def _ids(generations: dict[Any, Generation]) -> dict[Any, Any]:
    return {key: (g.ids.tolist(), g.finish_reason, g.probs and g.probs.to_json()) for key, g in generations.items()}


def _decoded(folder: Path) -> Any:
    answers = [(d.result, None if d.probs_N4K is None else d.probs_N4K.tobytes()) for d in read_decoded(folder)]
    return answers, read_json(folder / "decode.json", "decode")


def _state(folder: Path) -> Any:
    state = load_state(folder)
    assert state is not None
    tensors = state.model | state.optimizer | {"random": state.torch_rng}
    values = {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in tensors.items()}
    return values | {"step": state.step, "start": state.start}


def _objects(path: Path) -> Any:
    """The content that results depend on, and the reusable answers, whose key is valid."""
    return [(row["image"], row["objects"]) for row in read_rows(path)]


def changes(kind: Kind, name: str, flips: int) -> Iterator[tuple[Path, bytes]]:
    """Single bits, spread over the files by size with some in each, and truncations at several places."""
    rng = random.Random(name)
    files = sorted(path for path in kind.folder.rglob("*") if path.is_file() and "eval/stage2" not in path.as_posix())
    files = files or sorted(path for path in kind.folder.rglob("*") if path.is_file())
    files = [path for path in files if path.stat().st_size]  # a mark is empty
    sizes = [path.stat().st_size for path in files]
    chosen = [*files * (1 + flips // 40), *rng.choices(files, sizes, k=flips)][:flips]
    for path in chosen:
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        yield path, bytes(changed)
    for path in files:
        whole = path.read_bytes()
        yield from ((path, whole[:size]) for size in {0, 1, len(whole) // 2, len(whole) - 1})


def outcome(kind: Kind, wanted: Any, path: Path, content: bytes) -> str:
    """The outcome of reading the changed file; the file is restored."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        found = kind.read(kind.folder)
    except CoordExpError as error:
        return "named" if path.name in str(error) or path.name == HASHES else f"misnamed: {error}"
    else:
        unread = found == wanted and (kind.folder / HASHES).exists() and any(damage(kind.folder))
    finally:
        path.write_bytes(whole)
    if found == wanted:
        return "of a file that is not read, named by damage()" if unread else "same"
    is_less = kind.loses and found.items() <= wanted.items()
    return "lost, to be made again" if is_less else "silent"


@pytest.mark.parametrize("flips", [FEW, pytest.param(MANY, marks=pytest.mark.faults)])
def test_damage_is_never_ignored(
    kinds: dict[str, Kind], flips: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.ERROR)
    found: dict[str, Counter[str]] = {}
    for name, kind in kinds.items():
        wanted = kind.read(kind.folder)
        found[name] = Counter(outcome(kind, wanted, *change) for change in changes(kind, name, flips))
        assert kind.read(kind.folder) == wanted
    with capsys.disabled():
        for name, counts in found.items():
            print(f"{name}: {counts.total()} tried, {dict(counts)}")
    allowed = {"named", "same", "lost, to be made again", "of a file that is not read, named by damage()"}
    assert {name: dict(counts) for name, counts in found.items() if counts.keys() - allowed} == {}
    # With a list of hashes, any change is damage; rows with their own hash tolerate white space.
    sealed = {name for name, kind in kinds.items() if (kind.folder / HASHES).exists()}
    assert len(sealed) >= 8
    assert {name for name in sealed if "same" in found[name]} == set()
