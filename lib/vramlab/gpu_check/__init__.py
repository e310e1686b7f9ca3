"""Forecasts held against the GPU of this machine."""
