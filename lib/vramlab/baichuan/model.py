"""Baichuan-2, natively: arXiv:2309.10305. One model for both published designs, 7B (rotary) and 13B
(ALiBi).

x + attention(norm(x)), x + mlp(norm(x)); packed W_pack = [Q | K | V] along its rows; no bias
anywhere; a head whose rows are normalised in the forward. Differs from the published remote code
where that is wrong: the head never changes its weight; ALiBi is relative in training and
evaluation; no mask is built where none is needed; norms start at one.

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

# transformers 5.24 calls past_key_values `cache`; both names are taken in, and the one of the
# installed version comes out
CACHE = (
    "cache"
    if "cache" in {field.name for field in fields(CausalLMOutputWithPast)}
    else "past_key_values"
)

REPEATED = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "cache_position",
)
"""Arguments of other models that say again what `position_ids` says, as data collators and
generation pass them."""


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


class NormHead(nn.Module):
    """logits = h normalize(W)^T, rows normalised to length one in every forward; gradient flows
    through the normalisation. W (V, H). The published head normalises its own weight in place at
    the first evaluation. With `norm` off it is the plain linear head that the paper compares with:
    logits = h W^T."""

    fused = None
    """(hidden, weight, labels, z_loss_weight, norm) -> loss, where something stands in for forming
    logits."""

    def __init__(self, hidden_size: int, vocab_size: int, norm: bool = True):
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.applied = AppliedHead(self)

    def rows(self, weight: Tensor) -> Tensor:
        """Rows of the weight, or all, as hidden states are multiplied with them."""
        return F.normalize(weight) if self.norm else weight

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.rows(self.weight))

    def forward(self, hidden: Tensor, labels: Tensor | None = None, z_loss_weight: float = 0.0):
        """hidden (b, t, H) -> logits (b, t, V); with labels (b, t), already moved: (loss, logits,
        or None if none were formed)."""
        if labels is None:
            return self.logits(hidden)
        if self.fused is not None:
            return self.fused(hidden, self.weight, labels, z_loss_weight, self.norm), None
        logits = self.logits(hidden)
        return causal_loss(logits, labels, z_loss_weight), logits


class AppliedHead(nn.Module):
    """What libraries that multiply with the head's weight by themselves (TRL's losses, peft,
    assisted generation) get as the output embeddings: `weight` (V, H) is the rows as `NormHead`
    multiplies them, normalised anew at each access, and gradient flows to the stored weight. It has
    no parameters of its own, and equals the head: so peft, which looks for the module that equals
    the output embeddings, saves the head's parameter."""

    bias = None
    __hash__ = nn.Module.__hash__

    def __init__(self, head: NormHead):
        super().__init__()
        object.__setattr__(self, "head", head)  # not as a submodule: the head is the parent

    def __eq__(self, other: object) -> bool:
        return other is self or other is self.head

    @property
    def weight(self) -> Tensor:
        return self.head.rows(self.head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)


class Attention(nn.Module):
    """Multi-head attention with one packed projection."""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.heads, self.head_dim, self.layer_idx = (
            config.num_attention_heads,
            config.head_dim,
            layer_idx,
        )
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
    """One block. Positional first argument, so that every kind of checkpointing sees it."""

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
    """Initialisation and what transformers has to know."""

    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("cache", "past_key_values")
    _supports_sdpa = True

    def __init__(self, config: BaichuanConfig, **others):
        """`others`: what `from_pretrained` is given beside the config's fields. Raises: ValueError,
        naming what is unsupported."""
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
        `output_hidden_states` what each block was given and the last one. Raises: ValueError, for
        an argument that it would have to ignore."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        wrong = [
            name
            for name, value in others.items()
            if value is not None
            and value is not False
            and (name not in REPEATED or position_ids is None and name != "cache_position")
        ]
        if wrong:
            raise ValueError(
                f"Baichuan-2 does not take {', '.join(wrong)}: leave it out; packed documents are"
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
        # looking is free on the host; elsewhere the caller drops the mask it knows to be idle
        if (
            attention_mask is not None
            and attention_mask.device.type == "cpu"
            and right_padded(attention_mask)
        ):
            attention_mask = None
        slopes = (
            alibi_slopes(self.config.num_attention_heads).to(hidden.device)
            if self.config.position == "alibi"
            else None
        )
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
        wanted = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        states = ()
        for layer in self.layers:
            states += (hidden,) if wanted else ()
            hidden = layer(hidden, bias, rotary, cache=cache)
        last = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            hidden_states=(*states, last) if wanted else None,
            **{CACHE: cache},
        )

    def _rotary(self, mask, position_ids, past: int, queries: int, hidden: Tensor):
        if self.rotary_emb is None:
            return None
        if position_ids is None and mask is not None:
            position_ids = positions(mask)[:, -queries:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + queries, device=hidden.device)[None]
        return self.rotary_emb(position_ids)


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    """Baichuan-2 with its language-model head."""

    accepts_loss_kwargs = True
    """transformers' Trainer hands `num_items_in_batch` to forward."""

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
        """Embedding and stored head, resized in place as transformers resizes an embedding and a
        linear head."""
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
        """-> logits (b, kept, V), and the loss when labels (b, t) are given: -100 where nothing is
        to be predicted. A fused head forms the loss without logits, which are None then. The loss
        is the mean over the labels that are predicted; with `num_items_in_batch` their sum divided
        by it, so that the losses of several micro-batches add up to the loss of all.
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


def next_labels(
    labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """Label of the next token at each position (b, t). Nothing is predicted across a document's
    edge, which is where the mask changes or positions do not grow: so these, and not the labels
    that were given, are what the loss counts. Moving the labels instead of the logits saves a copy
    of the logits."""
    moved = F.pad(labels[:, 1:], (0, 1), value=-100)
    if attention_mask is not None:
        mask = attention_mask[:, -labels.shape[1] :]  # a mask covers what is cached too
        edge = mask[:, 1:] != mask[:, :-1]
        moved[:, :-1].masked_fill_(edge, -100)
    if position_ids is not None:
        moved[:, :-1].masked_fill_(position_ids[:, 1:] <= position_ids[:, :-1], -100)
    return moved


def causal_loss(logits: Tensor, labels: Tensor, z_loss_weight: float = 0.0) -> Tensor:
    """Mean cross-entropy over labelled positions, plus z_loss_weight * mean(max logit ^ 2) over
    them (paper eq. 1).

    Shapes: logits (b, t, V), labels (b, t), already moved. In fp32 whatever the logits are. At
    weight 0, as released, the max-z term is not built: it would hold one more copy of the logits'
    size in backward. Not exact: the released code averages the term over padding too. Where nothing
    is labelled the loss is nan, as torch's is, and every gradient 0.
    """
    flat, wanted = logits.flatten(0, -2), labels.flatten()
    loss = F.cross_entropy(flat.float(), wanted, ignore_index=-100)
    if z_loss_weight:
        labelled = wanted != -100
        highest = flat.float().amax(-1).pow(2)
        loss = loss + z_loss_weight * (highest * labelled).sum() / labelled.sum().clamp_(min=1)
    return loss


def decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks inside a (possibly peft-wrapped) Baichuan-2: the module that owns
    `layers`."""
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    raise ValueError(
        f"{type(model).__name__} has no `layers`: it is not a decoder the axes know how to rewrite"
    )
