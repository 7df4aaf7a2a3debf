"""Other engines as subprocesses that speak JSON lines; they import nothing of jaxserve.

Each runs as `python -m benchmarks.peers.<name>` in the oracle environment (`make oracles`).
"""
