"""Random weights and tokens of a published shape, where no checkpoint is at hand."""

from __future__ import annotations

import torch

from . import BaichuanForCausalLM, ModelSpec

DRAWN = 1 << 22
"""Random numbers that weights are made of, over and over: drawing seven billion takes a minute."""


def random_model(spec: ModelSpec) -> BaichuanForCausalLM:
    """The model on the host, in the type it is published in, with weights of the usual spread;
    norms are ones."""
    with torch.device("meta"):
        model = BaichuanForCausalLM(spec.config)
    model.to(spec.config.dtype or torch.float32)
    model.to_empty(device="cpu")
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            _fill(parameter, drawn.to(parameter.dtype))
    if model.model.rotary_emb is not None:
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.frequencies()
    return model


def _fill(parameter: torch.Tensor, drawn: torch.Tensor) -> None:
    if parameter.dim() < 2:
        parameter.fill_(1.0)
        return
    flat, whole = parameter.view(-1), parameter.numel() // DRAWN * DRAWN
    flat[:whole].view(-1, DRAWN).copy_(drawn)
    flat[whole:].copy_(drawn[: parameter.numel() - whole])


def batches(spec: ModelSpec, seq: int, rows: int, seed: int, count: int = 1) -> list[dict]:
    """`count` micro-batches of full rows on the host, every token labelled; no padding, so no mask,
    as forecast."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(3, spec.config.vocab_size, (rows, seq), generator=generator)
        for _ in range(count)
    ]
    return [{"input_ids": one, "labels": one.clone()} for one in ids]
