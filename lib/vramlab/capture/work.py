"""What a step computes and moves, counted by the meter operation by operation, and the time that no
card can go under.

FLOPs: products and attention, by torch's own formulas; everything element-wise is left out, so they
are a lower bound. Bytes moved: each operation reads its operands and writes its results, as if
nothing stayed in a cache between two operations: what eager kernels ask for, more than DRAM sees.
Compulsory bytes: each storage that outlives the phase in which it is used, once for each phase:
what DRAM has to see, except for what fits into the card's cache. Both are of the device's memory
only. Bus bytes: what copies bring up from the host and take down to it, counted in the smaller of
their two types.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ROWS_ONLY = frozenset({aten.embedding.default, aten.index_select.default, aten.gather.default})
"""Of their first operand they read only the rows that they return."""
NOTHING = frozenset(
    {
        aten._unsafe_view.default,
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.empty_strided.default,
        aten.new_empty_strided.default,
    }
)
IN_LISTS = frozenset(
    {
        aten._fused_adamw_.default,
        aten._fused_adamw_.tensor_lr,
        aten._fused_sgd_.default,
        aten._fused_sgd_.tensor_lr,
    }
)
"""They return nothing: the tensors that they write are among their operands."""

COPIES = frozenset({aten.copy_.default, aten._to_copy.default})
"""Their first result is a copy of their last operand, perhaps on another device."""


@dataclass
class PhaseWork:
    """The work of a phase in a step."""

    flops: Counter = field(default_factory=Counter)
    """dtype of the operands -> floating-point operations, a multiplication and an addition being
    two."""
    moved_bytes: int = 0
    touched: dict[int, int] = field(default_factory=dict)
    """storage on the device -> its bytes, for what operations read or wrote."""
    bus_bytes: Counter = field(default_factory=Counter)
    """"up" (from the host) and "down" (to it) -> bytes."""


class Work:
    """Counts while a meter watches. `phases[step, phase]` is that phase's work."""

    def __init__(self):
        self.phases: dict[tuple[int, str], PhaseWork] = defaultdict(PhaseWork)

    def count(
        self, step: int, phase: str, func, args, outputs, storage_of: Callable[[Tensor], Any]
    ) -> None:
        """Count an operation that has run. `storage_of(tensor)` is the record of the storage in
        which a tensor lies, with its `serial` number and whether it is the `host`'s."""
        if func.is_view or func in NOTHING:
            return
        results = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        # without results, an operation queries something and computes nothing
        if not results and func not in IN_LISTS and func.namespace != "bitsandbytes":
            return
        operands = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        work = self.phases[step, phase]
        for tensor in operands[1:] + 2 * results if func in ROWS_ONLY else operands + results:
            storage, storage_bytes = storage_of(tensor), tensor.untyped_storage().nbytes()
            if not storage.host:
                work.moved_bytes += min(tensor.nbytes, storage_bytes)
                work.touched[storage.serial] = storage_bytes
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None and not storage_of(results[0]).host:
            dtype = str(operands[0].dtype).removeprefix("torch.")
            work.flops[dtype] += flops(*args, out_val=outputs)
        if func in COPIES and storage_of(operands[-1]).host != storage_of(results[0]).host:
            way = "down" if storage_of(results[0]).host else "up"
            work.bus_bytes[way] += min(operands[-1].nbytes, results[0].nbytes)

    def of_step(self, step: int, outlives) -> dict[str, dict]:
        """phase -> {flops {dtype: count}, moved_bytes, compulsory_bytes, bus_bytes {up, down}} of a
        step. `outlives(serial)`: whether a storage lives longer than the phase that made it."""
        return {
            phase: {
                "flops": dict(work.flops),
                "moved_bytes": work.moved_bytes,
                "bus_bytes": dict(work.bus_bytes),
                "compulsory_bytes": sum(
                    size for key, size in work.touched.items() if outlives(key)
                ),
            }
            for (when, phase), work in self.phases.items()
            if when == step
        }


@dataclass(frozen=True)
class Floor:
    """The roofline's floor of a step, in seconds, and its parts. A floor, not an estimate: real
    steps take longer, small ones much longer.

    The phases follow each other, and each takes the longer of computing and moving. Copies over the
    bus may run beside that, up and down at once, and reach from a phase into the next: so the bus
    is compared with the whole step. Not included: the time that the host itself reads, computes and
    writes."""

    compute_s: float
    """All phases' products and attention, at the card's peak rates."""
    memory_s: float
    """All phases' compulsory bytes, at the card's memory bandwidth."""
    device_s: float
    """The longer of the two in each phase, added up."""
    bus_s: float
    """Bytes up from the host, or down to it, whichever are more, at the rate of the card's host
    link in one direction."""

    @property
    def s(self) -> float:
        return max(self.device_s, self.bus_s)

    @property
    def binds(self) -> str:
        """What a faster step would need most: `compute`, `memory` or `bus`."""
        if self.bus_s > self.device_s:
            return "bus"
        return "compute" if self.compute_s >= self.memory_s else "memory"


def roofline(
    work: Mapping[str, Mapping],
    bf16_tflops: float,
    fp32_tflops: float,
    gb_per_s: float,
    host_gb_per_s: float,
) -> Floor:
    """The floor of a step with this `work`, see `Work.of_step`, on a card with these peak rates."""
    peak = {"bfloat16": bf16_tflops, "float16": bf16_tflops, "float32": fp32_tflops}
    compute_s = [
        sum(
            count / (peak.get(dtype, fp32_tflops) * 1e12) for dtype, count in phase["flops"].items()
        )
        for phase in work.values()
    ]
    memory_s = [phase["compulsory_bytes"] / (gb_per_s * 1e9) for phase in work.values()]
    bus_bytes = [
        sum(phase.get("bus_bytes", {}).get(way, 0) for phase in work.values())
        for way in ("up", "down")
    ]
    return Floor(
        sum(compute_s),
        sum(memory_s),
        sum(map(max, compute_s, memory_s)),
        max(bus_bytes) / (host_gb_per_s * 1e9),
    )
