"""The axes of a regime: each value is a small frozen record with essentially one verb.

`AXES[axis][value]` is the record's class. A row of `params/regimes.yml` picks one value an axis, by its name
(`rule: adamw`) or by its name with fields (`trains: {chunks: {count: 8, interval: 4}}`).
"""

from .acts import Checkpoint, Keep, Offload, Selective
from .adapters import Lora, Prefix, Prompt, SplitLora
from .head import Fused, Plain
from .host import FsdpOffload, HostEmbed, HostState
from .place import Device, Fsdp
from .rule import AdamW, NoRule, Sgd
from .stream import HostWeights
from .trains import All, Blocks, Chunks, Norms, Nothing, Top
from .until import Backward, Step
from .weights import Bf16, Fp32, Int8, Mixed, Nf4

AXES: dict[str, dict[str, type]] = {
    "weights": {"fp32": Fp32, "mixed": Mixed, "bf16": Bf16, "int8": Int8, "nf4": Nf4},
    "trains": {"all": All, "none": Nothing, "norms": Norms, "top": Top, "blocks": Blocks, "chunks": Chunks, "lora": Lora,
               "split_lora": SplitLora, "prompt": Prompt, "prefix": Prefix},
    "until": {"step": Step, "backward": Backward},
    "rule": {"adamw": AdamW, "sgd": Sgd, "none": NoRule},
    "acts": {"keep": Keep, "checkpoint": Checkpoint, "offload": Offload, "selective": Selective},
    "head": {"plain": Plain, "fused": Fused},
    "place": {"device": Device, "host_state": HostState, "host_weights": HostWeights, "host_embed": HostEmbed, "fsdp": Fsdp,
              "fsdp_offload": FsdpOffload},
}
"""axis -> value -> class; the first value of each axis is its default."""

__all__ = ["AXES"]
