"""Parsers of what models write around their answers: reasoning and tool calls."""
