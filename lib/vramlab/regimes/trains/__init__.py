"""Axis `trains`: which weights train, and when."""
