"""Training stages: their outputs, the states from which they resume, and changes that make them start over."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file

from coordexp.errors import DamagedArtefactError, Interrupted
from coordexp.infra import files, resume
from coordexp.infra.logs import BIN_ERROR
from coordexp.infra.provenance import read_run_record
from coordexp.infra.resume import holding
from coordexp.models.loading import Checkpoint, load_checkpoint
from coordexp.packing.planner import read_packs
from coordexp.packing.samples import SampleStore
from coordexp.rollout import hf_engine
from coordexp.rollout.hf_engine import HfEngine
from coordexp.training import session as session_module
from coordexp.training import stage1, stage2
from coordexp.training.loop import Task
from coordexp.training.rollout_pool import Refresher
from coordexp.training.session import EvalCallback, Session, summarise_log, write_curve
from coordexp.training.stage1 import control_tokens, read_compute, train_control, train_stage1
from coordexp.training.stage2 import train_stage2
from coordexp.training.stage2_task import Stage2Task
from coordexp.training.state_files import generation_name
from coordexp.training.step import TeacherTask
from helpers import Workspace
from permissions import permissions_hold

STAGES = {"stage1": train_stage1, "stage1-control": train_control, "stage2": train_stage2}
STEPS = 4  # of the smoke profile


def train(space: Workspace, stage: str) -> dict:
    return STAGES[stage](space)


def log_rows(folder: Path) -> list[dict]:
    lines = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def stop_in_step(monkeypatch):
    """Makes the next run receive SIGTERM while it runs this step."""

    def arm(wanted: int | None) -> None:
        for kind, original in originals.items():

            def micro_batches(self, step, original=original):
                if step == wanted:
                    os.kill(os.getpid(), signal.SIGTERM)
                return original(self, step)

            monkeypatch.setattr(kind, "micro_batches", micro_batches)

    originals = {kind: kind.micro_batches for kind in (TeacherTask, Stage2Task)}
    return arm


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_uninterrupted(ready, stage, stop_in_step):
    train(ready, stage)
    out = ready.paths.run(stage)
    expected_weights, expected_rows = weights(out), log_rows(out)
    stop_in_step(1)
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        train(ready, stage)
    stop_in_step(None)
    train(ready, stage)
    assert log_rows(out) == expected_rows
    assert [row["step"] for row in expected_rows] == list(range(STEPS))
    assert all(torch.equal(value, expected_weights[name]) for name, value in weights(out).items())


def test_a_resumed_run_trains_on_the_fresh_rollouts_of_the_interrupted_one(ready, monkeypatch):
    """Generated before step 2, from weights that no longer exist when step 3 runs in another process."""
    asked, generate = [], HfEngine.generate

    def counting(self, samples, settings):
        asked.append(len(samples))
        return generate(self, samples, settings)

    monkeypatch.setattr(HfEngine, "generate", counting)
    space = ready.set(stage2__b_ratio=1.0, stage2__refresh_steps=2, decode__max_new_tokens=12)
    space = with_profile(space, "monitor", every_steps=0)  # it generates too
    summary = train(space, "stage2")
    out = space.paths.run("stage2")
    expected_weights, expected_rows = weights(out), log_rows(out)
    assert len(asked) == 1
    bill, fresh = read_compute(space.paths), summary["refresh_prompt_tokens"] + summary["refresh_generated_tokens"]
    assert bill["rollout_tokens"] == on_file_tokens(space) + fresh
    assert bill["tokens"] == summary["tokens"]
    assert 0 < summary["refresh_generated_tokens"] <= 12 * asked[0]
    with monkeypatch.context() as patch:
        at = Refresher.at

        def stops(self, step):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return at(self, step)

        patch.setattr(Refresher, "at", stops)
        with pytest.raises(Interrupted, match="after step 3 of 4"):
            train(space, "stage2")
    train(space, "stage2")
    assert len(asked) == 2
    assert log_rows(out) == expected_rows
    assert all(torch.equal(value, expected_weights[name]) for name, value in weights(out).items())


@pytest.mark.parametrize("place", ["fresh rollouts", "evaluation"])
def test_work_between_steps_stops_at_once_and_resumes_to_the_same_result(ready, place, monkeypatch):
    """SIGTERM after the first of several groups of answers; no group is answered twice, and nothing is left out."""
    space = ready.set(stage2__b_ratio=1.0, stage2__refresh_steps=2, decode__max_new_tokens=12)
    space = with_profile(space, "monitor", every_steps=0 if place == "fresh rollouts" else 2, batch_images=1)
    space = with_profile(space, "rollout", batch_images=1)
    monkeypatch.setattr(hf_engine, "GROUP_BATCHES", 1)
    answered, original = [], hf_engine.answer_group
    monkeypatch.setattr(hf_engine, "answer_group", lambda *a: answered.append(a[1]) or original(*a))
    train(space, "stage2")
    out = space.paths.run("stage2")
    expected = weights(out), log_rows(out), [path.read_bytes() for path in sorted(out.glob("monitor*/*"))]
    n_groups = len(answered)
    assert n_groups > 2

    with monkeypatch.context() as patch:
        keep = hf_engine.keep
        patch.setattr(hf_engine, "keep", lambda *a: keep(*a) or os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="stopped by signal 15 after step 2 of 4; run it again"):
            train(space, "stage2")
    answered.clear()
    train(space, "stage2")
    assert (weights(out).keys(), log_rows(out)) == (expected[0].keys(), expected[1])
    assert all(torch.equal(value, expected[0][name]) for name, value in weights(out).items())
    assert [path.read_bytes() for path in sorted(out.glob("monitor*/*"))] == expected[2]
    if place == "fresh rollouts":
        assert len(answered) == n_groups - 1


class Planned(Exception):
    """Carries session and task of a stage that would train now."""


def planned(space: Workspace, stage: str) -> tuple[Session, Task]:
    def stop(session: Session, _: Checkpoint, task: Task, __: EvalCallback) -> NoReturn:
        raise Planned(session, task)

    with pytest.MonkeyPatch.context() as patch:
        for module in (stage1, stage2):
            patch.setattr(module, "run_session", stop)
        with pytest.raises(Planned) as caught:
            train(space, stage)
    return caught.value.args


def state_of(space: Workspace, stage: str) -> Path:
    """What a run of this stage would go on from."""
    return planned(space, stage)[0].state_folder()


def with_profile(space: Workspace, block: str, **changes) -> Workspace:
    inner = getattr(space.profile, block).model_copy(update=changes)
    return replace(space, profile=space.profile.model_copy(update={block: inner}))


def test_only_the_same_run_resumes_a_state(ready, monkeypatch):
    changes = [
        *({"sigma": 3.0}, {"anneal__sigma_fraction": 0.5}, {"stage1__softce_weight": 2.0}),
        *({"seed": 1}, {"stage1__seed": 1}, {"text__object_order": "random"}),
    ]
    states = [state_of(ready.set(**change), "stage1") for change in ({}, *changes)]
    states.append(state_of(with_profile(ready, "stage1", betas=(0.9, 0.99)), "stage1"))
    states.append(state_of(with_profile(ready, "tuning", vision="freeze"), "stage1"))
    for manifest in ("{}", '{"sets": {}}'):
        (ready.paths.raw / "manifest.json").write_text(manifest)
        states.append(state_of(ready, "stage1"))
    states.append(state_of(ready, "stage2"))
    rollouts = ready.paths.run("rollout") / "rollouts.jsonl"
    rollouts.write_text("".join(rollouts.read_text().splitlines(keepends=True)[:4]))
    states.append(state_of(ready, "stage2"))
    monkeypatch.setattr(session_module, "code_hash", lambda layers: "edited")
    states.append(state_of(ready, "stage1"))
    assert len(set(states)) == len(states)


def test_changes_that_a_stage_does_not_read_keep_its_state(ready):
    ours = state_of(ready, "stage1")
    elsewhere = {"softce_weight": 0.2, "stage2__b_ratio": 0.9, "stage2__seed": 1, "decode__max_new_tokens": 7}
    assert state_of(ready.set(**elsewhere), "stage1") == ours
    assert state_of(with_profile(ready, "launch", save_every_seconds=7.0, sharding="fsdp2"), "stage1") == ours


@pytest.mark.parametrize(("stage", "other"), [("stage1", "stage2"), ("stage2", "stage1")])
def test_another_seed_changes_the_order_of_the_same_data(ready, stage, other):
    def items(space: Workspace) -> list:
        task = planned(space, stage)[1]
        return [task.items(step) for step in range(STEPS)]

    assert items(ready.set(**{f"{other}__seed": 1})) == items(ready)
    assert items(ready.set(**{f"{stage}__seed": 1})) != items(ready)


def test_two_runs_of_one_session_do_not_share_its_state(ready, stop_in_step, monkeypatch):
    stop_in_step(1)
    with pytest.raises(Interrupted):
        train(ready, "stage1")
    (state,) = (ready.paths.root / ".resume").iterdir()
    stop_in_step(None)
    monkeypatch.setattr(resume, "POLL_S", 0.01)

    def ends_when_waited_for() -> None:
        while not (state / resume.WAITING).exists():
            time.sleep(0.01)
        other.close()

    with ExitStack() as other:
        other.enter_context(holding(state, "another run"))
        threading.Thread(target=ends_when_waited_for).start()
        assert train(ready, "stage1")["steps"] == STEPS


def test_a_damaged_state_is_reported(ready, stop_in_step):
    stop_in_step(1)
    with pytest.raises(Interrupted):
        train(ready, "stage1")
    (state,) = (ready.paths.root / ".resume").iterdir()
    (part,) = state.glob("state-*/part-*")
    content = part.read_bytes()
    for damaged in (content[:1000], b"", b"x" * 1000):
        part.write_bytes(damaged)
        with pytest.raises(DamagedArtefactError, match=f"delete {state} to start"):
            train(ready, "stage1")


def test_a_full_disk_stops_with_its_name_and_damages_nothing(ready, stop_in_step):
    """The limit on file sizes is what a full disk is to one file; the weights do not fit under it."""
    train(ready, "stage1")
    out = ready.paths.run("stage1")
    before = weights(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):  # the checkpoint
            train(ready, "stage1")
        stop_in_step(1)
        with pytest.raises(OSError, match="File too large"):  # the resume state
            train(ready, "stage1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(torch.equal(value, before[name]) for name, value in weights(out).items())
    stop_in_step(None)
    assert train(ready, "stage1")["steps"] == STEPS  # with room again
    assert not list(out.parent.glob("*.tmp"))


def test_disk_space_for_the_checkpoint_is_checked_before_and_after_training(ready, monkeypatch):
    free = {"free": 0}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(**free))
    with pytest.raises(OSError, match=r"GB are needed, 0\.0 GB free.*stage1"):
        train(ready, "stage1")
    assert not list((ready.paths.root / ".resume").glob("*")), "nothing began"
    answers = iter([10**12, 0])
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(answers)))
    with pytest.raises(OSError, match=r"GB are needed"):
        train(ready, "stage1")
    (state,) = (ready.paths.root / ".resume").glob("stage1-*/state-*")
    assert state.name == generation_name(STEPS), "no step runs again"
    monkeypatch.undo()
    monkeypatch.setenv("DVC_ROOT", str(ready.paths.root))
    assert train(ready, "stage1")["steps"] == STEPS
    assert not list(ready.paths.run("stage1").parent.glob("*.tmp"))


def test_read_only_outputs_stop_with_their_name_and_damage_nothing(ready, stop_in_step):
    train(ready, "stage1")
    out = ready.paths.run("stage1")
    before = weights(out)
    stop_in_step(1)
    with pytest.raises(Interrupted):
        train(ready, "stage1")
    stop_in_step(None)
    out.parent.chmod(0o555)
    with permissions_hold(), pytest.raises(PermissionError, match=r"stage1\.tmp"):
        train(ready, "stage1")
    assert all(torch.equal(value, before[name]) for name, value in weights(out).items())
    assert list((ready.paths.root / ".resume").iterdir()), "what it goes on from"
    out.parent.chmod(0o755)
    assert train(ready, "stage1")["steps"] == STEPS


def test_outputs_of_a_training_stage(ready):
    summary = train(ready, "stage1")
    out = ready.paths.run("stage1")
    checkpoint = load_checkpoint(out)  # a plain Hugging Face folder
    assert checkpoint.coord is not None
    metadata = json.loads((out / "run_metadata.json").read_text())
    assert metadata["stage"] == "stage1"
    assert metadata["settings"]["sigma"] == ready.params.sigma
    assert metadata["inputs"].keys() == {"start", "samples", "plan"}
    assert metadata.items() >= summary.items()
    assert not list((ready.paths.root / ".resume").iterdir())  # a finished run needs no state
    assert not list(out.parent.glob("*.tmp"))
    before = weights(ready.paths.norm1000 / "init")
    assert any(not torch.equal(value, before[name]) for name, value in weights(out).items())


def test_stage_2_runs_both_channels_and_records_its_cost_for_the_control(ready):
    summary = train(ready, "stage2")
    rows = log_rows(ready.paths.run("stage2"))
    assert [row["channel"] for row in rows] == ["A", "B", "A", "B"]
    compute = read_compute(ready.paths)
    taken = {"tokens": sum(row["tokens"] for row in rows), "rollout_tokens": on_file_tokens(ready)}
    assert compute == {"steps": STEPS, **taken}
    assert read_run_record(ready.paths.run_record("stage2")).items() >= compute.items()
    assert summary["tokens"] == compute["tokens"]


def test_without_channel_b_the_rollouts_on_file_cost_nothing(ready):
    summary = train(ready.set(stage2__b_ratio=0.0), "stage2")
    assert read_compute(ready.paths) == {"steps": STEPS, "tokens": summary["tokens"], "rollout_tokens": 0}


def test_a_repetition_of_stage_2_repeats_the_control_from_the_same_checkpoint(ready):
    train(ready, "stage1-control")
    first = weights(ready.paths.run("stage1-control"))
    train(ready.set(stage2__seed=ready.params.stage2.seed + 1), "stage1-control")
    other = weights(ready.paths.run("stage1-control"))
    assert any(not torch.equal(value, first[name]) for name, value in other.items())


def on_file_tokens(space: Workspace) -> int:
    """What the rollouts on file read and wrote."""
    lines = (json.loads(line) for line in space.paths.rollouts.read_text().splitlines())
    written = {row["image_id"]: len(row["ids"]) for row in lines}
    store = SampleStore(space.paths.norm1000 / "train.parquet")
    samples = [store[i] for i in range(len(store))]
    return sum(s.prompt_length + written[s.image_id] for s in samples if s.image_id in written)


def test_a_rollout_token_counts_as_a_third_of_a_training_token():
    taken = {"steps": 4, "tokens": 2000, "rollout_tokens": 300}
    assert (control_tokens(taken, "compute"), control_tokens(taken, "tokens")) == (2100, 2000)


@pytest.mark.parametrize(("budget", "tokens"), [("tokens", 2000), ("compute", 3000)])
def test_the_control_takes_stage_2s_steps_and_its_compute_or_tokens(ready, budget, tokens):
    ready = ready.set(control__budget=budget)
    summary = train(ready, "stage1-control")
    packs = read_packs(ready.paths.packed / "plan.parquet")
    lengths = SampleStore(ready.paths.norm1000 / "train.parquet").lengths()
    largest = max(int(lengths[pack].sum()) for pack in packs)
    assert summary["steps"] == STEPS
    assert tokens <= summary["tokens"] <= tokens + largest
    optim = json.loads((ready.paths.run("stage1-control") / "run_metadata.json").read_text())["settings"]["optim"]
    assert optim["lr"] == ready.profile.stage2.lr


def test_summary_and_curve_of_a_log_by_hand(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [
        {"step": s, "samples": 2, "tokens": 10 + s, "time/step_s": 0.25, "loss/total": 20.0 - s}
        | ({"loss/box": 1.0 * s} if s % 2 else {})
        for s in range(20)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summarise_log(log) == {
        "steps": 20, "samples": 40, "tokens": 390, "final_loss": 1.5,
        "refresh_prompt_tokens": 0, "refresh_generated_tokens": 0
    }  # fmt: skip
    write_curve(log, tmp_path / "curves" / "a.tsv", ("loss/total", "loss/box"), every=8)
    lines = (tmp_path / "curves" / "a.tsv").read_text().splitlines()
    assert lines == [
        "step\tloss/total\tloss/box", "7\t16.5000\t4.0000", "15\t8.5000\t12.0000", "19\t2.5000\t18.0000"
    ]  # fmt: skip
    write_curve(log, tmp_path / "a.tsv", ("loss/box",))
    assert (tmp_path / "a.tsv").read_text().splitlines()[:3] == ["step\tloss/box", "0\t", "1\t1.0000"]


def test_a_curve_holds_no_weight_and_few_rows(tmp_path):
    def curve(weight):
        rows = [
            {"step": s, "raw/box": 0.5 * s, "loss/box": weight * s, "loss/total": weight * s, BIN_ERROR: 9.0 - s / 100}
            for s in range(120)
        ]
        log = tmp_path / f"{weight}.jsonl"
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_curve(log, tmp_path / f"{weight}.tsv")
        return (tmp_path / f"{weight}.tsv").read_text().splitlines()

    assert curve(1.0) == curve(0.2)
    assert curve(1.0)[:2] == [f"step\t{BIN_ERROR}\traw/box", "2\t8.9900\t0.5000"]
    assert len(curve(1.0)) == 1 + 40
