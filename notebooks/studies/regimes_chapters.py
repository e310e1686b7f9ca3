"""The chapters of the regimes' notebook: what each displays, computed once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

import regimes as study
import regimes_figures
from regimes_figures import kept
from vramlab.progress import bar
from vramlab.regimes import updates
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import read_regimes


@dataclass(frozen=True)
class Chapters:
    """Everything the chapters show, by row."""

    rows: Mapping[str, Sequence[str]]
    """family -> rows"""
    cells: Mapping[str, dict]
    counts: Mapping[str, updates.Updates]
    times: pd.DataFrame
    quotes: Mapping[str, study.Quote]

    @classmethod
    def of(
        cls,
        model: str,
        seq: int,
        card: str,
        families: Sequence[str],
        rows: Sequence[str],
        progress: bool = True,
    ) -> Chapters:
        """Forecast, count and time the rows. Raises: ValueError, for an unknown family or row."""
        known, study_file = read_regimes(), study.read_study()
        chosen = study_file.chapters(families, rows)
        cells = study.predicted(chosen, model, seq, card, progress)
        counts = {}
        with bar("updates", len(cells), progress) as progress_bar:
            for name in cells:
                counts[name] = updates.updates(model_spec(model), known[name])
                progress_bar.update()
        return cls(chosen, cells, counts, study.stalls(cells, progress=progress), study_file.quotes)

    def show(self, family: str) -> None:
        """One chapter: the table, the bytes, the step times."""
        from IPython.display import Markdown, display

        if family not in self.rows:
            display(Markdown("*Left out by the parameters.*"))
            return
        names = self.rows[family]
        cells = {name: cell for name, cell in kept(names, self.cells).items() if not cell["reason"]}
        display(
            *(
                Markdown(f"* `{name}` has no forecast: {self.cells[name]['reason']}")
                for name in names
                if name not in cells
            )
        )
        if cells:
            display(
                regimes_figures.table(cells, self.counts, self.quotes).round(2),
                regimes_figures.ledger(cells, self.counts),
            )
        times = self.times[self.times["row"].isin(names)]
        if len(times):
            display(regimes_figures.stalls(times))
        sentences = regimes_figures.stall_words(times) or [
            "No row here has a step unlike its others."
        ]
        display(Markdown("\n".join(f"* {sentence}" for sentence in sentences)))

    def takeaway(self) -> str:
        """In Markdown; rows without a forecast are not in it."""
        return regimes_figures.takeaway(
            {name: cell for name, cell in self.cells.items() if not cell["reason"]}, self.counts
        )
