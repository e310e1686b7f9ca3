"""The studies: what each source paper claims, run again, with a verdict by rule."""
