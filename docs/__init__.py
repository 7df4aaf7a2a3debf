"""Sources of the documentation site; the Python files beside them write its tables."""
