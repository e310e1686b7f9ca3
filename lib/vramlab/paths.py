"""Where the project's files lie. Imports nothing."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "outputs" / "cache"
"""What can be made again: bases and forecasts."""
FORECASTS = CACHE / "forecasts"
