"""Approximated gradients: what is exact in them, what they hold, and what they are worth on a small
language."""

import itertools
import math
from copy import deepcopy

import pandas as pd
import pytest
import torch
from torch import nn

import measured_step
import micro
from conftest import SMALL
from micro import batch, model, train
from vramlab.baichuan import BaichuanConfig, ModelSpec
from vramlab.forecast.trace import trace
from vramlab.observer import Observer
from vramlab.regimes.grads.predicted import GUESS, Predicted, Writers, sites
from vramlab.regimes.grads.update_head import UpdatedNorm
from vramlab.regimes.place.place import Device
from vramlab.regimes.regime import IllegalRegime, read_regimes, read_row
from vramlab.regimes.rule.rules import Sgd
from vramlab.regimes.until.until import Step
from vramlab.training.trainer import Schedule, Trainer

TRUE = {"trains": "writers"}


def predicted(by: str, **fields) -> dict:
    return {**TRUE, "grads": {"predicted": {"by": by, **fields}}}


def adapters(weights: dict) -> dict:
    return {name: tensor for name, tensor in weights.items() if "lora_B" in name}


def same(one: dict, other: dict) -> bool:
    return (
        one.keys() == other.keys()
        and bool(one)
        and all(torch.equal(one[name], other[name]) for name in one)
    )


@pytest.mark.parametrize("by", ["learned", "identity", "random"])
@pytest.mark.parametrize("acts", ["keep", "checkpoint", "offload"])
def test_nothing_but_anchors_is_lora_with_a_frozen(by, acts):
    losses, weights, _ = train({**TRUE, "acts": acts})
    others, guessed, _ = train({**predicted(by, every=1), "acts": acts})
    assert others == losses and same(adapters(guessed), adapters(weights))


def test_a_frozen_a_stays_and_b_moves():
    before, (_, after, _) = (
        Trainer(model(), read_row("row", TRUE), Schedule(1e-2, 4)).model.state_dict(),
        train(TRUE),
    )
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == set(adapters(after))


class _Oracle(nn.Module):
    """Guesses the truth."""

    def __init__(self, true: dict):
        super().__init__()
        self.true = true

    def read(self, site, h):
        return None

    def forward(self, site, read, end):
        return self.true[site]


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_true_guess_gives_the_exact_gradient(position):
    value, net = (
        Predicted(by="identity", every=0),
        Writers(rank=3).prepare(model(position).double(), 0),
    )
    net.requires_grad_(False)
    for index, site in enumerate(sites(net)):
        torch.manual_seed(index)
        nn.init.normal_(
            site.weight.requires_grad_()
        )  # B = 0 would have no part in any gradient but its own
    true, handles = {}, []
    for index, site in enumerate(sites(net)):
        handles.append(
            site.writer.register_forward_hook(
                lambda _, __, out, index=index: (
                    out.register_hook(lambda d: true.__setitem__(index, d)) and None
                )
            )
        )
    net(**batch(1)).loss.backward()
    exact = {site.name: site.weight.grad for site in sites(net)}
    [handle.remove() for handle in handles]
    net.zero_grad()
    net.add_module(GUESS, _Oracle(true))
    updater = value.updater(
        Device(),
        Step(),
        Sgd().bind(),
        net,
        {site.name: site.weight for site in sites(net)},
        1.0,
        Observer(),
    )
    updater.begin(0, 1.0)
    with updater.run(0):
        updater.take(net(**batch(1)).loss)
    assert len(true) == 6 and all(grad.abs().sum() > 0 for grad in exact.values())
    for site in sites(net):
        torch.testing.assert_close(site.weight.grad, exact[site.name], rtol=1e-12, atol=1e-15)


