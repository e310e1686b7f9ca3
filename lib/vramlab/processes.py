"""Processes that work for another one, and end with it."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

MALLOC_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_MAX_": "1000000",
}


def die_with(parent: int) -> None:
    """In a child, before it works: when the process `parent` is killed, so is this one (Linux;
    elsewhere nothing)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


TURN = "VRAMLAB_TURN"
"""In the environment: a file, of which a process that was started ahead of its time waits for the
lock."""
_turn: list = []


def take_turn() -> None:
    """Wait until no other process that was given the same `TURN` is at work; then this one is, to
    its end."""
    if TURN in os.environ and not _turn:
        _turn.append(open(os.environ[TURN], "w"))  # noqa: SIM115, the lock is held as long as it is open
        fcntl.flock(_turn[0], fcntl.LOCK_EX)


def worker(parent: int) -> None:
    """A pool's initializer: one of as many processes as there are cores, so one thread."""
    import torch

    die_with(parent)
    torch.set_num_threads(1)


def side_by_side(
    does: Callable, asked: Sequence, jobs: int
) -> Iterator[tuple[Any, Any, BaseException | None]]:
    """(item, what `does` makes of it, its error) as each of `asked` ends, in `jobs` fresh processes
    of one thread. A process that dies is the error of every item that had not ended."""
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=worker, initargs=(os.getpid(),)
    )
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
    """Once, when the libraries are there, which are half a million objects: the collector need not
    look at them again."""
    gc.collect()
    gc.freeze()


def run_in_measured_process(
    target: str,
    payload: Mapping,
    timeout_s: float,
    threads: int = 0,
    environment: Mapping[str, str] = MALLOC_ENV,
) -> dict:
    """Call `module:function` with `payload` in a fresh Python with `environment` set; return its
    dict. See `MeasuredProcess`."""
    with MeasuredProcess(target, threads, environment) as process:
        return process.call(payload, timeout_s)


class MeasuredProcess:
    """A fresh Python with `environment` set, for one call of `module:function`. It loads the module
    at once, beside whatever its caller does, and then waits for the call. A context: at its end no
    process is left."""

    def __init__(self, target: str, threads: int = 0, environment: Mapping[str, str] = MALLOC_ENV):
        self.target = target
        self._folder = tempfile.TemporaryDirectory(prefix="vramlab-")
        self._answer, self._loaded = (
            Path(self._folder.name, "answer.json"),
            Path(self._folder.name, "loaded"),
        )
        environment = {
            **os.environ,
            **environment,
            **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        }
        command = [
            sys.executable,
            "-m",
            "vramlab.processes",
            target,
            str(self._loaded),
            str(self._answer),
        ]
        self._process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def wait_until_loaded(self) -> None:
        """Return once nothing more is loaded there, or it has died: what is timed from here on is
        timed alone."""
        while not self._loaded.exists() and self._process.poll() is None:
            time.sleep(0.02)

    def call(self, payload: Mapping, timeout_s: float) -> dict:
        """The function's dict. What goes wrong there is a result, not an exception here:
        {"outcome": "oom" | "failed", "reason": ...}. A process killed by signal 9 is taken for out
        of memory, which is what the kernel does to it.
        """
        try:
            _, printed = self._process.communicate(json.dumps(dict(payload)), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {
                "outcome": "failed",
                "reason": f"no answer from {self.target} in {timeout_s:.0f} s",
            }
        if self._answer.exists():
            return json.loads(self._answer.read_text())
        last = (printed.strip().splitlines() or ["no message"])[-1]
        killed = self._process.returncode in (-9, 137)
        return {
            "outcome": "oom" if killed else "failed",
            "reason": "killed by the kernel" if killed else last,
        }

    def __enter__(self) -> MeasuredProcess:
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


def _main(target: str, loaded: str, answer: str) -> None:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    Path(loaded).touch()
    try:
        result = {"outcome": "ok", "reason": "", **function(json.loads(sys.stdin.read()))}
    except MemoryError as error:
        result = {"outcome": "oom", "reason": f"MemoryError: {error}"}
    partial = Path(answer + ".part")
    partial.write_text(json.dumps(result))
    os.replace(partial, answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
