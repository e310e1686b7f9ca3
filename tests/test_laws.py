"""What each regime must obey, whatever it saves."""

import itertools
import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from micro import batch, model, ranks, train
from vramlab.axes import AXES
from vramlab.axes.leaves import ActiveLeaves, Leaf, SlicedEmbedding, SlicedLinear
from vramlab.observer import Observer
from vramlab.regime import IllegalRegime, read_regimes, read_row
from vramlab.trainer import Schedule, Trainer

FULL: dict = {}

IDENTICAL_TO_FULL = {
    "checkpoint": {"acts": "checkpoint"},
    "checkpoint every other block": {"acts": {"checkpoint": {"every": 2}}},
    "offload": {"acts": {"offload": {"min_bytes": 0}}},
    "one chunk": {"trains": {"chunks": {"count": 1}}},
    "one block of everything": {"trains": {"blocks": {"count": 1, "ends": True}}},
    "fused backward": {"until": "backward"},
    "one rank": {"place": "fsdp"},
    "one rank, fused backward": {"place": "fsdp", "until": "backward"},
    "one rank, checkpoint": {"place": "fsdp", "acts": "checkpoint"},
    "one rank, offload": {"place": "fsdp", "acts": "offload"},
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
    assert all(torch.equal(weights[name], tensor) for name, tensor in reference.state_dict().items())


def test_full_is_torch_adamw():
    reference = model()
    optimizer, schedule = torch.optim.AdamW(reference.parameters(), weight_decay=0.0), Schedule(1e-2, 4)
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
        trainer = Trainer(model(), read_row("row", {**row, "rule": "sgd"}), Schedule(1.0, 1, warmup=0))
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
        for leaf, param in zip(part, leaves.named.values() if all(x.whole for x in part) else _in_order(leaves, part), strict=True):
            grads[leaf.name][leaf.start : leaf.stop] = param.grad
            param.grad = None
        leaves.switch_off()
    for name, param in exact.named_parameters():
        torch.testing.assert_close(grads[name], param.grad, rtol=1e-4, atol=1e-6)


def _in_order(leaves, part):
    return [leaves.named[leaf.name if leaf.whole else f"{leaf.name}[{leaf.start}:{leaf.stop}]"] for leaf in part]


@pytest.mark.parametrize("count", [1, 3, 8, 100])
def test_chunks_tile_every_row_once_in_equal_bytes(count):
    tiny = model()
    parts = read_row("row", {"trains": {"chunks": {"count": count}}}).trains.parts(tiny)
    params = dict(tiny.named_parameters())
    rows = sorted((leaf.name, row) for part in parts for leaf in part for row in range(leaf.start, leaf.stop))
    assert rows == sorted((name, row) for name, p in params.items() for row in range(p.shape[0]))
    sizes = [sum(params[x.name].nbytes // x.rows * (x.stop - x.start) for x in part) for part in parts]
    largest_row = max(p.nbytes // p.shape[0] for p in params.values())
    assert max(sizes) <= sum(sizes) / count + 2 * largest_row


def test_sliced_backwards_pass_gradcheck():
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    leaf = nn.Parameter(weight.detach()[2:5])  # shares storage, so a perturbed leaf perturbs the weight
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, leaf: SlicedLinear.apply(x, weight, leaf, 2), (x, leaf))
    ids = torch.tensor([[0, 2, 3], [4, 4, 6]])
    assert torch.autograd.gradcheck(lambda leaf: SlicedEmbedding.apply(ids, weight, leaf, 2, None), (leaf,))


def test_padding_row_of_a_sliced_embedding_gets_no_gradient():
    weight = torch.randn(6, 4)
    leaf = nn.Parameter(weight.detach()[0:3])
    SlicedEmbedding.apply(torch.tensor([0, 1, 0, 5]), weight, leaf, 0, 0).sum().backward()
    assert leaf.grad[0].abs().sum() == 0 and leaf.grad[1].eq(1).all() and leaf.grad[2].abs().sum() == 0


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
    trainer = Trainer(model(), read_row("row", {"trains": {"chunks": {"count": 6}}}), Schedule(1e-2, 6))
    seen = set()
    for step in range(6):
        hooks = [p.register_hook(lambda grad, n=n: seen.add(n)) for n, p in trainer.model.named_parameters() if p.requires_grad]
        trainer.step([batch(step)])
        whole = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert whole == {n for n in trainer.active if "[" not in n}
        assert all(p.grad is None for p in trainer.model.parameters())
        [hook.remove() for hook in hooks]


def test_moving_parts_touch_only_the_active_leaves():
    trainer = Trainer(model(), read_row("row", {"trains": {"chunks": {"count": 5}}}), Schedule(1e-2, 5))
    for step in range(5):
        before = deepcopy(trainer.model.state_dict())
        trainer.step([batch(step)])
        part = {leaf.name: leaf for leaf in trainer.parts[step]}
        for name, tensor in trainer.model.state_dict().items():
            changed = (tensor != before[name]).flatten(1).any(1) if tensor.dim() > 1 else tensor != before[name]
            outside = changed.clone()
            if name in part:
                outside[part[name].start : part[name].stop] = False
            assert not outside.any(), name
        assert any((trainer.model.state_dict()[name] != before[name]).any() for name in part)


def test_lora_starts_as_the_identity():
    base = model().eval()
    trainer = Trainer(model(), read_row("row", {"trains": "lora"}), Schedule(1e-2, 1))
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**batch(3)).logits, base(**batch(3)).logits)


@pytest.mark.parametrize("row", [FULL, {"until": "backward"}, {"trains": "lora"}, {"rule": "sgd"}, {"weights": "bf16"},
                                 {"trains": {"chunks": {"count": 4, "state": "device"}}}], ids=str)
def test_optimizer_state_is_exactly_what_the_rule_promises(row):
    _, _, trainer = train(row, steps=4)
    leaves = [p for turn in trainer._turns.values() for p in turn.leaves.named.values()]
    assert trainer.optimizer_state_bytes() == trainer.regime.rule.state_bytes(leaves)
    if row == FULL:
        parameters = list(trainer.model.parameters())
        assert trainer.optimizer_state_bytes() == 8 * sum(p.numel() for p in parameters) + 4 * len(parameters)


@pytest.mark.parametrize(("fate", "parts_left"), [("reset", 0), ("host", 3), ("device", 3)])
def test_the_fate_of_a_resting_parts_state(fate, parts_left):
    _, _, trainer = train({"trains": {"blocks": {"interval": 1, "order": "ascending", "state": fate}}}, steps=3)
    assert len(trainer._turns) == parts_left
    assert bool(trainer.optimizer_state_bytes()) == bool(parts_left)


def test_host_and_device_state_train_the_same():
    rows = [{"trains": {"chunks": {"count": 3, "state": fate}}} for fate in ("host", "device")]
    (_, first, _), (_, second, _) = (train(row, steps=7) for row in rows)
    assert all(torch.equal(first[name], second[name]) for name in first)


PRODUCT = [dict(zip((*AXES, "accumulate", "clip"), values, strict=True))
           for values in itertools.product(*(list(known) for known in AXES.values()), (1, 2), (0.0, 0.5))]
PRODUCT = [row for row in PRODUCT if (row["place"], row["head"]) == ("device", "plain")
           or (row["accumulate"], row["clip"]) in ((1, 0.0), (2, 0.5))]


@pytest.mark.parametrize("weights", AXES["weights"])
@pytest.mark.parametrize("trains", AXES["trains"])
def test_whatever_constructs_trains(weights, trains):
    outcomes = {"refused": 0, "trained": 0}
    for row in (row for row in PRODUCT if row["weights"] == weights and row["trains"] == trains):
        try:
            read_row("row", row)
        except IllegalRegime as refusal:
            assert "use" in str(refusal)
            outcomes["refused"] += 1
            continue
        losses, after, trainer = train(row, steps=2, lr=0.1 if row["rule"] == "adamw" else 3.0)
        assert all(math.isfinite(loss) for loss in losses), row
        moved = any(not torch.equal(p, q.to(p.dtype)) for p, q in zip(after.values(), model().state_dict().values(), strict=False))
        assert moved or trains in ("none", "lora"), row
        outcomes["trained"] += 1
    assert outcomes["trained"]


def test_every_row_of_the_file_trains():
    for name, row in read_regimes().items():
        with ranks(row):
            trainer = Trainer(model(), row, Schedule(row.lr, 2))
            losses = [float(trainer.step([batch(step)])) for step in range(2)]
        assert all(math.isfinite(loss) for loss in losses), name


def test_whole_leaf_is_the_parameter_itself():
    tiny = model()
    leaves = ActiveLeaves(tiny, [Leaf("lm_head.weight", 0, 61, 61)])
    assert leaves.named["lm_head.weight"] is tiny.lm_head.weight
