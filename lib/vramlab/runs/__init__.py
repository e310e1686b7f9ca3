"""One run in three passes, its folder, and a sweep of runs."""
