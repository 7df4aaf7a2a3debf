"""Hooks for schemathesis, loaded in its own environment; imports nothing of jaxserve.

Every call is written to the file that FUZZ_CALLS names. Half of the random bodies are thinned to
few optional fields and name the served model: otherwise nearly all would be refused for one of
their many fields, and little would reach the engine. The other half stays as it was generated.
"""

import contextlib
import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import schemathesis

MAX_FIELDS = 3
KEPT = (
    "prompt", "messages", "input", "query", "queries", "documents", "items", "text_1", "text_2",
    "data_1", "data_2", "tokens",
)  # fmt: skip
IDS = ("prompt", "input", "tokens")
NUM_IDS = 1000
ONE_OF = {
    "/v1/score": (
        ("text_1", "queries", "query", "data_1"),
        ("text_2", "documents", "items", "data_2"),
    ),
    "/v1/embeddings": (("input", "messages"),),
    "/tokenize": (("prompt", "messages"),),
}
"""Of several fields with one meaning, one may be given."""
STOPS = {
    "/pause", "/pause_generation", "/sleep", "/release_memory_occupation", "/wake_up",
    "/resume_memory_occupation",
}  # fmt: skip
"""Routes behind which the server may serve nobody."""
_lock = threading.Lock()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:  # noqa: ANN401, ARG001
    """Let half of the valid cases reach the engine; invalid ones stay as they are."""
    if isinstance(case.query, dict) and case.operation.path == "/sleep":
        _keep_weights(case.query)
    if case.meta is None or case.meta.generation.mode.value != "positive":
        return
    if case.path_parameters and len(case.path_parameters.get("name", "")) % 2:
        case.path_parameters["name"] = os.environ["FUZZ_MODEL"]
    if isinstance(case.body, dict):
        case.body = _thinned(case.body, case.operation.path)


def _thinned(body: dict[str, Any], path: str) -> dict[str, Any]:
    number = hash(json.dumps(body, sort_keys=True, default=str))
    if number % 2:
        return body
    names = sorted((name for name in body if name not in KEPT), key=lambda n: hash((number, n)))
    kept = {name: body[name] for name in body if name in KEPT or name in names[:MAX_FIELDS]}
    if "model" in kept:
        kept["model"] = os.environ["FUZZ_MODEL"]
    for names in ONE_OF.get(path, ()):
        given = [name for name in names if kept.get(name)]
        for name in given[1:]:
            del kept[name]
    if path == "/v1/score":
        _complete_score(kept)
    return {name: _within(value) if name in IDS else value for name, value in kept.items()}


def _complete_score(body: dict[str, Any]) -> None:
    """Let a body compare one text with others: no field is required by itself, but two are."""
    firsts, seconds = ONE_OF["/v1/score"]
    first = next((name for name in firsts if body.get(name)), firsts[0])
    second = next((name for name in seconds if body.get(name)), seconds[0])
    value = body.get(first) or "a text"
    body[first] = (value[0] if isinstance(value, list) else value) or "a text"
    others = body.get(second) or "another"
    body[second] = [text or "another" for text in others] if isinstance(others, list) else others
    body.pop("label_token_ids", None)


def _within(value: Any) -> Any:  # noqa: ANN401  a JSON value
    """Bring token ids into the vocabulary."""
    if isinstance(value, list):
        return [_within(item) for item in value]
    return value % NUM_IDS if isinstance(value, int) else value


def _keep_weights(query: dict[str, Any]) -> None:
    """Let nobody throw the weights away: the next case would find a server without them."""
    if str(query.get("level")) == "2":
        query["level"] = 1


def _recover() -> None:
    """Let the server go on, whatever it was told."""
    for path in ("/wake_up", "/resume"):
        request = urllib.request.Request(  # noqa: S310  the server under test
            os.environ["FUZZ_RECOVER"] + path,
            method="POST",
            headers={"Authorization": f"Bearer {os.environ['FUZZ_KEY']}"},
        )
        with contextlib.suppress(urllib.error.HTTPError):  # 409: there was nothing to undo
            urllib.request.urlopen(request, timeout=60).close()  # noqa: S310


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:  # noqa: ANN401, ARG001
    """Write down what was called and answered."""
    mode = case.meta.generation.mode.value if case.meta is not None else "positive"
    call = [f"{case.operation.method.upper()} {case.operation.path}", mode, response.status_code]
    with _lock, Path(os.environ["FUZZ_CALLS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")
    if "FUZZ_RECOVER" in os.environ and case.operation.path in STOPS:
        _recover()


@schemathesis.check
def only_deliberate_server_errors(ctx: Any, response: Any, case: Any) -> None:  # noqa: ANN401, ARG001
    """Allow no status of 500 and above but a 503 that says when to come back."""
    if response.status_code < 500:
        return
    after = response.headers.get("retry-after") or [""]
    if response.status_code == 503 and str(after[0]).isdecimal():
        return
    raise AssertionError(f"status {response.status_code}, Retry-After {after}")
