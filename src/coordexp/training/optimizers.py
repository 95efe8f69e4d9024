"""Optimizers by name: AdamW, or Muon on the matrices with AdamW on the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from coordexp.errors import ConfigError
from coordexp.training.distributed import is_sharded
from coordexp.training.sharding import WholeMatrixMuon, keep_state_whole

# Rows of an embedding or head are looked up, not multiplied, and biases, norms and convolutions are no matrices:
# Muon's orthogonalised update is meant for hidden matrices only.
_NOT_FOR_MUON = ("embed_tokens", "lm_head", "pos_embed", "patch_embed", "localiser")


class MuonWithAdamW(Optimizer):
    """Two optimizers behind one interface, so that schedulers and checkpoints see a single one.

    `param_groups` are the very dictionaries of the two: a scheduler that writes a learning rate writes it there.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([{"params": list(g["params"])} for part in self.parts for g in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of both parts; closures are not supported."""
        assert closure is None
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of both parts."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both states, under `parts`."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both states and share their groups again (loading replaces the group dictionaries)."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, row_lr_factor: float = 1.0
) -> Optimizer:
    """The optimizer of that name over the trainable parameters.

    `row_lr_factor` scales the learning rate of embedding and head rows: new rows start far from where they belong.
    Muon takes AdamW's learning rate ("match_rms_adamw"), so one `lr` serves both parts.
    """
    optimizer = _build(model, name, lr, weight_decay, row_lr_factor)
    if is_sharded(model):
        for part in optimizer.parts if isinstance(optimizer, MuonWithAdamW) else (optimizer,):
            keep_state_whole(part)
    return optimizer


def _build(model: nn.Module, name: str, lr: float, weight_decay: float, row_lr_factor: float) -> Optimizer:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    rows = [p for n, p in named if "embed_tokens" in n or "lm_head" in n]
    if name == "adamw":
        others = [p for n, p in named if not ("embed_tokens" in n or "lm_head" in n)]
        return AdamW(_adam_groups(others, rows, lr, weight_decay, row_lr_factor), betas=(0.9, 0.95))
    if name == "adamw_8bit":
        others = [p for n, p in named if not ("embed_tokens" in n or "lm_head" in n)]
        groups = _adam_groups(others, rows, lr, weight_decay, row_lr_factor)
        return _eight_bit_adamw()(groups, betas=(0.9, 0.95))
    if name == "muon":
        matrices = [p for n, p in named if p.ndim == 2 and not any(key in n for key in _NOT_FOR_MUON)]
        chosen = {id(p) for p in [*matrices, *rows]}
        others = [p for _, p in named if id(p) not in chosen]
        kind = WholeMatrixMuon if is_sharded(model) else Muon
        muon = kind(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return MuonWithAdamW(
            muon, AdamW(_adam_groups(others, rows, lr, weight_decay, row_lr_factor), betas=(0.9, 0.95))
        )
    raise ConfigError(f"optimizer is {name!r}, expected 'muon', 'adamw' or 'adamw_8bit'.")


def _eight_bit_adamw() -> Callable[..., Optimizer]:
    """AdamW whose moments take one byte each (Dettmers et al., 2110.02861)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer is 'adamw_8bit', which needs bitsandbytes and a GPU: pip install bitsandbytes, or set adamw."
        ) from error
    return AdamW8bit


def _adam_groups(
    others: list[nn.Parameter], rows: list[nn.Parameter], lr: float, weight_decay: float, row_lr_factor: float
) -> list[dict[str, Any]]:
    groups = [
        {"params": others, "lr": lr, "weight_decay": 0.0},
        {"params": rows, "lr": lr * row_lr_factor, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
