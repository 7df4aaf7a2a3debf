"""Pure policies: which tokens run next. Standard library and numpy only."""
