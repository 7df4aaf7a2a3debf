"""Measurements; each program says what it compares and writes JSON lines.

This package file imports nothing, because peers run below it in an environment of their own.
"""
