"""What the server answers before its model is there, and to requests that never reach it."""

import asyncio
import json
import logging

import httpx
import pytest

from jaxserve.serve import openai_api
from jaxserve.serve.app import create_app
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.state import ServerState

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def ask(
    method: str, path: str, settings: dict[str, object] | None = None, **request
) -> httpx.Response:
    """Send one request to a server whose model is still being loaded."""
    app = create_app(ServerState(ServerConfig.from_settings(settings or {}), model="m"))

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def error_of(response: httpx.Response) -> dict[str, object]:
    """Check the shape of an error body and return what is in it."""
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["code"] == response.status_code
    assert response.headers["content-type"] == "application/json"
    return body["error"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/completions", {"prompt": "Hi"}),
        ("POST", "/tokenize", {"prompt": "Hi"}),
        ("POST", "/detokenize", {"tokens": [1]}),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/m", None),
    ],
)
def test_while_loading_everything_that_needs_the_model_is_503(method: str, path: str, body: object):
    response = ask(method, path, json=body)
    assert response.status_code == 503
    assert error_of(response)["type"] == "ServiceUnavailableError"
    assert int(response.headers["retry-after"]) >= 1


def test_health_is_503_while_loading():
    assert ask("GET", "/health").status_code == 503
    assert ask("GET", "/ping").status_code == 503
    assert ask("POST", "/ping").status_code == 503


def test_what_needs_no_model_answers_at_once():
    assert ask("GET", "/version").json()["version"]
    assert ask("GET", "/load").json() == {"server_load": 0}
    assert ask("GET", "/metrics").status_code == 200


