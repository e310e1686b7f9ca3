"""The report's HTML, made from the templates beside this file. They escape every text that they are
given; what goes in as it is stands there as `safe`: styles, scripts and their data, and the `extra`
of a section."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd
import plotly.graph_objects as go

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
    """The HTML that a template, named without its `.html.j2`, makes of the values."""
    return _templates.get_template(f"{template}.html.j2").render(values)


def _script_json(value) -> str:
    """Data for a script element. It has no `<`: a name with `<!--` or `</script` in it would end
    the page."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _figure_json(figure: go.Figure) -> str:
    """A figure and its configuration for the page's script, without plotly's template: the page
    gives every figure the same theme."""
    content = json.loads(figure.to_json())
    content["layout"].pop("template", None)
    return _script_json({**content, "config": CONFIG})


def _rows(frame: pd.DataFrame) -> list[tuple]:
    """The rows of a table, with None for what is missing."""
    values = frame.astype(object)
    return list(values.where(values.notna(), None).itertuples(index=False, name=None))


def _source(name: str) -> str:
    """A style sheet or script of the page."""
    return (FOLDER / name).read_text()


_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_templates.filters |= {
    "figure_json": _figure_json,
    "rows": _rows,
    "script_json": _script_json,
    "source": _source,
}
