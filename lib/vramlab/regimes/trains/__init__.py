"""Axis `trains`: which of the weights move, and when."""
