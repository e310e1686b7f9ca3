"""What was run and committed, so that a visitor sees results without running anything: figures and
what made them.

Reads the thinned studies under outputs/gallery, one folder a study file; imports nothing that
trains.
"""

from __future__ import annotations

from pathlib import Path

from ..files import ROOT
from ..reading import read_json
from .claims import Verdict, decide, read_claims
from .estimates import Figure

GALLERY = ROOT / "outputs" / "gallery"


def read_figures(folder: Path) -> dict[str, Figure]:
    """Name -> figure of one study in the gallery; empty when it is not there."""
    path = folder / "figures.json"
    return (
        {name: Figure.from_json(said) for name, said in read_json(path).items()}
        if path.exists()
        else {}
    )


def read_made(folder: Path) -> dict:
    """What made one study in the gallery: file, hash of its content, environment; empty when it is
    not there."""
    path = folder / "made.json"
    return read_json(path) if path.exists() else {}


def verdicts(gallery: Path = GALLERY) -> list[Verdict]:
    """Every claim of the ledger, decided from the small studies in the gallery. A study that is not
    there decides nothing."""
    figures: dict[str, dict[str, Figure]] = {}
    for claim in (found := read_claims()):
        figures.setdefault(claim.study, read_figures(gallery / claim.study))
    return [decide(claim, figures[claim.study]) for claim in found]
