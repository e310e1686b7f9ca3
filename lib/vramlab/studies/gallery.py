"""The gallery: the results of studies, committed so that a visitor sees them without running
anything.

Reads the thinned studies under outputs/gallery, one folder for each study file. Imports nothing
that trains.
"""

from __future__ import annotations

from pathlib import Path

from ..files import ROOT
from ..reading import read_json
from .claims import Verdict, decide, read_claims
from .estimates import Figure

GALLERY = ROOT / "outputs" / "gallery"


def read_figures(folder: Path) -> dict[str, Figure]:
    """Name -> figure of a study; empty, when the gallery does not have it."""
    path = folder / "figures.json"
    contents = read_json(path) if path.exists() else {}
    return {name: Figure.from_json(content) for name, content in contents.items()}


def read_made(folder: Path) -> dict:
    """The origin of a study: its file, the hash of the file's content, and the environment;
    empty, when the gallery does not have it."""
    path = folder / "made.json"
    return read_json(path) if path.exists() else {}


def verdicts(gallery: Path = GALLERY) -> list[Verdict]:
    """The verdict on every claim of the ledger from the small studies in the gallery. A study that
    the gallery does not have decides nothing."""
    claims = read_claims()
    figures = {study: read_figures(gallery / study) for study in {c.study for c in claims}}
    return [decide(claim, figures[claim.study]) for claim in claims]
