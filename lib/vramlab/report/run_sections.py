"""The sections of the report that say what was measured and learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ..capture.oom import evidence_lines
from ..runs.folder import Run
from . import comparison, figures, tables
from .rendering import Section


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """The sections for which the runs have the data."""
    done, summary = [run for run in runs if run.ok], tables.summary(runs)
    if not done:
        reasons = Section("Runs", "No run finished; the reasons are here.", None, summary)
        return [reasons, *_with_content(_out_of_memory(runs))]
    return [
        *_memory(done, summary),
        *_scores(done),
        *_with_content(_written(done), _driver(done), _out_of_memory(runs)),
    ]


def _with_content(*sections: Section) -> list[Section]:
    return [section for section in sections if len(section.table) or section.sentences]


def _memory(done: Sequence[Run], summary: pd.DataFrame) -> list[Section]:
    traced = [run for run in done if run.has_timeline]
    return [
        Section(
            "The trade-off",
            "Left is less memory, up is more consistent, bright is faster. The bars are 95 %"
            " intervals over documents.",
            figures.trade_off(done) if traced else None,
            summary,
        ),
        Section(
            "Where the bytes are",
            "The event meter's bytes at the peak, by what they are for. The line is the operating "
            "system's figure for the whole process, from a separate pass; host memory is in it.",
            figures.ledger(done) if traced else None,
            tables.ledger(done),
        ),
        Section(
            "The timeline of a run",
            "Two steps under the event meter (regimes that take turns: two for each part). Pick a "
            "regime; drag to zoom. The strip below is the phase.",
            figures.timelines(done) if traced else None,
            tables.owners(traced),
        ),
        Section(
            "Speed",
            "Median of the timed steps, nothing watching. LOMO updates inside backward.",
            figures.speed(done),
            summary.filter(regex="regime|tokens|_ms"),
        ),
    ]


def _scores(done: Sequence[Run]) -> list[Section]:
    metrics = ("balanced_accuracy", "balanced_accuracy_at_0", "auc", "accuracy")
    columns = ["judge", "place", "scoring", "metric", "value", "low", "high", "n"]
    accuracy = pd.concat([tables.accuracy(done, metric) for metric in metrics])
    return [
        Section(
            "In and out of the training domain",
            f"Trained on {done[0].params['train_domain']}. Thresholds are frozen on its "
            "validation items. The last rows are judges without a model.",
            figures.matrix(done),
            accuracy[[*columns, "n_consistent", "threshold"]],
        ),
        Section(
            "Against full fine-tuning",
            "Paired on the same items; Holm corrects over the regimes of a column.",
            figures.differences(done),
            tables.against_reference(done),
        ),
        Section(
            "Training",
            "Regimes that change no arithmetic lie on one line.",
            figures.losses(done),
            tables.recalls(done),
        ),
    ]


def _written(done: Sequence[Run]) -> Section:
    return Section(
        "What the models write",
        "One sentence a document: shares that are consistent, not, or no sentence at all."
        " The oracle is the grammar that made the document, the checker a published model."
        " The interval is over documents.",
        None,
        tables.written(done),
    )


def _driver(done: Sequence[Run]) -> Section:
    ledgers = comparison.driver_ledgers(done)
    return Section(
        "What the driver reports",
        "At the peak of the recorded steps: what is asked for by category, what the"
        " allocator adds by rounding and caching, the context, other processes, and the"
        " rest, which nothing explains.",
        comparison.ledgers(ledgers),
        comparison.ledger_table(ledgers).reset_index(names="part"),
    )


def _out_of_memory(runs: Sequence[Run]) -> Section:
    records = {run.name: run.result["oom"] for run in runs if run.result.get("oom")}
    return Section(
        "Out of memory",
        "What was asked for, what there was, who held the rest. The table has forecasts of"
        " the same step with one thing changed; none of them was run.",
        None,
        tables.would_fit(runs),
        sentences=[
            f"{name}, {line.strip()}"
            for name, record in records.items()
            for line in (*evidence_lines(record)[:6], *_would_fit(record))
        ],
    )


def _would_fit(record: Mapping) -> list[str]:
    changes = record.get("would_fit", ())
    fits = [change["change"] for change in changes if change["fits"]]
    if fits:
        return [f"predicted to fit: with {'; or '.join(fits)}"]
    return ["none of the changes is predicted to fit"] if changes else []
