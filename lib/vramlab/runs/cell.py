"""What the process of one cell of a sweep does: run its notebook. Apart from the sweep, so that it
starts without torch."""

import json
import sys
from pathlib import Path

import papermill


def main(notebook: str, output: str, given: str) -> None:
    """Run `notebook` into `output` with the parameters in the JSON file `given`. A failing cell
    raises."""
    papermill.execute_notebook(
        notebook,
        output,
        parameters=json.loads(Path(given).read_text()),
        engine_name="vramlab",
        kernel_name="python3",
        progress_bar=False,
        log_output=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
