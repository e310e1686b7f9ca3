"""Memory regimes: a regime is a row with one value for each axis of the training."""
