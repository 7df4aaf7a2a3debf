"""Attention over dense batches and over the key-value cache, behind one door: `dense.attend`."""
