"""What a notebook's cells call besides the library: parameters that refuse a typo, folders with
runs, controls over a figure."""

from __future__ import annotations

import ast
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ipywidgets
import pandas as pd
import plotly.io
from IPython.display import Markdown, display

from ..files import ROOT
from ..studies import claims

# the figure as data: a saved notebook stays small, and JupyterLab shows it without trusting the
# notebook first
MIMETYPE = "plotly_mimetype"
if "PLOTLY_RENDERER" not in os.environ:
    plotly.io.renderers.default = MIMETYPE
# on some CPUs bitsandbytes, which peft imports, tells that a faster kernel could be downloaded: no
# reader of a notebook needs that
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def parameters(namespace: Mapping, known: Sequence[str]) -> dict:
    """The notebook's parameters: those names of `namespace` that are `known`.

    Raises: ValueError, for an injected name that is not known, with the names that are. Papermill
    itself only warns and goes on with the default.
    """
    unknown = sorted(set(_injected(namespace.get("In", []))) - set(known))
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}; known: {', '.join(known)}")
    return {name: namespace[name] for name in known if name in namespace}


def _injected(cells: Sequence[str]) -> list[str]:
    """Names assigned in the cell that papermill put behind the parameters."""
    injected = (source for source in cells if source.lstrip().startswith("# Parameters\n"))
    return [
        node.id
        for node in ast.walk(ast.parse(next(injected, "")))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]


def folder(path: str) -> Path:
    """A folder relative to where the kernel was started, or else to the project."""
    return Path(path) if Path(path).exists() else ROOT / path


def runs_folder(path: str, progress: bool = True) -> Path:
    """`path`, when finished runs are there; else a folder with two small runs made now, so that a
    notebook opened before any sweep shows something real: few steps from an untrained base, memory
    and speed true, accuracy at chance.
    """
    if list(folder(path).glob("*/result.json")):
        return folder(path)
    from ..runs.execute import execute
    from ..runs.parameters import run_id

    example = ROOT / "outputs" / "example"
    print(
        f"no finished runs under {path}: two small runs are made in outputs/example instead (make"
        " report makes the real ones)"
    )
    items = {"train_items": 64, "val_items": 20, "test_items": 20}
    for regime in ("full", "checkpoint"):
        run = {"regime": regime, "recipe": "smoke", "steps": 4, **items}
        if not (example / run_id(run) / "result.json").exists():
            execute(run, example / run_id(run), progress)
    return example


def explore(draw: Callable, **choices: Sequence) -> None:
    """Show `draw(**first choices)` as a plain figure, which a saved notebook keeps, and in a live
    notebook a control for each choice; when one is first used the figure moves into a widget, where
    it is drawn anew each time.
    """
    controls = {name: _control(name, list(options)) for name, options in choices.items()}

    def chosen():
        return draw(**{name: control.value for name, control in controls.items()})

    figure, output = chosen(), ipywidgets.Output()
    display(ipywidgets.VBox([ipywidgets.HBox(list(controls.values())), output]))
    # not display(figure): plotly's own display takes no id, so nothing could take the plain figure
    # away later
    plain = display(
        plotly.io.renderers[MIMETYPE].to_mimebundle(figure.to_dict()), raw=True, display_id=True
    )

    def redraw(_) -> None:
        plain.update({"text/plain": ""}, raw=True)
        with output:
            output.clear_output(wait=True)
            display(chosen())

    for control in controls.values():
        control.observe(redraw, names="value")


def _control(name: str, options: list) -> ipywidgets.Widget:
    label = name.replace("_", " ")
    if all(isinstance(option, int) for option in options) and len(options) > 8:
        return ipywidgets.IntSlider(
            options[0], min(options), max(options), description=label, continuous_update=False
        )
    return ipywidgets.Dropdown(options=options, description=label)


def show(*contents) -> None:
    """Display figures, tables with all their words, and Markdown. In place of an empty one stands
    that it was left out."""
    for content in contents:
        empty = content is None or not len(getattr(content, "data", content))
        displayed = "*Left out: no run of it has ended.*" if empty else content
        with pd.option_context("display.max_colwidth", None):
            display(Markdown(displayed) if isinstance(displayed, str) else displayed)


def verdicts(study) -> None:
    """The last cell of a study: every claim with its verdict and what decided it, from the run
    folders alone."""
    decided = study.verdicts()
    counts = Counter(verdict.word for verdict in decided)
    listed = ", ".join(f"{count} {word}" for word, count in counts.items())
    show(claims.table(decided).drop(columns="study"))
    show(f"**{listed}**, of {len(decided)} claims.")
