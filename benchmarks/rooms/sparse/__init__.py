"""Parts of the benchmark of sparse attention; `benchmarks.rooms.tactic` is its command."""
