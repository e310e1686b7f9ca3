"""The driver's figures of a card during a run: a thread of its own reads them every 30 ms, on the
clock of the steps.

Sampling never ends the run that it accompanies. A lost card, a reading that raises, a thread that
dies or hangs in the driver: each ends the sampling, the samples so far are kept, and `notes` says
why. Memory is bounded: at `most_rows` every second row is dropped, of two neighbours the row with
fewer bytes, and samples come half as often. Not yet run on a GPU.
"""

from __future__ import annotations

import threading
import time

import pandas as pd

from .energy import Energy, energy
from .nvml import COLUMNS, Reader

LINGER_S = 0.25
"""How long sampling goes on after the last window, so that the energy counter moves once more."""
PATIENCE_S = 2.0
"""How long to wait at the end for a reading that is under way."""


class Sampler:
    """A context manager: `reader` is sampled every `period_s` while it is open. With the null
    object no thread is started and `frame()` is empty."""

    def __init__(self, reader: Reader, period_s: float = 0.03, most_rows: int = 200_000):
        self.reader, self._period_s, self._most = reader, period_s, most_rows
        self._rows: list[tuple] = []
        self._ended: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nvml", daemon=True)

    @property
    def notes(self) -> list[str]:
        """What could not be measured, and why."""
        return [*self.reader.notes, *self._ended]

    def __enter__(self) -> Sampler:
        if self.reader.card:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._thread.ident is None:
            return
        if self._thread.is_alive() and self.frame()["energy_j"].notna().any():
            time.sleep(LINGER_S)
        self._stop.set()
        self._thread.join(timeout=PATIENCE_S)
        if self._thread.is_alive():
            self._ended.append(
                f"sampling stopped after {len(self._rows)} samples: the driver does not answer"
            )

    def frame(self) -> pd.DataFrame:
        """`t_s`, seconds of `time.perf_counter` in the middle of each reading, and the reader's
        `COLUMNS`, empty where N/A."""
        rows = pd.DataFrame(list(self._rows), columns=["t_s", *COLUMNS])
        return rows.astype(
            {name: "Int64" if name.endswith("_bytes") else "float64" for name in rows}
        )

    def energy_j(self, t0: float, t1: float) -> Energy:
        """The card's energy from `t0` to `t1`, seconds of the same clock."""
        return energy(self.frame(), t0, t1)

    def _watch(self) -> None:
        due, ending = time.perf_counter(), "its thread was ended"
        try:
            while not self._stop.is_set() and not self.reader.lost:
                before = time.perf_counter()
                row = self.reader.sample()
                now = time.perf_counter()
                self._keep(((before + now) / 2, *(row[name] for name in COLUMNS)))
                due += self._period_s
                if due < now:  # the driver was slow: missed samples are not made up for
                    due = now + self._period_s
                self._stop.wait(due - now)
            ending = ""
        except Exception as error:
            ending = f"{type(error).__name__}: {error}"
        finally:
            if ending:
                self._ended.append(f"sampling stopped after {len(self._rows)} samples: {ending}")

    def _keep(self, row: tuple) -> None:
        self._rows.append(row)
        if len(self._rows) >= self._most:
            self._rows = [
                max(pair, key=lambda r: r[1] or 0)
                for pair in zip(self._rows[::2], self._rows[1::2], strict=False)
            ]
            self._period_s *= 2
