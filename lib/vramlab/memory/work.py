"""What a step computes and moves, counted operation by operation by the meter, and the time no card can go under.

FLOPs: products and attention, by torch's own formulas; everything element-wise is left out, so they are a lower bound.
Bytes moved: each operation reads its operands and writes its results, as if nothing stayed in a cache between two
operations: what eager kernels ask for, more than what DRAM sees. Compulsory bytes: each storage that outlives the phase it
is used in, once a phase: what DRAM has to see, but for what fits into the card's cache.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ROWS_ONLY = frozenset({aten.embedding.default, aten.index_select.default, aten.gather.default})
"""They read the rows they return of their first operand, not all of it."""
NOTHING = frozenset({aten._unsafe_view.default, aten.empty.memory_format,
                     aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
                     aten.new_empty_strided.default})
IN_LISTS = frozenset({aten._fused_adamw_.default, aten._fused_adamw_.tensor_lr, aten._fused_sgd_.default,
                      aten._fused_sgd_.tensor_lr})
"""They return nothing: what they write is among their operands."""


@dataclass
class PhaseWork:
    """One phase of one step."""

    flops: Counter = field(default_factory=Counter)
    """dtype of the operands -> floating-point operations, a multiplication and an addition being two."""
    moved_bytes: int = 0
    touched: dict[int, int] = field(default_factory=dict)
    """storage -> its bytes, for what operations read or wrote."""


class Work:
    """Counts while a meter watches. `seen[step, phase]` is that phase's work."""

    def __init__(self):
        self.seen: dict[tuple[int, str], PhaseWork] = defaultdict(PhaseWork)

    def saw(self, step: int, phase: str, func, args, outputs, serial_of) -> None:
        """An operation ran; `serial_of(tensor)` names the storage it lies in."""
        if func.is_view or func in NOTHING:
            return
        results = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        if not results and func not in IN_LISTS and func.namespace != "bitsandbytes":  # asks, computes nothing
            return
        here, operands = self.seen[step, phase], [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            here.flops[str(operands[0].dtype).removeprefix("torch.")] += count(*args, out_val=outputs)
        if func in ROWS_ONLY:
            operands = operands[1:] + results
        for tensor in (*operands, *results):
            storage_bytes = tensor.untyped_storage().nbytes()
            here.moved_bytes += min(tensor.nbytes, storage_bytes)
            here.touched[serial_of(tensor)] = storage_bytes

    def of_step(self, step: int, outlives) -> dict[str, dict]:
        """phase -> {flops {dtype: count}, moved_bytes, compulsory_bytes} of one step; `outlives(storage)` says whether a
        storage lives longer than the phase that made it."""
        return {phase: {"flops": dict(work.flops), "moved_bytes": work.moved_bytes,
                        "compulsory_bytes": sum(size for key, size in work.touched.items() if outlives(key))}
                for (when, phase), work in self.seen.items() if when == step}


def floor_s(work: Mapping[str, Mapping], bf16_tflops: float, fp32_tflops: float, gb_per_s: float) -> float:
    """The roofline's floor of a step, in seconds: in each phase the longer of computing and moving, neither of which can be
    faster than the card's peak. A floor, not an estimate: real steps take longer, small ones much longer."""
    peak = {"bfloat16": bf16_tflops, "float16": bf16_tflops, "float32": fp32_tflops}
    total = 0.0
    for phase in work.values():
        computing = sum(count / (peak.get(dtype, fp32_tflops) * 1e12) for dtype, count in phase["flops"].items())
        total += max(computing, phase["compulsory_bytes"] / (gb_per_s * 1e9))
    return total
