"""FSDP2: parameters sharded by torch's own `fully_shard`, on CPUs as on GPUs.

Accelerate does the same for GPUs only, so the call is made here; processes, devices and precision stay Accelerate's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Shards:
    """A model sharded over all processes, in place: every block on its own, the rest with the model.

    Args:
        model: on `device`.
        blocks: modules of `model` whose weights are whole only while they run.
        optimizer: without state; from here on it holds the shards in place of the parameters.
        device: whose kind decides how the processes communicate.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], optimizer: Optimizer, device: torch.device
    ) -> None:
        self._model, self._optimizer = model, optimizer
        # Nothing here changes a model's output in place, which is what torch warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        before = {id(parameter): name for name, parameter in model.named_parameters()}
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
        shards = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [shards[before[id(parameter)]] for parameter in group["params"]]
        self._names = {id(parameter): name for name, parameter in shards.items()}

    def synchronize(self, wanted: bool) -> None:
        """Whether the next backward passes exchange gradients."""
        self._root().set_requires_gradient_sync(wanted)

    def _root(self) -> FSDPModule:
        assert isinstance(self._model, FSDPModule)
        return self._model

    def _owner(self, name: str) -> FSDPModule:
        """The innermost sharded module around a parameter."""
        path = name.rpartition(".")[0]
        module = self._model.get_submodule(path)
        while not isinstance(module, FSDPModule):  # the whole model is one
            path = path.rpartition(".")[0]
            module = self._model.get_submodule(path)
        return module

    @contextmanager
    def gathered(self, parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """The parameters as whole tensors; meanwhile their modules hold them whole too. Collective."""
        # A parameter that is no shard is whole already: the root's stay so after a forward pass.
        found = [(self._names.get(id(parameter)), parameter) for parameter in parameters]
        owners = {id(owner): owner for name, _ in found if name for owner in [self._owner(name)]}
        for owner in owners.values():
            owner.unshard()
        try:
            yield [self._model.get_parameter(name) if name else parameter for name, parameter in found]
        finally:
            for owner in owners.values():
                owner.reshard()

    def save(self, folder: Path) -> None:
        """Write the shards of model and optimizer with torch's distributed checkpoint. Collective."""
        weights, moments = get_state_dict(self._model, self._optimizer)
        with _plain_errors():
            save({"model": weights, "optimizer": moments}, checkpoint_id=str(folder))

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. Collective."""
        weights, moments = get_state_dict(self._model, self._optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        # The file lacks the moments of parameters that never had a gradient: they begin at zero.
        for value in _tensors(state["optimizer"]["state"]):
            value.zero_()
        # In place for tensors; whatever else there is comes back in the dictionary.
        with _plain_errors():
            load(state, checkpoint_id=str(folder), planner=DefaultLoadPlanner(allow_partial_load=True))
        set_state_dict(
            self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


def shard_frozen(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, offload: bool) -> None:
    """Shard a model that gets no gradients over all processes, in place. Collective.

    Args:
        model: in CPU memory or on `device`; every process has the same weights.
        blocks: modules of `model` whose weights are whole only while they run.
        device: where it computes.
        offload: keep the shards in CPU memory.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    away = offload and device.type != "cpu"
    policy = CPUOffloadPolicy() if away else OffloadPolicy()
    for module in (*blocks, model):
        # Without a backward pass the outermost weights would stay whole.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)


def _tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    for moments in state.values():
        yield from (value for value in moments.values() if isinstance(value, Tensor))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what went wrong on the first process that failed; torch's wrapper of it is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise (first if isinstance(first, Exception) else RuntimeError(str(error))) from error


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole one on every process, any other tensor itself. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
