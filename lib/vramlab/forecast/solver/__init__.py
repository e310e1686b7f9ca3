"""Steps of other sizes, derived from a few traced ones."""
