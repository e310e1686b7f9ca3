"""Axis `place`, values that keep optimizer state, or the embedding table, in host memory.

    host_state    ZeRO-Offload, Ren 2021, arXiv:2101.06840: weights on the device, and a copy of
                  them on the host beside the optimizer state. A gradient goes down, the rule runs
                  on the host's copy, and the new weight comes up. With `until: backward` each
                  gradient leaves when it is formed, and is used while backward goes on.
    host_embed    The input embedding table on the host, with its state. A step looks up the rows of
                  its tokens there, and their gradients go back there; the device never holds the
                  table.
    fsdp_offload  Sharding (see `place`), with each rank's pieces on its host.

All are exact: the rule computes the same as on the device (fused kernels of the CPU and of a GPU
may round the last digit differently). Host bytes of host_state for a trained weight of `b` bytes:
b (copy) + b (gradient; with `until: backward` those of two tensors at a time) + the rule's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from ...baichuan.model import decoder
from ...observer import Observer
from ..until.until import Updater
from ..weights.types import Fp32
from .host_updater import HostUpdater, SplitUpdater
from .place import Device, Fsdp
from .transfers import Bus


@dataclass(frozen=True)
class HostState(Device):
    """Weights on the device; a copy of them, the gradients and the optimizer state on the host,
    where the update runs."""

    def on_host(self, name: str) -> bool:
        return True

    def host_copy_bytes(self, leaf: Tensor) -> int:
        return leaf.nbytes

    def updater(
        self,
        until: Any,
        rule: Any,
        leaves: Mapping[str, nn.Parameter],
        lr: float,
        model: nn.Module,
        observer: Observer,
    ) -> Updater:
        params = list(leaves.values())
        return HostUpdater(until, rule, params, lr, Bus(params[0].device, observer), copies=True)


class LookUp(torch.autograd.Function):
    """y = W[ids], with W (V, H) on the host, and ids (...) and y (..., H) on the device. backward:
    dW, or its rows from `start` on that `leaf` holds, as torch forms it on a CPU: summed in the
    order of the tokens, with nothing for the padding row.
    """

    @staticmethod
    def forward(
        ctx,
        ids: Tensor,
        leaf: Tensor,
        weight: Tensor,
        start: int,
        padding_idx: int | None,
        bus: Bus,
    ) -> Tensor:
        with bus.observer.region("host"):
            host_ids = torch.empty_like(ids, device="cpu").copy_(ids)
            rows = torch.nn.functional.embedding(host_ids, weight)
        ctx.save_for_backward(host_ids)
        ctx.rows, ctx.start, ctx.padding_idx, ctx.bus = leaf.shape[0], start, padding_idx, bus
        return bus.fetch(rows)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (ids,) = ctx.saved_tensors
        host, arrived = ctx.bus.down(dy.contiguous())
        arrived.synchronize()
        with ctx.bus.observer.region("host"):
            local = ids - ctx.start
            inside = (local >= 0) & (local < ctx.rows)
            if ctx.padding_idx is not None:
                inside &= ids != ctx.padding_idx
            # tokens outside go to a spare row past the end, which torch leaves out as padding
            local = local.where(inside, ctx.rows)
            dleaf = torch.ops.aten.embedding_dense_backward(
                host, local, ctx.rows + 1, ctx.rows, False
            )[:-1]
        return None, dleaf, None, None, None, None


class HostEmbedding(nn.Module):
    """Replaces an `nn.Embedding`, with the same parameter, on the host. ids (...) -> (..., H) on
    `runs_on`. Reading the ids makes the host wait for the device, once in each forward."""

    def __init__(self, table: nn.Embedding, bus: Bus):
        super().__init__()
        self.weight, self.padding_idx, self.bus = table.weight, table.padding_idx, bus

    @property
    def runs_on(self) -> torch.device:
        """The device of inputs and outputs, which is not that of the parameter."""
        return self.bus.device

    def forward(self, ids: Tensor) -> Tensor:
        return self.look_up(ids, self.weight, 0)

    def look_up(self, ids: Tensor, leaf: Tensor, start: int) -> Tensor:
        """Look up ids; the gradient goes to `leaf`, which holds the rows from `start` on."""
        return LookUp.apply(ids, leaf, self.weight.detach(), start, self.padding_idx, self.bus)


TABLE = "embed_tokens.weight"


@dataclass(frozen=True)
class HostEmbed(Device):
    """The input embedding table is on the host, and so are its gradient and its state; everything
    else is on the device. In bf16 that saves 2 V H bytes, and if the table trains, as many for its
    gradient, and those of its state."""

    def on_host(self, name: str) -> bool:
        return name.split("[")[0].endswith(TABLE)

    def move(self, model: nn.Module, device: torch.device) -> nn.Module:
        return move_all_but(model, device, {decoder(model).embed_tokens})

    def shard(
        self, model: nn.Module, device: torch.device, weights: Fp32, observer: Observer
    ) -> set[int]:
        bus, stack = Bus(device, observer), decoder(model)
        stack.embed_tokens = HostEmbedding(stack.embed_tokens, bus)
        own_on_host(stack.embed_tokens, bus, TABLE.removesuffix(".weight"))
        return super().shard(model, device, weights, observer)

    def updater(
        self,
        until: Any,
        rule: Any,
        leaves: Mapping[str, nn.Parameter],
        lr: float,
        model: nn.Module,
        observer: Observer,
    ) -> Updater:
        table = [leaf for name, leaf in leaves.items() if self.on_host(name)]
        others = [leaf for name, leaf in leaves.items() if not self.on_host(name)]
        if not table:
            return until.updater(rule, others, lr)
        on_host = HostUpdater(until, rule, table, lr, decoder(model).embed_tokens.bus, copies=False)
        return SplitUpdater(until.updater(rule, others, lr), on_host) if others else on_host


@dataclass(frozen=True)
class FsdpOffload(Fsdp):
    """Sharding with the pieces in host memory, and with them their gradients and optimizer state:
    FSDP2's `CPUOffloadPolicy`. The piece of a unit comes up before it is gathered, its reduced
    gradient goes down, and the rule runs on the host.

    On CUDA pieces are page-locked. Norms for clipping are then reduced on the host, which needs a
    process group that can do it: `init_process_group("cpu:gloo,cuda:nccl")`."""

    pieces_on: ClassVar[str] = "host"

    def on_host(self, name: str) -> bool:
        return True

    def _offload_policy(self, device: torch.device) -> OffloadPolicy:
        return CPUOffloadPolicy(pin_memory=device.type == "cuda")

    def updater(
        self,
        until: Any,
        rule: Any,
        leaves: Mapping[str, nn.Parameter],
        lr: float,
        model: nn.Module,
        observer: Observer,
    ) -> Updater:
        params = list(leaves.values())
        device = torch.device(params[0].device_mesh.device_type)
        return HostUpdater(until, rule, params, lr, Bus(device, observer), copies=False)


def move_all_but(model: nn.Module, device: torch.device, staying: set[nn.Module]) -> nn.Module:
    """Move the tensors of all modules except those `staying` to the device."""
    for module in model.modules():
        if module not in staying:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return model


def own_on_host(module: nn.Module, bus: Bus, prefix: str = "") -> None:
    """Declare the module's parameters, which are on the host, as weights there. For CUDA they move
    to page-locked memory."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and bus.device.type == "cuda" and not parameter.is_pinned():
                pinned = bus.host_like(parameter.detach()).copy_(parameter.detach())
                owner._parameters[name] = nn.Parameter(pinned, parameter.requires_grad)
    with bus.observer.region("host"):
        bus.observer.own("weights", module.named_parameters(prefix=prefix))
