"""VRAM Lab: which memory regime fine-tunes Baichuan-2 on the GPU at hand, and what it costs in factual consistency."""

__version__ = "0.1.0"