def test_the_top_writers_gradient_is_never_guessed_and_g_starts_as_the_identity():
    rows = {
        by: train(predicted(by, every=1), steps=1)[2].probes()
        for by in ("learned", "identity", "random")
    }
    for by, (*below, top, _) in rows.items():
        assert top["site"] == "layers.2.mlp.down_proj" and len(below) == 5
        assert top["cosine"] == pytest.approx(1, abs=1e-5) and top["norm_ratio"] == pytest.approx(
            1, abs=1e-5
        ), by
    assert str(rows["learned"]) == str(rows["identity"])
    assert rows["random"][0]["cosine"] < rows["identity"][0]["cosine"]


def test_what_is_probed_is_the_gradient_that_is_used():
    """The guess of a probed step, from the weights' own change under SGD, against autograd's
    gradient."""
    row = read_row("row", {**predicted("random", every=0, probe=1), "rule": "sgd"})
    trainer = Trainer(model(), row, Schedule(1.0, 1, warmup=0))
    leaves = {site.name: site.weight for site in sites(trainer.model)}
    before, reference = (
        {name: leaf.detach().clone() for name, leaf in leaves.items()},
        deepcopy(trainer.model),
    )
    [site.weight.requires_grad_() for site in sites(reference)]
    reference(**batch(5)).loss.backward()
    trainer.step([batch(5)])
    for probed, site in zip(trainer.probes()[:-1], sites(reference), strict=True):
        used, true = (
            (before[site.name] - leaves[site.name].detach()).flatten(),
            site.weight.grad.flatten(),
        )
        assert probed["cosine"] == pytest.approx(
            float(nn.functional.cosine_similarity(used, true, 0)), abs=1e-4
        )
        assert probed["norm_ratio"] == pytest.approx(float(used.norm() / true.norm()), rel=1e-3)


