"""The page: figures, tables and words in one file that needs no network and asks for none."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..capture.oom import evidence_lines
from ..files import write_whole
from ..runs.folder import Run, read_runs
from ..studies import gallery
from ..studies.claims import table
from . import claims_page as ledger
from . import comparison as measured
from . import figures, forecast_figures, tables
from . import forecast_tables as forecasts
from . import planner as plan
from . import takeaways as words
from .forecast_tables import Forecasts

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob:; worker-src blob:;"
    " style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
LIMIT_BYTES = 10_000_000


@dataclass(frozen=True)
class Section:
    """A heading, what to look for, the figure, and the table behind it."""

    title: str
    about: str
    figure: go.Figure | None
    table: pd.DataFrame
    badge: str = ""
    """How its figures were come by, where that is not what the head of the page says."""
    said: Sequence[str] = ()
    """Sentences under the figure."""
    extra: str = ""
    """HTML of its own."""


def build(folder: Path | str, damage: list[str] | None = None) -> Path:
    """Write `report.html` into a folder of finished runs and return its path. `damage` gets a
    sentence for each file or run that the report leaves out, as the report itself has it. Raises:
    FileNotFoundError, without runs."""
    damage = [] if damage is None else damage
    runs = read_runs(folder, damage)
    path = Path(folder) / "report.html"
    said = Forecasts.read(folder, damage)
    sections = [*_sections(runs), *(forecast_sections(said) if said else []), _claims()]
    page = _page(
        Path(folder).name,
        runs,
        sections,
        damage,
        [*words.caveats(runs), *(forecasts.CAVEATS if said else [])],
    )
    if len(page.encode()) > LIMIT_BYTES:
        raise ValueError(
            f"the report has {len(page.encode()):,} bytes, more than {LIMIT_BYTES:,}: make it of"
            " fewer runs"
        )
    write_whole(path, page)
    return path


def _sections(runs: Sequence[Run]) -> list[Section]:
    done = [run for run in runs if run.ok]
    summary = tables.summary(runs)
    if not done:
        return [
            Section("Runs", "No run finished; the reasons are here.", None, summary),
            *_ran_out(runs),
        ]
    traced = [run for run in done if run.has_timeline]
    owners = pd.DataFrame(
        [
            {"regime": run.name, "phase": run.result["peak"]["phase"], **owner}
            for run in traced
            for owner in run.result["peak"]["owners"]
        ]
    )
    found = [
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
            owners,
        ),
        Section(
            "Speed",
            "Median of the timed steps, nothing watching. LOMO updates inside backward.",
            figures.speed(done),
            summary.filter(regex="regime|tokens|_ms"),
        ),
        Section(
            "In and out of the training domain",
            f"Trained on {done[0].params['train_domain']}. Thresholds are frozen on its "
            "validation items. The last rows are judges without a model.",
            figures.matrix(done),
            _accuracy_table(done),
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
    return [*found, *_written(done), *_driver(done), *_ran_out(runs)]


def _written(done: Sequence[Run]) -> list[Section]:
    table = tables.written(done)
    return (
        [
            Section(
                "What the models write",
                "One sentence a document: shares that are consistent, not, or no sentence at all."
                " The oracle is the grammar that made the document, the checker a published model."
                " The interval is over documents.",
                None,
                table,
            )
        ]
        if len(table)
        else []
    )


def _driver(done: Sequence[Run]) -> list[Section]:
    named = measured.driver_ledgers(done)
    return (
        [
            Section(
                "What the driver reports",
                "At the peak of the recorded steps: what is asked for by category, what the"
                " allocator adds by rounding and caching, the context, other processes, and the"
                " rest, which nothing explains.",
                measured.ledgers(named),
                measured.ledger_table(named).reset_index(names="part"),
            )
        ]
        if named
        else []
    )


def _ran_out(runs: Sequence[Run]) -> list[Section]:
    records = {run.name: run.result["oom"] for run in runs if run.result.get("oom")}
    return (
        [
            Section(
                "Out of memory",
                "What was asked for, what there was, who held the rest. The table has forecasts of"
                " the same step with one thing changed; none of them was run.",
                None,
                tables.would_fit(runs),
                said=[
                    f"{name}, {line.strip()}"
                    for name, found in records.items()
                    for line in (*evidence_lines(found)[:6], *_fitting(found))
                ],
            )
        ]
        if records
        else []
    )


def _fitting(found: dict) -> list[str]:
    asked = found.get("would_fit", ())
    fits = [change["change"] for change in asked if change["fits"]]
    return (
        [
            (
                f"predicted to fit: with {'; or '.join(fits)}"
                if fits
                else "none of the changes is predicted to fit"
            )
        ]
        if asked
        else []
    )


def _claims() -> Section:
    found = gallery.verdicts()
    return Section(
        "What the papers said, what we saw",
        "Every claim of params/claims.yml, decided by its rule from the runs under outputs/gallery."
        " Quoted figures are the papers' own, of other models and machines; a verdict is never from"
        " one seed.",
        ledger.figure(found),
        table(found),
        said=ledger.sentences(found),
        extra=ledger.markup(found),
    )


def forecast_sections(said: Forecasts) -> list[Section]:
    """The forecast part: nothing of it was measured."""
    table = forecasts.atlas_table(said)
    if not said.cells:
        return [
            Section(
                "The atlas",
                "No cell could be forecast; the reasons are here.",
                None,
                table,
                "predicted",
            )
        ]
    cells = said.detailed
    only = (
        ""
        if len(cells) == len(said.cells)
        else f" Of {len(said.cells)} cells the first {len(cells)} are here."
    )
    saved = forecasts.one_variable(said)
    device = f"predicted, {cells[0]['device']}"
    return [
        Section(
            "The atlas",
            "What each card has left at the reserved peak of one training step, in GiB. Blue fits,"
            " red lacks. `fits flushing`: it runs, but the allocator must give its cache back on"
            " the way.",
            forecast_figures.atlas(said),
            table,
            device,
        ),
        Section(
            "Why this peak",
            "The largest groups alive at the peak, all blocks as one. `without` is the peak had"
            " that group never been allocated: where it falls by less than the group's size,"
            " another moment becomes the peak." + only,
            forecast_figures.why(cells),
            forecasts.peak_table(said),
            device,
        ),
        Section(
            "The predicted timeline",
            "One step of the real model, in requested bytes; the strip is the phase, the dashed"
            " line what the card has for the allocator. Pick a regime and a card. Reserved bytes"
            " are more: see the atlas." + only,
            forecast_figures.timeline(cells, said.cards),
            forecasts.curve_table(said),
            device,
        ),
        Section(
            "Allocator what-if",
            "The same events under other settings of PyTorch's allocator. The default's rules"
            " reproduce CUDA snapshots that others published (this project has recorded none yet);"
            " the others follow PyTorch's source, by which `garbage_collection_threshold` does"
            " nothing unless `per_process_memory_fraction` is below 1." + only,
            forecast_figures.allocators(said),
            forecasts.allocator_table(said),
            device,
            [
                *(
                    saved
                    or [
                        "In no cell here does a setting make a step fit that does not fit"
                        " without it."
                    ]
                ),
                *forecasts.lost(said),
            ],
        ),
        Section(
            "Regime diff",
            "Bytes at the peak of two cells, by category and part of the model. The table has what"
            " moved from full fine-tuning to each other row." + only,
            forecast_figures.difference(cells),
            forecasts.moved_table(said),
            device,
        ),
        *([_worlds(said)] if said.content.get("worlds") else []),
        Section(
            "Planner",
            "Pick a regime, a card and a size. Between two forecasts it draws a straight line and"
            " says so; outside them it refuses.",
            None,
            table[["name", "model", "seq", "batch"]],
            device,
            extra=plan.embed(said),
        ),
    ]


def _worlds(said: Forecasts) -> Section:
    table = forecasts.worlds_table(said)
    if not said.worlds:
        return Section(
            "One rank of many",
            "No world could be forecast; the reasons are here.",
            None,
            table,
            "predicted",
        )
    return Section(
        "One rank of many",
        "Requested bytes at one rank's peak of fsdp as written, each rank with rows of its own."
        " Weights, gradients and optimizer state are cut between ranks; activations, temporaries"
        " and the buffers of gathers and reductions (`collectives`) are not. The mark is the"
        " reserved peak (`flush`: it fits if the allocator gives its cache back), the dashed line"
        " what the card has for the allocator. What NCCL holds for itself, 1 to 2 GiB a rank, is"
        " not included.",
        forecast_figures.worlds(said),
        table,
        f"predicted, {said.worlds[0]['device']}",
        forecasts.worlds_words(said),
    )


def _accuracy_table(runs: Sequence[Run]) -> pd.DataFrame:
    frames = [
        tables.accuracy(runs, metric)
        for metric in ("balanced_accuracy", "balanced_accuracy_at_0", "auc", "accuracy")
    ]
    return pd.concat(frames)[
        [
            "judge",
            "place",
            "scoring",
            "metric",
            "value",
            "low",
            "high",
            "n",
            "n_consistent",
            "threshold",
        ]
    ]


def _page(
    name: str,
    runs: Sequence[Run],
    sections: Sequence[Section],
    damage: Sequence[str],
    caveats: Sequence[str],
) -> str:
    env = next(
        (
            run.environment
            for run in runs
            if "env.json" not in run.damage and (run.folder / "env.json").exists()
        ),
        {},
    )
    device = env.get("device", {}).get("name", "unknown device")
    model = next((run.result for run in runs if run.ok), runs[0].result)
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        (
            "<title>VRAM Lab:"
            f" {_text(name)}</title><style>{(HERE / 'page.css').read_text()}</style></head><body>"
        ),
        (
            "<header><div><h1>Which memory regime fine-tunes Baichuan-2, and at what cost?</h1><p"
            f" class=soft>sweep {_text(name)} · {len(runs)} runs · model {_text(model['model'])},"
            f" {model.get('parameters', 0):,} parameters · <span class=badge>measured on"
            f" {_text(model.get('measured_on', 'cpu').upper())}</span>"
            f" {_text(device)}</p></div><button class=theme type=button>light /"
            " dark</button></header>"
        ),
        "<ul class=takeaways>",
        *(f"<li>{_text(said)}</li>" for said in words.takeaways(runs)),
        *(f"<li>Damaged, so it counts as not there: {_text(sentence)}</li>" for sentence in damage),
        "</ul>",
        *(_section(index, section) for index, section in enumerate(sections)),
        "<h2>Before you quote a figure</h2><ul>",
        *(f"<li>{_text(said)}</li>" for said in caveats),
        "</ul>",
        "<h2>Environment</h2>",
        _table(_environment(env, model)),
        f"<p class=soft>made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p>",
        f"<script type='text/plain' id=plotly>{_packed(get_plotlyjs())}</script>",
        f"<script>{(HERE / 'page.js').read_text()}</script></body></html>",
    ]
    return "\n".join(parts)


def _section(index: int, section: Section) -> str:
    badge = f" <span class=badge>{_text(section.badge)}</span>" if section.badge else ""
    parts = [f"<h2>{_text(section.title)}{badge}</h2>"]
    if section.figure is not None:
        parts += [
            (
                f"<figure aria-label='{_text(section.title)}'>"
                f"<figcaption>{_text(section.about)}</figcaption>"
                f"<div data-figure=figure{index}></div></figure>"
            ),
            f"<script type='application/json' id=figure{index}>{_json(section.figure)}</script>",
        ]
    else:
        parts.append(f"<p class=soft>{_text(section.about)}</p>")
    parts += (
        ["<ul>", *(f"<li>{_text(sentence)}</li>" for sentence in section.said), "</ul>"]
        if section.said
        else []
    )
    parts.append(section.extra)
    parts.append(
        f"<details><summary>table, {len(section.table)}"
        f" rows</summary>{_table(section.table)}</details>"
    )
    return "\n".join(parts)


def _json(figure: go.Figure) -> str:
    """Without a `<`: a name with `<!--` or `</script` in it would end the page."""
    plain = json.loads(figure.to_json())
    plain["layout"].pop("template", None)  # the page themes every figure alike
    return json.dumps({**plain, "config": figures.CONFIG}, separators=(",", ":")).replace(
        "<", "\\u003c"
    )


def _packed(code: str) -> str:
    return base64.b64encode(gzip.compress(code.encode(), 9, mtime=0)).decode()


def _table(frame: pd.DataFrame) -> str:
    head = "".join(f"<th>{_text(str(column).replace('_', ' '))}</th>" for column in frame.columns)
    rows = "".join(
        "<tr>" + "".join(_cell(value) for value in row) + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return (
        "<div"
        f" class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(value) -> str:
    if value is None or value is pd.NA or value != value:
        return "<td data-value=''>–</td>"
    if isinstance(value, float):
        shown = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        return f"<td data-value={value}>{shown}</td>"
    if isinstance(value, int):
        return f"<td data-value={value}>{value:,}</td>"
    kind = " class=words" if len(str(value)) > 24 else ""
    return f"<td{kind}>{_text(str(value))}</td>"


def _environment(env: dict, result: dict) -> pd.DataFrame:
    base = result.get("base", {})
    rows = {
        "device": env.get("device", {}).get("name"),
        "cores": env.get("cores"),
        "threads": env.get("threads"),
        "cpu capability": env.get("cpu_capability"),
        "bf16": env.get("bf16"),
        "python": env.get("python"),
        **env.get("versions", {}),
        "commit": f"{env.get('commit')}{' (changed since)' if env.get('dirty') else ''}",
        "started": env.get("started_at"),
        "base model": base.get("hash", base.get("recipe")),
        "base reached (general, held out)": ", ".join(
            f"{k} {v:.3f}" for k, v in base.get("general", {}).items()
        ),
    }
    return pd.DataFrame(
        [{"what": key, "value": str(value)} for key, value in rows.items() if value]
    )


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
