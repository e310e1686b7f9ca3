"""The figures of the forecast part, each from `forecast_tables`. In GiB, all predicted. The report
and the notebook draw the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from .forecast_tables import (
    GIB,
    Forecasts,
    allocator_table,
    cell_label,
    parts,
    place_label,
    short_module,
    short_op,
    verdict,
)
from .style import (
    LIMIT_LINE,
    PREDICTED_COLORS,
    add_choices,
    add_menu,
    menu,
    new_figure,
    phase_band,
    stacked_area,
)

SETTINGS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2")


def atlas(forecasts: Forecasts) -> go.Figure:
    """Regimes against cards: what is left of the card at the reserved peak; a menu picks model,
    length and batch."""
    places = forecasts.places
    most = max(map(len, places.values()), default=1)
    figure = new_figure("Predicted margin, GiB", 130 + 38 * most, yaxis={"autorange": "reversed"})

    def heatmap(cells: Sequence[Mapping], visible: bool) -> list[go.Heatmap]:
        return [_margins(forecasts.cards, cells, visible)]

    owners = add_choices(figure, places.values(), heatmap)
    return add_menu(figure, [place_label(where) for where in places], owners)


def _margins(cards: Mapping, cells: Sequence[Mapping], visible: bool) -> go.Heatmap:
    return go.Heatmap(
        x=list(cards),
        y=[cell["name"] for cell in cells],
        visible=visible,
        zmin=-40,
        zmax=40,
        zmid=0,
        colorscale="RdBu",
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": "GiB left", "side": "right"}, "thickness": 10},
        showscale=False,
        z=[
            [round(outcome["margin_bytes"] / GIB, 2) for outcome in cell["cards"].values()]
            for cell in cells
        ],
        text=[
            [verdict(outcome).replace(" ", "<br>", 1) for outcome in cell["cards"].values()]
            for cell in cells
        ],
        texttemplate="%{text}",
        textfont={"size": 9},
        customdata=[
            [
                (
                    outcome["reserved_bytes"] / GIB,
                    cards[key]["name"],
                    cell["phase"],
                    outcome["retries"],
                )
                for key, outcome in cell["cards"].items()
            ]
            for cell in cells
        ],
        hovertemplate=(
            "%{y} on %{customdata[1]}: %{text}<br>reserved %{customdata[0]:.2f} GiB, margin"
            " %{z:+.2f} GiB<br>peak in %{customdata[2]}, cache flushed %{customdata[3]}"
            " times<extra>predicted</extra>"
        ),
    )


def why(cells: Sequence[Mapping]) -> go.Figure:
    """The largest groups at a cell's peak; over each bar its owner and what the peak would be
    without it. A menu picks the cell."""
    most = max((len(cell["without"]) for cell in cells), default=1)
    figure = new_figure(
        "What is alive at the peak, predicted",
        90 + 66 * most,
        xaxis_title="GiB at the peak",
        showlegend=False,
        yaxis={"visible": False, "range": [most - 0.4, -0.9]},
    )
    owners = add_choices(figure, cells, _groups)
    return add_menu(figure, [cell_label(cell) for cell in cells], owners)


def _groups(cell: Mapping, visible: bool) -> list[go.Bar | go.Scatter]:
    groups = cell["without"]
    bars = go.Bar(
        x=[group["bytes"] / GIB for group in groups],
        y=list(range(len(groups))),
        orientation="h",
        width=0.36,
        visible=visible,
        marker_color=[PREDICTED_COLORS.get(group["category"], "#888") for group in groups],
        hoverinfo="x",
    )
    labels = go.Scatter(
        x=[0] * len(groups),
        y=[at - 0.45 for at in range(len(groups))],
        mode="text",
        visible=visible,
        text=[_without(cell, group) for group in groups],
        textposition="middle right",
        hoverinfo="skip",
        textfont={"size": 11},
        cliponaxis=False,
    )
    return [bars, labels]


def _without(cell: Mapping, group: Mapping) -> str:
    lower_by = cell["requested_bytes"] - group["peak_bytes"]
    moves = f", in {group['peak_phase']}" if group["peak_phase"] != cell["phase"] else ""
    return (
        f"<b>{short_module(group['module'])}</b><br>{group['category']}, {short_op(group['op'])},"
        f" {group['bytes'] / GIB:.1f}; without: {group['peak_bytes'] / GIB:.1f}"
        f" ({-lower_by / GIB:+.1f}){moves}"
    )


def timeline(cells: Sequence[Mapping], cards: Mapping[str, Mapping]) -> go.Figure:
    """The reported step, stacked by category, with the phases below and a card's limit above; menus
    pick cell and card."""
    figure = new_figure(
        "The predicted step",
        560,
        xaxis_title="allocation events of the step, %",
        hovermode="x",
        yaxis={"title": "GiB requested", "domain": [0.12, 0.84]},
        yaxis2={"domain": [0, 0.07], "visible": False, "fixedrange": True},
    )
    owners = add_choices(figure, cells, _stack_and_phases)
    limits = card_limits(cards)
    figure.add_trace(limit_line([0, 100], next(iter(limits.values()))))
    add_menu(figure, [cell_label(cell) for cell in cells], [*owners, None])
    buttons = [
        {
            "label": cards[key]["name"],
            "method": "restyle",
            "args": [{"y": [limit["y"]], "name": limit["name"]}, [len(owners)]],
        }
        for key, limit in limits.items()
    ]
    return figure.update_layout(updatemenus=[*figure.layout.updatemenus, menu(buttons, 0.87)])


def _stack_and_phases(cell: Mapping, visible: bool) -> list[go.Scatter]:
    curve = cell["curve"]
    stack = [
        stacked_area(
            category,
            color,
            curve["share"],
            [round(size / GIB, 3) for size in curve["bytes"][category]],
            "GiB",
            visible=visible,
            legendgroup=category,
        )
        for category, color in PREDICTED_COLORS.items()
        if category in curve["bytes"]
    ]
    shares: dict[str, list[float]] = {}
    for share, phase in zip(curve["share"], curve["phase"], strict=True):
        shares.setdefault(phase, []).append(share)
    bands = [
        phase_band(
            phase,
            x,
            [1] * len(x),
            yaxis="y2",
            visible=visible,
            hovertemplate=f"{phase}<extra></extra>",
        )
        for phase, x in shares.items()
    ]
    return [*stack, *bands]


def card_limits(cards: Mapping[str, Mapping]) -> dict[str, dict]:
    """card -> `y` and `name` of a level line at what it has for the allocator."""
    return {
        key: {"y": [card["capacity_bytes"] / GIB] * 2, "name": f"limit: {card['name']}"}
        for key, card in cards.items()
    }


def limit_line(x: Sequence, limit: Mapping) -> go.Scatter:
    """A card's limit, one of `card_limits`, as a line from the first to the last of `x`."""
    return go.Scatter(
        x=x, **limit, mode="lines", line=LIMIT_LINE, hovertemplate="%{y:.2f} GiB<extra>card</extra>"
    )


