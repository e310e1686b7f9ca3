"""What each regime must obey, whatever it saves."""

import itertools
import math
import random
from copy import deepcopy

import pytest
import torch
from torch import nn

from micro import batch, model, ranks, train
from vramlab.capture.meter import Meter
from vramlab.observer import Observer
from vramlab.regimes.regime import IllegalRegime, read_regimes, read_row
from vramlab.regimes.registry import AXES
from vramlab.regimes.trains.leaves import ActiveLeaves, Leaf, SlicedEmbedding, SlicedLinear
from vramlab.training.trainer import Schedule, Trainer

FULL: dict = {}

IDENTICAL_TO_FULL = {
    "checkpoint": {"acts": "checkpoint"},
    "checkpoint every other block": {"acts": {"checkpoint": {"every": 2}}},
    "offload": {"acts": {"offload": {"min_bytes": 0}}},
    "one chunk": {"trains": {"chunks": {"count": 1}}},
    "one block of everything": {"trains": {"blocks": {"count": 1, "ends": "units"}}},
    "fused backward": {"until": "backward"},
    "one rank": {"place": "fsdp"},
    "one rank, fused backward": {"place": "fsdp", "until": "backward"},
    "one rank, checkpoint": {"place": "fsdp", "acts": "checkpoint"},
    "one rank, offload": {"place": "fsdp", "acts": "offload"},
    "selective": {"acts": "selective"},
    "one rank, selective": {"place": "fsdp", "acts": "selective"},
    "checkpoint, offload": {"acts": {"checkpoint": {"offload": True}}},
    "host state": {"place": "host_state"},
    "host state, fused backward": {"place": "host_state", "until": "backward"},
    "host embeddings": {"place": "host_embed"},
    "host embeddings, fused backward": {"place": "host_embed", "until": "backward"},
    "host weights": {"place": "host_weights", "acts": "checkpoint"},
    "host weights, fused backward": {
        "place": "host_weights",
        "acts": {"checkpoint": {"offload": True}},
        "until": "backward",
    },
    "one rank, host": {"place": "fsdp_offload"},
    "one rank, host, fused backward": {"place": "fsdp_offload", "until": "backward"},
}


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("name", IDENTICAL_TO_FULL)
def test_identical_to_full(name, position):
    losses, weights, _ = train(FULL, position=position)
    other_losses, other_weights, _ = train(IDENTICAL_TO_FULL[name], position=position)
    assert other_losses == losses
    assert all(torch.equal(other_weights[key], weights[key]) for key in weights)


def test_lomo_is_sgd():
    reference, lr, losses = model(), 1e-2, []
    schedule, optimizer = Schedule(lr, 4), torch.optim.SGD(reference.parameters(), lr=lr)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        loss = reference(**batch(100 * step)).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lomo_losses, weights, _ = train({"until": "backward", "rule": "sgd"}, lr=lr)
    assert lomo_losses == losses
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in reference.state_dict().items()
    )


@pytest.mark.parametrize("head", ["plain", "fused"])
@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clipping_inside_backward_is_clipped_sgd(clip_norm, head):
    reference, lr = model(), 1e-1
    schedule, optimizer = Schedule(lr, 4), torch.optim.SGD(reference.parameters(), lr=lr)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        optimizer.zero_grad()
        reference(**batch(100 * step)).loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), clip_norm)
        assert (norm > clip_norm) == (clip_norm == 0.5)
        optimizer.step()
    row = {"until": {"backward": {"clip_norm": clip_norm}}, "rule": "sgd", "head": head}
    losses, weights, _ = train(row, lr=lr)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    if clip_norm == 1e6:
        lomo_losses, lomo_weights, _ = train({**row, "until": "backward"}, lr=lr)
        assert losses == lomo_losses and all(
            torch.equal(weights[name], lomo_weights[name]) for name in weights
        )


