"""The studies: what each source paper claims, run again, with a verdict by rule."""

STUDIES = ("checkpointing", "gradient_approximation", "chunkft", "baichuan2", "lomo")
"""One a source paper; each is a notebook with a module beside it, a file of params/studies, and a
part of params/claims.yml."""
