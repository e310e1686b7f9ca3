"""One self-contained HTML file from a folder of finished runs. Reads run folders; imports nothing that trains."""

from .html import build

__all__ = ["build"]
