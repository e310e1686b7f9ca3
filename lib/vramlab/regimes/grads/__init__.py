"""Axis `grads`: how a gradient is formed."""
