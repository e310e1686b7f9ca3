"""VRAM Lab: which memory regime fine-tunes Baichuan-2 on the GPU at hand, and what it costs in
factual consistency.

    from vramlab import Trainer, execute, read_regimes, regime    # loaded when first used
    from vramlab.forecast.forecast import forecast    # `vramlab.forecast` is the room
"""

import importlib
import logging
import os
from typing import Any

from . import auto_classes  # noqa: F401, lets transformers find the model

# before torch loads OpenMP: threads that wait go to sleep early. On idle cores a step takes as
# long; on cores that others use too it takes a twentieth, because nobody spins on the core that the
# one they wait for needs.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# transformers imports torchao where it is installed, which says at length which of its GPU kernels
# this torch cannot load
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

__version__ = "0.1.0"

PUBLIC = {
    "Question": "forecast.forecast",
    "Schedule": "training.trainer",
    "Trainer": "training.trainer",
    "assert_peak": "forecast.forecast",
    "build_report": "report:build",
    "card": "cards",
    "execute": "runs.execute",
    "read_regimes": "regimes.regime",
    "read_runs": "runs.folder",
    "regime": "regimes.regime",
    "sweep": "runs.sweep",
}
"""Name -> the module that defines it, with its name there where that differs. Nothing of it is
imported before it is used, so that a command that needs no torch loads none."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
