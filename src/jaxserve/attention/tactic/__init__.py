"""Sparse decode attention that reads as much of the context as a share of the attention mass takes.

Source: Tactic, arXiv 2502.12216. See the README of this folder.
"""
