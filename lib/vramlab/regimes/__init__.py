"""Memory regimes: a row of answers, one for each axis, and what each answer does to a model and its
training."""
