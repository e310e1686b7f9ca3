"""The figures of the forecast part, each from `forecasts`. In GiB, all predicted. The report and
the notebook draw the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from . import forecast_tables as forecasts
from .figures import COLORS, PHASES, _figure, _menu
from .forecast_tables import GIB, Forecasts, cell_words, outcome, parts, place, place_words

COLORS = {**COLORS, "workspace": "#bab0ac"}
RESERVED = "reserved at the peak"
SETTINGS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2")


def atlas(said: Forecasts) -> go.Figure:
    """Regimes against cards: what is left of the card at the reserved peak; a menu picks model,
    length and batch."""
    rows = max(
        (sum(place(cell) == where for cell in said.cells) for where in said.places), default=1
    )
    figure = _figure("Predicted margin, GiB", 130 + 38 * rows, yaxis={"autorange": "reversed"})
    for index, where in enumerate(said.places):
        cells = [cell for cell in said.cells if place(cell) == where]
        figure.add_heatmap(
            x=list(said.cards),
            y=[cell["name"] for cell in cells],
            visible=index == 0,
            zmin=-40,
            zmax=40,
            zmid=0,
            colorscale="RdBu",
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "GiB left", "side": "right"}, "thickness": 10},
            showscale=False,
            z=[
                [round(held["margin_bytes"] / GIB, 2) for held in cell["cards"].values()]
                for cell in cells
            ],
            text=[
                [outcome(held).replace(" ", "<br>", 1) for held in cell["cards"].values()]
                for cell in cells
            ],
            texttemplate="%{text}",
            textfont={"size": 9},
            customdata=[
                [
                    (
                        held["reserved_bytes"] / GIB,
                        said.cards[key]["name"],
                        cell["phase"],
                        held["retries"],
                    )
                    for key, held in cell["cards"].items()
                ]
                for cell in cells
            ],
            hovertemplate=(
                "%{y} on %{customdata[1]}: %{text}<br>reserved %{customdata[0]:.2f} GiB, margin"
                " %{z:+.2f} GiB<br>peak in %{customdata[2]}, cache flushed %{customdata[3]}"
                " times<extra>predicted</extra>"
            ),
        )
    return _with_menu(
        figure, [place_words(where) for where in said.places], range(len(said.places))
    )


def why(cells: Sequence[Mapping]) -> go.Figure:
    """The largest groups at a cell's peak; over each bar its owner and what the peak would be
    without it."""
    most = max((len(cell["without"]) for cell in cells), default=1)
    figure = _figure(
        "What is alive at the peak, predicted",
        90 + 66 * most,
        xaxis_title="GiB at the peak",
        showlegend=False,
        yaxis={"visible": False, "range": [most - 0.4, -0.9]},
    )
    owners = []
    for index, cell in enumerate(cells):
        groups = cell["without"]
        size = [group["bytes"] / GIB for group in groups]
        figure.add_bar(
            x=size,
            y=list(range(len(groups))),
            orientation="h",
            width=0.36,
            visible=index == 0,
            marker_color=[COLORS.get(group["category"], "#888") for group in groups],
            hoverinfo="x",
        )
        figure.add_scatter(
            x=[0] * len(groups),
            y=[at - 0.45 for at in range(len(groups))],
            mode="text",
            visible=index == 0,
            text=[_without(cell, group) for group in groups],
            textposition="middle right",
            hoverinfo="skip",
            textfont={"size": 11},
            cliponaxis=False,
        )
        owners += [index, index]
    return _with_menu(figure, [cell_words(cell) for cell in cells], owners)


def _without(cell: Mapping, group: Mapping) -> str:
    falls = cell["requested_bytes"] - group["peak_bytes"]
    moves = f", in {group['peak_phase']}" if group["peak_phase"] != cell["phase"] else ""
    return (
        f"<b>{forecasts.short(group['module'])}</b><br>{group['category']},"
        f" {forecasts.op(group['op'])}, {group['bytes'] / GIB:.1f}; without:"
        f" {group['peak_bytes'] / GIB:.1f} ({-falls / GIB:+.1f}){moves}"
    )


def timeline(cells: Sequence[Mapping], cards: Mapping[str, Mapping]) -> go.Figure:
    """The reported step, stacked by category, phases below, a card's limit above; menus pick cell
    and card."""
    figure = _figure(
        "The predicted step",
        560,
        xaxis_title="allocation events of the step, %",
        hovermode="x",
        yaxis={"title": "GiB requested", "domain": [0.12, 0.84]},
        yaxis2={"domain": [0, 0.07], "visible": False, "fixedrange": True},
    )
    owners: list[int | None] = []
    for index, cell in enumerate(cells):
        traces = [*_stack(cell, index == 0), *_bands(cell, index == 0)]
        figure.add_traces(traces)
        owners += [index] * len(traces)
    limits = {card["name"]: card["capacity_bytes"] / GIB for card in cards.values()}
    first = next(iter(limits))
    figure.add_scatter(
        x=[0, 100],
        y=[limits[first]] * 2,
        name=f"limit: {first}",
        mode="lines",
        line={"dash": "dash", "color": "#d62728", "width": 2},
        hovertemplate="%{y:.2f} GiB<extra>card</extra>",
    )
    figure = _with_menu(figure, [cell_words(cell) for cell in cells], [*owners, None])
    line = len(owners)
    buttons = [
        {
            "label": name,
            "method": "restyle",
            "args": [{"y": [[size, size]], "name": f"limit: {name}"}, [line]],
        }
        for name, size in limits.items()
    ]
    figure.update_layout(updatemenus=[*figure.layout.updatemenus, _second(buttons, 0.87)])
    return figure


def _stack(cell: Mapping, visible: bool) -> list[go.Scatter]:
    curve = cell["curve"]
    return [
        go.Scatter(
            x=curve["share"],
            y=[round(size / GIB, 3) for size in curve["bytes"][name]],
            name=name,
            visible=visible,
            mode="lines",
            line={"width": 0, "shape": "hv"},
            fillcolor=color,
            stackgroup="bytes",
            legendgroup=name,
            hovertemplate="%{y:.2f} GiB<extra>" + name + "</extra>",
        )
        for name, color in COLORS.items()
        if name in curve["bytes"]
    ]


def _bands(cell: Mapping, visible: bool) -> list[go.Scatter]:
    curve, found = cell["curve"], []
    for phase in dict.fromkeys(curve["phase"]):
        at = [
            share
            for share, name in zip(curve["share"], curve["phase"], strict=True)
            if name == phase
        ]
        found.append(
            go.Scatter(
                x=at,
                y=[1] * len(at),
                name=phase,
                visible=visible,
                yaxis="y2",
                mode="markers",
                marker={"color": PHASES.get(phase, "#888"), "symbol": "square", "size": 9},
                hovertemplate=phase + "<extra></extra>",
            )
        )
    return found


def worlds(said: Forecasts) -> go.Figure:
    """What one rank holds at its peak, stacked by category, against the number of ranks; menus pick
    the model and the card, at first one on which it depends on the number of ranks whether the step
    fits."""
    sizes = sorted({cell["world"] for cell in said.worlds})
    figure = _figure(
        "One rank's predicted peak by world size",
        560,
        barmode="stack",
        yaxis={"title": "GiB a rank", "domain": [0, 0.86]},
        xaxis={
            "title": "ranks (log scale)",
            "tickvals": [math.log2(size) for size in sizes],
            "ticktext": [f"{size:,}" for size in sizes],
        },
    )
    groups = [
        [cell for cell in said.worlds if cell["model"] == model]
        for model in dict.fromkeys(c["model"] for c in said.worlds)
    ]
    first = next(
        (key for key in said.cards if len({cell["cards"][key]["fits"] for cell in groups[0]}) > 1),
        next(iter(said.cards)),
    )
    owners: list[int | None] = []
    for index, cells in enumerate(groups):
        bars = _bars(cells, index == 0)
        figure.add_traces([*bars, _reserved(cells, first, index == 0)])
        owners += [index] * (len(bars) + 1)
    marks = [at for at, trace in enumerate(figure.data) if trace.name == RESERVED]
    ends, limits = [math.log2(sizes[0]) - 0.5, math.log2(sizes[-1]) + 0.5], {}
    for key, card in said.cards.items():
        limits[key] = {"y": [card["capacity_bytes"] / GIB] * 2, "name": f"limit: {card['name']}"}
    figure.add_scatter(
        x=ends,
        **limits[first],
        mode="lines",
        line={"dash": "dash", "color": "#d62728", "width": 2},
        hovertemplate="%{y:.2f} GiB<extra>card</extra>",
    )
    buttons = []
    for key, limit in limits.items():
        drawn = [_reserved(cells, key, True) for cells in groups]
        buttons.append(
            {
                "label": said.cards[key]["name"],
                "method": "restyle",
                "args": [
                    {
                        "y": [*(trace.y for trace in drawn), limit["y"]],
                        "name": [RESERVED] * len(drawn) + [limit["name"]],
                        "text": [*(trace.text for trace in drawn), None],
                    },
                    [*marks, len(owners)],
                ],
            }
        )
    figure = _with_menu(
        figure, [place_words(place(cells[0])) + " a rank" for cells in groups], [*owners, None]
    )
    figure.update_layout(
        updatemenus=[
            *figure.layout.updatemenus,
            {**_second(buttons, 0.9), "active": list(limits).index(first)},
        ]
    )
    return figure


def _bars(cells: Sequence[Mapping], visible: bool) -> list[go.Bar]:
    """Categories that are nowhere a thousandth of the peak are left to the table."""
    at, shown = [math.log2(cell["world"]) for cell in cells], [cell["world"] for cell in cells]
    seen = [
        name
        for name in COLORS
        if any(cell["ledger"].get(name, 0) >= cell["requested_bytes"] / 1000 for cell in cells)
    ]
    return [
        go.Bar(
            x=at,
            y=[round(cell["ledger"].get(name, 0) / GIB, 4) for cell in cells],
            name=name,
            marker_color=COLORS[name],
            width=0.7,
            visible=visible,
            customdata=shown,
            hovertemplate="%{customdata:,} ranks: %{y:.2f} GiB<extra>" + name + "</extra>",
        )
        for name in seen
    ]


def _reserved(cells: Sequence[Mapping], card: str, visible: bool) -> go.Scatter:
    held = [cell["cards"][card] for cell in cells]
    return go.Scatter(
        x=[math.log2(cell["world"]) for cell in cells],
        y=[round(one["reserved_bytes"] / GIB, 3) for one in held],
        name=RESERVED,
        text=[outcome(one).replace("flushing", "flush").replace(" ", "<br>") for one in held],
        textposition="top center",
        textfont={"size": 9},
        mode="markers+text",
        cliponaxis=False,
        visible=visible,
        customdata=[cell["world"] for cell in cells],
        marker={"symbol": "line-ew-open", "size": 16, "color": "#888", "line": {"width": 3}},
        hovertemplate=(
            "%{customdata:,} ranks: %{y:.2f} GiB reserved, %{text}<extra>predicted</extra>"
        ),
    )


def allocators(said: Forecasts) -> go.Figure:
    """Reserved peak by the allocator's settings; a menu picks tokens and card. Cells beyond any
    setting's help are left out."""
    frame = forecasts.allocator_table(said)
    figure = _figure(
        "Reserved peak by allocator setting, predicted",
        520,
        barmode="group",
        yaxis_title="reserved GiB",
    )
    owners, labels = [], []
    tokens = frame["cell"].str.split(", ", n=1).str[1] if len(frame) else frame
    for (where, card), rows in frame.groupby([tokens, "card"], sort=False) if len(frame) else ():
        names = rows["cell"].str.split(", ", n=1).str[0]
        usual = rows.assign(name=names).drop_duplicates("name")
        bars = [("default (rules verified)", usual["name"], usual["default_GiB"])]
        bars += [
            (f"{setting} (not verified)", names[its.index], its["reserved_GiB"])
            for setting, its in rows.groupby("setting", sort=False)
        ]
        for color, (label, x, y) in zip(SETTINGS, bars, strict=False):
            figure.add_bar(
                x=x.tolist(),
                y=y.round(3).tolist(),
                name=label,
                marker_color=color,
                visible=not labels,
                hovertemplate="%{x}: %{y:.2f} GiB<extra>" + label + "</extra>",
            )
        limit = (
            next(held["capacity_bytes"] for held in said.cards.values() if held["name"] == card)
            / GIB
        )
        ends = usual["name"].tolist()
        figure.add_scatter(
            x=ends,
            y=[limit] * len(ends),
            name=f"limit: {card}",
            mode="lines+markers",
            visible=not labels,
            marker={"symbol": "line-ew-open", "size": 20},
            line={"dash": "dash", "color": "#d62728", "width": 2},
        )
        owners += [len(labels)] * (len(bars) + 1)
        labels.append(f"{card}: {where}")
    return _with_menu(figure, labels, owners)


