"""Weights, gradients and optimizer state sharded over the processes of a run (FSDP2; Zhao et al., arXiv:2304.11277).

Each process keeps its rows of every tensor. A layer is gathered for its forward and its backward and released
afterwards. Its gradients are summed, not averaged, into the process that keeps the rows, because every loss is already
divided by the counts of the whole step. Embedding, head and other parts outside the layers stay gathered from the
forward of a micro-batch to the end of its backward, because the head is used outside the model's own forward
(`in_forward`).

The checkpoint has the format of an unsharded run (`whole_weights`). In a resume state every process writes and reads
its own rows (training/state_files.py), so a run can resume with another number of processes, sharded or not.
torch.distributed.checkpoint is not used: its metadata are a pickle, its files are not hashed, and its helpers gather
tied weights twice and take an optimizer step to obtain a state that they can load into.
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
    """Whether `launch.sharding` has any effect: a single process is never sharded."""
    return sharding == "fsdp2" and world().size > 1


def shard_model(model: Qwen3VLForConditionalGeneration, precision: str) -> None:
    """Shard the model in place: keep this process's rows of every weight, on its device. Freeze weights before.

    The model moves to the device layer by layer, so only the parts outside the layers must fit there whole. With
    `bf16`, a layer is gathered in bfloat16, the dtype in which autocast computes anyway, which halves the traffic.
    Gradients are summed in float32. Parts outside the layers (embedding, head, mergers) are gathered in their own
    dtype, so that their outputs stay float32.
    """
    mesh = _mesh()
    gathered = torch.bfloat16 if precision == "bf16" else torch.float32
    of_layers = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.model.language_model.layers, *model.model.visual.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy() if part is model else of_layers)
        # FSDP averages gradients by default. The losses are already divided by the counts of all processes.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo does not implement the scaled sum

    def compute(wanted: Callable[[], Made]) -> Made:
        return wanted()

    setattr(model, COMPUTE, compute)
    register_fsdp_forward_method(model, COMPUTE)


def _mesh() -> DeviceMesh:
    """One dimension for a single node; on several nodes, each node keeps all rows, sharded over its own processes.

    Weights are then gathered within a node, and only sums of gradients cross nodes (HSDP).
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world().size))
    if local == world().size:
        return init_device_mesh(world().device.type, (world().size,))
    return init_device_mesh(
        world().device.type, (world().size // local, local), mesh_dim_names=("nodes", "processes of a node")
    )


def plain_weights(model: Qwen3VLForConditionalGeneration) -> dict[str, Tensor] | None:
    """The weights of a checkpoint by name, if the model is sharded or has adapters; None if it holds plain weights.

    A collective call; only the result in the main process is meaningful.
    """
    if is_sharded(model):
        return whole_weights(model)
    return merged_weights(model) if world().is_main else None


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded state of a sharded model, on the CPU; a collective call.

    Only the main process receives it; the others get an empty dictionary. Tied weights are one tensor with two names.
    """
    gathered: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in gathered:
            gathered[id(value)] = _whole(value.detach())
        weights[name] = gathered[id(value)]
    return weights if world().is_main else {}


def held_rows(tensor: Tensor) -> Rows | None:
    """The rows of a tensor that this process writes: its own, or, in the main process, all of a replicated tensor.

    None if another process writes them, or if there are none.
    """
    if not isinstance(tensor, DTensor):
        return Rows(tensor, 0, tuple(tensor.shape)) if world().is_main else None
    first, count = own_rows(tensor)
    is_copy = any(tensor.device_mesh.get_local_rank(dim) for dim in _copied(tensor))
    return Rows(tensor.to_local(), first, tuple(tensor.shape)) if count and not is_copy else None


def own_rows(tensor: DTensor) -> tuple[int, int]:
    """The first row of a tensor that this process keeps, and the number of rows; all parts but the last are equal."""
    (sharded,) = (dim for dim in range(tensor.device_mesh.ndim) if dim not in _copied(tensor))
    chunk = -(-tensor.shape[0] // tensor.device_mesh.size(sharded))
    first = min(tensor.shape[0], chunk * tensor.device_mesh.get_local_rank(sharded))
    count = min(chunk, tensor.shape[0] - first)
    assert count == len(tensor.to_local())
    return first, count


def from_own_rows(rows: Tensor, like: DTensor) -> DTensor:
    """A sharded tensor from this process's rows, laid out like another one of the same shape."""
    return DTensor.from_local(
        rows.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def _copied(tensor: DTensor) -> list[int]:
    """Dimensions of the mesh along which the tensor is replicated."""
    return [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]


def _whole(value: Tensor) -> Tensor:
    """The whole tensor on the CPU, in the main process; the others take part in the collective and keep nothing."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.cpu() if world().is_main else torch.empty(0)


def _rows(whole: Tensor, like: Tensor) -> Tensor:
    """This process's rows; all processes hold the same whole tensor, so there is no communication."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class WholeMatrixMuon(Muon):
    """Muon for sharded matrices. The orthogonalization needs the whole matrix, which is gathered, updated and split.

    Every process computes every update. One matrix is gathered at a time, which takes three times its size.
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
