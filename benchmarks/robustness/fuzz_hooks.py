"""Hooks for schemathesis, loaded in its own environment; imports nothing of jaxserve.

Every call is written to the file that FUZZ_CALLS names. Half of the random bodies are thinned to
few optional fields and name the served model: otherwise nearly all would be refused for one of
their many fields, and little would reach the engine. The other half stays as it was generated.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

import schemathesis

MAX_FIELDS = 3
KEPT = ("prompt", "messages", "input", "query", "documents", "text_1", "text_2", "tokens")
_lock = threading.Lock()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:  # noqa: ANN401, ARG001
    """Let half of the valid cases reach the engine; invalid ones stay as they are."""
    if case.meta is None or case.meta.generation.mode.value != "positive":
        return
    if case.path_parameters and len(case.path_parameters.get("name", "")) % 2:
        case.path_parameters["name"] = os.environ["FUZZ_MODEL"]
    if isinstance(case.body, dict):
        case.body = _thinned(case.body)


def _thinned(body: dict[str, Any]) -> dict[str, Any]:
    number = hash(json.dumps(body, sort_keys=True, default=str))
    if number % 2:
        return body
    names = sorted((name for name in body if name not in KEPT), key=lambda n: hash((number, n)))
    kept = {name: body[name] for name in body if name in KEPT or name in names[:MAX_FIELDS]}
    if "model" in kept:
        kept["model"] = os.environ["FUZZ_MODEL"]
    return kept


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:  # noqa: ANN401, ARG001
    """Write down what was called and answered."""
    mode = case.meta.generation.mode.value if case.meta is not None else "positive"
    call = [f"{case.operation.method.upper()} {case.operation.path}", mode, response.status_code]
    with _lock, Path(os.environ["FUZZ_CALLS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


@schemathesis.check
def only_deliberate_server_errors(ctx: Any, response: Any, case: Any) -> None:  # noqa: ANN401, ARG001
    """Allow no status of 500 and above but a 503 that says when to come back."""
    if response.status_code < 500:
        return
    after = response.headers.get("retry-after") or [""]
    if response.status_code == 503 and str(after[0]).isdecimal():
        return
    raise AssertionError(f"status {response.status_code}, Retry-After {after}")
