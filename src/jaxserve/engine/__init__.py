"""The engine: text and requests in, tokens and events out; one thread, one loop."""
