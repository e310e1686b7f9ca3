"""The small base model: its recipe, its curriculum, its training, and the record of the bases that
ship."""
