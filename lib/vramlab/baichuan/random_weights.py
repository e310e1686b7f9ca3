"""Random weights and tokens for a published shape, without a checkpoint."""

from __future__ import annotations

import torch

from . import BaichuanForCausalLM, ModelSpec

RANDOM_NUMBERS = 1 << 22
"""Random numbers that are repeated to fill the weights: drawing seven billion takes a minute."""


def random_model(spec: ModelSpec) -> BaichuanForCausalLM:
    """The model on the host, in its published storage type, with weights of the usual spread; norms
    are ones."""
    with torch.device("meta"):
        model = BaichuanForCausalLM(spec.config)
    model.to(spec.config.dtype or torch.float32)
    model.to_empty(device="cpu")
    numbers = torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            _fill(parameter, numbers.to(parameter.dtype))
    if model.model.rotary_emb is not None:
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.frequencies()
    return model


def _fill(parameter: torch.Tensor, numbers: torch.Tensor) -> None:
    if parameter.dim() < 2:
        parameter.fill_(1.0)
        return
    flat, whole = parameter.view(-1), parameter.numel() // RANDOM_NUMBERS * RANDOM_NUMBERS
    flat[:whole].view(-1, RANDOM_NUMBERS).copy_(numbers)
    flat[whole:].copy_(numbers[: parameter.numel() - whole])


def batches(spec: ModelSpec, seq: int, rows: int, seed: int, count: int = 1) -> list[dict]:
    """`count` micro-batches of `rows` full rows on the host, every token labelled. There is no
    padding, so no mask, as in a forecast."""
    generator, shape = torch.Generator().manual_seed(seed), (rows, seq)
    ids = [
        torch.randint(3, spec.config.vocab_size, shape, generator=generator) for _ in range(count)
    ]
    return [{"input_ids": micro_batch, "labels": micro_batch.clone()} for micro_batch in ids]
