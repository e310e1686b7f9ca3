"""How far apart two trainings go from the same base, and how exact the gradient of a slice is. Arms
name them in `call:`.

Trainings that differ in one answer are run on the same batches, and their weights are compared on
the way: the distance between them as a share of the way that one has gone from the base, so that 0
is the same model and, of two that go in unrelated directions equally far, it is the square root of
2.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from vramlab.baichuan import BaichuanForCausalLM
from vramlab.observer import Observer
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import read_row
from vramlab.regimes.trains.leaves import ActiveLeaves
from vramlab.runs.parameters import resolve
from vramlab.runs.preparation import prepare

Weights = Mapping[str, Tensor]
EVERY = "all"
"""What the layers together are called."""


def apart(
    seed: int,
    common: Mapping,
    rows: Mapping[str, Mapping],
    against: Sequence[Sequence[str]],
    at: Sequence[float],
) -> pd.DataFrame:
    """Trains each of `rows` (name -> parameters of a run, over `common`; a `seed` there is added to
    this one) from the same base, and for each pair of `against` compares the two at the shares `at`
    of their own steps, ascending. Columns: `row`, `against`, `progress`, `layer`, `distance` of
    their weights, `travelled` by the second since the base, `relative`: one by the other, and
    `cosine` between the ways that the two have gone."""
    paths = {
        name: _path({**common, **said, "seed": seed + said.get("seed", 0)}, at)
        for name, said in rows.items()
    }
    found = []
    for one, other in against:
        base = paths[other][0]
        for progress, mine, theirs in zip(at, paths[one][1:], paths[other][1:], strict=True):
            found += [
                {"row": one, "against": other, "progress": progress, **gap}
                for gap in gaps(base, mine, theirs)
            ]
    return pd.DataFrame(found)


def _path(params: Mapping, at: Sequence[float]) -> list[Weights]:
    """The weights before the first step and after each of `at`."""
    prepared = prepare(resolve(params), progress=False)
    trainer = prepared.trainer(prepared.regime, copy.deepcopy(prepared.model), Observer())
    steps = prepared.params["steps"]
    due = [max(1, round(share * steps)) for share in at]
    seen = [_weights(prepared.model)]
    for done, batches in enumerate(itertools.islice(prepared.batches(), steps), 1):
        trainer.check(trainer.step(batches))
        seen += [_weights(trainer.model)] * due.count(done)
    return seen


def _weights(model: nn.Module) -> Weights:
    return {name: param.detach().double().clone() for name, param in model.named_parameters()}


def layer_of(name: str) -> str:
    """embeddings, block 0 and so on, or head, which is the final norm too."""
    if "layers." in name:
        return f"block {name.split('layers.')[1].split('.')[0]}"
    return "embeddings" if "embed_tokens" in name else "head"


def gaps(base: Weights, one: Weights, other: Weights) -> Iterator[dict]:
    """One row a layer, and one of all."""
    layers = {name: layer_of(name) for name in base}
    for layer in (*dict.fromkeys(layers.values()), EVERY):
        names = [name for name in base if layer in (layers[name], EVERY)]
        mine, theirs = (
            torch.cat([(weights[name] - base[name]).flatten() for name in names])
            for weights in (one, other)
        )
        distance, went, travelled = (float(way.norm()) for way in (mine - theirs, mine, theirs))
        yield {
            "layer": layer,
            "distance": distance,
            "travelled": travelled,
            "relative": (
                distance / travelled if travelled else math.nan
            ),  # a chunk may not have had its turn yet
            "cosine": float(mine @ theirs) / (went * travelled) if went * travelled else math.nan,
        }


def sliced(count: int, model: str = "tiny", seq: int = 24, batch: int = 2) -> pd.DataFrame:
    """The gradient of each of `count` chunks against the same rows of the whole gradient, fp64,
    random weights: `error`, the largest difference as a share of the largest gradient;
    `chunk_bytes`, the most gradient that a chunk has, and `dense_bytes`.
    """
    torch.manual_seed(0)
    net = BaichuanForCausalLM(model_spec(model).config).double()
    ids = torch.randint(3, net.config.vocab_size, (batch, seq))
    net(input_ids=ids, labels=ids).loss.backward()
    dense = {name: param.grad for name, param in net.named_parameters()}
    net.requires_grad_(False).zero_grad()
    largest, error, chunk_bytes = max(float(grad.abs().max()) for grad in dense.values()), 0.0, 0
    for part in read_row("chunks", {"trains": {"chunks": {"count": count}}}).trains.parts(net):
        leaves = ActiveLeaves(net, part)
        leaves.switch_on()
        net(input_ids=ids, labels=ids).loss.backward()
        grads = [leaf.grad for leaf in leaves.named.values()]
        error = max(
            error,
            *(
                float((grad - dense[leaf.name][leaf.start : leaf.stop]).abs().max())
                for grad, leaf in zip(grads, part, strict=True)
            ),
        )
        chunk_bytes = max(chunk_bytes, sum(grad.nbytes for grad in grads))
        leaves.switch_off()
        net.zero_grad()
    return pd.DataFrame(
        [
            {
                "error": error / largest,
                "chunk_bytes": chunk_bytes,
                "dense_bytes": sum(grad.nbytes for grad in dense.values()),
            }
        ]
    )
