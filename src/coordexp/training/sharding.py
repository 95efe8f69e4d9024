"""Weights, gradients and optimizer state spread over the processes of a run (FSDP2; Zhao et al., 2304.11277).

Each process keeps its rows of every tensor. A layer is gathered when its forward or backward needs it and let go of
afterwards; its gradients are summed, not averaged, into the process that keeps the rows, because every loss is already
divided by the counts of the whole step. Embedding, head and whatever else is no layer stay gathered from the forward of
a micro-batch to the end of its backward: the head is read outside of the model's own forward (`in_forward`).

What is on disk is that of one process: `whole_weights` and `keep_state_whole` gather, `own_rows` cuts again. So a run
resumes with another number of processes, sharded or not. The helpers of torch.distributed.checkpoint do not serve here:
they gather tied weights twice, as two tensors, and take an optimizer step in order to have a state that they can read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Muon, Optimizer
from transformers import Qwen3VLForConditionalGeneration

from coordexp.training.distributed import COMPUTE, Made, world


def will_shard(sharding: str) -> bool:
    """Whether `launch.sharding` has any effect: one process has nobody to share with."""
    return sharding == "fsdp2" and world().size > 1


def shard_model(model: Qwen3VLForConditionalGeneration) -> None:
    """Keep this process's rows of every weight, in place and on its device; what is frozen must be so already.

    The whole model is moved to the device layer by layer, so that only the rest must fit there whole.
    """
    mesh = init_device_mesh(world().device.type, (world().size,))
    for part in (*model.model.language_model.layers, *model.model.visual.blocks, model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum

    def compute(wanted: Callable[[], Made]) -> Made:
        return wanted()

    setattr(model, COMPUTE, compute)
    register_fsdp_forward_method(model, COMPUTE)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded model as one process would have it, on the CPU; a collective call.

    Only the main process is given it, the others get an empty dictionary. Tied weights are one tensor under two names.
    """
    gathered: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in gathered:
            gathered[id(value)] = _whole(value.detach())
        weights[name] = gathered[id(value)]
    return weights if world().is_main else {}


def own_rows(like: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of whole tensors, what this process keeps: as those of the same name in `like` are spread."""
    return {name: _rows(value, like[name]) for name, value in weights.items()}


def keep_state_whole(optimizer: Optimizer) -> None:
    """Let `state_dict` give, and `load_state_dict` take, the state of one process; both become collective calls.

    Only the main process is given the numbers.
    """
    optimizer.register_state_dict_post_hook(_gather_state)
    optimizer.register_load_state_dict_pre_hook(_spread_state)


def _gather_state(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        index: {name: _whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    return state_dict | {"state": state}


def _spread_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            # Moments have the shape of their parameter; a step counter has none.
            name: _rows(value, parameters[index]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in entry.items()
        }
        for index, entry in state_dict["state"].items()
    }
    return state_dict | {"state": state}


def _whole(value: Tensor) -> Tensor:
    """The whole tensor on the CPU of the main process; the others take part and keep nothing."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.cpu() if world().is_main else torch.empty(0)


def _rows(whole: Tensor, like: Tensor) -> Tensor:
    """This process's rows; all processes hold the same whole tensor, so nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class WholeMatrixMuon(Muon):
    """Muon on sharded matrices: its update is made of the whole matrix, so each is gathered, updated and cut again.

    Every process computes every update. What is gathered is one matrix at a time, three times its size.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for rows in group["params"]:
                if rows.grad is not None:
                    self._update(rows, settings)

    def _update(self, rows: nn.Parameter, settings: dict[str, Any]) -> None:
        gradient = rows.grad
        assert isinstance(rows, DTensor)
        assert isinstance(gradient, DTensor)
        matrix = nn.Parameter(rows.full_tensor())
        matrix.grad = gradient.full_tensor()
        muon = Muon([matrix], **settings)
        if momentum := self.state[rows]:
            muon.state[matrix]["momentum_buffer"] = momentum["momentum_buffer"].full_tensor()
        muon.step()
        rows.copy_(_rows(matrix, rows))
        self.state[rows]["momentum_buffer"] = _rows(muon.state[matrix]["momentum_buffer"], rows)
