"""Processes that work for another one, and end with it."""

from __future__ import annotations

import ctypes
import os
import signal


def die_with(parent: int) -> None:
    """In a child, before it works: when the process `parent` is killed, so is this one (Linux; elsewhere nothing)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


def worker(parent: int) -> None:
    """A pool's initializer: one of as many processes as there are cores, so one thread."""
    import torch

    die_with(parent)
    torch.set_num_threads(1)
