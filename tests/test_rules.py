"""Each rule is what its paper or library says, on slices of any height, and holds the bytes it
promises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import micro
from vramlab.baichuan import ModelSpec
from vramlab.capture.meter import Meter
from vramlab.forecast.trace import trace
from vramlab.regimes.regime import IllegalRegime, read_regimes, read_row
from vramlab.regimes.registry import AXES
from vramlab.regimes.rule import quantized_moments, sliced
from vramlab.regimes.rule.rules import Adafactor, AdaLomo, Adam4bit, Adam8bit, AdamMini, AdamW, Sgd
from vramlab.regimes.rule.sliced import LeafContext, RowAdamW, RowSgd, slices
from vramlab.regimes.until.row_protocol import TakesRows
from vramlab.regimes.weights.storage import Master, Nearest, Stochastic
from vramlab.training.trainer import Schedule, Trainer

SHAPES = [(37, 20), (33,), (64, 96)]
SLICED = {
    "sgd": Sgd(),
    "adamw": AdamW(weight_decay=0.1),
    "adafactor": Adafactor(),
    "adalomo": AdaLomo(),
    "adam_mini": AdamMini(weight_decay=0.1),
    "adam4bit": Adam4bit(weight_decay=0.1),
}
STORED = {"nearest": Nearest(), "stochastic": Stochastic(), "master": Master()}


@pytest.fixture
def low(monkeypatch):
    """Slices of few rows: many a parameter, and a last one that is shorter."""
    monkeypatch.setattr(sliced, "SLICE_BYTES", 4 * 20 * 5)


def _weights(dtype=torch.float32, shapes=SHAPES, scale=0.1):
    generator = torch.Generator().manual_seed(3)
    return [
        nn.Parameter((scale * torch.randn(shape, generator=generator)).to(dtype))
        for shape in shapes
    ]


def _gradients(step, weights, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    return [(scale * torch.randn(w.shape, generator=generator)).to(w.dtype) for w in weights]


def _run(optimizer, weights, steps=5, scale=1.0, first=0):
    for step in range(first, first + steps):
        for weight, gradient in zip(weights, _gradients(step, weights, scale), strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.detach() for weight in weights]


def _close(ours, theirs, rtol=1e-5, atol=1e-7):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-9])
def test_adafactor_is_torchs_in_fp32(scale, low):
    ours, theirs = _weights(), _weights()
    reference = torch.optim.Adafactor(theirs, lr=0.05, weight_decay=0.0)
    _close(
        _run(Adafactor().bind().make(ours, 0.05), ours, scale=scale),
        _run(reference, theirs, scale=scale),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adalomo_is_the_published_one(dtype, low, monkeypatch):
    """Which needs a model, loses its loss scale, and calls .cuda() wherever it is. In bf16 both
    round the same fp32 update: apart by one rounding where the order of sums decides."""
    from lomo_optim import AdaLomo as Published

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(20, 37), nn.Tanh(), nn.Linear(37, 9)).to(dtype)
    ours = copy.deepcopy(theirs)
    published = Published(theirs, loss_scale=0)
    optimizer = AdaLomo().bind().make(list(ours.parameters()), 0.1)
    for step in range(5):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step)).to(dtype)
        published.fused_backward(theirs(x).square().mean(), 0.1)
        ours(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tight = {} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-4}
        _close(list(ours.parameters()), list(theirs.parameters()), **tight)


def test_adam8bit_is_bitsandbytes_bit_for_bit():
    bitsandbytes = quantized_moments.library()
    ours, theirs = _weights(), _weights()
    reference = bitsandbytes.AdamW8bit(theirs, lr=0.01, weight_decay=0.0)
    for mine, other in zip(
        _run(Adam8bit().bind().make(ours, 0.01), ours), _run(reference, theirs), strict=True
    ):
        assert torch.equal(mine, other)


def test_codebooks_are_the_libraries():
    from bitsandbytes.functional import create_dynamic_map
    from torchao.optim.subclass_4bit import get_qmap_signed, get_qmap_unsigned

    for name, signed in (("dynamic", True), ("udynamic", False)):
        assert torch.equal(
            torch.tensor(quantized_moments.CODEBOOKS_8BIT[name]), create_dynamic_map(signed)
        )
    for name, values in (("exp_avg", get_qmap_signed()), ("exp_avg_sq", get_qmap_unsigned())):
        torch.testing.assert_close(
            torch.tensor(quantized_moments.CODEBOOKS_4BIT[name]),
            torch.tensor(values),
            rtol=1e-6,
            atol=0,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam4bit_is_torchaos(dtype, low):
    """Its step, uncompiled. A moment half-way between two codes may be coded either way: of one
    weight in a thousand."""
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_4bit import OptimState4bit

    (ours,), (theirs,) = _weights(dtype, [(64, 96)]), _weights(dtype, [(64, 96)])
    optimizer = Adam4bit(weight_decay=0.1).bind().make([ours], 0.01)
    moments = [
        OptimState4bit.zeros(theirs.shape, signed, 128, dtype=dtype) for signed in (True, False)
    ]
    for step in range(4):
        _run(optimizer, [ours], steps=1, first=step)
        single_param_adam(
            theirs.detach(),
            _gradients(step, [theirs])[0],
            torch.tensor(step + 1.0),
            *moments,
            None,
            torch.tensor(0.01),
            0.9,
            0.999,
            0.1,
            1e-8,
            True,
            False,
        )
        same = torch.isclose(
            ours, theirs, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6
        )
        assert (~same).float().mean() < 1e-3
        for name, moment in zip(quantized_moments.CODEBOOKS_4BIT, moments, strict=True):
            entry = optimizer.state[ours]
            assert (entry[f"{name}_codes"] != moment.codes).float().mean() < 1e-3
            torch.testing.assert_close(entry[f"{name}_scale"], moment.scale)


def test_adam_mini_with_one_weight_a_row_is_adamw(low):
    ours, theirs = _weights(shapes=[(41, 1)]), _weights(shapes=[(41, 1)])
    _close(
        _run(AdamMini(weight_decay=0.1).bind().make(ours, 0.01), ours),
        _run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1), theirs),
    )


def test_adam_mini_has_a_moment_a_head_of_q_and_k_and_a_row_of_v(low):
    """Against the formula on an explicit index of blocks."""
    head_dim, width = 5, 20
    (leaf,), (norm,) = _weights(shapes=[(3 * width, width)]), _weights(shapes=[(width,)])
    fit = LeafContext(names={id(leaf): "model.layers.0.self_attn.W_pack.weight"}, head_dim=head_dim)
    optimizer = AdamMini().bind(fit).make([leaf, norm], 0.01)
    index = torch.cat(
        (torch.arange(2 * width) // head_dim, 2 * width // head_dim + torch.arange(width))
    )
    assert len(index.unique()) == 2 * 4 + width
    wide = leaf.detach().double()
    m, v = torch.zeros_like(wide), torch.zeros(len(index.unique()), dtype=torch.double)
    for step in range(4):
        gradient = _gradients(step, [leaf, norm])[0].double()
        _run(optimizer, [leaf, norm], steps=1, first=step)
        m = 0.9 * m + 0.1 * gradient
        block = torch.stack([gradient[index == number].square().mean() for number in range(len(v))])
        v = 0.999 * v + 0.001 * block
        root = (v / (1 - 0.999 ** (step + 1))).sqrt()[index, None] + 1e-8
        wide -= 0.01 / (1 - 0.9 ** (step + 1)) * m / root
        torch.testing.assert_close(leaf.detach().double(), wide, rtol=1e-5, atol=1e-6)
    assert optimizer.state[leaf]["exp_avg_sq"].shape == v.shape and optimizer.state[norm][
        "exp_avg_sq"
    ].shape == (1,)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", SLICED)
def test_slices_do_not_matter_and_rows_may_be_handed_over(name, stored, monkeypatch):
    """Whole, in low slices, and in rows from outside: the same weights."""
    results = []
    for slice_bytes, handed in ((1 << 30, False), (4 * 96 * 5, False), (1 << 30, True)):
        monkeypatch.setattr(sliced, "SLICE_BYTES", slice_bytes)
        weights = _weights(torch.bfloat16)
        names = {id(weight): str(index) for index, weight in enumerate(weights)}
        optimizer = SLICED[name].bind(LeafContext(STORED[stored], names)).make(weights, 0.02)
        if handed and not isinstance(optimizer, TakesRows):
            continue  # torch's own, and those that need whole blocks
        for step in range(3):
            if not handed:
                _run(optimizer, weights, steps=1, first=step)
                continue
            for weight, gradient in zip(weights, _gradients(step, weights), strict=True):
                optimizer.begin_rows(weight)
                for sweep in range(optimizer.sweeps):
                    for start in range(0, len(weight), 7):
                        optimizer.rows(
                            weight,
                            start,
                            min(start + 7, len(weight)),
                            gradient[start : start + 7].clone(),
                            sweep,
                        )
                optimizer.end_rows(weight)
        results.append([weight.detach().float() for weight in weights])
    # torch's own bf16 addition rounds the end of a vector otherwise than its middle, and slices end
    # elsewhere
    exact = name in ("adamw", "adam4bit") or (name == "sgd" and stored != "nearest")
    for other in results[1:]:
        _close(
            other,
            results[0],
            **({"rtol": 0, "atol": 0} if exact else {"rtol": 2**-6, "atol": 1e-4}),
        )


@pytest.mark.parametrize("name", SLICED)
def test_no_temporary_has_a_parameters_size(name, monkeypatch):
    monkeypatch.setattr(sliced, "SLICE_BYTES", 4 * 96 * 8)
    weight = nn.Parameter(torch.randn(640, 96).bfloat16())
    weight.grad = torch.randn(640, 96).bfloat16()
    optimizer = SLICED[name].bind(LeafContext(Stochastic())).make([weight], 0.01)
    optimizer.step()
    meter = Meter()
    meter.own("weights", [("weight", weight)])
    meter.own("gradients", [("weight", weight.grad)])
    meter.own(
        "optimizer",
        [
            (key, value)
            for key, value in optimizer.state[weight].items()
            if isinstance(value, torch.Tensor)
        ],
    )
    with meter:
        optimizer.step()
    made = meter.frame().query("event == 'alloc' and phase == 'init' and category == 'temporaries'")
    assert 0 < made["bytes"].max() <= 4 * 96 * 8 < weight.nbytes / 30


def test_slices_tile_in_grains(monkeypatch):
    monkeypatch.setattr(sliced, "SLICE_BYTES", 4 * 10 * 7)
    assert [(s.start, s.stop) for s in slices(torch.Size((17, 10)))] == [(0, 7), (7, 14), (14, 17)]
    assert [(s.start, s.stop) for s in slices(torch.Size((17, 10)), grain=4)] == [
        (0, 4),
        (4, 8),
        (8, 12),
        (12, 16),
        (16, 17),
    ]
    assert [(s.start, s.stop) for s in slices(torch.Size((3, 1000)), grain=2)] == [(0, 2), (2, 3)]
    assert not list(slices(torch.Size((0, 10))))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", [*SLICED, "adam8bit"])
def test_stopping_and_resuming_changes_nothing(name, stored, low):
    """state_dict out, a new optimizer, state_dict in: fp32 state of bf16 weights survives, which
    torch's own cast would not."""
    rule = SLICED.get(name, Adam8bit())
    if stored != "nearest" and not rule.row_wise:
        pytest.skip("refused")
    dtype = torch.float32 if (name, stored) == ("adam8bit", "nearest") else torch.bfloat16

    def make(weights):
        return rule.bind(
            LeafContext(STORED[stored], {id(weight): str(i) for i, weight in enumerate(weights)})
        ).make(weights, 0.02)

    straight = _weights(dtype)
    _run(make(straight), straight, steps=4)
    stopped = _weights(dtype)
    before = make(stopped)
    _run(before, stopped, steps=2)
    resumed = [nn.Parameter(weight.detach().clone()) for weight in stopped]
    after = make(resumed)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    _run(after, resumed, steps=2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(resumed, straight, strict=True))


