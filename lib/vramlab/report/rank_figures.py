"""The figure of the sharded regime: one rank of many. In GiB, predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter

import plotly.graph_objects as go

from .forecast_figures import card_limits, limit_line
from .forecast_tables import GIB, Forecasts, grouped, place, place_label, verdict
from .style import PREDICTED_COLORS, add_choices, add_menu, menu, new_figure

RESERVED = "reserved at the peak"


def worlds(forecasts: Forecasts) -> go.Figure:
    """What one rank holds at its peak, stacked by category, against the number of ranks; menus pick
    the model and the card, at first one on which it depends on the number of ranks whether the step
    fits."""
    ranks = sorted({cell["world"] for cell in forecasts.worlds})
    figure = new_figure(
        "One rank's predicted peak by world size",
        560,
        barmode="stack",
        yaxis={"title": "GiB a rank", "domain": [0, 0.86]},
        xaxis={
            "title": "ranks (log scale)",
            "tickvals": [math.log2(count) for count in ranks],
            "ticktext": [f"{count:,}" for count in ranks],
        },
    )
    models = list(grouped(forecasts.worlds, itemgetter("model")).values())
    first = _first_card(forecasts, models[0])

    def traces(cells: Sequence[Mapping], visible: bool) -> list[go.Bar | go.Scatter]:
        return [*_bars(cells, visible), _reserved(cells, first, visible)]

    owners = add_choices(figure, models, traces)
    limits = card_limits(forecasts.cards)
    ends = [math.log2(ranks[0]) - 0.5, math.log2(ranks[-1]) + 0.5]
    figure.add_trace(limit_line(ends, limits[first]))
    add_menu(
        figure, [f"{place_label(place(cells[0]))} a rank" for cells in models], [*owners, None]
    )
    cards = menu(_card_buttons(figure, forecasts, models, limits), 0.9)
    cards["active"] = list(limits).index(first)
    return figure.update_layout(updatemenus=[*figure.layout.updatemenus, cards])


def _first_card(forecasts: Forecasts, cells: Sequence[Mapping]) -> str:
    """A card that some numbers of ranks fit on and others do not, else the first."""
    telling = (
        key for key in forecasts.cards if len({cell["cards"][key]["fits"] for cell in cells}) > 1
    )
    return next(telling, next(iter(forecasts.cards)))


def _card_buttons(
    figure: go.Figure, forecasts: Forecasts, models: Sequence[Sequence[Mapping]], limits: Mapping
) -> list[dict]:
    """One button a card: it changes the marks of reserved bytes and the limit, which is the last
    trace."""
    marks = [at for at, trace in enumerate(figure.data) if trace.name == RESERVED]
    buttons = []
    for key, limit in limits.items():
        reserved = [_reserved(cells, key, True) for cells in models]
        changes = {
            "y": [*(trace.y for trace in reserved), limit["y"]],
            "name": [RESERVED] * len(reserved) + [limit["name"]],
            "text": [*(trace.text for trace in reserved), None],
        }
        buttons.append(
            {
                "label": forecasts.cards[key]["name"],
                "method": "restyle",
                "args": [changes, [*marks, len(figure.data) - 1]],
            }
        )
    return buttons


def _bars(cells: Sequence[Mapping], visible: bool) -> list[go.Bar]:
    """Categories that are nowhere a thousandth of the peak are left to the table."""
    return [
        go.Bar(
            x=[math.log2(cell["world"]) for cell in cells],
            y=[round(cell["ledger"].get(category, 0) / GIB, 4) for cell in cells],
            name=category,
            marker_color=color,
            width=0.7,
            visible=visible,
            customdata=[cell["world"] for cell in cells],
            hovertemplate=f"%{{customdata:,}} ranks: %{{y:.2f}} GiB<extra>{category}</extra>",
        )
        for category, color in PREDICTED_COLORS.items()
        if any(cell["ledger"].get(category, 0) >= cell["requested_bytes"] / 1000 for cell in cells)
    ]


def _reserved(cells: Sequence[Mapping], card: str, visible: bool) -> go.Scatter:
    outcomes = [cell["cards"][card] for cell in cells]
    return go.Scatter(
        x=[math.log2(cell["world"]) for cell in cells],
        y=[round(outcome["reserved_bytes"] / GIB, 3) for outcome in outcomes],
        name=RESERVED,
        text=[
            verdict(outcome).replace("flushing", "flush").replace(" ", "<br>")
            for outcome in outcomes
        ],
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
