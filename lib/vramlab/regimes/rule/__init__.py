"""Axis `rule`: what an update computes and remembers."""
