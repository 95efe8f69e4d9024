"""The rollouts of a step: on file or fresh, matched with the parameters of the step, and stored for resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coordexp.errors import ConfigError, DamagedArtefactError
from coordexp.geometry.bins import encode_boxes
from coordexp.models.adapters import apply_tuning
from coordexp.models.loading import load_checkpoint
from coordexp.rollout.engine import Generation
from coordexp.rollout.hf_engine import HfEngine
from coordexp.text.codecs import TextObject
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


class Guesser:
    """Answers with nothing where it is greedy; else in turn with the first annotated object, all, and the first."""

    def __init__(self, checkpoint, world) -> None:
        self.encoder = world.encoder(checkpoint)
        self.asked: list[tuple[float, int]] = []

    def generate(self, samples, request):
        self.asked.append((request.params.temperature, len(samples)))
        answers = []
        for i, sample in enumerate(samples):
            n_objects = 0 if request.params.temperature == 0 else None if i % 3 == 1 else 1
            objects = objects_of(sample)[:n_objects]
            answers.append(Generation(self.encoder.encode(objects).ids, "stop"))
        return answers


def objects_of(sample) -> list[TextObject]:
    keep = [i for i, crowd in enumerate(sample.iscrowd) if not crowd]
    bins = encode_boxes(sample.boxes_xyxy_px[keep], sample.width, sample.height)
    return [TextObject(sample.descs[i], tuple(row)) for i, row in zip(keep, bins.tolist(), strict=True)]


def test_the_best_of_several_answers_is_kept_and_all_count_as_compute(world, checkpoint, on_file, tmp_path):
    engine, items = Guesser(checkpoint, world), (0, 1)
    sampled = replace(REQUEST, params=changed(REQUEST.params, temperature=0.7))

    def pool() -> RolloutPool:
        return RolloutPool(
            on_file, lambda _: MATCHING,
            Refresher([Refresh(2, items)], lambda: engine, answer_reader(checkpoint).parse, REQUEST, world.store,
                      10**6, tmp_path, torch.nn.Identity(), sampled, 3, lambda _: MATCHING),
        )  # fmt: skip

    made = pool()
    made.refresh(2)
    samples = [world.store[i] for i in items]
    found, logs = made.at(2, samples)
    assert engine.asked == [(0.0, 2), (0.7, 6)]
    for sample in samples:
        n_true = len(sample.descs) - sum(sample.iscrowd)
        assert len(found[sample.image_id].objects) == len(found[sample.image_id].pairs) == n_true
    kept = sum(len(found[sample.image_id].ids) for sample in samples)
    assert logs["rollout/generated_tokens"] > kept + 2 * 3 * len(samples)  # the others are paid for, too
    again = pool()
    again.refresh(2)
    assert again.at(2, samples) == (found, logs)


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


def test_a_damaged_set_is_reported_and_not_replaced(world, checkpoint, on_file, tmp_path):
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
def test_servers_get_the_current_weights(workspace, world, tmp_path, monkeypatch, method):
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


def test_fresh_rollouts_from_external_servers_are_rejected(ready):
    rollout = {"rollout__engine": "vllm", "rollout__servers": ["http://gpu-3:8000"]}
    space = replace(ready, profile=changed(ready.profile, **rollout)).set(stage2__refresh_steps=2)
    with pytest.raises(ConfigError, match=r"rollout\.servers is \['http://gpu-3:8000'\]: external servers do not"):
        train_stage2(space)


def test_generation_does_not_change_the_random_numbers_of_training(world, checkpoint, on_file, tmp_path):
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
