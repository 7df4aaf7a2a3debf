"""The field's Python clients against a running server; `python -m benchmarks.clients`.

Each `*_worker.py` runs in the environment of its client, imports nothing of jaxserve, and answers
with plain facts (see `benchmarks.clients.cases`), which `benchmarks.clients.checks` judges.
"""
