"""The report's HTML, made from the templates beside this file. They escape every text that they are
given; only the styles, the scripts and their data, and the `extra` of a section, which is HTML of
our own, go in as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

from .style import CONFIG

FOLDER = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Section:
    """A heading, what to look for, the figure, and the table behind it."""

    title: str
    about: str
    figure: go.Figure | None
    table: pd.DataFrame
    badge: str = ""
    """How the section's numbers were obtained, where that differs from the head of the page."""
    sentences: Sequence[str] = ()
    """Sentences under the figure."""
    extra: str = ""
    """HTML, put in unescaped."""


def render(template: str, **values) -> str:
    """HTML of one template, by its name without `.html.j2`."""
    return _templates.get_template(f"{template}.html.j2").render(values)


def script_json(value) -> Markup:
    """Data for a script element. It has no `<`: a name with `<!--` or `</script` in it would end
    the page."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def figure_json(figure: go.Figure) -> Markup:
    """A figure and its configuration for the page's script, without plotly's template: the page
    gives every figure the same theme."""
    content = json.loads(figure.to_json())
    content["layout"].pop("template", None)
    return script_json({**content, "config": CONFIG})


def cell(value) -> tuple[str, Any]:
    """(what a table's cell shows, what its column is sorted by); None for the latter means that the
    shown text sorts."""
    if value is None or value is pd.NA or value != value:
        return "–", ""
    if isinstance(value, float):
        return (f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"), value
    if isinstance(value, int):
        return f"{value:,}", value
    return str(value), None


def _source(name: str) -> Markup:
    return Markup((FOLDER / name).read_text())


_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_templates.globals["source"] = _source
_templates.filters |= {"cell": cell, "figure_json": figure_json, "script_json": script_json}
