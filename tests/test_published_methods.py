"""Where a published package computes something else than its paper, the field that says so gives
the package's numbers: 30 steps beside the package, or beside its algorithm written out here where
the package is not installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import micro
from micro import model
from vramlab.baichuan import ModelSpec
from vramlab.forecast.trace import trace
from vramlab.regimes.grads.keyed_random import normal
from vramlab.regimes.regime import read_regimes, read_row
from vramlab.regimes.rule.projected import Apollo, GaLore
from vramlab.regimes.rule.rules import Adafactor, AdaLomo
from vramlab.regimes.rule.sliced import LeafContext
from vramlab.training.trainer import Schedule, Trainer

STEPS = 30
SPEC = ModelSpec("micro", model().config, None)
SHAPES = {
    "layers.0.wide": (7, 12),
    "layers.0.tall": (33, 5),
    "layers.0.square": (9, 9),
    "layers.0.norm": (6,),
    "embed": (11, 4),
}
MATRICES = ("layers.0.wide", "layers.0.tall", "layers.0.square")


def batch(seed: int) -> dict:
    return micro.batch(seed, rows=2, tokens=6)


def _params(dtype=torch.float64) -> dict[str, nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    numbers = {
        name: torch.randn(shape, generator=draws, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }
    return {name: nn.Parameter(tensor.to(dtype)) for name, tensor in numbers.items()}


def _gradients(step: int) -> dict[str, torch.Tensor]:
    """Small enough for eps to count, and at every fourth step ten times as large, so that APOLLO's
    limit is met."""
    draws = torch.Generator().manual_seed(100 + step)
    size = 1e-4 * (10 if step % 4 == 3 else 1)
    return {
        name: size * torch.randn(shape, generator=draws, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def _trained(params, optimizer) -> dict[str, nn.Parameter]:
    for step in range(STEPS):
        for name, gradient in _gradients(step).items():
            params[name].grad = gradient.to(params[name].dtype, copy=True)
        optimizer.step()
    return params


def _ours(rule, dtype=torch.float64) -> dict[str, nn.Parameter]:
    params = _params(dtype)
    return _trained(
        params,
        rule.bind(LeafContext(names={id(p): name for name, p in params.items()})).make(
            params.values(), 0.1
        ),
    )


def _close(ours, theirs, tolerance=1e-9) -> None:
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name].detach(),
            tensor.detach().to(ours[name].dtype),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize(("rank", "gap"), [(3, 7), (99, 200)])
def test_galore_follows_galore_torch(rank, gap):
    from galore_torch import GaLoreAdamW

    params = _params()
    low = {
        "params": [params[name] for name in MATRICES],
        "rank": rank,
        "update_proj_gap": gap,
        "scale": 0.25,
        "proj_type": "std",
    }
    rest = {"params": [p for name, p in params.items() if name not in MATRICES]}
    theirs = _trained(
        params,
        GaLoreAdamW([low, rest], lr=0.1, eps=1e-6, weight_decay=0.3, no_deprecation_warning=True),
    )
    options = {"rank": rank, "gap": gap, "eps": 1e-6, "weight_decay": 0.3}
    _close(_ours(GaLore(**options, follows="package")), theirs)
    with pytest.raises(AssertionError):
        _close(_ours(GaLore(**options), torch.float32), theirs, 1e-4)


def _adam(m, v, grad, step, rule):
    """A step of the AdamW in both packages: (m, v, the direction before bias correction, what
    corrects it)."""
    m, v = rule.beta1 * m + (1 - rule.beta1) * grad, rule.beta2 * v + (1 - rule.beta2) * grad**2
    return (
        m,
        v,
        m / (v.sqrt() + rule.eps),
        math.sqrt(1 - rule.beta2 ** (step + 1)) / (1 - rule.beta1 ** (step + 1)),
    )


def _apollo_torch(name, weight, rule, lr=0.1):
    """What apollo-torch 1.0.3 does to one leaf, dense, with this project's random numbers in place
    of the package's."""
    matrix, flip = name in MATRICES, weight.dim() == 2 and weight.shape[0] >= weight.shape[1]
    weight = weight.detach().T if flip else weight.detach()
    m = v = torch.zeros((), dtype=torch.float64)
    last = None
    for step in range(STEPS):
        grad = _gradients(step)[name]
        grad = low = grad.T if flip else grad
        if matrix:
            rank = min(rule.rank, len(grad))
            drawn = normal(
                (len(grad), rank), torch.device("cpu"), rule.seed, name, step // rule.gap
            )
            low = (drawn / rank**0.5).double().T @ grad
        m, v, update, correction = _adam(m, v, low, step, rule)
        if matrix:
            over = None if rule.per_tensor else 0
            update = grad * (
                torch.linalg.vector_norm(update, dim=over)
                / (torch.linalg.vector_norm(low, dim=over) + 1e-8)
            )
            limiter = (
                1.0
                if last is None
                else max(float(update.norm()) / (last + 1e-8), rule.growth) / rule.growth
            )
            last = float(update.norm()) / limiter
            update = update / limiter * rule.scale**0.5
        weight = weight - lr * correction * update
        weight = weight - lr * rule.weight_decay * weight
    return weight.T if flip else weight


