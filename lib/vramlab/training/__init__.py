"""The training step: one trainer for every regime, and what is timed and watched beside it."""
