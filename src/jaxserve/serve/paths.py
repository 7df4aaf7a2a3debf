"""Paths as routes see them."""

from fastapi import FastAPI
from starlette.routing import compile_path
from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """Return a request's path below the server's root path, the way routes are matched."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root or not path.startswith(root):
        return path
    below = path[len(root) :]
    return below if below.startswith("/") or not below else path


def methods_of(app: FastAPI, path: str) -> set[str]:
    """Return every method that the OpenAPI description lists for a path.

    Args:
        app: The application.
        path: Below its root path.
    """
    described = app.openapi()["paths"]
    found = [ways for form, ways in described.items() if compile_path(form)[0].match(path)]
    return {method.upper() for ways in found for method in ways}
