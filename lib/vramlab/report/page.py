"""The page: figures, tables and words in one file that needs no network and asks for none."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from plotly.offline import get_plotlyjs

from ..files import write_whole
from ..runs.folder import Run, read_runs
from . import claims_page, takeaways
from .forecast_sections import CAVEATS, forecast_sections
from .forecast_tables import Forecasts
from .rendering import Section, render
from .run_sections import run_sections

LIMIT_BYTES = 10_000_000


def build(folder: Path | str, damage: list[str] | None = None) -> Path:
    """Write `report.html` into a folder of finished runs and return its path. `damage` gets a
    sentence for each file or run that the report leaves out, as the report itself has it. Raises:
    FileNotFoundError, without runs; ValueError, for a page that would be too large to open."""
    damage = [] if damage is None else damage
    runs = read_runs(folder, damage)
    path = Path(folder) / "report.html"
    sections, caveats = run_sections(runs), takeaways.caveats(runs)
    forecasts = Forecasts.read(folder, damage)
    if forecasts:
        sections += forecast_sections(forecasts)
        caveats += CAVEATS
    page = _page(Path(folder).name, runs, [*sections, claims_page.section()], damage, caveats)
    size_bytes = len(page.encode())
    if size_bytes > LIMIT_BYTES:
        raise ValueError(
            f"the report has {size_bytes:,} bytes, more than {LIMIT_BYTES:,}: make it of fewer runs"
        )
    write_whole(path, page)
    return path


def _page(
    name: str,
    runs: Sequence[Run],
    sections: Sequence[Section],
    damage: Sequence[str],
    caveats: Sequence[str],
) -> str:
    environments = (
        run.environment
        for run in runs
        if "env.json" not in run.damage and (run.folder / "env.json").exists()
    )
    env: Mapping = next(environments, {})
    result = next((run.result for run in runs if run.ok), runs[0].result)
    plotly = gzip.compress(get_plotlyjs().encode(), 9, mtime=0)
    return render(
        "page",
        name=name,
        runs=runs,
        result=result,
        device=env.get("device", {}).get("name", "unknown device"),
        takeaways=takeaways.takeaways(runs),
        damage=damage,
        sections=sections,
        caveats=caveats,
        environment=_environment(env, result),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        plotly=base64.b64encode(plotly).decode(),
    )


def _environment(env: Mapping, result: Mapping) -> pd.DataFrame:
    """What the runs were made with, as far as it is known."""
    base = result.get("base", {})
    reached = (f"{domain} {score:.3f}" for domain, score in base.get("general", {}).items())
    rows = {
        "device": env.get("device", {}).get("name"),
        "cores": env.get("cores"),
        "threads": env.get("threads"),
        "cpu capability": env.get("cpu_capability"),
        "bf16": env.get("bf16"),
        "python": env.get("python"),
        **env.get("versions", {}),
        "commit": f"{env.get('commit')}{' (changed since)' if env.get('dirty') else ''}",
        "started": env.get("started_at"),
        "base model": base.get("hash", base.get("recipe")),
        "base reached (general, held out)": ", ".join(reached),
    }
    return pd.DataFrame(
        [{"what": key, "value": str(value)} for key, value in rows.items() if value]
    )
