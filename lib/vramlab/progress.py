"""A progress bar that a terminal, a notebook and a saved notebook can all show.

In a kernel it is one output, rewritten at most four times a second, whose last state is what the
saved notebook holds; widget bars freeze at 0 % in an exported page, and a bar printed line by line
floods it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class _NotebookBar:
    def __init__(self, label: str, total: int):
        from IPython.display import display

        self.label, self.total, self.done = label, total, 0
        self._began = self._shown = time.monotonic()
        self._handle = display(self._html(), display_id=True)

    def _html(self):
        from IPython.display import HTML

        elapsed_s = time.monotonic() - self._began
        left_s = elapsed_s / self.done * (self.total - self.done) if self.done else float("nan")
        left = f", {left_s:.0f} s left" if 0 < self.done < self.total else ""
        words = f"{self.done}/{self.total}, {elapsed_s:.0f} s{left}"
        return HTML(
            f'<label>{self.label} <progress value="{self.done}" max="{self.total}"></progress>'
            f" {words}</label>"
        )

    def update(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self._shown > 0.25 or self.done >= self.total:
            self._shown = time.monotonic()
            self._handle.update(self._html())

    def close(self) -> None:
        self._handle.update(self._html())


def _in_kernel() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


@contextmanager
def bar(label: str, total: int, show: bool = True) -> Iterator:
    """An object with `update(count)`. Shows nothing when `show` is false."""
    if show and _in_kernel():
        shown = _NotebookBar(label, total)
    else:
        from tqdm import tqdm

        shown = tqdm(total=total, desc=label, disable=not show, leave=False, mininterval=0.25)
    try:
        yield shown
    finally:
        shown.close()