def test_clipping_inside_backward_costs_no_bytes_but_its_norms():
    peaks = []
    for until in ("backward", {"backward": {"clip_norm": 0.5}}):
        meter = Meter()
        with meter:
            train({"until": until, "rule": "sgd"}, steps=2, observer=meter)
        peaks.append(meter.peak(1)["peak_bytes"])
    assert 0 <= peaks[1] - peaks[0] <= 4 * (len(list(model().parameters())) + 8)


@pytest.mark.parametrize("head", ["plain", "fused"])
@pytest.mark.parametrize("how", ["value", "last"])
def test_clipping_inside_backward_without_a_second_look(how, head):
    """By value, as `clip_grad_value_` does it; by the last step's norm, of which the first step has
    none."""
    reference, lr, largest, last = model(), 1e-1, 0.02 if how == "value" else 0.5, None
    schedule, optimizer = Schedule(lr, 4), torch.optim.SGD(reference.parameters(), lr=lr)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        optimizer.zero_grad()
        reference(**batch(100 * step)).loss.backward()
        grads = [p.grad for p in reference.parameters()]
        norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]))
        before, last = norm if last is None else last, norm
        if how == "value":
            assert max(float(grad.abs().max()) for grad in grads) > largest
            nn.utils.clip_grad_value_(reference.parameters(), largest)
        else:
            assert before > largest
            for grad in grads:
                grad.mul_(largest / before)
        optimizer.step()
    until = {"clip_value": largest} if how == "value" else {"clip_norm": largest, "norm": "last"}
    losses, weights, _ = train({"until": {"backward": until}, "rule": "sgd", "head": head}, lr=lr)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_loss_scale_changes_nothing_where_nothing_overflows():
    """Powers of two are exact, so that the weights are LOMO's to the bit but for lr's own rounding;
    gradients stay scaled."""
    clipped, weights, _ = train({"until": {"backward": {"clip_norm": 0.5}}, "rule": "sgd"}, lr=0.1)
    for scale in (2.0**10, 2.0**-10):
        losses, others, _ = train(
            {"until": {"backward": {"clip_norm": 0.5, "loss_scale": scale}}, "rule": "sgd"}, lr=0.1
        )
        assert losses == pytest.approx(clipped, rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(others[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_overflow_leaves_the_whole_step_out_and_halves_the_scale():
    row = {
        "weights": "fp16",
        "until": {"backward": {"clip_norm": 1.0, "loss_scale": 2.0**24}},
        "rule": "sgd",
    }
    trainer = Trainer(model(), read_row("row", row), Schedule(0.5, 40))
    seen = []
    for step in range(20):
        matrices = {
            name: p for name, p in trainer.model.named_parameters() if p.dim() > 1
        }  # a norm's update may round to none
        before = {name: p.detach().clone() for name, p in matrices.items()}
        trainer.step([batch(step)])
        moved = [not torch.equal(before[name], p) for name, p in matrices.items()]
        assert all(moved) or not any(moved)  # never half of a step
        assert all(p.isfinite().all() for p in trainer.model.parameters())
        seen.append(all(moved))
    assert not seen[0] and seen[-1] and seen == sorted(seen)
    (turn,) = trainer._active_turns()
    assert turn.updater._clipper.scale == 2.0 ** (24 - seen.count(False))


def test_full_is_torch_adamw():
    reference = model()
    optimizer, schedule = (
        torch.optim.AdamW(reference.parameters(), weight_decay=0.0),
        Schedule(1e-2, 4),
    )
    for step in range(4):
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        optimizer.zero_grad()
        reference(**batch(100 * step)).loss.backward()
        optimizer.step()
    _, weights, _ = train(FULL)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_accumulation_is_the_large_batch():
    """Micro-batches with different numbers of labels weigh by their labels."""
    torch.manual_seed(0)
    small, large = batch(1, rows=1), batch(2, rows=3)
    small["labels"][:, :6] = -100
    together = {key: torch.cat([small[key], large[key]]) for key in small}
    grads = []
    for row, batches in (({}, [together]), ({"accumulate": 2}, [small, large])):
        trainer = Trainer(
            model(), read_row("row", {**row, "rule": "sgd"}), Schedule(1.0, 1, warmup=0)
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.step(batches)
        grads.append({name: before[name] - p for name, p in trainer.model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [2, 5, 16])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_chunk_gradients_tile_the_exact_gradient(count, position):
    exact = model(position)
    exact(**batch(7)).loss.backward()
    tiled = model(position)
    parts = read_row("row", {"trains": {"chunks": {"count": count}}}).trains.parts(tiled)
    tiled.requires_grad_(False)
    grads = {name: torch.full_like(p, math.nan) for name, p in tiled.named_parameters()}
    for part in parts:
        leaves = ActiveLeaves(tiled, part)
        leaves.switch_on()
        tiled(**batch(7)).loss.backward()
        for leaf, param in zip(
            part,
            leaves.named.values() if all(x.whole for x in part) else _in_order(leaves, part),
            strict=True,
        ):
            grads[leaf.name][leaf.start : leaf.stop] = param.grad
            param.grad = None
        leaves.switch_off()
    for name, param in exact.named_parameters():
        torch.testing.assert_close(grads[name], param.grad, rtol=1e-4, atol=1e-6)


def _in_order(leaves, part):
    return [
        leaves.named[leaf.name if leaf.whole else f"{leaf.name}[{leaf.start}:{leaf.stop}]"]
        for leaf in part
    ]


@pytest.mark.parametrize("count", [1, 3, 8, 100])
def test_chunks_tile_every_row_once_in_equal_bytes(count):
    tiny = model()
    parts = read_row("row", {"trains": {"chunks": {"count": count}}}).trains.parts(tiny)
    params = dict(tiny.named_parameters())
    rows = sorted(
        (leaf.name, row) for part in parts for leaf in part for row in range(leaf.start, leaf.stop)
    )
    assert rows == sorted((name, row) for name, p in params.items() for row in range(p.shape[0]))
    sizes = [
        sum(params[x.name].nbytes // x.rows * (x.stop - x.start) for x in part) for part in parts
    ]
    largest_row = max(p.nbytes // p.shape[0] for p in params.values())
    assert max(sizes) <= sum(sizes) / count + 2 * largest_row


def test_sliced_backwards_pass_gradcheck():
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    leaf = nn.Parameter(
        weight.detach()[2:5]
    )  # shares storage, so a perturbed leaf perturbs the weight
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, leaf: SlicedLinear.apply(x, weight, leaf, 2), (x, leaf)
    )
    ids = torch.tensor([[0, 2, 3], [4, 4, 6]])
    assert torch.autograd.gradcheck(
        lambda leaf: SlicedEmbedding.apply(ids, weight, leaf, 2, None), (leaf,)
    )


def test_padding_row_of_a_sliced_embedding_gets_no_gradient():
    weight = torch.randn(6, 4)
    leaf = nn.Parameter(weight.detach()[0:3])
    SlicedEmbedding.apply(torch.tensor([0, 1, 0, 5]), weight, leaf, 0, 0).sum().backward()
    assert (
        leaf.grad[0].abs().sum() == 0 and leaf.grad[1].eq(1).all() and leaf.grad[2].abs().sum() == 0
    )


class _Saved(Observer):
    """Counts the bytes of distinct storages that autograd saves in forward, parameters left out."""

    def __init__(self):
        self.bytes = []

    def phase(self, name):
        if name != "forward":
            return super().phase(name)
        seen = {}
        self.bytes.append(seen)

        def pack(tensor):
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _saved_bytes(row, **changes):
    observer = _Saved()
    _, _, trainer = train(row, steps=1, observer=observer, **changes)
    weights = {p.untyped_storage()._cdata for p in trainer.model.parameters()}
    return sum(size for key, size in observer.bytes[0].items() if key not in weights)


def test_inactive_blocks_save_nothing():
    """Only the top block trains: the saved bytes do not depend on how many blocks lie below it."""
    row = {"trains": {"blocks": {"order": "descending", "interval": 1}}}
    assert _saved_bytes(row, num_hidden_layers=2) == _saved_bytes(row, num_hidden_layers=6)
    assert _saved_bytes(row) < _saved_bytes(FULL)


def test_inactive_leaves_have_no_gradient():
    trainer = Trainer(
        model(), read_row("row", {"trains": {"chunks": {"count": 6}}}), Schedule(1e-2, 6)
    )
    seen = set()
    for step in range(6):
        hooks = [
            p.register_hook(lambda grad, n=n: seen.add(n))
            for n, p in trainer.model.named_parameters()
            if p.requires_grad
        ]
        trainer.step([batch(step)])
        whole = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert whole == {n for n in trainer.active if "[" not in n}
        assert all(p.grad is None for p in trainer.model.parameters())
        [hook.remove() for hook in hooks]


def test_moving_parts_touch_only_the_active_leaves():
    trainer = Trainer(
        model(), read_row("row", {"trains": {"chunks": {"count": 5}}}), Schedule(1e-2, 5)
    )
    for step in range(5):
        before = deepcopy(trainer.model.state_dict())
        trainer.step([batch(step)])
        part = {leaf.name: leaf for leaf in trainer.parts[step]}
        for name, tensor in trainer.model.state_dict().items():
            changed = (
                (tensor != before[name]).flatten(1).any(1)
                if tensor.dim() > 1
                else tensor != before[name]
            )
            outside = changed.clone()
            if name in part:
                outside[part[name].start : part[name].stop] = False
            assert not outside.any(), name
        assert any((trainer.model.state_dict()[name] != before[name]).any() for name in part)


LISA = {"blocks": {"interval": 2, "sample": 1, "ends": "always"}}


@pytest.mark.parametrize(
    "row",
    [
        FULL,
        {"until": "backward"},
        {"trains": "lora"},
        {"rule": "sgd"},
        {"weights": "bf16"},
        {"trains": {"chunks": {"count": 4, "state": "device"}}},
        {"trains": "norms"},
        {"trains": "top"},
        {"trains": {"lora": {"dora": True}}},
        {"trains": {"lora": {"frozen_a": True}}},
        {"trains": {"lora": {"adapters": "bf16"}}, "weights": "nf4"},
        {"trains": "split_lora"},
        {"trains": "lora", "weights": "int8"},
        {"trains": "prompt"},
        {"trains": "prefix"},
        {"trains": {"blocks": {"ends": "units", "interval": 1, "state": "device"}}},
        {"place": "host_state"},
        {"place": "host_embed", "trains": {"chunks": {"count": 4, "state": "host"}}},
        {"place": "host_weights", "acts": "checkpoint", "until": "backward"},
    ],
    ids=str,
)
def test_optimizer_state_is_exactly_what_the_rule_promises(row):
    _, _, trainer = train(row, steps=4)
    leaves = {name: p for turn in trainer._turns.values() for name, p in turn.leaves.named.items()}
    assert trainer.optimizer_state_bytes() == trainer.regime.rule_for(
        trainer.model, leaves
    ).state_bytes(leaves.values())
    if row == FULL:
        parameters = list(trainer.model.parameters())
        assert trainer.optimizer_state_bytes() == 8 * sum(p.numel() for p in parameters) + 4 * len(
            parameters
        )


@pytest.mark.parametrize(("fate", "parts_left"), [("reset", 0), ("host", 3), ("device", 3)])
def test_the_fate_of_a_resting_parts_state(fate, parts_left):
    _, _, trainer = train(
        {"trains": {"blocks": {"interval": 1, "order": "ascending", "state": fate}}}, steps=3
    )
    assert len(trainer._turns) == parts_left
    assert bool(trainer.optimizer_state_bytes()) == bool(parts_left)


@pytest.mark.parametrize("until", ["step", "backward"])
def test_lisas_state_is_that_of_the_active_leaves_and_never_more(until):
    """Embeddings, norm and head keep theirs across switches; a block's is dropped with its turn."""
    regime = read_row("row", {"trains": LISA, "until": until})
    trainer, drawn = Trainer(model(), regime, Schedule(1e-2, 12)), set()
    for step in range(12):
        trainer.step([batch(step)])
        active = trainer.active
        blocks = {name.split(".")[2] for name in active if ".layers." in name}
        drawn |= blocks
        assert len(blocks) == 1 and {
            "model.embed_tokens.weight",
            "model.norm.weight",
            "lm_head.weight",
        } < set(active)
        assert trainer.optimizer_state_bytes() == regime.rule.bind().state_bytes(active.values())
        state = dict(item for index in trainer._active for item in trainer._turns[index].state())
        assert int(state["lm_head.weight.step"]) == step + 1
        assert all(p.grad is None for p in trainer.model.parameters())
    assert drawn == {"0", "1", "2"}


def test_lisa_of_all_blocks_is_full():
    losses, weights, _ = train(FULL)
    other_losses, other, _ = train(
        {"trains": {"blocks": {"interval": 1, "sample": 3, "ends": "always"}}}
    )
    assert other_losses == losses and all(
        torch.equal(other[name], weights[name]) for name in weights
    )


def test_draws_are_uniform():
    trains = read_row(
        "row", {"trains": {"blocks": {"interval": 3, "sample": 2, "ends": "always"}}}
    ).trains
    drawn = [trains.active(step, 5) for step in range(3 * 600)]
    assert all(drawn[3 * turn] == drawn[3 * turn + 2] for turn in range(600))
    assert all(len(set(parts)) == 3 and parts[-1] == 4 for parts in drawn)
    shares = [sum(block in parts for parts in drawn) / len(drawn) for block in range(4)]
    assert all(abs(share - 0.5) < 0.08 for share in shares)  # four standard errors of 600 draws


@pytest.mark.parametrize("order", ["ascending", "descending", "random", "shuffled"])
def test_every_order_visits_every_part_once_a_cycle(order):
    trains = read_row("row", {"trains": {"blocks": {"order": order, "interval": 1}}}).trains
    cycles = [[trains.active(cycle * 7 + i, 7) for i in range(7)] for cycle in range(4)]
    assert all(sorted(cycle) == [(i,) for i in range(7)] for cycle in cycles)
    assert (len(set(map(tuple, cycles))) > 1) == (order == "random")


def test_hift_trains_all_its_parts_at_one_rate():
    regime = read_row(
        "row",
        {
            "trains": {
                "blocks": {
                    "interval": 2,
                    "ends": "units",
                    "order": "descending",
                    "state": "host",
                    "delayed_lr": True,
                }
            }
        },
    )
    trainer = Trainer(model(), regime, Schedule(1e-2, 30))
    names, rates = [], []
    for step in range(20):
        trainer.step([batch(step)])
        names.append(next(iter(trainer.active)))
        rates.append(
            {
                group["lr"]
                for index in trainer._active
                for optimizer in trainer._turns[index].updater.optimizers
                for group in optimizer.param_groups
            }
        )
    assert names[0] == names[1] == "model.norm.weight" and names[8] == "model.embed_tokens.weight"
    assert (
        rates[:10] == [{trainer.schedule.at(0)}] * 10
        and rates[10:] == [{trainer.schedule.at(10)}] * 10
    )


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_badam_is_badams(order):
    from badam import BlockOptimizer

    reference, schedule = model(), Schedule(1e-2, 5)
    inner = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    with pytest.warns(UserWarning, match="fp16/bf16"):
        theirs = BlockOptimizer(
            inner,
            list(reference.named_parameters()),
            switch_block_every=2,
            switch_mode=order,
            verbose=0,
        )
    theirs.global_step = -1  # it counts before it asks, so its first block would get a step less
    for step in range(5):
        theirs.param_groups[0]["lr"] = schedule.at(step)
        reference(**batch(step)).loss.backward()
        theirs.step()
        theirs.zero_grad()
    trainer = Trainer(
        model(), read_row("row", {"trains": {"blocks": {"interval": 2, "order": order}}}), schedule
    )
    for step in range(5):
        trainer.step([batch(step)])
    for name, tensor in reference.state_dict().items():
        # an Adam that has just begun divides a gradient by itself, so rounding in it shows: a
        # thousandth of one update
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=0, atol=1e-5)


def test_host_and_device_state_train_the_same():
    rows = [{"trains": {"chunks": {"count": 3, "state": fate}}} for fate in ("host", "device")]
    (_, first, _), (_, second, _) = (train(row, steps=7) for row in rows)
    assert all(torch.equal(first[name], second[name]) for name in first)


COLUMNS = {
    **{axis: list(known) for axis, known in AXES.items()},
    "accumulate": [1, 2],
    "clip": [0.0, 0.5],
}


ADAPTERS = ("lora", "split_lora", "prompt", "prefix", "writers", "update_head")
"""Beside them the model's own weights stand still."""


def _legal(row) -> bool:
    """Refusals say what to use instead."""
    try:
        read_row("row", row)
    except IllegalRegime as refusal:
        assert "use" in str(refusal)
        return False
    return True


def _pairs(row) -> set:
    return set(itertools.combinations(row.items(), 2))


def _covering(tries: int = 60) -> list[dict]:
    """Few legal rows, with every pair of values that can be had together: a defect of two values
    shows in one of them. A pair is looked for in rows filled up by chance, half with defaults; of
    the legal ones the one with most new pairs.
    """
    chance, covered, chosen = random.Random(0), set(), []
    for (axis, values), (other, others) in itertools.combinations(COLUMNS.items(), 2):
        for pair in itertools.product(
            [(axis, value) for value in values], [(other, value) for value in others]
        ):
            if pair in covered:
                continue
            filled = [
                {
                    key: chance.choice((known[0], chance.choice(known)))
                    for key, known in COLUMNS.items()
                }
                | dict(pair)
                for _ in range(tries)
            ]
            legal = [row for row in filled if _legal(row)]
            if legal:
                chosen.append(max(legal, key=lambda row: len(_pairs(row) - covered)))
                covered |= _pairs(chosen[-1])
    return chosen


ROWS = _covering()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(map(str, row.values())))
def test_whatever_constructs_trains(row):
    losses, after, _ = train(row, steps=2, lr=3.0 if row["rule"] == "sgd" else 0.1)
    assert all(math.isfinite(loss) for loss in losses), row
    moved = any(
        not torch.equal(p, q.to(p.dtype))
        for p, q in zip(after.values(), model().state_dict().values(), strict=False)
    )
    assert moved or row["trains"] in ("none", *ADAPTERS), row


def test_every_value_is_legal_somewhere():
    for axis, values in COLUMNS.items():
        assert {row[axis] for row in ROWS} == set(values)


@pytest.mark.parametrize("norm_head", [True, False])
def test_every_row_of_the_file_trains(norm_head):
    for name, row in read_regimes().items():
        with ranks(row):
            trainer = Trainer(model(norm_head=norm_head), row, Schedule(row.lr, 2))
            losses = [float(trainer.step([batch(step)])) for step in range(2)]
        assert all(math.isfinite(loss) for loss in losses), name


def test_whole_leaf_is_the_parameter_itself():
    tiny = model()
    leaves = ActiveLeaves(tiny, [Leaf("lm_head.weight", 0, 61, 61)])
    assert leaves.named["lm_head.weight"] is tiny.lm_head.weight
