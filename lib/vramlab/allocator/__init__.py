"""CUDA's caching allocator, simulated: its settings, blocks and segments; recorded snapshots, read
and replayed."""
