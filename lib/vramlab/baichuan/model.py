"""Baichuan-2 as a native transformers model (arXiv:2309.10305), for both published designs: 7B
(rotary) and 13B (ALiBi).

Blocks are x + attention(norm(x)), x + mlp(norm(x)), with a packed W_pack = [Q | K | V] along its
rows and no bias anywhere; the rows of the head are normalised in the forward. Differs from the
published remote code where that is wrong: the head never changes its weight; ALiBi is relative in
training and evaluation; no mask is built where none is needed; norms start at one.

Shapes: b batch, t tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..reading import nearest
from .attention import (
    RotaryEmbedding,
    alibi_slopes,
    attend,
    attention_bias,
    checked_mask,
    documents,
    positions,
    right_padded,
    rotate,
)
from .config import HINTS, BaichuanConfig
from .features import UNSUPPORTED
from .head import NormHead, next_labels

OUTPUT_FIELDS = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE = "cache" if "cache" in OUTPUT_FIELDS else "past_key_values"
"""The installed version's name of the cache: `cache` since transformers 5.24. Both are accepted as
arguments."""
REPEATED = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "cache_position",
)
"""Arguments that repeat what `position_ids` says; data collators and generation pass them."""


class BaichuanRMSNorm(nn.Module):
    """w * x / rms(x), the mean square in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(self.weight.dtype)


class Attention(nn.Module):
    """Multi-head attention with one packed projection."""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.layer_idx = layer_idx
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
    ) -> Tensor:
        b, t, _ = x.shape
        query, key, value = (
            self.W_pack(x).view(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        )
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(query.dtype)
        mixed = attend(query, key, value, bias)
        return self.o_proj(mixed.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """One block. Its input is a positional argument, which every kind of checkpointing requires."""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), bias, rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class BaichuanPreTrainedModel(PreTrainedModel):
    """Initialisation, and the class attributes that transformers reads."""

    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("cache", "past_key_values")
    _supports_sdpa = True

    def __init__(self, config: BaichuanConfig, **others):
        """`others`: arguments of `from_pretrained` that are no field of the config. Raises:
        ValueError, naming the unsupported ones."""
        config.check(others)
        if unknown := [
            f"{name}{nearest(name, HINTS)}" for name in others if name not in UNSUPPORTED
        ]:
            raise ValueError(f"unknown {', '.join(unknown)}; a Baichuan-2 has {', '.join(HINTS)}")
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RotaryEmbedding):
            initialization.copy_(module.inv_freq, module.frequencies())
        elif isinstance(module, NormHead):
            if module.norm:
                initialization.kaiming_uniform_(module.weight, a=math.sqrt(5))
            else:
                initialization.normal_(module.weight, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class BaichuanModel(BaichuanPreTrainedModel):
    """Embeddings, blocks, final norm."""

    def __init__(self, config: BaichuanConfig, **others):
        super().__init__(config, **others)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config) if config.position == "rope" else None
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        **others,
    ) -> BaseModelOutputWithPast:
        """input_ids (b, t); attention_mask (b, cached + t), see `attention`; position_ids (b or 1,
        t): a new document begins where they do not grow; -> last_hidden_state (b, t, H), and with
        `output_hidden_states` the input of each block and the last state. Raises: ValueError, for
        an argument that it would have to ignore."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        ignored = [
            name
            for name, value in others.items()
            if value is not None
            and value is not False
            and (name not in REPEATED or position_ids is None and name != "cache_position")
        ]
        if ignored:
            raise ValueError(
                f"Baichuan-2 does not take {', '.join(ignored)}: leave it out; packed documents are"
                " marked by position_ids that begin again at 0, or by their number in a 2-D"
                " attention_mask"
            )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = cache.get_seq_length() if cache is not None else 0
        queries = hidden.shape[1]
        attention_mask = documents(checked_mask(attention_mask, past + queries), position_ids, past)
        # reading the mask is free on the host only; elsewhere callers leave out a mask without use
        if (
            attention_mask is not None
            and attention_mask.device.type == "cpu"
            and right_padded(attention_mask)
        ):
            attention_mask = None
        alibi, heads = self.config.position == "alibi", self.config.num_attention_heads
        slopes = alibi_slopes(heads).to(hidden.device) if alibi else None
        bias = attention_bias(
            self.config,
            attention_mask,
            queries,
            past + queries,
            hidden.dtype,
            hidden.device,
            slopes,
        )
        rotary = self._rotary(attention_mask, position_ids, past, queries, hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = ()
        for layer in self.layers:
            states += (hidden,) if output_hidden_states else ()
            hidden = layer(hidden, bias, rotary, cache=cache)
        last = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            hidden_states=(*states, last) if output_hidden_states else None,
            **{CACHE: cache},
        )

    def _rotary(self, mask, position_ids, past: int, queries: int, hidden: Tensor):
        """cos and sin of the new tokens' positions; None with ALiBi."""
        if self.rotary_emb is None:
            return None
        if position_ids is None:
            position_ids = (
                torch.arange(past, past + queries, device=hidden.device)[None]
                if mask is None
                else positions(mask)[:, -queries:]
            )
        return self.rotary_emb(position_ids)


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    """Baichuan-2 with its language-model head."""

    accepts_loss_kwargs = True
    """So transformers' Trainer passes `num_items_in_batch` to forward."""

    def __init__(self, config: BaichuanConfig, **others):
        super().__init__(config, **others)
        self.model = BaichuanModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size, config.norm_head)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return getattr(self.lm_head, "applied", self.lm_head)

    def _resize_token_embeddings(
        self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True
    ) -> nn.Embedding:
        """Resize the embedding and the stored head in place, as transformers resizes an embedding
        and a linear head."""
        embedding = self.model._resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        plain = nn.Linear(*reversed(self.lm_head.weight.shape), bias=False, device="meta")
        plain.weight = self.lm_head.weight
        plain = self._get_resized_lm_head(plain, len(embedding.weight), mean_resizing=mean_resizing)
        self.lm_head.weight.data = plain.weight.data
        return embedding

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others,
    ) -> CausalLMOutputWithPast:
        """-> logits (b, kept, V), and the loss with labels (b, t), which are -100 where nothing is
        to be predicted.

        A fused head forms the loss without logits, which are None then. The loss is the mean over
        the predicted labels; with `num_items_in_batch` their sum divided by it, so that the losses
        of several micro-batches add up to the loss of all.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cache,
            output_hidden_states,
            return_dict=True,
            **others,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden, loss = output.last_hidden_state[:, kept], None
        if labels is None:
            logits = self.lm_head(hidden)
        else:
            targets = next_labels(labels, attention_mask, position_ids)[:, kept]
            loss, logits = self.lm_head(hidden, targets, self.config.z_loss_weight)
            if num_items_in_batch is not None:
                share = (targets != -100).sum() / num_items_in_batch
                loss = torch.where(share > 0, loss * share, 0.0)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{CACHE: getattr(output, CACHE)},
        )


def decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks inside a (possibly peft-wrapped) Baichuan-2: the module that owns
    `layers`."""
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    raise ValueError(
        f"{type(model).__name__} has no `layers`: it is not a decoder the axes know how to rewrite"
    )
