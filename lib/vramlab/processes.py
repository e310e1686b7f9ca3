"""Child processes: every one that the project starts is started, watched and ended here.

    call_once("module:function", payload, limit_s=600)      # CallResult(value, reason, killed)

    for item, value, reason in side_by_side(function, items, jobs=4):
        ...  # single-threaded workers, each for many items

A child loads its function at once, beside whatever its parent does, and then calls it with each
payload that is sent. It ends with its parent, even when the parent is killed. `run_cells` is the
loop behind sweeps, studies, charts and forecasts: it keeps a number of cells at work, starts the
next, ends those that take too long, and leaves no process behind, whatever stops it.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import math
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, NamedTuple

MALLOC_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_MAX_": "1000000",
}
"""With these in its environment, glibc returns freed memory to the operating system at once."""
TURN = "VRAMLAB_TURN"
"""The environment variable that names the lock file of `take_turn`."""
_turn_locks: list[IO] = []
_interrupted = threading.Event()


class CallResult(NamedTuple):
    """How a call in a child process ended."""

    value: Any
    """What the function returned; None, where it did not return."""
    reason: str
    """Empty when it returned, else its error, or how the process ended."""
    killed: bool = False
    """The process was killed by signal 9, which is what Linux does when memory runs out."""

    def to_dict(self) -> dict:
        """The dict that the function returned, with `outcome` ("ok", "oom" or "failed") and
        `reason`. A killed process counts as out of memory."""
        short = self.killed or self.reason.startswith("MemoryError: ")
        outcome = "oom" if short else "failed" if self.reason else "ok"
        return {"outcome": outcome, "reason": self.reason, **(self.value or {})}


class Child:
    """A fresh Python process that calls `target`, "module:function", with each payload sent to it.

    `environment` is added to this process's own. `output` is where the child prints: a file,
    `subprocess.DEVNULL`, or None for where this process prints. As a context, it ends with the
    block.
    """

    def __init__(
        self,
        target: str,
        environment: Mapping[str, str] | None = None,
        output: IO | int | None = None,
    ):
        self.target = target
        self.connection, far_end = multiprocessing.Pipe()
        # the rest of sys.path is the child's only: a kernel that it starts may be another Python
        library, own = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
        path = f"{library}{os.pathsep}{own}" if own else library
        arguments = [str(far_end.fileno()), str(os.getpid()), os.pathsep.join(sys.path), target]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vramlab.processes", *arguments],
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            pass_fds=[far_end.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        far_end.close()

    def send(self, payload: Any, limit_s: float = math.inf) -> None:
        """Begin a call. One that takes longer than `limit_s` seconds counts as ended."""
        self._limit_s, self._ends_s = limit_s, time.monotonic() + limit_s
        with suppress(BrokenPipeError, ConnectionResetError):  # `result` says how it died
            self.connection.send(payload)

    def ended(self) -> bool:
        """Whether the call has returned, raised or outlived its limit, or the process has died."""
        return self.connection.poll() or time.monotonic() >= self._ends_s

    def result(self) -> CallResult:
        """Wait for the end of the call. A process that has not answered in time is ended."""
        left_s = max(0.0, self._ends_s - time.monotonic())
        try:
            if self.connection.poll(None if math.isinf(left_s) else left_s):
                return CallResult(*self.connection.recv())
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
            how = "was killed by signal 9" if killed else f"ended with code {code}"
            return CallResult(None, f"its process {how}", killed)
        self.stop()
        return CallResult(None, f"no answer from {self.target} in {self._limit_s:.0f} s")

    def wait_until_loaded(self) -> None:
        """Return once the child has loaded its function, or died: what is timed from here on is
        timed alone."""
        self.send(None)
        self.result()

    @property
    def alive(self) -> bool:
        """Whether the process can take another call."""
        return self._process.poll() is None

    def stop(self, grace_s: float = 20.0) -> None:
        """End the process: with SIGTERM, and after `grace_s` seconds with SIGKILL."""
        self.connection.close()
        self._process.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def call_once(
    target: str,
    payload: Any,
    limit_s: float = math.inf,
    environment: Mapping[str, str] | None = None,
    output: IO | int | None = subprocess.DEVNULL,
) -> CallResult:
    """One call of `target` in a fresh process; see `Child`."""
    with Child(target, environment, output) as child:
        child.send(payload, limit_s)
        return child.result()


def run_cells(
    cells: Iterable,
    start: Callable[[Any], Child],
    jobs: int = 1,
    may_start_next: Callable[[Any], bool] = lambda cell: False,
    budget_s: float = math.inf,
) -> Generator[tuple[Any, Child], None, None]:
    """Work on `cells` in child processes; yield each with its process when its call has ended.

    `start(cell)` returns the process that the cell was sent to. `jobs` cells run at a time; one
    more is started early as soon as `may_start_next` holds for those that run. `cells` may be lazy:
    the next is taken when there is room for it. After `budget_s` seconds the loop ends. The caller
    ends the processes that it was handed, this loop those that are still at work when it is closed.

    Raises: KeyboardInterrupt, on Ctrl-C.
    """
    waiting, running, ends_s = iter(cells), dict[Any, Any](), time.monotonic() + budget_s
    with ExitStack() as stack:
        stack.callback(lambda: [child.stop() for child in running])
        if threading.current_thread() is threading.main_thread():
            _interrupted.clear()
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, _interrupt))
        while time.monotonic() < ends_s:
            early = len(running) == jobs and all(map(may_start_next, running.values()))
            for cell in islice(waiting, max(0, jobs + early - len(running))):
                running[start(cell)] = cell
            if not running:
                return
            wait([child.connection for child in running], min(1.0, ends_s - time.monotonic()))
            if _interrupted.is_set():
                raise KeyboardInterrupt
            for child in [child for child in running if child.ended()]:
                yield running.pop(child), child


def side_by_side(
    function: Callable,
    items: Sequence,
    jobs: int,
    environment: Mapping[str, str] | None = None,
    budget_s: float = math.inf,
) -> Iterator[tuple[Any, Any, str]]:
    """Yield (item, `function(item)`, reason of its failure) as each item ends, in `jobs`
    single-threaded processes. A process that dies fails its own item; items that are not done after
    `budget_s` seconds are left out. `function` and items must be picklable."""
    idle: list[Child] = []

    def start(item: Any) -> Child:
        target = "vramlab.processes:call_in_one_thread"
        child = idle.pop() if idle else children.enter_context(Child(target, environment))
        child.send((function, item))
        return child

    with (
        ExitStack() as children,
        closing(run_cells(items, start, jobs, budget_s=budget_s)) as ended,
    ):
        for item, child in ended:
            result = child.result()
            idle += [child] if child.alive else []
            yield item, result.value, result.reason


def call_in_one_thread(call: tuple[Callable, Any]) -> Any:
    """Call (function, argument) in a worker: there are as many workers as cores."""
    _prepare_worker()
    function, argument = call
    return function(argument)


@cache
def _prepare_worker() -> None:
    """One thread; and the half a million objects of the libraries are kept from the garbage
    collector."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def take_turn() -> None:
    """Wait until no other process with the same `TURN` is at work; it is then this one's turn, to
    its end. Without `TURN`, return at once."""
    if TURN in os.environ and not _turn_locks:
        _turn_locks.append(open(os.environ[TURN], "w"))  # noqa: SIM115, locked while it is open
        fcntl.flock(_turn_locks[0], fcntl.LOCK_EX)


