"""Grammars: from a constraint on text to masks over the vocabulary."""
