"""A progress bar for a terminal, a notebook and a saved notebook.

In a kernel the bar is one output, rewritten at most four times a second, and the saved notebook
holds its last state; a widget's bar would freeze at 0 % in an exported page, and a bar that prints
a line for each state would flood the notebook.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, closing

from tqdm import tqdm


class _NotebookBar:
    def __init__(self, label: str, total: int):
        from IPython.display import display

        self.label, self.total, self.done = label, total, 0
        self._started_s = self._drawn_s = time.monotonic()
        self._output = display(self._html(), display_id=True)

    def _html(self):
        from IPython.display import HTML

        elapsed_s = time.monotonic() - self._started_s
        left = ""
        if 0 < self.done < self.total:
            left = f", {elapsed_s / self.done * (self.total - self.done):.0f} s left"
        return HTML(
            f'<label>{self.label} <progress value="{self.done}" max="{self.total}"></progress>'
            f" {self.done}/{self.total}, {elapsed_s:.0f} s{left}</label>"
        )

    def update(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self._drawn_s > 0.25 or self.done >= self.total:
            self._drawn_s = time.monotonic()
            self._output.update(self._html())

    def close(self) -> None:
        self._output.update(self._html())


def bar(label: str, total: int, show: bool = True) -> AbstractContextManager:
    """A context whose value has `update(count)`. Nothing is drawn when `show` is false."""
    ipython = sys.modules.get("IPython")
    if show and ipython and getattr(ipython.get_ipython(), "kernel", None):
        return closing(_NotebookBar(label, total))
    return closing(tqdm(total=total, desc=label, disable=not show, leave=False, mininterval=0.25))