def difference(cells: Sequence[Mapping]) -> go.Figure:
    """Two cells side by side, by category and part of the model; a menu for each."""
    figure = _figure(
        "Two regimes at their peaks, predicted",
        640,
        barmode="group",
        xaxis_title="GiB at the peak",
        yaxis={"autorange": "reversed"},
    )
    first = next((index for index, cell in enumerate(cells) if cell["regime"] == "full"), 0)
    second = next(
        (index for index, cell in enumerate(cells) if cell["regime"] == "lomo"), len(cells) - 1
    )
    for index, color in ((first, "#4e79a7"), (second, "#f28e2b")):
        size = _by_part(cells[index])
        figure.add_bar(
            y=list(size),
            x=list(size.values()),
            orientation="h",
            name=cell_words(cells[index]),
            marker_color=color,
            hovertemplate="%{y}: %{x:.2f} GiB<extra></extra>",
        )
    menus = []
    for bar, y, active in ((0, 1.11, first), (1, 1.02, second)):
        buttons = [
            {
                "label": cell_words(cell),
                "method": "restyle",
                "args": [
                    {"x": [list(size.values())], "y": [list(size)], "name": cell_words(cell)},
                    [bar],
                ],
            }
            for cell in cells
            for size in [_by_part(cell)]
        ]
        menus.append({**_second(buttons, y), "active": active})
    figure.update_layout(updatemenus=menus, margin_t=110, yaxis_domain=[0, 0.9])
    return figure


def _by_part(cell: Mapping) -> dict[str, float]:
    """Parts below 1 % of the peak are left to the table."""
    least = cell["requested_bytes"] / 100
    order = [*COLORS, "rest"]
    kept = sorted(
        ((key, size) for key, size in parts(cell).items() if size >= least),
        key=lambda item: order.index(item[0][0]),
    )
    return {f"{category}, {part}": round(size / GIB, 3) for (category, part), size in kept}


def _second(buttons: list[dict], y: float) -> dict:
    return {**_menu(buttons)[0], "y": y}


def _with_menu(figure: go.Figure, labels: Sequence[str], owners: Sequence[int | None]) -> go.Figure:
    """One button a label, showing the traces it owns and those nobody owns."""
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [{"visible": [owner in (None, index) for owner in owners]}],
        }
        for index, label in enumerate(labels)
    ]
    figure.update_layout(updatemenus=_menu(buttons) if len(buttons) > 1 else [])
    return figure
