"""Programs that ask outside implementations for golden tensors; run in an environment of their own.

Nothing here is imported by the test suite except the file names. `make oracles` makes the
environment (torch, transformers, gguf, llama_cpp_python) and runs every `make_*.py`.
"""
