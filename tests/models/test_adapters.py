"""Freezing and adapters: which weights are trained, which stay, and merging to equivalent plain weights."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from coordexp.config.profile import TuningConfig
from coordexp.errors import ConfigError
from coordexp.infra.device import training_plan
from coordexp.models.adapters import PARTS, apply_tuning, count_trainable, merged_weights, part_of
from coordexp.models.forward import hidden_states, input_table, slot_logits
from coordexp.models.loading import Checkpoint, load_checkpoint, save_checkpoint
from coordexp.packing.collator import teacher_segment
from coordexp.training.optimizers import build_optimizer
from helpers import new_checkpoint, optim

ADAPTERS = ("lora", "dora")


def tuning(**changes) -> TuningConfig:
    keys = {"method": "full", "vision": "train", "projector": "train", "language": "train", "rank": 4, "alpha": 8.0}
    return TuningConfig(**(keys | {"dropout": 0.0, "activations": "keep", "vision_activations": "keep"} | changes))


def untied(checkpoint: Checkpoint) -> Checkpoint:
    model = checkpoint.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 0.01)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    return checkpoint


@pytest.fixture(params=["tied", "untied"])
def checkpoint(request) -> Checkpoint:
    made = new_checkpoint()
    return untied(made) if request.param == "untied" else made


@pytest.fixture
def batch(world):
    return world.collator(new_checkpoint())([teacher_segment(s) for s in world.samples[:3]])


def logits(checkpoint: Checkpoint, batch) -> torch.Tensor:
    """At every supervised slot."""
    slots = torch.cat([batch.text_slots, batch.coord_slots])
    return slot_logits(checkpoint.model, hidden_states(checkpoint.model, batch), slots)


def steps(checkpoint: Checkpoint, batch, count: int = 3) -> None:
    """A few real optimizer steps, large enough to have a visible effect."""
    optimizer = build_optimizer(checkpoint.model, optim())
    targets = torch.cat([batch.text_targets, batch.coord_targets.round().long() + checkpoint.coord.first_id])
    for _ in range(count):
        torch.nn.functional.cross_entropy(logits(checkpoint, batch), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def moved(before: dict[str, torch.Tensor], model) -> set[str]:
    """The parts whose weights changed; embedding rows are compared separately."""
    after = {n: p for n, p in model.named_parameters() if "embed_tokens" not in n and "lm_head" not in n}
    return {part_of(name) for name, value in after.items() if not torch.equal(value, before[name])}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", ADAPTERS)
def test_merged_equals_adapted_and_is_a_plain_checkpoint(checkpoint, batch, method, tmp_path):
    pytest.importorskip("peft")
    names, before = list(snapshot(checkpoint.model)), logits(checkpoint, batch).detach()
    undo = apply_tuning(checkpoint.model, tuning(method=method), checkpoint.coord)
    torch.testing.assert_close(logits(checkpoint, batch), before, atol=1e-4, rtol=0)  # adapters start at zero
    steps(checkpoint, batch)
    adapted = logits(checkpoint, batch).detach()
    assert (adapted - before).abs().max() > 0.1
    undo()
    torch.testing.assert_close(logits(checkpoint, batch), adapted, atol=1e-4, rtol=0)
    assert list(snapshot(checkpoint.model)) == names
    is_tied = checkpoint.model.config.tie_word_embeddings
    assert (checkpoint.model.lm_head.weight is input_table(checkpoint.model).weight) == is_tied
    save_checkpoint(tmp_path, checkpoint)
    assert not list(tmp_path.glob("adapter*"))
    loaded = load_checkpoint(tmp_path)
    torch.testing.assert_close(logits(loaded, batch), adapted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ADAPTERS)
def test_only_coordinate_rows_of_the_tables_are_trained(checkpoint, batch, method):
    pytest.importorskip("peft")
    before = snapshot(checkpoint.model)
    undo = apply_tuning(checkpoint.model, tuning(method=method), checkpoint.coord)
    steps(checkpoint, batch)
    undo()
    assert_only_coordinate_rows_moved(before, checkpoint)


def assert_only_coordinate_rows_moved(before, checkpoint: Checkpoint) -> None:
    span = slice(checkpoint.coord.first_id, checkpoint.coord.end_id)
    tables = {n: p for n, p in checkpoint.model.named_parameters() if "embed_tokens" in n or "lm_head" in n}
    assert len(tables) == (1 if checkpoint.model.config.tie_word_embeddings else 2)
    for name, table_VD in tables.items():
        change_V = (table_VD - before[name]).abs().sum(1)
        assert change_V[span].max() > 0
        change_V[span] = 0
        assert change_V.max() == 0


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("method", ["full", *ADAPTERS])
def test_a_frozen_part_does_not_change(batch, part, method):
    if method != "full":
        pytest.importorskip("peft")
    checkpoint = new_checkpoint()
    before = snapshot(checkpoint.model)
    undo = apply_tuning(checkpoint.model, tuning(method=method, **{part: "freeze"}), checkpoint.coord)
    steps(checkpoint, batch)
    undo()
    assert moved(before, checkpoint.model) == set(PARTS) - {part}
    if part == "language":
        assert_only_coordinate_rows_moved(before, checkpoint)
    assert all(p.requires_grad for p in checkpoint.model.parameters())


def test_adapters_have_few_trained_parameters():
    pytest.importorskip("peft")
    checkpoint = new_checkpoint()
    everything = count_trainable(checkpoint.model)
    apply_tuning(checkpoint.model, tuning(method="lora", vision="freeze"), checkpoint.coord)
    hidden = checkpoint.model.config.text_config.hidden_size
    rows = 1000 * hidden
    assert rows < count_trainable(checkpoint.model) < rows + 0.1 * everything


@pytest.mark.parametrize("parts", [{"language"}, {"vision"}, {"vision", "language"}])
def test_gradient_checkpointing_of_a_part_changes_no_gradient(batch, parts):
    plain, recomputing = new_checkpoint(), new_checkpoint()
    keys = {"language": "activations", "vision": "vision_activations"}
    undo = apply_tuning(recomputing.model, tuning(**{keys[p]: "recompute" for p in parts}), recomputing.coord)
    calls = []
    inner = recomputing.model.model
    for part, layer in (("language", inner.language_model.layers[0]), ("vision", inner.visual.blocks[0])):
        layer.register_forward_pre_hook(lambda *_, part=part: calls.append(part))
    for checkpoint in (plain, recomputing):
        checkpoint.model.train()
        logits(checkpoint, batch).square().mean().backward()
    again = [part for part in ("language", "vision") if part in parts]  # in the backward pass
    assert calls == ["vision", "language", *again]
    for (name, a), b in zip(plain.model.named_parameters(), recomputing.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    undo()
    assert not recomputing.model.is_gradient_checkpointing


def test_only_the_coordinate_rows_of_a_frozen_table_get_its_gradient(checkpoint, batch):
    reference = copy.deepcopy(checkpoint)
    apply_tuning(checkpoint.model, tuning(language="freeze"), checkpoint.coord)
    for each in (checkpoint, reference):
        logits(each, batch).square().mean().backward()
    span = slice(checkpoint.coord.first_id, checkpoint.coord.end_id)
    of_rows = {n: p.grad for n, p in checkpoint.model.named_parameters() if p.requires_grad and n.endswith(".rows")}
    of_tables = {n: p.grad for n, p in reference.model.named_parameters() if "embed_tokens" in n or "lm_head" in n}
    for (name, ours), whole in zip(of_rows.items(), of_tables.values(), strict=True):
        torch.testing.assert_close(ours, whole[span], msg=name)
    assert {p.grad for p in checkpoint.model.parameters() if not p.requires_grad} == {None}


@pytest.mark.parametrize(
    "changes", [{"vision": "freeze"}, {"language": "freeze"}, {"method": "lora"}, {"method": "dora"}]
)
def test_frozen_weights_are_stored_in_bfloat16_and_restored_exactly(checkpoint, batch, changes):
    """Also if rounding changed them; trained weights stay in float32, and a step under autocast runs."""
    if "method" in changes:
        pytest.importorskip("peft")
    before, model = snapshot(checkpoint.model), checkpoint.model
    undo = apply_tuning(model, tuning(**changes), checkpoint.coord, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    plan = training_plan("bf16", torch.device("cpu"))
    with plan.autocast(model):
        steps(checkpoint, batch, 1)
    with plan.autocast(model):  # a new context: it caches copies of weights
        trained = logits(checkpoint, batch).detach().float()
    undo()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if changes.get("method") != "dora":  # which scales what it adapts
        apart = (logits(checkpoint, batch) - trained).norm() / trained.norm()
        assert apart < 0.05
    frozen = [part for part in PARTS if changes.get(part) == "freeze"]
    assert not moved(before, model) & set(frozen)
    if changes != {"vision": "freeze"}:
        assert_only_coordinate_rows_moved(before, checkpoint)


def test_missing_packages_are_named(monkeypatch):
    checkpoint = new_checkpoint()
    for package in ("peft", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"tuning.method is 'lora', which needs PEFT"):
        apply_tuning(checkpoint.model, tuning(method="lora"), checkpoint.coord)
    with pytest.raises(ConfigError, match=r"'adamw_8bit', which needs bitsandbytes"):
        build_optimizer(checkpoint.model, optim(optimizer="adamw_8bit"))


def test_adapting_nothing_is_refused():
    with pytest.raises(ValueError, match="adapts nothing"):
        tuning(method="lora", vision="freeze", projector="freeze", language="freeze")


@pytest.mark.parametrize("method", ADAPTERS)
def test_merged_weights_during_training_equal_those_at_its_end(checkpoint: Checkpoint, batch, method: str) -> None:
    """Taking them does not change the model."""
    assert merged_weights(checkpoint.model) is None
    undo = apply_tuning(checkpoint.model, tuning(method=method), checkpoint.coord)
    steps(checkpoint, batch)
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    found = merged_weights(checkpoint.model)
    after = checkpoint.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    undo()
    plain = checkpoint.model.state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], value) for name, value in plain.items())
