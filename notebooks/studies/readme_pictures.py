"""The README's pictures of the studies: figures drawn from the gallery, photographed in a headless
Chromium.

python notebooks/studies/readme_pictures.py    # writes outputs/gallery/pictures/*.png
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go

import checkpointing_figures
import chunkft_figures
import lomo_figures
from vramlab.runs.machine_report import browser
from vramlab.studies.gallery import GALLERY
from vramlab.studies.study import Lab

PICTURES: dict[str, Callable[[Lab], go.Figure]] = {
    "lomo": lambda lab: lomo_figures.bytes_at_7b(lab)[0],
    "chunkft": chunkft_figures.count,
    "checkpointing": lambda lab: checkpointing_figures.forecast_by_length(lab, "baichuan2-7b"),
}
"""Study, which is the picture's name -> its figure."""


def take(gallery: Path = GALLERY) -> list[Path]:
    """Raises: RuntimeError, without a browser; ImportError, without playwright; FileNotFoundError,
    without a gallery."""
    from playwright.sync_api import sync_playwright

    chromium = browser()
    if chromium is None:
        raise RuntimeError("no Chromium is here: install the package chromium, see the README")
    (gallery / "pictures").mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page(
            viewport={"width": 1100, "height": 900}
        )
        return [
            _photograph(
                page, draw(Lab.committed(study, gallery)), gallery / "pictures" / f"{study}.png"
            )
            for study, draw in PICTURES.items()
        ]


def _photograph(page, figure: go.Figure, path: Path) -> Path:
    page.set_content(figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
    page.locator(".plotly-graph-div").screenshot(path=path)
    return path


if __name__ == "__main__":
    print("\n".join(map(str, take())))
