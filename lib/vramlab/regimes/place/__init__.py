"""Axis `place`: where the bytes live."""
