"""Axis `head`: how the loss is formed from the last hidden state."""
