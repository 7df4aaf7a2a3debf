"""How the server bears what clients do to it; `python -m benchmarks.robustness`."""
