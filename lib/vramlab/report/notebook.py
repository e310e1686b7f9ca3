"""What a notebook's cells call besides the library: parameters that refuse a typo, folders with
runs, widgets over figures."""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import plotly.io

from ..files import ROOT

# the figure as data: a saved notebook stays small, and JupyterLab shows it without trusting the
# notebook first
MIMETYPE = "plotly_mimetype"
if "PLOTLY_RENDERER" not in os.environ:
    plotly.io.renderers.default = MIMETYPE
# on some CPUs bitsandbytes, which peft imports, says that a faster kernel of its own could be
# downloaded: no cell's business
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def parameters(namespace: Mapping, known: Sequence[str]) -> dict:
    """The notebook's parameters: those names of `namespace` that are `known`.

    Raises: ValueError, when papermill injected a name that is not one, with the names there are.
    Papermill itself only warns and goes on with the default.
    """
    unknown = sorted(set(_injected(namespace.get("In", []))) - set(known))
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}; known: {', '.join(known)}")
    return {name: namespace[name] for name in known if name in namespace}


def _injected(cells: Sequence[str]) -> list[str]:
    """Names assigned in the cell that papermill put behind the parameters."""
    for source in cells:
        if source.lstrip().startswith("# Parameters\n"):
            return [
                target.id
                for node in ast.parse(source).body
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name)
            ]
    return []


def folder(path: str) -> Path:
    """A folder given relative to the project, wherever the kernel was started."""
    given = Path(path)
    return given if given.is_absolute() or given.exists() else ROOT / given


def runs_folder(path: str, progress: bool = True) -> Path:
    """`path`, when finished runs are there; else a folder with two small runs made now, so that a
    notebook opened before any sweep shows something real: few steps from an untrained base, memory
    and speed true, accuracy at chance.
    """
    wanted = folder(path)
    if list(wanted.glob("*/result.json")):
        return wanted
    from ..runs.execute import execute
    from ..runs.parameters import run_id

    example = ROOT / "outputs" / "example"
    print(
        f"no finished runs under {path}: two small runs are made in outputs/example instead (make"
        " report makes the real ones)"
    )
    for name in ("full", "checkpoint"):
        small = {
            "regime": name,
            "recipe": "smoke",
            "steps": 4,
            "train_items": 64,
            "val_items": 20,
            "test_items": 20,
        }
        target = example / run_id(small)
        if not (target / "result.json").exists():
            execute(small, target, progress)
    return example


def explore(draw: Callable, **choices: Sequence) -> None:
    """Show `draw(**first choices)` as a plain figure, which a saved notebook keeps, and in a live
    notebook a control for each choice; at its first use the figure moves into a widget, where it is
    drawn anew each time.
    """
    from IPython.display import display

    figure = draw(**{name: next(iter(options)) for name, options in choices.items()})
    try:
        import ipywidgets
    except ImportError:
        display(figure)
        return
    controls = {
        name: _control(ipywidgets, name, list(options)) for name, options in choices.items()
    }
    shown = ipywidgets.Output()
    display(ipywidgets.VBox([ipywidgets.HBox(list(controls.values())), shown]))
    # not display(figure): plotly's own display takes no id, so nothing could take the plain figure
    # away later
    plain = display(
        plotly.io.renderers[MIMETYPE].to_mimebundle(figure.to_dict()), raw=True, display_id=True
    )

    def redraw(_=None) -> None:
        plain.update({"text/plain": ""}, raw=True)
        with shown:
            shown.clear_output(wait=True)
            display(draw(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(redraw, names="value")


def _control(ipywidgets, name: str, options: list):
    label = name.replace("_", " ")
    if all(isinstance(option, int) for option in options) and len(options) > 8:
        return ipywidgets.IntSlider(
            options[0], min(options), max(options), description=label, continuous_update=False
        )
    return ipywidgets.Dropdown(options=options, description=label)


def show(*things) -> None:
    """Figures, tables with all their words, and Markdown. Where there is nothing of one, that is
    said."""
    import pandas as pd
    from IPython.display import Markdown, display

    for thing in things:
        nothing = thing is None or not len(getattr(thing, "data", thing))
        shown = "*Left out: no run of it has ended.*" if nothing else thing
        with pd.option_context("display.max_colwidth", None):
            display(Markdown(shown) if isinstance(shown, str) else shown)


def verdicts(lab) -> None:
    """The last cell of a study: every claim with its verdict and what decided it, from the run
    folders alone."""
    from ..studies.claims import table

    found = lab.verdicts()
    show(table(found).drop(columns="study"))
    counts = {
        word: sum(verdict.word == word for verdict in found)
        for word in dict.fromkeys(v.word for v in found)
    }
    show(
        "**"
        + ", ".join(f"{count} {word}" for word, count in counts.items())
        + f"**, of {len(found)} claims."
    )
