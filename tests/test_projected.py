"""Low-rank rules: GaLore is the published one, APOLLO the paper's, and their bytes are exactly what
they say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from micro import train
from vramlab.forecast.trace import trace
from vramlab.forecast.virtual_gpu import virtual_gpu
from vramlab.regimes.grads.keyed_random import normal
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import read_row
from vramlab.regimes.rule.projected import Apollo, GaLore
from vramlab.regimes.rule.sliced import LeafContext

SHAPES = {
    "layers.0.wide": (7, 12),
    "layers.0.tall": (33, 5),
    "layers.0.square": (9, 9),
    "layers.0.norm": (6,),
    "embed": (11, 4),
}

MATRICES = ("layers.0.wide", "layers.0.tall", "layers.0.square")


def _params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def _gradients(params, step, growth=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params.values():
        param.grad = (growth**step * torch.randn(param.shape, generator=generator)).to(param.dtype)


def _optimizer(rule, params, lr=0.1):
    return rule.bind(LeafContext(names={id(p): name for name, p in params.items()})).make(
        params.values(), lr
    )


def _ours(rule, params, steps=6, growth=1.0, optimizer=None, first=0):
    optimizer = optimizer or _optimizer(rule, params)
    for step in range(first, steps):
        _gradients(params, step, growth)
        optimizer.step()
    return optimizer


def _published(params, rank, gap, scale, eps, steps=6):
    from galore_torch import GaLoreAdamW

    matrices = [params[name] for name in MATRICES]
    rest = [p for p in params.values() if all(p is not matrix for matrix in matrices)]
    low = {
        "params": matrices,
        "rank": rank,
        "update_proj_gap": gap,
        "scale": scale,
        "proj_type": "std",
    }
    optimizer = GaLoreAdamW([low, {"params": rest}], lr=0.1, eps=eps, no_deprecation_warning=True)
    for step in range(steps):
        _gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("rank", [1, 3, 99])
@pytest.mark.parametrize("gap", [1, 4])
def test_galore_is_the_published_galore(rank, gap):
    """eps 0: the published code adds it before the moment's bias is corrected, torch and the paper
    after."""
    ours, theirs = _params(), _params()
    _ours(GaLore(rank=rank, gap=gap, eps=0.0), ours)
    _published(theirs, rank, gap, 0.25, 0.0)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_galore_in_bf16_is_no_further_from_the_truth_than_the_published_one():
    exact, ours, theirs = _params(), _params(torch.bfloat16), _params(torch.bfloat16)
    for name, param in exact.items():
        param.data.copy_(ours[name])
    _published(exact, 3, 4, 0.25, 0.0)
    _ours(GaLore(rank=3, gap=4, eps=0.0), ours)
    _published(theirs, 3, 4, 0.25, 0.0)
    for name in MATRICES:
        error, plain = ((p[name].float() - exact[name]).norm() for p in (ours, theirs))
        assert error <= 1.1 * plain, name


def test_galore_at_full_rank_with_sgd_inside_is_sgd():
    ours, theirs = _params(), _params()
    _ours(GaLore(rank=99, gap=3, scale=1.0, inner="sgd"), ours)
    _ours(None, theirs, optimizer=torch.optim.SGD(theirs.values(), lr=0.1))
    for name in MATRICES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


def _apollo_of_the_paper(name, weight, rule, lr, steps, growth):
    """Algorithm 1 of arXiv:2412.05270 for one matrix, dense and slow, in fp64 but for the drawn
    projection."""
    weight, flip = weight.detach().double(), weight.shape[0] >= weight.shape[1]
    weight = weight.T if flip else weight
    m = v = before = None
    for step in range(steps):
        params = {key: nn.Parameter(torch.zeros(shape)) for key, shape in SHAPES.items()}
        _gradients(params, step, growth)
        grad = params[name].grad.double()
        grad = grad.T if flip else grad
        rank = min(rule.rank, grad.shape[0])
        drawn = normal(
            (grad.shape[0], rank), torch.device("cpu"), rule.seed, name, step // rule.gap
        ).double()
        low = drawn.T @ grad / math.sqrt(rank)
        m = (1 - rule.beta1) * low if m is None else rule.beta1 * m + (1 - rule.beta1) * low
        v = (1 - rule.beta2) * low**2 if v is None else rule.beta2 * v + (1 - rule.beta2) * low**2
        adam = (m / (1 - rule.beta1 ** (step + 1))) / (
            (v / (1 - rule.beta2 ** (step + 1))).sqrt() + rule.eps
        )
        factor = (
            adam.norm() / low.norm()
            if rule.per_tensor
            else torch.diag(adam.norm(dim=0) / low.norm(dim=0))
        )
        update = math.sqrt(rule.scale) * (grad * factor if rule.per_tensor else grad @ factor)
        if before is not None and update.norm() > rule.growth * before:
            update *= rule.growth * before / update.norm()
        before = update.norm()
        weight = weight - lr * update
    return weight.T if flip else weight


MINI = Apollo(rank=1, gap=4, scale=128.0, per_tensor=True)


@pytest.mark.parametrize("rule", [Apollo(rank=3, gap=2), Apollo(rank=99), MINI], ids=str)
@pytest.mark.parametrize("growth", [0.7, 1.5])
def test_apollo_is_the_papers_algorithm(rule, growth):
    params = _params()
    _ours(rule, params, growth=growth)
    for name in MATRICES:
        wanted = _apollo_of_the_paper(name, _params()[name], rule, 0.1, 6, growth)
        torch.testing.assert_close(params[name].double(), wanted, rtol=1e-4, atol=1e-5)


def test_apollo_bounds_growth_and_mini_keeps_the_gradients_direction():
    params, norms = _params(), []
    optimizer = _optimizer(Apollo(rank=1, scale=128.0, per_tensor=True), params)
    tall = params["layers.0.tall"]
    for step in range(5):
        before = tall.detach().clone()
        _gradients(params, step, 3.0)
        grad = tall.grad.clone()
        optimizer.step()
        update = before - tall.detach()
        assert torch.cosine_similarity(update.flatten(), grad.flatten(), dim=0) > 1 - 1e-5
        norms.append(update.norm())
    assert all(later <= 1.0101 * earlier for earlier, later in zip(norms, norms[1:], strict=False))


def test_what_is_not_a_matrix_of_a_block_gets_adamw():
    ours, theirs = _params(), _params()
    _ours(GaLore(), ours)
    _ours(None, theirs, optimizer=torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.0))
    for name in ("layers.0.norm", "embed"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


RULES = [
    {"galore": {"rank": 4}},
    {"galore": {"rank": 99}},
    {"galore": {"rank": 3, "inner": "sgd"}},
    {"apollo": {"rank": 5}},
    {"apollo": {"rank": 1, "per_tensor": True}},
]


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_state_is_exactly_what_the_rule_promises(rule, weights):
    _, _, trainer = train({"rule": rule, "weights": weights}, steps=2)
    named = dict(trainer.model.named_parameters())
    assert trainer.optimizer_state_bytes() == trainer.regime.rule_for(
        trainer.model, named
    ).state_bytes(named.values())


def test_state_bytes_of_one_packed_projection():
    """W_pack is one matrix, 3H x H: at rank r, P (H, r) in bf16 and two moments (3H, r) in fp32."""
    leaf, rank = nn.Parameter(torch.zeros(96, 32, dtype=torch.bfloat16)), 4
    fit = LeafContext(names={id(leaf): "model.layers.0.self_attn.W_pack.weight"})
    assert GaLore(rank=rank).bind(fit).state_bytes([leaf]) == 2 * 32 * rank + 2 * 4 * 96 * rank
    assert Apollo(rank=rank).bind(fit).state_bytes([leaf]) == 2 * 4 * 96 * rank + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rule",
    [GaLore(rank=3, gap=4), Apollo(rank=3, gap=4), Apollo(rank=3, gap=4, follows="package")],
    ids=["galore", "apollo", "apollo as packaged"],
)
def test_a_run_stopped_between_two_projections_goes_on_as_if_it_had_not(rule, dtype):
    whole, halves = _params(dtype), _params(dtype)
    _ours(rule, whole, steps=7)
    saved = copy.deepcopy(_ours(rule, halves, steps=3).state_dict())
    again = _optimizer(rule, halves)
    again.load_state_dict(saved)
    _ours(rule, halves, steps=7, first=3, optimizer=again)
    assert all(torch.equal(whole[name], halves[name]) for name in SHAPES)


def test_the_forecast_reports_a_step_that_projects_anew():
    traced = trace(model_spec("tiny"), read_row("row", {"rule": "galore"}), 64, 1)
    made = traced.frame[
        (traced.frame["step"] == traced.step) & traced.frame["op"].str.contains("linalg_svd")
    ]
    assert traced.step == 1 and (made["phase"] == "update").all() and len(made)


O, I, MIB = 1024, 4096, 1 << 20  # noqa: E741
ROWS = 2 * O * I  # bytes of the matrix in bf16


@pytest.mark.parametrize(
    ("rule", "steps", "least", "most"),
    [
        (GaLore(rank=16, gap=200), 2, 0, MIB),
        (
            GaLore(rank=16, gap=200),
            1,
            4 * (O * I + O * O + O * I),
            4 * (O * I + O * O + O * I) + MIB,
        ),
        (Apollo(rank=16), 2, 0, MIB),
    ],
    ids=["galore", "galore projects anew", "apollo"],
)
def test_only_the_svd_has_temporaries_of_a_matrixs_size(rule, steps, least, most):
    with virtual_gpu() as gpu:
        weight = nn.Parameter(torch.empty(O, I, device=gpu.device, dtype=torch.bfloat16))
        optimizer, meter = _optimizer(rule, {"layers.0.matrix": weight}), gpu.meter()
        with meter:
            meter.own("weights", [("matrix", weight)])
            for step in range(steps):
                meter.begin_step(step)
                weight.grad = torch.empty_like(weight)
                meter.own("gradients", [("matrix", weight.grad)])
                with meter.phase("update"):
                    optimizer.step()
        peak = meter.peak(steps - 1)["categories"]
    beside = sum(
        size for name, size in peak.items() if name not in ("weights", "gradients", "workspace")
    )
    held = rule.bind(LeafContext(names={id(weight): "layers.0.matrix"})).state_bytes([weight])
    assert least <= beside <= most + held
