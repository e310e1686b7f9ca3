"""A Baichuan-2 small enough for hundreds of training steps a second, and batches for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from vramlab.baichuan import BaichuanConfig, BaichuanForCausalLM
from vramlab.forecast.virtual_gpu.ranks import virtual_ranks
from vramlab.observer import Observer
from vramlab.regimes.place.place import Fsdp
from vramlab.regimes.regime import Regime, read_row
from vramlab.regimes.sharded import local
from vramlab.training.trainer import Schedule, Trainer


def model(position: str = "rope", seed: int = 0, **changes) -> BaichuanForCausalLM:
    """Odd sizes on purpose: 3 blocks, 61 words, 20 wide, 4 heads, 33 inside."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 20,
        "intermediate_size": 33,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        **changes,
    }
    return BaichuanForCausalLM(BaichuanConfig(position=position, **sizes))


def batch(seed: int, rows: int = 3, tokens: int = 11) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def ranks(regime: Regime) -> AbstractContextManager:
    """What a regime that shards needs. One rank has nothing to exchange, so a pretended one is
    right on real tensors too."""
    return virtual_ranks(1) if isinstance(regime.place, Fsdp) else nullcontext()


def train(row: dict, steps: int = 4, observer: Observer | None = None, lr: float = 1e-2, **changes):
    """Train the micro model under `row`. Returns (losses, weights by name, trainer)."""
    torch.manual_seed(1)
    regime = read_row("row", row)
    with ranks(regime):
        trainer = Trainer(model(**changes), regime, Schedule(lr, steps), observer=observer)
        losses = [
            float(trainer.step([batch(100 * step + i) for i in range(regime.accumulate)]))
            for step in range(steps)
        ]
        weights = {
            name: local(tensor).detach().clone()
            for name, tensor in trainer.finish().state_dict().items()
        }
    return losses, weights, trainer
