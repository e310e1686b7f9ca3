"""The notebook of a cell, executed in a process of its own. A module apart from the sweep, so
that the process starts without torch."""

from collections.abc import Mapping

import papermill


def run_notebook(call: Mapping) -> None:
    """Execute the notebook `call["notebook"]` into `call["output"]` with `call["parameters"]`.
    Raises: what its failing cell raised."""
    papermill.execute_notebook(
        call["notebook"],
        call["output"],
        parameters=call["parameters"],
        engine_name="vramlab",
        kernel_name="python3",
        progress_bar=False,
        log_output=False,
    )
