"""What the head costs in bytes at the published sizes: NormHead beside the plain linear head,
formed naively and fused.

Predicted, on the virtual GPU: no weights and no GPU are needed. The head alone shows the price of
normalising its rows; a whole step shows whether that price is paid, which it is only where the head
sets the peak.
"""

from __future__ import annotations

import pandas as pd
import torch

from vramlab.baichuan.head import NormHead
from vramlab.forecast.trace import trace
from vramlab.forecast.virtual_gpu import virtual_gpu
from vramlab.regimes.head.head import FusedLoss
from vramlab.regimes.parameters import model_spec, row_of

HEADS = {
    "linear": (False, False),
    "linear, fused": (False, True),
    "NormHead": (True, False),
    "NormHead, fused": (True, True),
}
"""name -> (rows normalised, fused)."""


def head_bytes(model: str, tokens: int) -> pd.DataFrame:
    """The head's forward and backward of the loss in bf16, on one row of `tokens`, trained and
    frozen. One row each: `head`, `trained`; `extra_bytes`, the peak without the weight and what
    comes in; `kept_bytes`, what of that waits between forward and backward; `weight_bytes`, one
    copy of the weight."""
    return pd.DataFrame(
        [
            {"head": name, "trained": trained, **_alone(model, tokens, norm, fused, trained)}
            for name, (norm, fused) in HEADS.items()
            for trained in (True, False)
        ]
    )


def _alone(model: str, tokens: int, norm: bool, fused: bool, trained: bool) -> dict[str, int]:
    config = model_spec(model).config
    with virtual_gpu() as gpu:
        with torch.device(gpu.device):
            head = (
                NormHead(config.hidden_size, config.vocab_size, norm)
                .to(torch.bfloat16)
                .requires_grad_(trained)
            )
            hidden = torch.empty(
                1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True
            )
            labels = torch.empty(1, tokens, dtype=torch.long)
        head.fused = FusedLoss() if fused else None
        meter = gpu.meter()
        meter.own("weights", [("head", head.weight), ("hidden", hidden), ("labels", labels)])
        with meter:
            with meter.phase("forward"):
                loss = head(hidden, labels)[0]
            with meter.phase("backward"):
                loss.backward()
    frame, given = meter.frame(), sum(tensor.nbytes for tensor in (head.weight, hidden, labels))
    forward = frame[frame["phase"] == "forward"]
    return {
        "extra_bytes": meter.peak()["peak_bytes"] - given,
        "kept_bytes": int(forward["live_bytes"].iloc[-1]) - given,
        "weight_bytes": head.weight.nbytes,
    }


def step_bytes(model: str, regime: str, seq: int, weights: str, batch: int = 1) -> pd.DataFrame:
    """The forecast peak of a whole step under `regime` with each head: `head`, `peak_bytes`
    (requested), `phase`, `head_share`, what of the peak the head's own tensors are, its stored
    weight included."""
    rows, spec = [], model_spec(model)
    for name, (norm, fused) in HEADS.items():
        row = row_of(regime, weights, {"head": "fused" if fused else "plain"})
        found = trace(spec.changed({"norm_head": norm}), row, seq, batch)
        own = sum(size for (module, _, _), size in found.alive.items() if "lm_head" in module)
        rows.append(
            {
                "head": name,
                "peak_bytes": found.peak_bytes,
                "phase": found.phase,
                "head_share": own / found.peak_bytes,
            }
        )
    return pd.DataFrame(rows)
