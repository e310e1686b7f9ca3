"""Axis `place`, values that keep optimizer state, or the embedding table, in host memory.

    host_state   ZeRO-Offload, Ren 2021, arXiv:2101.06840: weights on the device, and a copy of them
                 on the host beside the
                 optimizer's state. A gradient goes down, the rule runs on the host's copy, the new
                   weight comes up. With
                 `until: backward` each gradient leaves when it is formed, and its update runs while
                   backward goes on.
    host_embed   the input embedding table on the host, with its state. A step looks up its tokens'
                 rows there, and their
                 gradients go back there; the device never holds the table.
    fsdp_offload sharding (see `place`), each rank's pieces on its host.

All are exact: the rule does to the same numbers what it would do on the device (fused kernels of
the CPU and of a GPU may round differently in the last digit). Host bytes of host_state, a trained
weight of `b` bytes: b (copy) + b (gradient; with `until: backward` two tensors' at a time) + the
rule's state.
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
from .host_updater import HostUpdater, Together
from .place import Device, Fsdp
from .transfers import Bus


@dataclass(frozen=True)
class HostState(Device):
    """Weights on the device; their copy, the gradients and the optimizer's state on the host, where
    the update runs."""

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
    """y = W[ids], W (V, H) on the host, ids (...) and y (..., H) on the device. backward: dW, or
    the rows `start:stop` of it that `leaf` holds, as torch forms it on a CPU: summed in the order
    of the tokens, nothing for the padding row.
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
            there = torch.empty_like(ids, device="cpu").copy_(ids)
            rows = torch.nn.functional.embedding(there, weight)
        ctx.save_for_backward(there)
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
            # tokens outside take the place of padding, one row past the end, which gets nothing
            local = local.where(inside, ctx.rows)
            dleaf = torch.ops.aten.embedding_dense_backward(
                host, local, ctx.rows + 1, ctx.rows, False
            )[:-1]
        return None, dleaf, None, None, None, None


class HostEmbedding(nn.Module):
    """Stands in for `nn.Embedding`, with the same parameter, on the host. ids (...) -> (..., H) on
    `runs_on`. Reading which tokens there are makes the host wait for the device, once a forward."""

    def __init__(self, table: nn.Embedding, bus: Bus):
        super().__init__()
        self.weight, self.padding_idx, self.bus = table.weight, table.padding_idx, bus

    @property
    def runs_on(self) -> torch.device:
        """Where inputs are expected, which the parameter does not tell."""
        return self.bus.device

    def forward(self, ids: Tensor) -> Tensor:
        return self.look_up(ids, self.weight, 0)

    def look_up(self, ids: Tensor, leaf: Tensor, start: int) -> Tensor:
        """With a gradient to `leaf`, which holds the rows from `start` on."""
        return LookUp.apply(ids, leaf, self.weight.detach(), start, self.padding_idx, self.bus)


TABLE = "embed_tokens.weight"


@dataclass(frozen=True)
class HostEmbed(Device):
    """All on the device but the input embedding table, its gradient and its state, which are on the
    host: 2 V H bytes less in bf16, and as much again for each of the other two where the table
    trains."""

    def on_host(self, name: str) -> bool:
        return name.split("[")[0].endswith(TABLE)

    def move(self, model: nn.Module, device: torch.device) -> nn.Module:
        return move_all_but(model, device, {decoder(model).embed_tokens})

    def shard(
        self, model: nn.Module, device: torch.device, weights: Fp32, observer: Observer
    ) -> set[int]:
        bus, stack = Bus(device, observer), decoder(model)
        stack.embed_tokens = HostEmbedding(stack.embed_tokens, bus)
        own_on_host(stack.embed_tokens, bus, TABLE.removesuffix("weight"))
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
        here = [leaf for name, leaf in leaves.items() if self.on_host(name)]
        there = [leaf for name, leaf in leaves.items() if not self.on_host(name)]
        if not here:
            return until.updater(rule, there, lr)
        on_host = HostUpdater(until, rule, here, lr, decoder(model).embed_tokens.bus, copies=False)
        return Together(until.updater(rule, there, lr), on_host) if there else on_host


@dataclass(frozen=True)
class FsdpOffload(Fsdp):
    """Sharding whose pieces live in host memory, with their gradients and the optimizer's state:
    FSDP2's `CPUOffloadPolicy`. A unit's piece comes up before it is gathered, its reduced gradient
    goes down, and the rule runs on the host.

    On CUDA pieces are page-locked. Norms for clipping are then reduced on the host, which needs a
    process group that can: `init_process_group("cpu:gloo,cuda:nccl")`."""

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
    for module in model.modules():
        if module not in staying:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return model


def own_on_host(module: nn.Module, bus: Bus, prefix: str = "") -> None:
    """The module's parameters, which are on the host, in memory the device can copy from, and
    declared there."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and bus.device.type == "cuda" and not parameter.is_pinned():
                pinned = bus.host_like(parameter.detach()).copy_(parameter.detach())
                owner._parameters[name] = nn.Parameter(pinned, parameter.requires_grad)
    with bus.observer.region("host"):
        bus.observer.own(
            "weights", ((prefix + name, parameter) for name, parameter in module.named_parameters())
        )