def test_sgd_in_bf16_is_formed_in_fp32():
    """One rounding, of w - lr g."""
    weight = nn.Parameter(torch.randn(300, 41).bfloat16())
    before, gradient = weight.detach().clone(), torch.randn(300, 41).bfloat16()
    for optimizer in (
        Sgd().bind().make([weight], 0.25),
        RowSgd([weight], 0.25, LeafContext(), **vars(Sgd())),
    ):
        weight.data.copy_(before)
        weight.grad = gradient
        optimizer.step()
        assert torch.equal(weight, (before.double() - 0.25 * gradient.double()).float().bfloat16())


def test_torchs_adamw_in_bf16_is_the_one_on_fp32_slices(low):
    ours, theirs = _weights(torch.bfloat16), _weights(torch.bfloat16)
    options = vars(AdamW(weight_decay=0.1))
    _run(RowAdamW(ours, 0.02, LeafContext(), **options), ours)
    _run(AdamW(weight_decay=0.1).bind().make(theirs, 0.02), theirs)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


ROWS = {
    f"{weights}, {rule}": {"weights": weights, "rule": rule}
    for weights in AXES["weights"]
    for rule in ("adamw", "sgd", "adafactor", "adalomo", "adam_mini", "adam8bit", "adam4bit")
}


@pytest.mark.parametrize("name", ROWS)
def test_state_is_what_the_rule_promises(name):
    """Wide enough to be coded. Held after two steps, and with `until: backward` too."""
    try:
        rows = [ROWS[name], {**ROWS[name], "until": "backward"}]
        read_row("row", rows[0])
    except IllegalRegime as refusal:
        assert any(
            words in str(refusal)
            for words in ("writes weights itself", "are packed", "keeps squares of gradients")
        )
        return
    for row in rows:
        _, _, trainer = micro.train(row, steps=2, hidden_size=64, num_hidden_layers=1)
        named = trainer._turns[0].leaves.named
        assert trainer.optimizer_state_bytes() == trainer.regime.rule_for(
            trainer.model, named
        ).state_bytes(named.values())


