"""Adapters, of axis `trains`: the model's own weights stand still, and small new ones are trained
beside them. By peft.

Bytes: weights once, in whatever form `weights` stores them, and gradient and optimizer state for
the adapter only. All but LoRA-FA keep, for each adapted matrix, its input x for the gradient of A;
backward runs to the lowest adapter, so prompt and prefix tuning run it to the bottom. Unless said
otherwise adapters are fp32, as peft makes them for a bf16 model too, so that a bf16 x is kept once
more in fp32 for each adapted matrix.
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
"""The matrices of a block. The packed projection is one, so its adapter serves query, key and value
together."""
LINEARS = get_args(Linear)


@contextmanager
def _peft(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers 5.24 for an attribute by its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Lora(All):
    """W x + (alpha / rank) B A x with W frozen, A (rank, in) and B (out, rank) trained, B starting
    at 0, so that the first forward is the base model's. Hu 2021, arXiv:2106.09685."""

    rank: Width = 8
    alpha: Width = 16
    targets: tuple[Linear, ...] = LINEARS
    adapters: Literal["fp32", "bf16"] = "fp32"
    """Their type, `fp32` or `bf16`: 4 or 2 bytes a number, its gradient and each moment."""
    dora: bool = False
    """m (W + B A) / |W + B A| with row norms m trained too. The norm is formed from the whole
    matrix in each forward and is not differentiated, as published. Liu 2024, arXiv:2402.09353."""
    frozen_a: bool = False
    """LoRA-FA: A stays as it was drawn, so that rank numbers a token, A x, are kept in place of x.
    Zhang 2023, arXiv:2308.03303. The paper's algorithm: a later version, in peft, also corrects the
    gradient of B by (A A^T)^-1."""

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
        with _peft(seed):
            model = get_peft_model(model, config)
        for module in model.modules():
            if isinstance(module, LoraLayer):  # the base inside it is none of these
                for name in module.adapter_layer_names:
                    getattr(module, name).to(ADAPTERS[self.adapters])
                for magnitude in module.lora_magnitude_vector.values():
                    _start_at_the_norm(magnitude, module.get_base_layer().weight)
        return model

    def parts(self, model: nn.Module) -> list[Part]:
        frozen = ("lora_A",) if self.frozen_a else ()
        return [
            tuple(
                whole(name, p)
                for name, p in model.named_parameters()
                if "lora_" in name and not any(word in name for word in frozen)
            )
        ]


@torch.no_grad()
def _start_at_the_norm(magnitude: nn.Module, weight: Tensor) -> None:
    """DoRA's m as the forward will form the norm, in the adapters' type: else m / norm is not 1 at
    the start."""
    weight = weight.to(magnitude.weight.dtype)
    magnitude.weight.copy_(magnitude.get_weight_norm(weight, torch.zeros_like(weight), 1.0))


@dataclass
class Link:
    """What has crossed the cut so far, in bytes: activations up to the server, their gradients down
    to the client. Labels, which SplitLoRA sends up too, are not counted."""

    up_bytes: int = 0
    down_bytes: int = 0

    def read(self) -> dict[str, int]:
        """What has crossed since it was read last."""
        seen = {"up_bytes": self.up_bytes, "down_bytes": self.down_bytes}
        self.up_bytes = self.down_bytes = 0
        return seen

    def carry(self, block: nn.Module, args: tuple) -> None:
        """Hook of the server's first block."""
        if recomputing:  # it kept what it received
            return
        hidden: Tensor = args[0]
        self.up_bytes += hidden.nbytes
        if hidden.requires_grad:
            hidden.register_hook(self._back)

    def _back(self, gradient: Tensor) -> None:
        self.down_bytes += gradient.nbytes


def link(model: nn.Module) -> Link | None:
    """The link of a model that is cut, of any other none."""
    return getattr(decoder(model), "link", None)


@dataclass(frozen=True)
class SplitLora(Lora):
    """LoRA whose blocks below `cut`, with the embeddings, are a client's and the rest a server's.
    Lin 2024, arXiv:2407.00952. One client, in one process: it trains as LoRA does, saves no byte of
    the sum, and what a client has to hold is told apart, see `split`. Not here: several clients,
    and the averaging of their adapters.
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
    """`tokens` trained vectors stand before every sequence, as many tokens longer it becomes; they
    start as embeddings of words drawn from the vocabulary. Lester 2021, arXiv:2104.08691."""

    tokens: Width = 20

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

        config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=self.tokens,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
            **_sizes(model),
        )
        return _made_where_the_model_is(get_peft_model, model, config, seed)

    def parts(self, model: nn.Module) -> list[Part]:
        return [
            tuple(
                whole(name, p)
                for name, p in model.named_parameters()
                if name.startswith("prompt_encoder.")
            )
        ]

    def predicted(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Behind a prompt a row's first token is predicted too; peft drops position_ids."""
        labels, mask = batch["labels"], batch.get("attention_mask")
        mask = None if mask is None else F.pad(mask, (self.tokens, 0), value=1)
        return next_labels(F.pad(labels, (self.tokens, 0), value=-100), mask)


@dataclass(frozen=True)
class Prefix(Prompt):
    """`tokens` trained keys and values stand before every block's own, through the key-value cache.
    Li 2021, arXiv:2101.00190, without its reparametrisation by a network."""

    def predicted(self, batch: Mapping[str, Tensor]) -> Tensor:
        return next_labels(batch["labels"], batch.get("attention_mask"))

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        from peft import PrefixTuningConfig, TaskType, get_peft_model

        config = PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=self.tokens, **_sizes(model)
        )
        return _made_where_the_model_is(get_peft_model, model, config, seed)


def _sizes(model: nn.Module) -> dict:
    config = model.config
    return {
        "num_layers": config.num_hidden_layers,
        "token_dim": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1,
    }


def _made_where_the_model_is(get_peft_model, model: nn.Module, config, seed: int) -> nn.Module:
    device = next(model.parameters()).device
    with _peft(seed):
        wrapped = get_peft_model(model, config)
        wrapped.prompt_encoder.to(device)
        return wrapped
