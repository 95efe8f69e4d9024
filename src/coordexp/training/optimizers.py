"""Optimizers by name: AdamW, or Muon for the matrices with AdamW for the rest.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalizes the momentum of a hidden matrix by a
Newton-Schulz iteration. The scaling to the update size of AdamW, which lets both share one learning rate, is that of
Moonlight (Liu et al. 2025, arXiv:2502.16982, eq. 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from coordexp.config.profile import OptimConfig
from coordexp.errors import ConfigError
from coordexp.models.adapters import EMBEDDING, HEAD, part_of
from coordexp.training.distributed import is_sharded
from coordexp.training.sharding import WholeMatrixMuon

# Muon's orthogonalized update is meant for hidden matrices only. Rows of an embedding or head are looked up rather than
# multiplied, and biases, norms and convolutions are not matrices.
_NOT_FOR_MUON = (EMBEDDING, HEAD, "pos_embed", "patch_embed", "auxiliary_head")
_LIKE_ADAMW = "match_rms_adamw"
STACK_NUMBERS = 1 << 24  # maximum numbers per stack of matrices: for large matrices stacking only costs memory


class StackedMuon(Muon):
    """torch's Muon with `match_rms_adamw`, on stacks of equally shaped matrices: few batched products, same update."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            for matrices in _stacks([p for p in group["params"] if p.grad is not None]):
                self._update(matrices, group)

    def _update(self, matrices: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        directions = torch.stack([self._direction(matrix, group) for matrix in matrices])
        assert group["adjust_lr_fn"] == _LIKE_ADAMW
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):  # Newton-Schulz, as in torch.optim.Muon
            gram = directions @ directions.mT
            directions = torch.baddbmm(directions, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), directions, beta=a)
        for matrix, direction in zip(matrices, directions, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            # An orthogonal matrix has RMS 1 / sqrt(max(shape)), an update of AdamW about 0.2 (Moonlight, eq. 4).
            rate = group["lr"] * 0.2 * max(matrix.shape) ** 0.5
            matrix.add_(_wide(matrix, direction), alpha=-rate)

    def _direction(self, matrix: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The gradient with Nesterov momentum in bf16, as a wide matrix of norm 1, so that Newton-Schulz converges."""
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = _wide(matrix, gradient.lerp(momentum, group["momentum"]).bfloat16())
        return direction / direction.norm().clamp(min=group["eps"])


def _wide(matrix: Tensor, update: Tensor) -> Tensor:
    """Transpose an update of a tall matrix, so that it has at most as many rows as columns; also the inverse."""
    return update.T if matrix.shape[0] > matrix.shape[1] else update


def _stacks(matrices: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Group matrices of equal shape, up to transposition."""
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for matrix in matrices:
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
    for (rows, columns), alike in by_shape.items():
        most = max(1, STACK_NUMBERS // (rows * columns))
        yield from (alike[first : first + most] for first in range(0, len(alike), most))


class MuonWithAdamW(Optimizer):
    """Two optimizers behind one interface, so that schedulers and checkpoints handle a single one.

    `param_groups` holds the same dictionary objects as the two parts, so a scheduler that sets a learning rate sets it
    in the part.
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
        """Restore both states and share their groups again, because loading replaces the dictionaries."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimizer of the trainable parameters.

    Muon uses AdamW's learning rate, so one `lr` serves both. Each part of the model, and the rows of embedding and
    head, have a factor on it. Weight decay applies to Muon's matrices and to those rows.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rows = [(name, p) for name, p in named if _is_of_rows(name)]
    matrices: list[Named] = []
    if optim.optimizer == "muon":
        matrices = [(name, p) for name, p in named if p.ndim == 2 and not any(key in name for key in _NOT_FOR_MUON)]
    chosen = {name for name, _ in [*matrices, *rows]}
    others = [(name, p) for name, p in named if name not in chosen]
    parts = [_adamw([*_groups(others, optim, 0.0), *_groups(rows, optim, optim.weight_decay)], optim)]
    if optim.optimizer == "muon":
        muon = WholeMatrixMuon if is_sharded(model) else StackedMuon
        parts.insert(0, muon(_groups(matrices, optim, optim.weight_decay), adjust_lr_fn=_LIKE_ADAMW))
    return MuonWithAdamW(*parts) if len(parts) > 1 else parts[0]


Named = tuple[str, nn.Parameter]


def _is_of_rows(name: str) -> bool:
    return EMBEDDING in name or HEAD in name


def _groups(named: Sequence[Named], optim: OptimConfig, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups, one per learning rate."""
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        factor = getattr(optim, f"{'coord_row' if _is_of_rows(name) else part_of(name)}_lr_factor")
        by_factor.setdefault(factor, []).append(parameter)
    return [{"params": p, "lr": optim.lr * f, "weight_decay": weight_decay} for f, p in by_factor.items()]


def _adamw(groups: list[dict[str, Any]], optim: OptimConfig) -> Optimizer:
    if optim.optimizer == "adamw_8bit":
        return _eight_bit_adamw()(groups, betas=optim.betas)
    # On CUDA, torch's default makes a temporary copy of all second moments: 4 bytes per parameter that may not be free.
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    return AdamW(groups, betas=optim.betas, fused=True if on_cuda else None)


def _eight_bit_adamw() -> Callable[..., Optimizer]:
    """AdamW with moments of one byte each (Dettmers et al. 2022, arXiv:2110.02861)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer is 'adamw_8bit', which needs bitsandbytes and a GPU. Run `pip install bitsandbytes`, or set "
            "optimizer: adamw."
        ) from error
    return AdamW8bit
