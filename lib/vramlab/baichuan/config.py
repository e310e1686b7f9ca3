"""Baichuan-2's configuration, for both published designs."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..reading import BadFile, checked, nearest, plain_name, read_yaml
from .features import HARMLESS, UNSUPPORTED

POSITIONS = ("rope", "alibi")
LIMITS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 2**14),
    "max_position_embeddings": (1, 2**30),
    "model_max_length": (1, 2**30),
    "initializer_range": (0, 1000),
    "rms_norm_eps": (0, 1),
    "z_loss_weight": (0, 1000),
    "rope_theta": (1, 2**40),
}
"""Field -> the least and the most that it may be: far beyond any published model, and still a shape
that can be laid out."""


class BaichuanConfig(PreTrainedConfig):
    """The fields of the published `config.json`, plus `position` and `norm_head`.

    The published files do not say which design they are: the same architecture name stands for
    rotary positions (7B) and for ALiBi (13B). `position` says it; where it is missing it follows
    from the published shapes. `norm_head: false` leaves the head's rows as long as they are, as the
    paper's appendix B does to compare. Raises: ValueError, when it cannot be told, the sizes do not
    fit together, or a key asks for a feature that this model lacks.
    """

    model_type = "baichuan"
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
    ]  # a list, to which transformers' Trainer adds one

    def __init__(
        self,
        vocab_size: int = 125696,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        hidden_act: str = "silu",
        max_position_embeddings: int | None = None,
        model_max_length: int = 4096,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        z_loss_weight: float = 0.0,
        norm_head: bool = True,
        position: str | None = None,
        rope_theta: float = 10000.0,
        use_cache: bool = True,
        pad_token_id: int = 0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        # the published 13B file sets gradient_checkpointing to a one-element tuple, which is true:
        # it is on only when asked for; auto_map names remote code, which a folder saved from this
        # model does not hold
        kwargs = {
            name: value
            for name, value in kwargs.items()
            if name not in ("gradient_checkpointing", "auto_map")
        }
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = (
            model_max_length if max_position_embeddings is None else max_position_embeddings
        )
        self.model_max_length = model_max_length
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.z_loss_weight = z_loss_weight
        self.norm_head = norm_head
        self.rope_theta = rope_theta
        self.use_cache = use_cache
        self.pad_token_id, self.bos_token_id, self.eos_token_id = (
            pad_token_id,
            bos_token_id,
            eos_token_id,
        )
        self.tie_word_embeddings = tie_word_embeddings
        self.position = (
            _published_position(hidden_size, num_hidden_layers) if position is None else position
        )
        self.check(kwargs)
        kwargs.pop("head_dim", None)  # a property here
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def check(self, others: Mapping[str, Any]) -> None:
        """Fields may have been set since the config was made, as `from_pretrained(folder,
        hidden_act="gelu")` does; `others` are settings that are no field. Raises: ValueError, as
        when a config is made."""
        checked(vars(self), HINTS, "config", others=True)
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}: use {least} to {most}")
        has = {
            "model_type": self.model_type,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "rope_ratio": 1,
            "partial_rotary_factor": 1,
            "pretraining_tp": 1,
            # set on a config that has been made, it is how transformers quantizes plain weights as
            # it loads them
            "quantization_config": vars(self).get("quantization_config"),
        }
        lacks = [
            f"{name} is {value!r:.80}, {UNSUPPORTED[name]}"
            for name, value in {**others, **vars(self)}.items()
            if name in UNSUPPORTED and value and value != has.get(name)
        ]
        if lacks:
            raise ValueError(
                f"{'; '.join(lacks)}: a Baichuan-2 has none, so this would be another model"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}: use 0 to {self.vocab_size - 1}")
        if self.position not in POSITIONS:
            raise ValueError(f"position is {self.position!r}: use one of {', '.join(POSITIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_attention_heads"
                f" {self.num_attention_heads} is odd: rotary positions turn pairs of numbers of a"
                " head"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}: Baichuan-2 uses silu")
        if self.vocab_size == 64000:
            raise ValueError(
                "vocab_size is 64000: this is Baichuan-1, whose plain head this model does not"
                " have; use a Baichuan-2 checkpoint (vocab_size 125696)"
            )


def _published_position(hidden_size: int, layers: int) -> str:
    known = {(4096, 32): "rope", (5120, 40): "alibi"}
    if (hidden_size, layers) not in known:
        raise ValueError(
            f"hidden_size {hidden_size} with {layers} layers is neither the published 7B (4096, 32)"
            " nor the 13B (5120, 40): say `position: rope` or `position: alibi` in the config"
        )
    return known[hidden_size, layers]


HINTS = typing.get_type_hints(BaichuanConfig.__init__)
"""Field -> its type."""
DTYPES = (None, "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSpec:
    """A model file of `params/models`: a shape, and where published weights lie, if they do."""

    name: str
    config: BaichuanConfig
    path: str | None

    def changed(self, config: Mapping) -> ModelSpec:
        """The same with some fields of its config set anew. Raises: ValueError, for a field that
        there is not."""
        return replace(self, config=config_of({**self.config.to_dict(), **config}))

    def fingerprint(self) -> dict:
        """What of the file decides numbers, as plain data."""
        shape = {
            k: v
            for k, v in self.config.to_dict().items()
            if k not in ("transformers_version", "_name_or_path")
        }
        if shape["norm_head"]:  # as published, and as it was before there was a choice
            del shape["norm_head"]
        return {"name": self.name, "path": self.path, "config": shape}


def read_model_file(path: Path | str) -> ModelSpec:
    """`params/models/*.yml` -> ModelSpec. Raises: OSError; ValueError, naming the file, the key and
    the value."""
    content = checked(
        read_yaml(path),
        {"name": str, "path": str | None, "config": Mapping},
        str(path),
        ("name", "config"),
    )
    if not plain_name(content["name"]):  # folders of bases are called by it
        raise BadFile(
            f"{path} has the name {content['name']!r:.80}: give a name for one folder, such as"
            f" {Path(path).stem}"
        )
    return ModelSpec(
        content["name"], config_of(content["config"], f"{path}: config"), content.get("path")
    )


def config_of(content: Mapping[str, Any], where: str = "config") -> BaichuanConfig:
    """The config that a file's keys and values make. Raises: ValueError, naming the key and the
    value, beginning with `where`."""
    known = {
        **HINTS,
        **dict.fromkeys((*HARMLESS, *UNSUPPORTED), Any),
        "dtype": DTYPES,
        "torch_dtype": DTYPES,
    }
    try:
        if wrong := [
            f"{name!r:.80}{nearest(name, known)}" for name in content if name not in known
        ]:
            raise ValueError(f"unknown {', '.join(wrong)}; a Baichuan-2 has {', '.join(HINTS)}")
        checked(content, known, "config", others=True)
        # what changes nothing is left out; what is asked for is refused, unless this model has it
        kept = {
            name: value
            for name, value in content.items()
            if name in (*HINTS, "dtype", "torch_dtype") or (name in UNSUPPORTED and value)
        }
        return BaichuanConfig.from_dict(kept)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
