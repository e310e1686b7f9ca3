"""VRAM Lab: which memory regime fine-tunes Baichuan-2 on the GPU at hand, and what it costs in
factual consistency."""

import logging
import os

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
