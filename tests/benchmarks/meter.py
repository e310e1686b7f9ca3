"""The event meter against MemTracker, as a ratio in one run: the first part of `make bench`.

The tracker: one step of the 7B (fp32, AdamW, 1 x 1,024 tokens) on fake tensors, watched by our
event meter and by `torch.distributed._tools.MemTracker`, the only other tool that watches every
tensor of a step without a GPU. Both on the fake CPU, which MemTracker knows; building the model is
not counted.

The head: fused against plain, see `fused_head`.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.fused_head import head_rows
from vramlab.baichuan import BaichuanForCausalLM
from vramlab.forecast.virtual_gpu import virtual_gpu
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import regime
from vramlab.training.trainer import Schedule, Trainer

MODEL, SEQ = "baichuan2-7b", 1024


def _batch() -> dict:
    ids = torch.empty(1, SEQ, dtype=torch.long)
    return {"input_ids": ids, "labels": torch.empty_like(ids)}


def ours_s() -> float:
    """Seconds of one step under the event meter."""
    with virtual_gpu("cpu") as gpu:
        meter = gpu.meter()
        trainer = Trainer(
            BaichuanForCausalLM(model_spec(MODEL).config),
            regime("full"),
            Schedule(1e-3, 1),
            observer=meter,
        )
        with meter:
            began = time.perf_counter()
            trainer.step([_batch()], [1.0])
            return time.perf_counter() - began


def mem_tracker_s() -> float:
    """Seconds of the same step under MemTracker."""
    with virtual_gpu("cpu"):
        model = BaichuanForCausalLM(model_spec(MODEL).config)
        optimizer, batch = torch.optim.AdamW(model.parameters(), fused=True), _batch()
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *batch.values())
        with tracker:
            began = time.perf_counter()
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - began


def main() -> int:
    """Print the table, or JSON with `--json`, a row a line."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    ours, theirs = ours_s(), mem_tracker_s()
    row = {
        "step": f"{MODEL}, full, 1 x {SEQ}",
        "ours_s": round(ours, 2),
        "mem_tracker_s": round(theirs, 2),
        "ratio": round(theirs / ours, 1),
    }
    for measured in (row, *head_rows()):
        print(
            json.dumps(measured)
            if "--json" in sys.argv
            else "  ".join(f"{name} {value}" for name, value in measured.items())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
