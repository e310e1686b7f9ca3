"""Axis `weights`: how the parameters are stored and multiplied."""