def allocators(forecasts: Forecasts) -> go.Figure:
    """Reserved peak by the allocator's settings; a menu picks tokens and card. Cells beyond any
    setting's help are left out."""
    frame = allocator_table(forecasts)
    figure = new_figure(
        "Reserved peak by allocator setting, predicted",
        520,
        barmode="group",
        yaxis_title="reserved GiB",
    )
    if frame.empty:
        return add_menu(figure, [], [])
    frame[["name", "tokens"]] = frame["cell"].str.split(", ", n=1, expand=True)
    limits = {limit["name"]: limit for limit in card_limits(forecasts.cards).values()}
    groups = list(frame.groupby(["tokens", "card"], sort=False))
    choices = [(rows, limits[f"limit: {card}"]) for (_, card), rows in groups]
    owners = add_choices(figure, choices, _settings)
    return add_menu(figure, [f"{card}: {tokens}" for (tokens, card), _ in groups], owners)


def _settings(choice: tuple[pd.DataFrame, Mapping], visible: bool) -> list[go.Bar | go.Scatter]:
    """Bars of the default and of each setting beside it, and the card's limit."""
    rows, limit = choice
    default = rows.drop_duplicates("name")
    names = default["name"].tolist()
    bars = [("default (rules verified)", default["name"], default["default_GiB"])]
    bars += [
        (f"{setting} (not verified)", cells["name"], cells["reserved_GiB"])
        for setting, cells in rows.groupby("setting", sort=False)
    ]
    traces = [
        go.Bar(
            x=x.tolist(),
            y=y.round(3).tolist(),
            name=label,
            marker_color=color,
            visible=visible,
            hovertemplate=f"%{{x}}: %{{y:.2f}} GiB<extra>{label}</extra>",
        )
        for color, (label, x, y) in zip(SETTINGS, bars, strict=False)
    ]
    line = go.Scatter(
        x=names,
        y=limit["y"][:1] * len(names),
        name=limit["name"],
        mode="lines+markers",
        visible=visible,
        marker={"symbol": "line-ew-open", "size": 20},
        line=LIMIT_LINE,
    )
    return [*traces, line]


def difference(cells: Sequence[Mapping]) -> go.Figure:
    """Two cells side by side, by category and part of the model; a menu for each. At first full
    fine-tuning and LOMO, where they are among the cells."""
    figure = new_figure(
        "Two regimes at their peaks, predicted",
        640,
        barmode="group",
        xaxis_title="GiB at the peak",
        yaxis={"autorange": "reversed"},
    )
    regimes = [cell["regime"] for cell in cells]
    first = regimes.index("full") if "full" in regimes else 0
    second = regimes.index("lomo") if "lomo" in regimes else len(cells) - 1
    sizes = [_by_part(cell) for cell in cells]
    for index, color in ((first, "#4e79a7"), (second, "#f28e2b")):
        figure.add_bar(
            y=list(sizes[index]),
            x=list(sizes[index].values()),
            orientation="h",
            name=cell_label(cells[index]),
            marker_color=color,
            hovertemplate="%{y}: %{x:.2f} GiB<extra></extra>",
        )
    menus = []
    for bar, y, active in ((0, 1.11, first), (1, 1.02, second)):
        buttons = [
            {
                "label": cell_label(cell),
                "method": "restyle",
                "args": [
                    {"x": [list(size.values())], "y": [list(size)], "name": cell_label(cell)},
                    [bar],
                ],
            }
            for cell, size in zip(cells, sizes, strict=True)
        ]
        menus.append({**menu(buttons, y), "active": active})
    return figure.update_layout(updatemenus=menus, margin_t=110, yaxis_domain=[0, 0.9])


def _by_part(cell: Mapping) -> dict[str, float]:
    """Label -> GiB, in the order of the categories. Parts below 1 % of the peak are left to the
    table."""
    order = [*PREDICTED_COLORS, "rest"]
    sizes = parts(cell)
    large = [key for key in sizes if sizes[key] >= cell["requested_bytes"] / 100]
    large.sort(key=lambda key: order.index(key[0]))
    return {
        f"{category}, {part}": round(sizes[category, part] / GIB, 3) for category, part in large
    }
