"""LOMO's hooks on real steps: what they see of a scaled loss, and how many gradients live beside
each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vramlab.baichuan import BaichuanForCausalLM
from vramlab.capture.meter import Meter
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import read_row
from vramlab.timeline.events import signed
from vramlab.training.trainer import Schedule, Trainer

UNCUT = 1e9
"""A norm that no gradient has."""


def scaled_updates(model: str, scale: float, seq: int = 64, lr: float = 1e-3) -> pd.DataFrame:
    """One update of random fp32 weights inside backward, three times: `how`, and `ratio`, how much
    further the weights move than without any scale (lengths over all weights).

    *hooks* are the plain ones that use a gradient as it is formed; under torch's GradScaler the
    loss is scaled before backward, and the gradients are to be divided after it, when no hook looks
    any more. *ours* is `until.backward.loss_scale`.
    """
    plain = _by_hooks(model, seq, lr, lambda loss: loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    found = {
        "hooks": plain,
        "hooks under GradScaler": _by_hooks(model, seq, lr, scaler.scale),
        "ours": _ours(model, seq, lr, scale),
    }
    return pd.DataFrame([{"how": how, "ratio": moved / plain} for how, moved in found.items()])


def gradients_alive(model: str, seq: int = 64) -> pd.DataFrame:
    """Two real steps of random weights, counted event by event: `row`, `most_bytes` of gradients
    alive at one time, of all `gradients_bytes` there are, and `largest_bytes`, the gradient of the
    largest matrix. Heads are plain: gradients are whole.
    """
    found = []
    for name, row in {"lomo": {"rule": "sgd", "until": "backward"}, "sgd": {"rule": "sgd"}}.items():
        meter = Meter()
        trainer = Trainer(_model(model), read_row(name, row), Schedule(1e-3, 2), observer=meter)
        with meter:
            for _ in range(2):
                trainer.step([_batch(model, seq)])
        frame = meter.frame()
        most = np.where(frame["category"] == "gradients", signed(frame), 0).cumsum().max()
        sizes = [param.nbytes for param in trainer.model.parameters()]
        found.append(
            {
                "row": name,
                "most_bytes": int(most),
                "gradients_bytes": sum(sizes),
                "largest_bytes": max(sizes),
            }
        )
    return pd.DataFrame(found)


def _by_hooks(name: str, seq: int, lr: float, scaled: Callable[[Tensor], Tensor]) -> float:
    model = _model(name)

    def use(param: Tensor) -> None:
        with torch.no_grad():
            param.sub_(param.grad, alpha=lr)
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(use)
    return _moved(
        model, lambda: scaled(model(**_batch(name, seq), use_cache=False).loss).backward()
    )


def _ours(name: str, seq: int, lr: float, scale: float) -> float:
    until = {"backward": {"clip_norm": UNCUT, "loss_scale": scale}}
    trainer = Trainer(
        _model(name), read_row("lomo", {"until": until, "rule": "sgd"}), Schedule(lr, 1, warmup=0)
    )
    return _moved(trainer.model, lambda: trainer.step([_batch(name, seq)]))


def _moved(model: nn.Module, step: Callable[[], object]) -> float:
    """How far the weights are after a step from where they were, in fp64: small steps of many
    weights."""
    before = [param.detach().clone() for param in model.parameters()]
    step()
    pairs = zip(model.parameters(), before, strict=True)
    return float(
        sum((param.detach().double() - old.double()).square().sum() for param, old in pairs).sqrt()
    )


def _model(name: str) -> BaichuanForCausalLM:
    torch.manual_seed(0)
    return BaichuanForCausalLM(model_spec(name).config).train()


def _batch(name: str, seq: int) -> dict[str, Tensor]:
    ids = torch.randint(
        3, model_spec(name).config.vocab_size, (2, seq), generator=torch.Generator().manual_seed(0)
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
