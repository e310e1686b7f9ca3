"""How an update is stored: the master is rounded, chance is fair and repeatable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import micro
from vramlab.observer import Observer
from vramlab.regimes.regime import read_row
from vramlab.regimes.rule.rules import AdamW
from vramlab.regimes.rule.sliced import LeafContext
from vramlab.regimes.weights.storage import Master, Stochastic, random_bits, round_up_or_down
from vramlab.training.trainer import Schedule, Trainer


def test_a_master_is_torchs_fp32_adamw_and_its_weight_the_rounded_master():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50, 30).bfloat16())
    master = nn.Parameter(weight.detach().float())
    ours = AdamW(weight_decay=0.1).bind(LeafContext(Master())).make([weight], 1e-4)
    theirs = torch.optim.AdamW([master], lr=1e-4, weight_decay=0.1, fused=True)
    for _ in range(5):
        weight.grad = torch.randn(50, 30).bfloat16()
        master.grad = weight.grad.float()
        ours.step(), theirs.step()
        assert torch.equal(ours.state[weight]["master"], master)
        assert torch.equal(weight, master.bfloat16())


def test_in_training_every_weight_is_its_rounded_master():
    seen = []

    class Look(Observer):
        def end_step(self):
            for leaf, entry in trainer._turns[0].updater.optimizers[0].state.items():
                seen.append(
                    torch.equal(leaf, entry["master"].bfloat16())
                    and entry["master"].dtype == torch.float32
                )

    trainer = Trainer(
        micro.model(),
        read_row("row", {"weights": "master", "clip": 1.0, "accumulate": 2}),
        Schedule(1e-2, 3),
        observer=Look(),
    )
    for step in range(3):
        trainer.step([micro.batch(step), micro.batch(step + 50)])
    assert len(seen) == 3 * len(list(trainer.model.parameters())) and all(seen)


def test_small_updates_are_lost_by_rounding_to_nearest_and_kept_by_the_others():
    """A thousand steps of 2^-12 of a weight of 1."""
    moved = {}
    for name, rule in (("bf16", "sgd"), ("bf16_sr", "sgd"), ("master", "sgd")):
        row = read_row("row", {"weights": name, "rule": rule})
        leaf = nn.Parameter(torch.ones(400, 3).bfloat16())
        optimizer = row.rule.bind(LeafContext(row.weights.storage, {id(leaf): "leaf"})).make(
            [leaf], 2.0**-12
        )
        for _ in range(1000):
            leaf.grad = torch.ones_like(leaf)
            optimizer.step()
        moved[name] = float((1 - leaf.detach().float()).mean())
    assert moved["bf16"] == 0 and moved["master"] == pytest.approx(
        1000 / 4096, abs=2**-9
    )  # half a bf16 unit there
    assert moved["bf16_sr"] == pytest.approx(1000 / 4096, rel=0.01)  # the mean of 1,200: s.e. 0.1 %


def test_rounding_is_to_a_neighbour_and_fair():
    wide = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    down = (wide.view(torch.int32) & -65536).view(torch.float32)
    up = ((wide.view(torch.int32) & -65536) + 65536).view(torch.float32)
    draws = torch.stack(
        [
            round_up_or_down(wide.clone(), random_bits(2000, 0, f"{n}", wide.device))
            for n in range(4000)
        ]
    )
    assert torch.equal(draws, draws.bfloat16().float()) and ((draws == down) | (draws == up)).all()
    error = (draws.double().mean(0) - wide) / (
        up - down
    ).abs()  # in units of the last place; s.e. at most 0.5 / sqrt(4000)
    assert (
        error.abs().max() < 5 * 0.5 / 4000**0.5
        and abs(error.mean()) < 5 * 0.5 / (4000 * 2000) ** 0.5
    )


def test_the_mean_over_all_bits_is_exact():
    wide = torch.tensor([1.2345678, -3.3e-5, 7e30]).repeat(65536, 1)
    rounded = round_up_or_down(
        wide.clone(), torch.arange(65536, dtype=torch.int32)[:, None].expand_as(wide)
    )
    assert torch.equal(rounded.double().mean(0), wide[0].double())
    assert torch.isinf(
        round_up_or_down(torch.tensor([float("inf")]), torch.tensor([65535], dtype=torch.int32))
    ).all()


def test_what_is_not_a_number_never_becomes_one():
    """The patterns of not-a-number with the highest payload, plus bits, would wrap around to zero;
    a GPU's own is such a one."""
    patterns = torch.tensor(
        [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -0x7FFFFF], dtype=torch.int32
    ).repeat(3, 1)
    bits = torch.tensor([[0], [1], [65535]], dtype=torch.int32).expand_as(patterns)
    assert patterns.view(torch.float32).isnan().all()
    assert not round_up_or_down(patterns.view(torch.float32), bits).isfinite().any()


def test_random_bits_are_a_function_of_element_and_label():
    device = torch.device("cpu")
    bits = random_bits(100_000, 0, "0/leaf/1/0", device)
    halves = [
        random_bits(count, first, "0/leaf/1/0", device)
        for count, first in ((40_000, 0), (60_000, 40_000))
    ]
    assert torch.equal(torch.cat(halves), bits)
    assert bits.min() >= 0 and bits.max() < 65536
    counts = torch.bincount(bits >> 8, minlength=256).double()
    assert ((counts - 100_000 / 256) ** 2 / (100_000 / 256)).sum() < 255 + 5 * (
        2 * 255
    ) ** 0.5  # chi squared
    for other in ("0/leaf/2/0", "0/leag/1/0", "1/leaf/1/0"):
        pairs = torch.stack([bits, random_bits(100_000, 0, other, device)]).double()
        assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / 100_000**0.5
    assert abs(torch.corrcoef(torch.stack([bits[1:], bits[:-1]]).double())[0, 1]) < 5 / 100_000**0.5


def test_training_with_chance_can_be_repeated_and_differs_by_seed():
    runs = [micro.train({"weights": {"bf16_sr": {"seed": seed}}}, steps=3)[1] for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_chance_leaves_fp32_weights_alone():
    """Adapters that peft keeps in fp32."""
    leaf = nn.Parameter(torch.ones(4, 3))
    optimizer = AdamW().bind(LeafContext(Stochastic())).make([leaf], 1e-4)
    leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    torch.testing.assert_close(leaf.detach(), torch.full((4, 3), 1 - 1e-4))
