"""Optimizers by name: AdamW, or Muon on the matrices with AdamW on the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from coordexp.config.profile import OptimConfig
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

    def __init__(self, muon: Optimizer, adamw: Optimizer) -> None:
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


def build_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimizer over the trainable parameters.

    Muon takes AdamW's learning rate ("match_rms_adamw"), so one `lr` serves both parts. Weight decay is for Muon's
    matrices and the rows of embedding and head.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    rows = [p for n, p in named if "embed_tokens" in n or "lm_head" in n]
    matrices = []
    if optim.optimizer == "muon":
        matrices = [p for n, p in named if p.ndim == 2 and not any(key in n for key in _NOT_FOR_MUON)]
    chosen = {id(p) for p in [*matrices, *rows]}
    others = [p for _, p in named if id(p) not in chosen]
    groups = [
        {"params": others, "lr": optim.lr, "weight_decay": 0.0},
        {"params": rows, "lr": optim.lr * optim.coord_row_lr_factor, "weight_decay": optim.weight_decay},
    ]
    kind = _eight_bit_adamw() if optim.optimizer == "adamw_8bit" else AdamW
    parts = [kind([group for group in groups if group["params"]], betas=optim.betas)]
    if optim.optimizer == "muon":
        muon = WholeMatrixMuon if is_sharded(model) else Muon
        parts.insert(0, muon(matrices, lr=optim.lr, weight_decay=optim.weight_decay, adjust_lr_fn="match_rms_adamw"))
    if is_sharded(model):
        for part in parts:
            keep_state_whole(part)
    return MuonWithAdamW(*parts) if len(parts) > 1 else parts[0]


def _eight_bit_adamw() -> Callable[..., Optimizer]:
    """AdamW whose moments take one byte each (Dettmers et al., 2110.02861)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer is 'adamw_8bit', which needs bitsandbytes and a GPU: pip install bitsandbytes, or set adamw."
        ) from error
    return AdamW8bit
