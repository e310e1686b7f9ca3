"""One self-contained HTML file from a folder of finished runs. Reads run folders; imports nothing
that trains."""

from .page import build

__all__ = ["build"]
