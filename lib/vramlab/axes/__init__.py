"""The axes of a regime: each value is a small frozen record with essentially one verb.

`AXES[axis][value]` is the record's class. A row of `params/regimes.yml` picks one value an axis, by its name
(`rule: adamw`) or by its name with fields (`trains: {chunks: {count: 8, interval: 4}}`).
"""

from .acts import Checkpoint, Keep, Offload
from .grads import Exact, ZerothOrder
from .head import Fused, Plain
from .place import Device, Fsdp
from .projected import Apollo, GaLore
from .rule import Adafactor, AdaLomo, Adam4bit, Adam8bit, AdamMini, AdamW, NoRule, Sgd
from .trains import All, Blocks, Chunks, Lora, Nothing
from .until import Backward, Step
from .weights import Bf16, Bf16Stochastic, Fp32, MasterFp32, Mixed

AXES: dict[str, dict[str, type]] = {
    "weights": {"fp32": Fp32, "mixed": Mixed, "bf16": Bf16, "bf16_sr": Bf16Stochastic, "master": MasterFp32},
    "trains": {"all": All, "none": Nothing, "lora": Lora, "blocks": Blocks, "chunks": Chunks},
    "grads": {"exact": Exact, "zeroth_order": ZerothOrder},
    "until": {"step": Step, "backward": Backward},
    "rule": {"adamw": AdamW, "sgd": Sgd, "adafactor": Adafactor, "adalomo": AdaLomo, "adam_mini": AdamMini, "adam8bit": Adam8bit,
             "adam4bit": Adam4bit, "galore": GaLore, "apollo": Apollo, "none": NoRule},
    "acts": {"keep": Keep, "checkpoint": Checkpoint, "offload": Offload},
    "head": {"plain": Plain, "fused": Fused},
    "place": {"device": Device, "fsdp": Fsdp},
}
"""axis -> value -> class; the first value of each axis is its default."""

__all__ = ["AXES"]
