"""Work by value: FLOPs by torch's formulas, bytes as each operation reads and writes them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vramlab.capture.work import PhaseWork, Work

aten = torch.ops.aten


def counted(func, *args) -> PhaseWork:
    """What one operation is counted as; a storage is named by its address."""
    work = Work()
    out = func(*args)
    work.count(
        3, "forward", func, args, out, lambda tensor: storage(tensor.untyped_storage().data_ptr())
    )
    return work.phases.get((3, "forward"), PhaseWork())


def storage(serial, host=False):
    return SimpleNamespace(serial=serial, host=host)


A, B, C = torch.ones(2, 3), torch.ones(3, 5), torch.ones(2, 5)
HALF = torch.ones(4, 4, dtype=torch.bfloat16)
TABLE, IDS = torch.ones(100, 8), torch.tensor([3, 1, 4])


@pytest.mark.parametrize(
    ("func", "args", "flops", "moved", "touched"),
    [
        (aten.mm.default, (A, B), {"float32": 2 * 2 * 3 * 5}, 4 * (6 + 15 + 10), 4 * (6 + 15 + 10)),
        (
            aten.addmm.default,
            (C, A, B),
            {"float32": 60},
            4 * (10 + 6 + 15 + 10),
            4 * (10 + 6 + 15 + 10),
        ),
        (
            aten.mm.default,
            (HALF, HALF),
            {"bfloat16": 2 * 4**3},
            2 * 3 * 16,
            2 * 2 * 16,
        ),  # one operand twice: read twice, one storage
        (aten.add.Tensor, (A, A), {}, 4 * 3 * 6, 4 * 2 * 6),
        (
            aten.embedding.default,
            (TABLE, IDS),
            {},
            8 * 3 + 2 * 4 * 3 * 8,
            8 * 3 + 4 * 3 * 8,
        ),  # the rows it returns, read and written
        (
            aten.add.Tensor,
            (TABLE[:2], 1.0),
            {},
            2 * 4 * 16,
            4 * 800 + 4 * 16,
        ),  # reads a part, touches a whole storage
        (
            aten.add.Tensor,
            (A[:1].expand(50, 3), 1.0),
            {},
            24 + 600,
            24 + 600,
        ),  # no more than the storage holds
        (aten.t.default, (A,), {}, 0, 0),
        (aten.empty_like.default, (A,), {}, 0, 0),
        (aten._local_scalar_dense.default, (A[0, 0],), {}, 0, 0),
    ],
)
def test_an_operation_by_hand(func, args, flops, moved, touched):
    found = counted(func, *args)
    assert (dict(found.flops), found.moved_bytes, sum(found.touched.values())) == (
        flops,
        moved,
        touched,
    )


def test_an_update_in_lists_returns_nothing_and_moves_its_operands():
    lists = [[torch.ones(7)] for _ in range(4)]
    found = Work()
    args = (*lists, [], [torch.tensor(1.0)])
    found.count(
        0, "update", aten._fused_adamw_.default, args, None, lambda tensor: storage(id(tensor))
    )
    assert found.phases[0, "update"].moved_bytes == 4 * 4 * 7 + 4


def test_compulsory_bytes_are_of_storages_that_outlive_their_phase_in_that_step_only():
    work = Work()
    for step, phase, size in ((1, "forward", 4), (1, "update", 2), (2, "forward", 9)):
        value = torch.ones(size)
        names = {id(value): "kept", id(result := value + 1): "gone"}
        work.count(
            step,
            phase,
            aten.add.Tensor,
            (value, 1.0),
            result,
            lambda tensor, names=names: storage(names[id(tensor)]),
        )
    found = work.of_step(1, lambda storage: storage == "kept")
    assert {
        phase: (each["moved_bytes"], each["compulsory_bytes"], each["flops"])
        for phase, each in found.items()
    } == {"forward": (32, 16, {}), "update": (16, 8, {})}


@pytest.mark.parametrize(
    ("func", "types", "from_host", "to_host", "bus"),
    [
        (aten.copy_.default, (torch.float32, torch.float32), True, False, {"up": 28}),
        (aten.copy_.default, (torch.float32, torch.float32), False, True, {"down": 28}),
        (aten.copy_.default, (torch.float32, torch.bfloat16), True, False, {"up": 14}),
        (aten.copy_.default, (torch.bfloat16, torch.float32), False, True, {"down": 14}),
        (aten.copy_.default, (torch.float32, torch.float32), False, False, {}),
        (aten.copy_.default, (torch.float32, torch.float32), True, True, {}),
        (aten._to_copy.default, (torch.float32, torch.float32), True, False, {"up": 28}),
        (aten.add.Tensor, (torch.float32, torch.float32), True, False, {}),
    ],
)
def test_a_copy_crosses_the_bus_in_the_smaller_of_its_types(func, types, from_host, to_host, bus):
    source, target = (torch.ones(7, dtype=dtype) for dtype in types)
    places, work = {id(source): from_host, id(target): to_host}, Work()
    args = (target, source) if func is aten.copy_.default else (source,)
    work.count(
        0,
        "update",
        func,
        args,
        target,
        lambda tensor: storage(id(tensor), places[id(tensor)]),
    )
    (found,) = work.of_step(0, lambda storage: True).values()
    assert found["bus_bytes"] == bus
    on_device = [] if from_host else [source.nbytes]
    on_device += [] if to_host else [target.nbytes] * (2 if func is aten.copy_.default else 1)
    once = [tensor.nbytes for tensor in (source, target) if not places[id(tensor)]]
    assert found["moved_bytes"] == sum(on_device) and found["compulsory_bytes"] == sum(once)