def test_a_row_that_trains_nothing_holds_no_state_and_makes_no_optimizer():
    regime, model = read_regimes()["zero_shot"], micro.model(num_hidden_layers=1)
    named = dict(model.named_parameters())
    rule = regime.rule_for(model, named)
    assert rule.state_bytes(named.values()) == 0
    with pytest.raises(AssertionError, match="trains nothing"):
        rule.make(named.values(), 1.0)


@pytest.mark.parametrize(
    "name", ["master", "bf16_sr", "adam8bit", "adam4bit", "adam_mini", "adafactor_backward"]
)
def test_the_forecasts_ledger_holds_what_the_rule_promises(name):
    regime = read_regimes()[name]
    config = micro.model(hidden_size=64, num_hidden_layers=1).config
    traced = trace(ModelSpec("micro", config, None), regime, seq=16, batch=1, mode="vgpu")
    model = micro.model(hidden_size=64, num_hidden_layers=1)
    named = dict(regime.weights.prepare(model).named_parameters())
    rows = traced.device_rows().query("category == 'optimizer'")
    held = rows["bytes"].where(rows["event"] == "alloc", -rows["bytes"]).sum()
    assert held == regime.rule_for(model, named).state_bytes(named.values())


NEW = (
    "bf16",
    "bf16_sr",
    "master",
    "sgd",
    "lomo",
    "adafactor",
    "adafactor_backward",
    "adalomo",
    "adam8bit",
    "adam4bit",
    "adam_mini",
)


@pytest.mark.parametrize("name", NEW)
def test_every_row_learns(name):
    regime = read_regimes()[name]
    trainer = Trainer(micro.model(hidden_size=64), regime, Schedule(regime.lr, 20))
    losses = [float(trainer.step([micro.batch(0)])) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.3, losses
