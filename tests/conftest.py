"""Every test runs offline and, unless OMP_NUM_THREADS says otherwise, on one thread: on shared
cores a second one spends its time waiting for its turn."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see vramlab, which is imported after torch here
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")

import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

import fcntl  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SMALL = {
    "recipe": "smoke",
    "steps": 4,
    "train_items": 64,
    "val_items": 40,
    "test_items": 40,
    "batch_size": 4,
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """A folder of real small runs, and one cell that ran out of memory. Each worker has a copy of
    what the first one made."""
    base = tmp_path_factory.getbasetemp()
    made = (base if worker_id == "master" else base.parent) / "finished-by-the-first"
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            os.replace(_finish(tmp_path_factory.mktemp("finished")), made)
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("finished") / "runs"))


def _finish(folder: Path) -> Path:
    from vramlab.files import write_checked
    from vramlab.runs.execute import execute

    for regime in ("zero_shot", "full", "checkpoint"):
        execute({**SMALL, "regime": regime}, folder / f"{regime}-0", progress=False)
    lost = folder / "lora-0"
    lost.mkdir()
    (lost / "params.yml").write_text("regime: lora\nseed: 0\ntrain_domain: news\n")
    (lost / "result.json").write_text(
        json.dumps(
            {"outcome": "oom", "reason": "no room <here>", "regime": "lora", "model": "tiny"}
        )
    )
    order = [{"run_id": f"{regime}-0"} for regime in ("zero_shot", "full", "checkpoint", "lora")]
    write_checked(folder / "sweep.json", {"cells": order})
    return folder
