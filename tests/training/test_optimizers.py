"""Optimizers by name: what each part gets, learning rates that reach both parts, and state that round-trips."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from coordexp.models.adapters import part_of
from coordexp.training import optimizers
from coordexp.training.optimizers import MuonWithAdamW, StackedMuon, build_optimizer
from helpers import new_checkpoint, optim

NAMES = ("adamw", "muon")


class Small(nn.Module):
    """One of each kind: rows, a matrix, a norm, a bias, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(10, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.patch_embed = nn.Conv1d(8, 8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.hidden(self.embed_tokens(ids)))
        return self.patch_embed(x.mT).square().mean()


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        ids = torch.randint(0, 10, (4, 3), generator=torch.Generator().manual_seed(step))
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name):
    model = Small()
    optimizer = build_optimizer(model, optim(optimizer=name))
    ids = torch.arange(10)[None]
    before = float(model(ids).detach())
    take_steps(model, optimizer, 0, 30)
    assert float(model(ids).detach()) < 0.7 * before


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trips(name, tmp_path):
    """Stopped after 3 of 6 steps, saved, loaded into new objects: the same weights as without the stop."""
    block = optim(optimizer=name, weight_decay=0.1, coord_row_lr_factor=2.0)
    straight = Small()
    take_steps(straight, build_optimizer(straight, block), 0, 6)
    first = Small()
    optimizer = build_optimizer(first, block)
    take_steps(first, optimizer, 0, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = copy.deepcopy(first)
    restored = build_optimizer(second, block)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    take_steps(second, restored, 3, 6)
    assert torch.equal(flat(second), flat(straight))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reloaded", [False, True])
def test_a_learning_rate_reaches_every_parameter(name, reloaded):
    model = Small()
    optimizer = build_optimizer(model, optim(optimizer=name))
    take_steps(model, optimizer, 0, 1)
    if reloaded:
        optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = flat(model)
    take_steps(model, optimizer, 1, 3)
    assert torch.equal(flat(model), before)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    take_steps(model, optimizer, 3, 4)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p.flatten(), _part(before, model, p))]
    assert moved == [name for name, _ in model.named_parameters()]


def _part(flat_before: torch.Tensor, model: nn.Module, wanted: nn.Parameter) -> torch.Tensor:
    start = 0
    for p in model.parameters():
        if p is wanted:
            return flat_before[start : start + p.numel()]
        start += p.numel()
    raise AssertionError


def test_muon_takes_hidden_matrices_only():
    model = new_checkpoint().model
    optimizer = build_optimizer(model, optim(optimizer="muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    muon, adamw = optimizer.parts
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    name_of = {id(p): name for name, p in model.named_parameters()}
    by_muon = {name_of[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adamw = {name_of[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert by_muon.isdisjoint(by_adamw)
    assert by_muon | by_adamw == set(name_of.values())
    assert "model.language_model.layers.0.mlp.gate_proj.weight" in by_muon
    assert not {name for name in by_muon if "embed" in name or "lm_head" in name or name.endswith("bias")}
    assert "model.language_model.embed_tokens.weight" in by_adamw


@pytest.mark.parametrize("name", NAMES)
def test_embedding_rows_have_their_own_rate_and_only_they_decay_in_adamw(name):
    model = Small()
    optimizer = build_optimizer(
        model, optim(optimizer=name, weight_decay=0.1, coord_row_lr_factor=3.0, betas=(0.8, 0.9))
    )
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rows, bias = group_of[id(model.embed_tokens.weight)], group_of[id(model.hidden.bias)]
    assert (rows["lr"], rows["weight_decay"], rows["betas"]) == (pytest.approx(0.03), 0.1, (0.8, 0.9))
    assert (bias["lr"], bias["weight_decay"], bias["betas"]) == (0.01, 0.0, (0.8, 0.9))


def test_frozen_parameters_are_not_optimized():
    model = Small()
    model.embed_tokens.weight.requires_grad_(False)
    for name in NAMES:
        params = [p for group in build_optimizer(model, optim(optimizer=name)).param_groups for p in group["params"]]
        assert len(params) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("stack_numbers", [1, 3 * 128 * 384, 1 << 24])
def test_stacking_does_not_change_muon(stack_numbers, monkeypatch):
    """Every shape of the tiny model, several steps, two groups, one matrix without a gradient."""
    monkeypatch.setattr(optimizers, "STACK_NUMBERS", stack_numbers)
    found = {}
    for kind in (Muon, StackedMuon):
        matrices = [p for n, p in new_checkpoint().model.named_parameters() if p.ndim == 2 and "embed" not in n]
        groups = [{"params": matrices[:9], "lr": 2e-3}, {"params": matrices[9:], "weight_decay": 0.3}]
        muon = kind(groups, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for matrix in matrices[1:]:
                matrix.grad = torch.randn(matrix.shape, generator=generator)
            muon.step()
        found[kind] = [p.detach() for p in matrices], muon.state_dict()
    (exact, state), (stacked, stacked_state) = found.values()
    for expected, weights in zip(exact, stacked, strict=True):
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)  # one step moves a number by about 3e-4
    assert state["param_groups"] == stacked_state["param_groups"]
    assert state["state"].keys() == stacked_state["state"].keys()
    for i, entry in state["state"].items():
        assert torch.equal(entry["momentum_buffer"], stacked_state["state"][i]["momentum_buffer"])


@pytest.mark.parametrize("name", NAMES)
def test_each_part_has_its_own_rate(name):
    model = new_checkpoint().model
    factors = {"vision": 0.1, "projector": 0.5, "language": 2.0, "coord_row": 7.0}
    optimizer = build_optimizer(model, optim(optimizer=name, **{f"{part}_lr_factor": f for part, f in factors.items()}))
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        part = "coord_row" if "embed_tokens" in parameter_name else part_of(parameter_name)
        assert rate_of[id(parameter)] == pytest.approx(0.01 * factors[part])


@pytest.mark.parametrize("name", NAMES)
def test_equal_rates_make_no_more_groups_than_kinds(name):
    """So that a profile which states no factor steps as it always did."""
    groups = build_optimizer(new_checkpoint().model, optim(optimizer=name, coord_row_lr_factor=2.0)).param_groups
    assert [group["lr"] for group in groups] == [0.01] * (len(groups) - 1) + [0.02]
    assert len(groups) == (3 if name == "muon" else 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_adamw_is_fused_on_cuda_alone(device):
    optimizer = build_optimizer(Small().to(device), optim())
    assert bool(optimizer.defaults["fused"]) == (device == "cuda")
