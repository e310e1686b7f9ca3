"""Axis `trains`, values that freeze the model's weights and train small new ones, by peft.

Bytes: the weights once, as `weights` stores them; gradients and optimizer state of the adapters
only. Each adapted matrix keeps its input x for the gradient of A, except in LoRA-FA. Backward runs
down to the lowest adapter, so with prompt and prefix tuning down to the embeddings. Adapters are
fp32 by default, as peft makes them also for a bf16 model. A bf16 x is then kept once more in fp32
for each adapted matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...baichuan.head import next_labels
from ...baichuan.model import decoder
from ...observer import recomputing
from ..fields import Count, IllegalRegime, Width
from .parts import All, Part, whole

ADAPTERS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Linear = Literal["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The matrices of a block. W_pack is the projection to query, key and value together, with one
adapter."""
LINEARS = get_args(Linear)


@contextmanager
def _seeded_peft(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers 5.24 for an attribute by its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Lora(All):
    """W x + (alpha / rank) B A x, with W frozen, and A (rank, in) and B (out, rank) trained. B
    starts at 0, so that the first forward is that of the base model. Hu 2021, arXiv:2106.09685."""

    rank: Width = 8
    alpha: Width = 16
    targets: tuple[Linear, ...] = LINEARS
    adapters: Literal["fp32", "bf16"] = "fp32"
    """Storage type of A and B: 4 or 2 bytes for a number, for its gradient and for each moment."""
    dora: bool = False
    """m (W + B A) / |W + B A|, with the row norms m trained too. The norm is computed from the
    whole matrix in each forward and is not differentiated, as published. Liu 2024,
    arXiv:2402.09353."""
    frozen_a: bool = False
    """LoRA-FA: A stays as it was drawn, so A x, `rank` numbers for each token, is kept in place of
    x. Zhang 2023, arXiv:2308.03303. This is the paper's algorithm; a later version, in peft, also
    corrects the gradient of B by (A A^T)^-1."""

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            lora_dropout=0.0,
            bias="none",
            use_dora=self.dora,
        )
        with _seeded_peft(seed):
            model = get_peft_model(model, config)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name in module.adapter_layer_names:
                    getattr(module, name).to(ADAPTERS[self.adapters])
                for magnitude in module.lora_magnitude_vector.values():
                    _start_at_the_norm(magnitude, module.get_base_layer().weight)
        return model

    def parts(self, model: nn.Module) -> list[Part]:
        return [
            tuple(
                whole(name, param)
                for name, param in model.named_parameters()
                if "lora_" in name and not (self.frozen_a and "lora_A" in name)
            )
        ]


@torch.no_grad()
def _start_at_the_norm(magnitude: nn.Module, weight: Tensor) -> None:
    """Set DoRA's m to the norm as the forward computes it, in the adapters' type: else m / norm
    would not be 1 at the start."""
    weight = weight.to(magnitude.weight.dtype)
    magnitude.weight.copy_(magnitude.get_weight_norm(weight, torch.zeros_like(weight), 1.0))


@dataclass
class Link:
    """Counts the bytes that cross the cut: activations up to the server, their gradients down to
    the client. Labels, which SplitLoRA also sends up, are not counted."""

    up_bytes: int = 0
    down_bytes: int = 0

    def read(self) -> dict[str, int]:
        """The bytes since the last call, which are then counted anew."""
        crossed = {"up_bytes": self.up_bytes, "down_bytes": self.down_bytes}
        self.up_bytes = self.down_bytes = 0
        return crossed

    def carry(self, block: nn.Module, args: tuple) -> None:
        """Hook of the server's first block."""
        if recomputing:  # the server kept what it received
            return
        hidden: Tensor = args[0]
        self.up_bytes += hidden.nbytes
        if hidden.requires_grad:
            hidden.register_hook(self._carry_back)

    def _carry_back(self, gradient: Tensor) -> None:
        self.down_bytes += gradient.nbytes


def link(model: nn.Module) -> Link | None:
    """The link of a model that is cut between two machines; else None."""
    return getattr(decoder(model), "link", None)


@dataclass(frozen=True)
class SplitLora(Lora):
    """LoRA, cut between two machines: the embeddings and the blocks below `cut` are the client's,
    the rest is the server's. Lin 2024, arXiv:2407.00952. Here client and server are one process,
    which trains as LoRA does and needs as many bytes in total; `timeline.sides` reports what each
    side holds. Not included: several clients, and the averaging of their adapters.
    """

    cut: Count = 1
    """Number of the client's blocks."""

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        model = super().prepare(model, seed)
        stack = decoder(model)
        if self.cut >= len(stack.layers):
            raise IllegalRegime(
                f"trains.split_lora.cut is {self.cut}: of {len(stack.layers)} blocks the server"
                f" needs one at least, use 1 to {len(stack.layers) - 1}"
            )
        stack.link = Link()
        stack.layers[self.cut].register_forward_pre_hook(stack.link.carry)
        return model


@dataclass(frozen=True)
class Prompt(All):
    """`tokens` trained vectors precede every sequence, which becomes longer by as many tokens. They
    start as the embeddings of words drawn from the vocabulary. Lester 2021, arXiv:2104.08691."""

    tokens: Width = 20

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        import peft

        device, config = next(model.parameters()).device, model.config
        kind, options = self._peft_config()
        with _seeded_peft(seed):
            wrapped = peft.get_peft_model(
                model,
                kind(
                    task_type=peft.TaskType.CAUSAL_LM,
                    num_virtual_tokens=self.tokens,
                    num_layers=config.num_hidden_layers,
                    token_dim=config.hidden_size,
                    num_attention_heads=config.num_attention_heads,
                    num_transformer_submodules=1,
                    **options,
                ),
            )
            wrapped.prompt_encoder.to(device)
        return wrapped

    def _peft_config(self) -> tuple[type, dict]:
        from peft import PromptTuningConfig, PromptTuningInit

        return PromptTuningConfig, {"prompt_tuning_init": PromptTuningInit.SAMPLE_VOCAB}

    def parts(self, model: nn.Module) -> list[Part]:
        return [
            tuple(
                whole(name, param)
                for name, param in model.named_parameters()
                if name.startswith("prompt_encoder.")
            )
        ]

    def predicted(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Behind a prompt the first token of a row is predicted too; peft drops position_ids."""
        labels, mask = batch["labels"], batch.get("attention_mask")
        mask = None if mask is None else F.pad(mask, (self.tokens, 0), value=1)
        return next_labels(F.pad(labels, (self.tokens, 0), value=-100), mask)


@dataclass(frozen=True)
class Prefix(Prompt):
    """`tokens` trained keys and values precede those of every block, through the key-value cache.
    Li 2021, arXiv:2101.00190, without its reparametrisation by a network."""

    def _peft_config(self) -> tuple[type, dict]:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig, {}

    def predicted(self, batch: Mapping[str, Tensor]) -> Tensor:
        return next_labels(batch["labels"], batch.get("attention_mask"))
