"""The OpenAI-compatible HTTP server: `python -m jaxserve.serve MODEL`.

Importing this package loads neither JAX nor a web library, so that flags are read and the port is
taken at once; `launch` loads the rest.
"""
