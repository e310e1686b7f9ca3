"""Where the project's files lie. Imports nothing."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "outputs" / "cache"
"""What can be made again: bases and forecasts."""
FORECASTS = CACHE / "forecasts"
BASES = ROOT / "outputs" / "reference" / "bases"
"""The base models that ship with the project, one folder each, named after model and recipe."""
