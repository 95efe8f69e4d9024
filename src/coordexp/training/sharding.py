"""Weights, gradients and optimizer state spread over the processes of a run (FSDP2; Zhao et al., 2304.11277).

Each process keeps its rows of every tensor. A layer is gathered when its forward or backward needs it and let go of
afterwards; its gradients are summed, not averaged, into the process that keeps the rows, because every loss is already
divided by the counts of the whole step. Embedding, head and whatever else is no layer stay gathered from the forward of
a micro-batch to the end of its backward: the head is read outside of the model's own forward (`in_forward`).

The checkpoint is that of one process (`whole_weights`). Of a resume state every process writes and reads its own rows
(training/state_files.py), so a run goes on with another number of processes, sharded or not. torch's own
torch.distributed.checkpoint does not serve here: its metadata are a pickle, nothing in its files is hashed, and its
helpers gather tied weights twice and take an optimizer step in order to have a state that they can read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Muon
from transformers import Qwen3VLForConditionalGeneration

from coordexp.models.adapters import merged_weights
from coordexp.training.distributed import COMPUTE, Made, is_sharded, world
from coordexp.training.state_files import Rows


def will_shard(sharding: str) -> bool:
    """Whether `launch.sharding` has any effect: one process has nobody to share with."""
    return sharding == "fsdp2" and world().size > 1


def shard_model(model: Qwen3VLForConditionalGeneration, precision: str) -> None:
    """Keep this process's rows of every weight, in place and on its device; what is frozen must be so already.

    The whole model is moved to the device layer by layer, so that only the rest must fit there whole. Under `bf16` a
    layer is gathered in bfloat16, in which autocast would compute with it anyway: half of what is sent. Sums of
    gradients are float32. What is no layer (embedding, head, mergers) is gathered as it is: its outputs stay float32.
    """
    mesh = _mesh()
    gathered = torch.bfloat16 if precision == "bf16" else torch.float32
    of_layers = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.model.language_model.layers, *model.model.visual.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy() if part is model else of_layers)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum

    def compute(wanted: Callable[[], Made]) -> Made:
        return wanted()

    setattr(model, COMPUTE, compute)
    register_fsdp_forward_method(model, COMPUTE)


def _mesh() -> DeviceMesh:
    """All processes in one row; on several nodes, each node keeps all rows, spread over its own processes.

    Gathers then stay within a node, and only sums of gradients go between them (HSDP).
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world().size))
    if local == world().size:
        return init_device_mesh(world().device.type, (world().size,))
    return init_device_mesh(
        world().device.type, (world().size // local, local), mesh_dim_names=("nodes", "processes of a node")
    )


def plain_weights(model: Qwen3VLForConditionalGeneration) -> dict[str, Tensor] | None:
    """What of a model in training a checkpoint holds by name, where the model itself does not hold it as plain weights.

    A collective call; what the main process gets counts.
    """
    if is_sharded(model):
        return whole_weights(model)
    return merged_weights(model) if world().is_main else None


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


def held_rows(tensor: Tensor) -> Rows | None:
    """What this process writes of a tensor: its own rows, or all of one that every process holds if it is the main one.

    None if another process writes them, or there are none.
    """
    if not isinstance(tensor, DTensor):
        return Rows(tensor, 0, tuple(tensor.shape)) if world().is_main else None
    first, count = own_rows(tensor)
    is_copy = any(tensor.device_mesh.get_local_rank(dim) for dim in _copied(tensor))
    return Rows(tensor.to_local(), first, tuple(tensor.shape)) if count and not is_copy else None


def own_rows(tensor: DTensor) -> tuple[int, int]:
    """The first row that this process keeps of a tensor, and how many: equal parts but for the last."""
    (sharded,) = (dim for dim in range(tensor.device_mesh.ndim) if dim not in _copied(tensor))
    chunk = -(-tensor.shape[0] // tensor.device_mesh.size(sharded))
    first = min(tensor.shape[0], chunk * tensor.device_mesh.get_local_rank(sharded))
    count = min(chunk, tensor.shape[0] - first)
    assert count == len(tensor.to_local())
    return first, count


def from_own_rows(rows: Tensor, like: DTensor) -> DTensor:
    """A tensor that is spread as another one of its shape, of the rows that this process keeps."""
    return DTensor.from_local(
        rows.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def _copied(tensor: DTensor) -> list[int]:
    """Dimensions of the mesh along which all processes hold the same."""
    return [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]


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
