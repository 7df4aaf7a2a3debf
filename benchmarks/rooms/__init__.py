"""Benchmarks of single systems; each has a room of the same name."""
