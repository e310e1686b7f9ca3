"""Processes that work for another one, and end with it."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from typing import Any


def die_with(parent: int) -> None:
    """In a child, before it works: when the process `parent` is killed, so is this one (Linux; elsewhere nothing)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


TURN = "VRAMLAB_TURN"
"""In the environment: a file, of which a process that was started ahead of its time waits for the lock."""
_turn: list = []


def take_turn() -> None:
    """Wait until no other process that was given the same `TURN` is at work; then this one is, to its end."""
    if TURN in os.environ and not _turn:
        _turn.append(open(os.environ[TURN], "w"))  # noqa: SIM115, the lock is held as long as it is open
        fcntl.flock(_turn[0], fcntl.LOCK_EX)


def worker(parent: int) -> None:
    """A pool's initializer: one of as many processes as there are cores, so one thread."""
    import torch

    die_with(parent)
    torch.set_num_threads(1)


def side_by_side(does: Callable, asked: Sequence, jobs: int) -> Iterator[tuple[Any, Any, BaseException | None]]:
    """(item, what `does` makes of it, its error) as each of `asked` ends, in `jobs` fresh processes of one thread. A process that
    dies is the error of every item that had not ended."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=worker, initargs=(os.getpid(),))
    try:
        waiting = {pool.submit(_do, does, item): item for item in asked}
        for future in as_completed(waiting):
            error = future.exception()
            yield waiting[future], None if error else future.result(), error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _do(does: Callable, item: Any) -> Any:
    _leave_alone()
    return does(item)


@cache
def _leave_alone() -> None:
    """Once, when the libraries are there, which are half a million objects: the collector need not look at them again."""
    gc.collect()
    gc.freeze()
