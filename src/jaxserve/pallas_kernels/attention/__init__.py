"""Paged attention: `api.attention`, its reference, its backends and its card."""