@pytest.mark.parametrize(
    "row",
    [
        predicted("identity", every=0),
        predicted("learned", every=2),
        {"trains": "update_head", "grads": "amortised"},
    ],
    ids=["identity", "learned", "literal"],
)
def test_probing_changes_nothing(row):
    ((value, fields),) = (
        row["grads"].items() if isinstance(row["grads"], dict) else [(row["grads"], {})]
    )
    quiet = train({**row, "accumulate": 2})
    probed = train({**row, "accumulate": 2, "grads": {value: {**fields, "probe": 1, "drop": True}}})
    assert probed[0] == quiet[0] and same(probed[1], quiet[1])
    rows = [row for row in probed[2].probes() if row["site"] == "all"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(
        math.isfinite(row["drop_ratio"]) for row in rows
    )


def test_a_step_along_the_true_gradient_falls_as_far_as_along_itself():
    rows = train(predicted("identity", every=1, drop=True), num_hidden_layers=1)[2].probes()
    _, top, _ = rows[:3]
    everything = [row for row in rows if row["site"] == "all"]
    assert top["cosine"] == pytest.approx(1, abs=1e-5)
    for row in everything:  # a short step: the fall is the cosine, but for curvature
        assert row["drop_ratio"] == pytest.approx(row["cosine"], abs=0.05)


def test_guesses_add_up_over_micro_batches():
    together = {key: torch.cat([batch(1)[key], batch(2)[key]]) for key in batch(1)}
    changes = []
    for batches in ([together], [batch(1), batch(2)]):
        row = read_row(
            "row", {**predicted("random", every=0), "rule": "sgd", "accumulate": len(batches)}
        )
        trainer = Trainer(model(), row, Schedule(1.0, 1, warmup=0))
        trainer.step(batches)
        changes.append([site.weight.detach().clone() for site in sites(trainer.model)])
    for one, other in zip(*changes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_g_learns_what_it_is_shown():
    """On one batch, with the adapters all but standing still, its error falls and the guess comes
    nearer to the truth."""

    def cosines(by: str) -> list[float]:
        row = read_row("row", predicted(by, every=1, depth=2, rank=8))
        trainer = Trainer(model(num_hidden_layers=4), row, Schedule(3e-3, 10**6, warmup=0))
        for _ in range(50):
            trainer.step([batch(1)])
            [nn.init.zeros_(site.weight) for site in sites(trainer.model)]
        return [row["cosine"] for row in trainer.probes() if row["site"] == "all"]

    learned, identity = cosines("learned"), cosines("identity")
    assert learned[0] == pytest.approx(identity[0]) and learned[-1] > 0.5 * (1 + identity[-1])


@pytest.mark.parametrize(
    "row",
    [
        predicted("learned", every=2, drop=True),
        predicted("random", every=0),
        {"trains": "update_head", "grads": {"amortised": {"probe": 1}}},
    ],
    ids=str,
)
def test_the_head_may_be_fused(row):
    (losses, _, plain), (others, _, fused) = train(row), train({**row, "head": "fused"})
    assert others == pytest.approx(losses, rel=1e-5)
    for one, other in zip(plain.probes(), fused.probes(), strict=True):
        assert other["site"] == one["site"] and other["cosine"] == pytest.approx(
            one["cosine"], abs=1e-3
        )


class _Saved(Observer):
    """Bytes that autograd saves in each forward, parameters left out."""

    def __init__(self):
        self.steps = []

    def phase(self, name):
        if name != "forward":
            return super().phase(name)
        seen = {}
        self.steps.append(seen)

        def pack(tensor):
            if not isinstance(tensor, nn.Parameter):
                seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


@pytest.mark.parametrize(
    "row",
    [predicted("learned", every=2), predicted("random", every=2), {"trains": "update_head"}],
    ids=str,
)
def test_between_anchors_blocks_keep_nothing(row):
    bytes_by_depth = []
    for layers in (2, 6):
        observer = _Saved()
        train(row, steps=2, observer=observer, num_hidden_layers=layers)
        bytes_by_depth.append([sum(seen.values()) for seen in observer.steps])
    shallow, deep = bytes_by_depth
    assert deep[1] == shallow[1] > 0
    assert (deep[0] > shallow[0]) == (row["trains"] == "writers"), "an anchor's blocks keep theirs"


def test_a_block_costs_its_weights_its_adapters_and_r_numbers_a_token():
    tokens, rank, row = (
        2 * 64,
        4,
        {
            "trains": {"writers": {"rank": 4}},
            "grads": {"predicted": {"by": "identity", "every": 0}},
        },
    )
    sizes = {**measured_step.SIZES, "num_hidden_layers": 2}
    peaks, nets = [], []
    for layers in (2, 4):
        spec = ModelSpec(
            "middle",
            BaichuanConfig(position="rope", **{**sizes, "num_hidden_layers": layers}),
            None,
        )
        peaks.append(trace(spec, read_row("row", row), 64, 2, mode="cpu").peak_bytes)
        nets.append(
            sum(
                p.nbytes for p in micro.model(**{**sizes, "num_hidden_layers": layers}).parameters()
            )
        )
    hidden, inside = sizes["hidden_size"], sizes["intermediate_size"]
    b, a = 2 * 2 * hidden * rank, 2 * (hidden + inside) * rank  # numbers in two blocks' B and A
    moments = 2 * 4 * b + 4 * 4  # of AdamW, and four step counts
    codes = 2 * 2 * tokens * rank * 4
    assert peaks[1] - peaks[0] == nets[1] - nets[0] + 4 * (a + b) + moments + codes


def test_a_forecast_reports_an_anchor_with_the_state_that_is_held():
    spec, row = ModelSpec("micro", model().config, None), read_regimes()["approx_residual"]
    said = trace(spec, row, 11, 3)
    assert said.step == 2 and said.phase in ("backward", "recompute")
    trainer = Trainer(model(), row, Schedule(1e-3, 3))
    [trainer.step([batch(step)]) for step in range(3)]
    held, leaves = trainer.optimizer_state_bytes(), list(trainer.active.values())
    assert held == trainer.regime.rule.bind().state_bytes(leaves) == said.ledger["optimizer"]
    assert sum(GUESS in name for name in trainer.active) == 5 * 4, (
        "five sites below the top, four tensors of G each"
    )


def test_an_update_head_starts_as_the_identity():
    trainer, base = (
        Trainer(model(), read_row("row", {"trains": "update_head"}), Schedule(1e-2, 1)),
        model().eval(),
    )
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**batch(3)).logits, base(**batch(3)).logits)


