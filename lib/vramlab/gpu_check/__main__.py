"""Forecasts held against this machine's GPU, in minutes.

    make gpu-check
    PYTHONPATH=lib:tests python3 -m vramlab.gpu_check --peers benchmarks.trainer_peers --out DIR

Any Python will do that has torch, transformers, peft, pandas and pyarrow. Every row that fits is
measured at the 7B's shape with random weights, at 1,024 and 4,096 tokens, each in a process of its
own with a time limit. One row runs out of memory on purpose. With `--peers` some rows also run
under another training loop; `make gpu-check` names the one of transformers. Then comes the small
sweep. The deadline holds for all of it, the most informative cells come first, and the same command
goes on where it stopped. The check needs no network. It leaves small files in DIR, which name the
card, the driver and the versions, and nothing else of the machine. With `--device cpu` the tiny
model goes the same way where there is no GPU. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .check import SMALL_SWEEP, Check


def peers_module(name: str) -> ModuleType:
    """The value of `--peers`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise argparse.ArgumentTypeError(
            f"{error}: its folder must be on PYTHONPATH, as in `make gpu-check`"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = argparse.ArgumentParser(
        prog="python -m vramlab.gpu_check", description=__doc__.split("\n")[0]
    )
    options.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "outputs") / "gpu-check",
        help="default: $OUT/gpu-check, or outputs/gpu-check",
    )
    options.add_argument("--minutes", type=float, default=8.7, help="for all of it (default: 8.7)")
    options.add_argument(
        "--device", default="cuda", help="default: cuda; with cpu the tiny model goes the same way"
    )
    options.add_argument(
        "--model",
        help="a file of params/models, or the path of one (default: baichuan2-7b; tiny on a CPU)",
    )
    options.add_argument("--seq", type=int, nargs="+", help="default: 1024 4096; 32 64 on a CPU")
    options.add_argument(
        "--only", nargs="+", default=[], help="rows of params/regimes.yml (default: all)"
    )
    options.add_argument(
        "--peers",
        type=peers_module,
        metavar="MODULE",
        help="a module that trains some rows in another loop (make gpu-check:"
        " benchmarks.trainer_peers, the Trainer of transformers)",
    )
    options.add_argument("--no-tiny", action="store_true", help="leave the small sweep out")
    args = options.parse_args(argv)
    on_cpu = args.device == "cpu"
    return Check(
        args.out,
        args.minutes,
        args.device,
        args.model or ("tiny" if on_cpu else "baichuan2-7b"),
        tuple(args.seq or ((32, 64) if on_cpu else (1024, 4096))),
        tuple(args.only),
        () if args.no_tiny else SMALL_SWEEP,
        0.2 if on_cpu else 2.2,
        args.peers,
    ).run()


if __name__ == "__main__":
    sys.exit(main())
