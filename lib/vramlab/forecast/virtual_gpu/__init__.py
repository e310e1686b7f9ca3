"""A GPU that does not exist: fake tensors on a device made in Python, with CUDA's autocast, streams
and ranks."""

from .device import VirtualGpu, virtual_gpu

__all__ = ["VirtualGpu", "virtual_gpu"]
