"""Axis `until`: how long a gradient lives."""