def test_an_update_head_without_eta_is_a_bias():
    """eta = 0: the same training as that of one bias P theta behind the final norm, and G gets no
    gradient."""
    row = {"trains": {"update_head": {"eta": 0.0, "code": 5}}, "rule": "sgd"}
    losses, weights, trainer = train(row, lr=0.5)
    net, start = model(), Trainer(model(), read_row("row", row), Schedule(1.0, 1)).model.model.norm
    theta, project = (
        nn.Parameter(start.theta.detach().clone()),
        nn.Parameter(start.project.weight.detach().clone()),
    )
    net.model.norm.register_forward_hook(lambda _, __, hidden: hidden + project @ theta)
    schedule, others = Schedule(0.5, 4), []
    for step in range(4):
        loss = net(**batch(100 * step)).loss
        others.append(float(loss.detach()))
        for param, grad in zip(
            (theta, project), torch.autograd.grad(loss, (theta, project)), strict=True
        ):
            param.data -= schedule.at(step) * grad
    assert losses == pytest.approx(others, rel=1e-5) and losses[-1] != losses[0]
    torch.testing.assert_close(
        weights["model.norm.project.weight"], project.detach(), rtol=1e-4, atol=1e-6
    )
    assert all(
        torch.equal(p, q)
        for p, q in zip(
            trainer.model.model.norm.approximator.parameters(),
            start.approximator.parameters(),
            strict=True,
        )
    )


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_depth_counts_layers(depth):
    head = UpdatedNorm(model().model.norm, depth, 6, 7, 1.0)
    assert sum(isinstance(module, nn.Linear) for module in head.approximator) == depth
    trainer = Trainer(
        model(), read_row("row", predicted("learned", depth=depth)), Schedule(1e-2, 3)
    )
    losses = [float(trainer.step([batch(0)])) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert len(getattr(trainer.model, GUESS).approximators[0].middle) == depth - 1


@pytest.mark.parametrize("weights", ["fp32", "mixed", "bf16"])
def test_every_guess_trains_in_every_type_under_every_rule(weights):
    for by, (rule, accumulate, clip, acts) in itertools.product(
        ("learned", "identity", "random"),
        (
            ("adamw", 1, 0.0, "keep"),
            ("sgd", 2, 0.5, "checkpoint"),
            ("adafactor", 2, 0.5, "offload"),
        ),
    ):
        row = {
            **predicted(by, every=2),
            "weights": weights,
            "rule": rule,
            "accumulate": accumulate,
            "acts": acts,
            "clip": 0.0 if by == "learned" else clip,
        }
        losses, after, _ = train(row, steps=2, lr=0.1)
        assert all(math.isfinite(loss) for loss in losses) and any(
            w.abs().sum() > 0 for w in adapters(after).values()
        ), row


REFUSED = [
    ({"grads": "predicted"}, "trains: writers"),
    ({**predicted("identity"), "until": "backward"}, "until: step"),
    ({**predicted("learned"), "clip": 1.0}, "by: identity"),
    ({**predicted("identity", every=0), "acts": "checkpoint"}, "every: 8"),
    ({"trains": "update_head", "acts": "offload"}, "acts: keep"),
    ({"grads": "amortised"}, "trains: update_head"),
    ({"trains": "update_head", "grads": "amortised", "place": "fsdp"}, "place: device"),
    (predicted("learned", every=0), "every: 8"),
    (predicted("oracle"), "learned, identity, random"),
    (predicted("learned", depth=0), "1 to 100"),
    (predicted("learned", probe=-1), "0 or more"),
    ({"trains": {"writers": {"targets": ["W_pack"]}}}, "trains: lora"),
    ({"trains": {"update_head": {"depth": 0}}}, "1 to 100"),
    ({"trains": "update_head", "grads": {"amortised": {"probe": -1}}}, "0 or more"),
]


@pytest.mark.parametrize(
    ("row", "way_out"), REFUSED, ids=[str(index) for index in range(len(REFUSED))]
)
def test_each_refusal_is_reachable_alone_and_says_the_way_out(row, way_out):
    with pytest.raises(IllegalRegime) as refusal:
        read_row("row", row)
    assert way_out in str(refusal.value) and len(str(refusal.value).splitlines()) <= 2


def test_a_run_keeps_its_probes(tmp_path):
    from vramlab.runs.execute import execute

    params = {
        **SMALL,
        "val_items": 8,
        "test_items": 8,
        "regime": "approx_residual",
        "measure": False,
    }
    folder = execute(params, tmp_path / "run", progress=False)
    probes = pd.read_parquet(folder / "probes.parquet")
    assert (
        set(probes["step"]) == {0}
        and probes["site"].iloc[-1] == "all"
        and probes["cosine"].between(-1, 1.001).all()
    )


# A small language, see the test below -------------------------------------------------------------

WORDS, SIZES = (
    32,
    {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
    },
)


def _texts(
    seed: int, renamed: torch.Tensor, count: int, rows: int = 16, tokens: int = 16
) -> list[dict]:
    """Batches of a language where a word decides which are likely to follow; then every word is
    renamed."""
    table = torch.softmax(
        3 * torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(1)), -1
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (count * rows, tokens), generator=generator)
    for t in range(1, tokens):
        ids[:, t] = torch.multinomial(table[ids[:, t - 1]], 1, generator=generator)[:, 0]
    return [{"input_ids": part, "labels": part.clone()} for part in renamed[ids].split(rows)]