@pytest.mark.parametrize(
    "options",
    [{"rank": 3, "gap": 7}, {"rank": 1, "gap": 200, "scale": 128.0, "per_tensor": True}],
    ids=str,
)
def test_apollo_follows_apollo_torch(options):
    options = {**options, "eps": 1e-6, "weight_decay": 0.3}
    rule = Apollo(**options, follows="package")
    theirs = {name: _apollo_torch(name, weight, rule) for name, weight in _params().items()}
    _close(_ours(rule), theirs)
    with pytest.raises(AssertionError):
        _close(_ours(Apollo(**options), torch.float32), theirs, 1e-4)


@pytest.mark.parametrize("rule", ["galore", "apollo"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_state_that_follows_a_package_is_what_the_rule_promises(rule, weights):
    row = read_row(
        "row",
        {
            "rule": {rule: {"rank": 3, "follows": "package"}},
            "weights": weights,
            "until": "backward",
            "head": "fused",
        },
    )
    trainer = Trainer(model(), row, Schedule(1e-2, 2))
    trainer.step([batch(0)])
    named = dict(trainer.model.named_parameters())
    assert trainer.optimizer_state_bytes() == row.rule_for(trainer.model, named).state_bytes(
        named.values()
    )


def test_rows_of_a_gradient_are_updated_as_the_whole_of_it():
    losses = []
    for until in ("step", "backward"):
        row = read_row(
            "row",
            {
                "rule": {"galore": {"rank": 3, "follows": "package", "weight_decay": 0.1}},
                "until": until,
                "head": "fused",
            },
        )
        trainer = Trainer(model(), row, Schedule(1e-2, 6))
        losses.append([float(trainer.step([batch(step)])) for step in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_row_that_follows_a_package_can_be_forecast():
    row = read_row(
        "row",
        {
            "rule": {"apollo": {"rank": 3, "follows": "package"}},
            "until": "backward",
            "head": "fused",
        },
    )
    assert trace(SPEC, row, 16, 1).frame is not None


def _trainer(row: dict, lr: float, steps: int = STEPS) -> Trainer:
    return Trainer(model(), read_row("row", row), Schedule(lr, steps))


@pytest.mark.parametrize(("clip_norm", "head"), [(0.0, "plain"), (0.5, "fused")])
def test_lomo_decays_as_lomo_optim_does(clip_norm, head):
    from lomo_optim import Lomo

    row = {
        "until": {"backward": {"clip_norm": clip_norm}},
        "rule": {"sgd": {"weight_decay": 0.3}},
        "head": head,
    }
    trainer, reference = _trainer(row, 0.1), model()
    theirs = Lomo(reference, lr=0.1, clip_grad_norm=clip_norm or None, weight_decay=0.3)
    for step in range(STEPS):
        trainer.step([batch(step)])
        loss = reference(**batch(step)).loss
        if clip_norm:
            theirs.grad_norm(loss)
        theirs.fused_backward(loss, trainer.schedule.at(step))
    _close(trainer.model.state_dict(), reference.state_dict(), 1e-4)


@pytest.mark.parametrize(
    "storage",
    [
        {"rule": {"sgd": {"weight_decay": 0.3}}},
        {"rule": {"sgd": {"weight_decay": 0.3}}, "until": "backward", "head": "fused"},
        {"rule": {"sgd": {"weight_decay": 0.3}}, "weights": "master"},
    ],
    ids=str,
)
def test_every_way_of_storing_weights_decays_them(storage):
    """Of lr 0.5 and decay 0.3 a weight without a gradient keeps 0.85 a step."""
    trainer = Trainer(model(), read_row("row", storage), Schedule(0.5, STEPS, warmup=0, floor=1))
    table = trainer.model.model.embed_tokens.weight
    before = table.detach().clone()
    for step in range(2):
        trainer.step([batch(step)])
    unused = sorted(
        set(range(61))
        - {int(token) for step in range(2) for token in batch(step)["input_ids"].flatten()}
    )
    torch.testing.assert_close(table[unused], before[unused] * 0.85**2, rtol=1e-2, atol=1e-4)


def test_adalomo_decays_as_lomo_optim_does(monkeypatch):
    """By its step, which is relative to the weight's size; with the loss scale of 2^10 that it has
    by default."""
    from lomo_optim import AdaLomo as Published

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(20, 37), nn.Tanh(), nn.Linear(37, 9))
    ours = nn.Sequential(nn.Linear(20, 37), nn.Tanh(), nn.Linear(37, 9))
    ours.load_state_dict(theirs.state_dict())
    published, optimizer = (
        Published(theirs, weight_decay=0.5),
        AdaLomo(weight_decay=0.5).bind().make(list(ours.parameters()), 0.1),
    )
    for step in range(STEPS):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        published.fused_backward(theirs(x).square().mean(), 0.1)
        ours(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    _close(ours.state_dict(), theirs.state_dict(), 1e-4)


def test_adafactor_decays_as_torchs_does():
    """By lr as it is given."""
    theirs = _params(torch.float32)
    _trained(theirs, torch.optim.Adafactor(theirs.values(), lr=0.1, weight_decay=0.5))
    _close(_ours(Adafactor(weight_decay=0.5), torch.float32), theirs, 1e-4)


def _step(reference, optimizers, active, seed, lr) -> None:
    """One step of a loop that trains the parameters named `active`."""
    for name, param in reference.named_parameters():
        param.requires_grad_(name in active)
    reference(**batch(seed)).loss.backward()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _adamw(params) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(params), weight_decay=0.0, fused=True)


def test_lisa_with_state_device_is_lmflows():
    """LMFlow's callback only switches requires_grad: one AdamW of all parameters, which never drops
    a state."""
    blocks = {"interval": 4, "sample": 1, "state": "device", "ends": "always"}
    trainer, reference = _trainer({"trains": {"blocks": blocks}}, 1e-2), model()
    names, optimizer, sizes = (
        [name for name, _ in reference.named_parameters()],
        _adamw(reference.parameters()),
        [],
    )
    for step in range(STEPS):
        drawn = {f"model.layers.{index}." for index in trainer.regime.trains.active(step, 4)[:-1]}
        active = {
            name
            for name in names
            if ".layers." not in name or any(name.startswith(block) for block in drawn)
        }
        _step(reference, [optimizer], active, step, trainer.schedule.at(step))
        trainer.step([batch(step)])
        sizes.append(trainer.optimizer_state_bytes())
    _close(trainer.model.state_dict(), reference.state_dict(), 1e-6)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert sizes[-1] == sum(
        value.nbytes for entry in optimizer.state.values() for value in entry.values()
    )
    assert sizes[-1] == sum(8 * p.numel() + 4 for p in reference.parameters())  # full AdamW's


def test_hift_with_a_norm_of_its_own_is_the_published_codes():
    """Groups from the embeddings up, the final norm between the last block and the head; a state
    each, and one rate a cycle."""
    blocks = {
        "interval": 1,
        "order": "ascending",
        "state": "host",
        "ends": "units",
        "norm": "own",
        "delayed_lr": True,
    }
    trainer, reference = _trainer({"trains": {"blocks": blocks}}, 1e-2), model()
    prefixes = [
        "model.embed_tokens.",
        *(f"model.layers.{index}." for index in range(3)),
        "model.norm.",
        "lm_head.",
    ]
    named = list(reference.named_parameters())
    groups = [{name: p for name, p in named if name.startswith(prefix)} for prefix in prefixes]
    optimizers = [_adamw(group.values()) for group in groups]
    for step in range(STEPS):
        turn = step % len(groups)
        _step(reference, [optimizers[turn]], groups[turn], step, trainer.schedule.at(step - turn))
        trainer.step([batch(step)])
        assert set(trainer.active) == set(groups[turn])
    _close(trainer.model.state_dict(), reference.state_dict(), 1e-6)


DIFFER = (
    "lomo",
    "lomo_clip",
    "adafactor",
    "adafactor_backward",
    "adalomo",
    "adam_mini",
    "galore",
    "galore_layerwise",
    "apollo",
    "apollo_mini",
    "badam",
    "chunkft",
    "hift",
    "lisa",
    "mezo",
)


def test_rows_whose_published_code_differs_say_how():
    rows = read_regimes()
    assert {name for name, row in rows.items() if row.differs} >= set(DIFFER)
    assert all("package" in rows[name].differs for name in ("galore", "apollo"))
