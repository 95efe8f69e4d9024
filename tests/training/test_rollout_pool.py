"""Which rollouts a step trains on: on file or fresh, matched under the settings of the step, and kept for a resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coordexp.errors import ConfigError, DamagedArtefactError
from coordexp.models.adapters import apply_tuning
from coordexp.models.loading import load_checkpoint
from coordexp.rollout.engine import Generation
from coordexp.rollout.hf_engine import HfEngine
from coordexp.training import rollout_pool
from coordexp.training.rollout_pool import Refresh, Refresher, RolloutPool, plan_refreshes
from coordexp.training.stage2 import train_stage2
from helpers import MATCHING, answer_reader, changed, decode_request, new_checkpoint, teacher_rollouts

REQUEST = decode_request(seed=17, max_new_tokens=8)


class TruthTeller:
    """An engine that answers with the annotation, notes what it was asked, and draws random numbers like a real one."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def generate(self, samples, request):
        torch.manual_seed(request.seed)
        self.asked.append(([s.image_id for s in samples], request.seed))
        return [Generation(s.answer_ids, "stop") for s in samples]


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


@pytest.fixture(scope="module")
def on_file(world, checkpoint):
    return teacher_rollouts(checkpoint, world)


def refresher(world, checkpoint, folder, engine, refreshes) -> Refresher:
    return Refresher(
        refreshes, lambda: engine, answer_reader(checkpoint).parse, REQUEST, world.store, 10**6, folder,
        torch.nn.Identity(),
    )  # fmt: skip


def test_a_plan_by_hand():
    """Windows of 4 steps; channel B in steps 1, 5, 7, 9; the first window trains on what is on file."""
    items = {1: (0, 1), 5: (2, 0), 7: (2, 5), 9: (3,)}
    assert plan_refreshes(items, 4) == [Refresh(5, (0, 2, 5)), Refresh(9, (3,))]
    assert plan_refreshes(items, 0) == []
    assert plan_refreshes(items, 100) == []
    assert plan_refreshes({}, 4) == []


def test_fresh_rollouts_replace_those_on_file_from_their_step_on(world, checkpoint, on_file, tmp_path):
    engine, sample = TruthTeller(), world.store[0]
    sets = [Refresh(5, (0, 2)), Refresh(9, (0,))]
    pool = RolloutPool(on_file, lambda _: MATCHING, refresher(world, checkpoint, tmp_path, engine, sets))
    n_true = len(sample.descs) - sum(sample.iscrowd)
    assert pool.refresh_steps == {5, 9}
    pool.refresh(1)
    found, logs = pool.at(1, [sample])
    assert found[sample.image_id] == on_file[sample.image_id]
    assert (logs, engine.asked) == ({}, [])
    pool.refresh(5)
    found, logs = pool.at(5, [sample])
    assert len(found[sample.image_id].pairs) == n_true  # on file one is missed
    assert logs == {
        "rollout/prompt_tokens": sum(world.store[i].prompt_length for i in (0, 2)),
        "rollout/generated_tokens": sum(len(world.store[i].answer_ids) for i in (0, 2)),
    }
    pool.refresh(7)
    assert pool.at(7, [sample])[1] == {}
    pool.refresh(9)
    assert [images for images, _ in engine.asked] == [[100, 102], [100]]
    assert len({seed for _, seed in engine.asked} | {REQUEST.seed}) == 3


def test_a_resumed_run_reads_the_set_and_logs_the_same(world, checkpoint, on_file, tmp_path):
    first, second = TruthTeller(), TruthTeller()
    made, read = (
        RolloutPool(on_file, lambda _: MATCHING, refresher(world, checkpoint, tmp_path, engine, [Refresh(2, (0, 1))]))
        for engine in (first, second)
    )
    samples = [world.store[0], world.store[1]]
    made.refresh(2)
    read.refresh(2)
    assert made.at(2, samples) == read.at(2, samples)
    assert (len(first.asked), len(second.asked)) == (1, 0)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_set_that_changed_is_named_and_none_is_made_by_other_weights(world, checkpoint, on_file, tmp_path):
    def pool() -> RolloutPool:
        refreshes = [Refresh(2, (0, 1))]
        return RolloutPool(
            on_file, lambda _: MATCHING, refresher(world, checkpoint, tmp_path, TruthTeller(), refreshes)
        )

    pool().refresh(2)
    for path in sorted((tmp_path / "rollouts-2").iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(DamagedArtefactError, match="to start this stage at step 0"):
                pool().refresh(2)
        path.unlink()
        with pytest.raises(DamagedArtefactError, match="to start this stage at step 0"):
            pool().refresh(3)
        path.write_bytes(whole)
    pool().refresh(3)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_servers_are_given_the_weights_of_the_moment(workspace, world, tmp_path, monkeypatch, method):
    """As a checkpoint of plain weights, which is gone afterwards; a folder that a killed run left is replaced."""
    served = []

    def ask(_profile, _form, folder, image_root, batch_images, samples, request):
        served.append(folder)
        engine = HfEngine(load_checkpoint(folder), image_root, batch_images)
        return engine.generate(samples, request), None, 0.0

    monkeypatch.setattr(rollout_pool, "generate_answers", ask)
    run = replace(workspace, profile=changed(workspace.profile, rollout__engine="vllm", tuning__method=method))
    made, folder = new_checkpoint(), tmp_path / "state"
    apply_tuning(made.model, run.profile.tuning, made.coord)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (p for p in made.model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    (folder / "served").mkdir(parents=True)
    (folder / "served" / "model-00001-of-00009.safetensors").write_bytes(b"")
    ours = HfEngine(made, world.root, 8).generate(world.samples, REQUEST)
    theirs = rollout_pool.engine_of_now(run, made, folder).generate(world.samples, REQUEST)
    assert [g.ids.tolist() for g in theirs] == [g.ids.tolist() for g in ours]
    assert (served, list(folder.iterdir())) == ([folder / "served"], [])


def test_fresh_rollouts_are_no_question_for_servers_elsewhere(ready):
    rollout = {"rollout__engine": "vllm", "rollout__servers": ["http://gpu-3:8000"]}
    space = replace(ready, profile=changed(ready.profile, **rollout)).set(stage2__refresh_steps=2)
    with pytest.raises(ConfigError, match=r"rollout\.servers is \['http://gpu-3:8000'\]: no server elsewhere"):
        train_stage2(space)


def test_generating_does_not_disturb_the_random_numbers_of_training(world, checkpoint, on_file, tmp_path):
    pool = RolloutPool(
        on_file, lambda _: MATCHING, refresher(world, checkpoint, tmp_path, TruthTeller(), [Refresh(2, (0,))])
    )
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    pool.refresh(2)
    torch.testing.assert_close(torch.rand(3), expected)


def test_matching_follows_the_step(world, on_file):
    """A gate that only exact boxes pass lets none of the shifted ones through; relaxed, all but the missed object."""
    strict = changed(MATCHING, gate_threshold=1.0)
    pool = RolloutPool(on_file, lambda step: strict if step < 3 else MATCHING)
    sample = world.store[0]
    assert pool.at(2, [sample])[0][sample.image_id].pairs == ()
    assert pool.at(3, [sample])[0][sample.image_id] == on_file[sample.image_id]
