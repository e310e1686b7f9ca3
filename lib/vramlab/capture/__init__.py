"""What a real step does to memory: event meter, CUDA recorder, driver, energy, process's peak, and
running out of it."""
