"""The training step: one trainer for every regime, its clock, and the watch on its logits."""
