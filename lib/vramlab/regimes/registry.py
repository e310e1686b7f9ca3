"""The axes of a regime and their values: small frozen records with essentially one verb.

`AXES[axis][value]` is the class of a record. A row of `params/regimes.yml` picks one value for each
axis, by its name (`rule: adamw`) or by its name with fields (`trains: {chunks: {count: 8}}`).
"""

from .acts import Checkpoint, Keep, Offload, Selective
from .grads.exact import Exact
from .grads.predicted import Predicted, Writers
from .grads.update_head import Amortised, UpdateHead
from .grads.zeroth_order import ZerothOrder
from .head.head import Fused, Plain
from .place.host import FsdpOffload, HostEmbed, HostState
from .place.place import Device, Fsdp
from .place.stream import HostWeights
from .rule.projected import Apollo, GaLore
from .rule.rules import Adafactor, AdaLomo, Adam4bit, Adam8bit, AdamMini, AdamW, NoRule, Sgd
from .trains.adapters import Lora, Prefix, Prompt, SplitLora
from .trains.parts import All, Blocks, Chunks, Norms, Nothing, Top
from .until.until import Backward, Step
from .weights.types import Bf16, Bf16Stochastic, Fp16, Fp32, Int8, MasterFp32, Mixed, Nf4

AXES: dict[str, dict[str, type]] = {
    "weights": {
        "fp32": Fp32,
        "mixed": Mixed,
        "bf16": Bf16,
        "bf16_sr": Bf16Stochastic,
        "master": MasterFp32,
        "fp16": Fp16,
        "int8": Int8,
        "nf4": Nf4,
    },
    "trains": {
        "all": All,
        "none": Nothing,
        "norms": Norms,
        "top": Top,
        "blocks": Blocks,
        "chunks": Chunks,
        "lora": Lora,
        "split_lora": SplitLora,
        "prompt": Prompt,
        "prefix": Prefix,
        "writers": Writers,
        "update_head": UpdateHead,
    },
    "grads": {
        "exact": Exact,
        "zeroth_order": ZerothOrder,
        "predicted": Predicted,
        "amortised": Amortised,
    },
    "until": {"step": Step, "backward": Backward},
    "rule": {
        "adamw": AdamW,
        "sgd": Sgd,
        "adafactor": Adafactor,
        "adalomo": AdaLomo,
        "adam_mini": AdamMini,
        "adam8bit": Adam8bit,
        "adam4bit": Adam4bit,
        "galore": GaLore,
        "apollo": Apollo,
        "none": NoRule,
    },
    "acts": {"keep": Keep, "checkpoint": Checkpoint, "offload": Offload, "selective": Selective},
    "head": {"plain": Plain, "fused": Fused},
    "place": {
        "device": Device,
        "host_state": HostState,
        "host_weights": HostWeights,
        "host_embed": HostEmbed,
        "fsdp": Fsdp,
        "fsdp_offload": FsdpOffload,
    },
}
"""axis -> value -> class; the first value of each axis is its default."""

__all__ = ["AXES"]
