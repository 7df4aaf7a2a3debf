"""The key-value cache: device buffers, and the host's book-keeping of pages and prefixes."""