@contextmanager
def alone(folder: Path, work: str) -> Iterator[None]:
    """Lock `folder`, where two processes would run the same cells. Raises: ValueError, when another
    process has the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another {work} is running in {folder}: wait for it, or use --out for another"
                " folder"
            ) from None
        yield


def _interrupt(*_) -> None:
    """Remember Ctrl-C besides raising it: an exception raised inside a callback of the interpreter
    is lost."""
    _interrupted.set()
    raise KeyboardInterrupt


def _die_with(parent: int) -> None:
    """When the process `parent` is killed, so is this one. Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before
            os._exit(1)


def _attempt(function: Callable, argument: Any) -> tuple[Any, str]:
    try:
        return function(argument), ""
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"


def _serve(descriptor: str, parent: str, path: str, target: str) -> None:
    """The child's side: answer each payload until the parent closes the connection. `path`: the
    parent's `sys.path`."""
    _die_with(int(parent))
    sys.path += path.split(os.pathsep)
    connection = Connection(int(descriptor))
    function, reason = _attempt(pkgutil.resolve_name, target)
    with suppress(EOFError, ConnectionResetError, KeyboardInterrupt):
        while True:
            payload = connection.recv()
            loaded_only = payload is None or reason
            connection.send((None, reason) if loaded_only else _attempt(function, payload))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
