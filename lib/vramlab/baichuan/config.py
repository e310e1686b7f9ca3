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
PUBLISHED = {(4096, 32): "rope", (5120, 40): "alibi"}
"""(hidden_size, num_hidden_layers) of the 7B and the 13B -> position."""
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
"""Field -> its least and its largest value: far beyond any published model, and still a shape that
can be traced."""


class BaichuanConfig(PreTrainedConfig):
    """The fields of the published `config.json`, plus `position` and `norm_head`.

    The published files do not name their design: the same architecture name stands for rotary
    positions (7B) and for ALiBi (13B). `position` names it; where it is missing it follows from the
    published shapes. `norm_head: false` does not normalise the head's rows, as in the comparison of
    the paper's appendix B. Raises: ValueError, when the design is unknown, the sizes do not fit
    together, or a key asks for a feature that this model does not have.
    """

    model_type = "baichuan"
    # a list, to which transformers' Trainer adds a key
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

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
        # The published 13B file sets gradient_checkpointing to a one-element tuple, which is true,
        # but it is on only when a regime asks for it. auto_map names remote code, which a folder
        # saved from this model does not hold.
        kwargs.pop("gradient_checkpointing", None)
        kwargs.pop("auto_map", None)
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
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.position = (
            PUBLISHED.get((hidden_size, num_hidden_layers)) if position is None else position
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
        """Check the fields, which may have been set since the config was made, as
        `from_pretrained(folder, hidden_act="gelu")` does; `others` are settings that are no field.
        Raises: ValueError, as when a config is made."""
        checked(vars(self), HINTS, "config", others=True)
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}: use {least} to {most}")
        supported = {
            "model_type": self.model_type,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "rope_ratio": 1,
            "partial_rotary_factor": 1,
            "pretraining_tp": 1,
            # set on an existing config, it makes transformers quantize plain weights at loading
            "quantization_config": vars(self).get("quantization_config"),
        }
        unsupported = [
            f"{name} is {value!r:.80}, {UNSUPPORTED[name]}"
            for name, value in {**others, **vars(self)}.items()
            if name in UNSUPPORTED and value and value != supported.get(name)
        ]
        if unsupported:
            raise ValueError(
                f"{'; '.join(unsupported)}: a Baichuan-2 has none, so this would be another model"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}: use 0 to {self.vocab_size - 1}")
        if self.position is None:
            raise ValueError(
                f"hidden_size {self.hidden_size} with {self.num_hidden_layers} layers is neither"
                " the published 7B (4096, 32) nor the 13B (5120, 40): set `position: rope` or"
                " `position: alibi` in the config"
            )
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


HINTS = typing.get_type_hints(BaichuanConfig.__init__)
"""Field -> its type."""
DTYPES = (None, "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSpec:
    """A model file of `params/models`: a shape, and the folder of its published weights, if it has
    any."""

    name: str
    config: BaichuanConfig
    path: str | None

    def changed(self, config: Mapping) -> ModelSpec:
        """The same model with other values for some fields of its config. Raises: ValueError, for
        an unknown field."""
        return replace(self, config=config_of({**self.config.to_dict(), **config}))

    def fingerprint(self) -> dict:
        """The contents of the file that decide numbers, as plain data."""
        shape = {
            name: value
            for name, value in self.config.to_dict().items()
            if name not in ("transformers_version", "_name_or_path")
        }
        if shape["norm_head"]:  # as published, and as it was before there was a choice
            del shape["norm_head"]
        return {"name": self.name, "path": self.path, "config": shape}


def read_model_file(path: Path | str) -> ModelSpec:
    """`params/models/*.yml` -> ModelSpec. Raises: OSError; ValueError, naming the file, the key and
    the value."""
    hints = {"name": str, "path": str | None, "config": Mapping}
    content = checked(read_yaml(path), hints, str(path), ("name", "config"))
    if not plain_name(content["name"]):  # the folders of its bases are named after it
        raise BadFile(
            f"{path} has the name {content['name']!r:.80}: give a name for one folder, such as"
            f" {Path(path).stem}"
        )
    config = config_of(content["config"], f"{path}: config")
    return ModelSpec(content["name"], config, content.get("path"))


def config_of(content: Mapping[str, Any], where: str = "config") -> BaichuanConfig:
    """The config of a file's keys and values. Keys that change nothing are left out; features that
    this model does not have are refused. Raises: ValueError, naming the key and the value,
    beginning with `where`."""
    dtypes = {"dtype": DTYPES, "torch_dtype": DTYPES}
    known = {**HINTS, **dict.fromkeys((*HARMLESS, *UNSUPPORTED), Any), **dtypes}
    try:
        if unknown := [f"{key!r:.80}{nearest(key, known)}" for key in content if key not in known]:
            raise ValueError(f"unknown {', '.join(unknown)}; a Baichuan-2 has {', '.join(HINTS)}")
        checked(content, known, "config", others=True)
        fields = {
            name: value
            for name, value in content.items()
            if name in HINTS or name in dtypes or (name in UNSUPPORTED and value)
        }
        return BaichuanConfig.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