def test_openapi_schema_describes_the_bodies():
    schema = ask("GET", "/openapi.json").json()
    assert "/v1/chat/completions" in schema["paths"]
    assert "top_k" in schema["components"]["schemas"]["ChatBody"]["properties"]
    for path, ways in schema["paths"].items():
        for way in ways.values():
            assert set(way["responses"]) == {"200", "4XX", "503"}, path
    reply = schema["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(reply) == {"application/json", "text/event-stream"}
    assert ask("GET", "/openapi.json", {"disable_fastapi_docs": True}).status_code == 404


def test_unknown_path_and_wrong_method():
    assert error_of(ask("GET", "/v1/nothing"))["type"] == "NotFoundError"
    wrong = ask("GET", "/v1/completions")
    assert wrong.status_code == 405
    assert "use POST" in error_of(wrong)["message"]
    both = ask("OPTIONS", "/ping")
    assert both.headers["allow"] == "GET, POST"
    assert "use GET, POST" in error_of(both)["message"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "not valid JSON"),
        (b"", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"[" * 100_000, "body"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "body"),
        (b"\xff\xfe", "body"),
    ],
)
def test_broken_bodies_are_400(content: bytes, expected: str):
    headers = {"Content-Type": "application/json"}
    response = ask("POST", "/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert expected in error_of(response)["message"]


def test_other_content_types_are_400():
    response = ask("POST", "/v1/completions", data={"prompt": "Hi"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "expected"),
    [
        ("/v1/completions", {}, "prompt", "prompt: Field required"),
        ("/v1/completions", {"prompt": 3}, "prompt", "got 3"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt", "got "),
        ("/v1/completions", {"prompt": "a", "n": "two"}, "n", "n: Input should be a valid integer"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "valid integer"),
        ("/v1/completions", {"prompt": "a", "top_p": [1]}, "top_p", "valid number, got [1]"),
        ("/v1/completions", {"prompt": "a", "priority": 2**64}, "priority", "less than"),
        ("/v1/chat/completions", {"messages": []}, "messages", "at least 1 item"),
        ("/v1/chat/completions", {"messages": "Hi"}, "messages", "valid list"),
        ("/v1/chat/completions", {"messages": [{}]}, "messages[0].role", "Field required"),
        ("/v1/chat/completions", {**CHAT, "logprobs": 5}, "logprobs", "valid boolean"),
        ("/tokenize", {"prompt": []}, "prompt", "valid string"),
        ("/detokenize", {"tokens": "x"}, "tokens", "valid list, got 'x'"),
    ],
)
def test_values_of_a_wrong_type_name_the_field(path: str, body: object, param: str, expected: str):
    headers = {"Content-Type": "application/json"}
    response = ask("POST", path, content=json.dumps(body), headers=headers)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "BadRequestError"
    assert error["param"].startswith(param)
    assert expected in error["message"]


def test_long_wrong_values_are_not_repeated_whole():
    response = ask("POST", "/v1/completions", json={"prompt": {"x": "y" * 10_000}})
    assert len(error_of(response)["message"]) < 500


def test_api_key_guards_v1_only():
    settings = {"api_key": ("secret", "other")}

    def status(path: str, key: str | None = None, method: str = "GET") -> int:
        headers = {} if key is None else {"Authorization": key}
        return ask(method, path, settings, headers=headers).status_code

    assert status("/v1/models") == 401
    assert status("/v1/models", "Bearer wrong") == 401
    assert status("/v1/models", "Basic secret") == 401
    assert status("/v1/models", "Bearer ") == 401
    assert status("/v1/models", "secret") == 401
    assert status("/v1/anything", method="POST") == 401
    assert status("/v1/models", "Bearer secret") == 503
    assert status("/v1/models", "bearer other") == 503
    for path in ("/health", "/metrics", "/version", "/load", "/tokenize"):
        assert status(path) != 401


def test_wrong_key_is_told_in_an_error_body():
    response = ask("GET", "/v1/models", {"api_key": ("k",)}, headers={"Authorization": "Bearer x"})
    assert error_of(response)["type"] == "AuthenticationError"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/models"])
def test_a_root_path_opens_no_way_around_the_key(path: str):
    settings = {"api_key": ("k",), "root_path": "/api"}
    assert ask("GET", path, settings).status_code == 401
    assert ask("GET", path, settings, headers={"Authorization": "Bearer k"}).status_code == 503


def test_large_bodies_are_413_announced_or_not():
    settings = {"max_request_body_bytes": 1000}
    body = b'{"prompt": "' + b"x" * 2000 + b'"}'
    headers = {"Content-Type": "application/json"}

    async def chunks():
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    for content in (body, chunks()):
        response = ask("POST", "/v1/completions", settings, content=content, headers=headers)
        assert response.status_code == 413
        assert "at most 1000 B" in error_of(response)["message"]


def test_cors_only_for_allowed_origins():
    origin = {"Origin": "https://here.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    settings = {"allowed_origins": ("https://here.example",), "api_key": ("k",)}
    allowed = ask("OPTIONS", "/v1/completions", settings, headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://here.example"
    # a refusal must be readable for the page that caused it
    refused = ask("POST", "/v1/completions", settings, headers=origin, json={})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://here.example"
    assert "access-control-allow-origin" not in ask("GET", "/version", headers=origin).headers


def test_request_id_comes_back():
    assert ask("GET", "/version", headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"
    assert "x-request-id" not in ask("GET", "/version").headers


def test_unknown_fields_are_warned_about_once_per_name(caplog: pytest.LogCaptureFixture):
    openai_api._warned.clear()
    with caplog.at_level(logging.WARNING, "jaxserve.serve"):
        for _ in range(2):
            body = openai_api.ChatBody.model_validate({**CHAT, "surprise": 1, "user": "me"})
            body.check_extra()
    assert [record.getMessage() for record in caplog.records] == [
        "request field 'surprise' is unknown and ignored"
    ]


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"tools": []},
        {"tool_choice": "auto"},
        {"guided_json": {}},
        {"functions": [{"name": "f"}]},
        {"suffix": "end"},
        {"use_beam_search": True},
        {"bad_words": ["x"]},
        {"audio": {}},
    ],
)
def test_what_is_not_built_is_refused_by_name(field: dict[str, object]):
    body = openai_api.CompletionBody.model_validate({"prompt": "a", **field})
    (name,) = field
    with pytest.raises(openai_api.RequestError, match=rf"^{name} cannot be used: ") as error:
        body.check_extra()
    assert error.value.param == name


@pytest.mark.parametrize(
    "field",
    [
        {"tools": None},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"suffix": ""},
    ],
)
def test_what_is_not_used_is_not_refused(field: dict[str, object]):
    openai_api.CompletionBody.model_validate({"prompt": "a", **field}).check_extra()
