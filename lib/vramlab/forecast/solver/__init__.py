"""Derives the step of another length and batch from a few traces, instead of tracing it."""