def _learn(net: nn.Module, row: dict, texts: list[dict], lr: float) -> Trainer:
    """A copy of `net` trained on the texts, one a step."""
    trainer = Trainer(deepcopy(net), read_row("row", row), Schedule(lr, len(texts)))
    for text in texts:
        trainer.step([text])
    trainer.finish()
    return trainer


@torch.no_grad()
def _loss(net: nn.Module, texts: list[dict]) -> float:
    return sum(float(net(**text).loss) for text in texts) / len(texts)


def test_on_a_small_language_identity_adapts_far_better_than_random_feedback():
    """What one toy shows: qualitative, one seed, and no result about a 7B. The literal guess is
    near the gradient where theta has not been updated, since that one can be told from H; at theta'
    what can be told from H is gone.
    """
    same_words, other_words = (
        torch.arange(WORDS),
        torch.randperm(WORDS, generator=torch.Generator().manual_seed(9)),
    )
    base = _learn(model(**SIZES), {}, _texts(2, same_words, 100), 5e-3).model
    texts, unseen = _texts(3, other_words, 60), _texts(4, other_words, 8)
    rows = {
        "true": TRUE,
        "identity": predicted("identity", every=0, probe=59),
        "random": predicted("random", every=0, probe=59),
        "learned": predicted("learned", every=8),
        "literal": {"trains": {"update_head": {"depth": 1}}, "grads": {"amortised": {"probe": 59}}},
    }
    loss, cosine, zero_shot = {}, {}, _loss(base, unseen)
    for name, row in rows.items():
        trainer = _learn(base, row, texts, 1e-2)
        loss[name] = _loss(trainer.model, unseen)
        cosine[name] = {row["site"]: row["cosine"] for row in trainer.probes()}  # of the last probe
    share = {name: (zero_shot - value) / (zero_shot - loss["true"]) for name, value in loss.items()}
    assert zero_shot - loss["true"] > 1
    assert (
        share["identity"] > 0.85
        and share["learned"] > 0.85
        and share["random"] < 0.6
        and share["literal"] > 1
    )
    assert (
        cosine["identity"]["all"] > 0.4
        and cosine["learned"]["all"] > 0.3
        and abs(cosine["random"]["all"]) < 0.2
    )
    assert cosine["literal"]["all"] > 0.4 and abs(cosine["literal"]["updated"]) < 0.1
