"""Every test runs offline and on few threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")

import torch  # noqa: E402

torch.set_num_threads(min(2, os.cpu_count() or 1))
