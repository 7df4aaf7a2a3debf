"""The routes that change a running server: closed by default, and what they do when open."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError
from jaxserve.serve.app import create_app
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.state import ServerState
from tests.tiny import write_tiny_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"prompt": "Hello", "temperature": 0, "ignore_eos": True, "max_tokens": 8}
OPEN = {"enable_admin_api": True}
ROUTES = [
    ("POST", "/pause"), ("POST", "/resume"), ("GET", "/is_paused"), ("POST", "/pause_generation"),
    ("POST", "/continue_generation"), ("POST", "/sleep"), ("POST", "/wake_up"),
    ("GET", "/is_sleeping"), ("POST", "/release_memory_occupation"),
    ("POST", "/resume_memory_occupation"), ("POST", "/abort_requests"),
    ("POST", "/reset_prefix_cache"), ("POST", "/flush_cache"), ("GET", "/weight_info"),
    ("POST", "/update_weight_version"), ("POST", "/update_weights"),
    ("POST", "/update_weights_from_disk"), ("GET", "/server_info"), ("POST", "/start_profile"),
    ("POST", "/stop_profile"),
]  # fmt: skip


@pytest.fixture(scope="module")
def admin(ask):
    """Ask a server whose admin routes are open."""

    def send(path: str, body: dict[str, Any] | None = None, **request: Any) -> httpx.Response:
        settings = OPEN | request.pop("settings", {})
        return ask(path, body, settings=settings, **request)

    return send


def ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_is_closed_by_default_and_says_how_to_open_it(ask, method, path):
    body = {"new_version": "x"} if method == "POST" else None
    told = error(ask(path, body), 403)
    assert told["type"] == "PermissionDeniedError"
    assert f"{path} is closed" in told["message"]
    assert "--enable-admin-api" in told["message"]


def test_closed_routes_are_not_in_the_schema(ask):
    closed = ok(ask("/openapi.json"))["paths"]
    opened = ok(ask("/openapi.json", settings=OPEN))["paths"]
    assert not {path for _, path in ROUTES} & set(closed)
    assert {path for _, path in ROUTES} <= set(opened)
    for path in set(opened) - set(closed):
        for operation in opened[path].values():
            assert {"200", "4XX", "503"} <= set(operation["responses"])
            assert "422" not in operation["responses"]  # never answered


@pytest.mark.parametrize(
    ("settings", "header", "status"),
    [
        ({}, None, 200),
        ({"admin_api_key": "root"}, None, 401),
        ({"admin_api_key": "root"}, "Bearer wrong", 401),
        ({"admin_api_key": "root"}, "Bearer root", 200),
        ({"admin_api_key": "root", "api_key": ("user",)}, "Bearer user", 401),
        ({"api_key": ("user",)}, None, 401),
        ({"api_key": ("user",)}, "Bearer user", 200),
    ],
)
def test_a_key_guards_the_routes(admin, settings, header, status):
    headers = {} if header is None else {"Authorization": header}
    response = admin("/is_paused", settings=settings, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"


def test_keys_without_open_routes_are_a_mistake():
    with pytest.raises(ConfigError, match="admin_api_key needs enable_admin_api"):
        ServerConfig.from_settings({"admin_api_key": "x"})


@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_pause_refuses_new_requests_until_resume(admin, mode):
    assert ok(admin(f"/pause?mode={mode}", {})) == {"status": "paused"}
    assert ok(admin("/is_paused")) == {"is_paused": True}
    refused = admin(COMPLETIONS, GREEDY)
    assert "paused" in error(refused, 503)["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert admin("/health").status_code == 200
    assert ok(admin("/resume", {})) == {"status": "resumed"}
    assert ok(admin("/is_paused")) == {"is_paused": False}
    ok(admin(COMPLETIONS, GREEDY))


@pytest.mark.parametrize("alias", [False, True])
def test_keep_queues_requests_until_resume(admin, engine, wait_for, alias):
    if alias:
        assert ok(admin("/pause_generation", {"mode": "retract"}))["status"] == "ok"
    else:
        ok(admin("/pause?mode=keep", {}))
    replies: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: replies.append(admin(COMPLETIONS, GREEDY)))
    thread.start()
    wait_for(lambda: engine.num_unfinished == 1)
    assert replies == []
    ok(admin("/continue_generation" if alias else "/resume", {}))
    thread.join()
    assert ok(replies[0])["usage"]["completion_tokens"] == 8


def test_sleep_and_wake_up(admin):
    text = ok(admin(COMPLETIONS, GREEDY))["choices"][0]["text"]
    ok(admin("/sleep", {}))
    assert ok(admin("/is_sleeping")) == {"is_sleeping": True}
    error(admin(COMPLETIONS, GREEDY), 503)
    assert error(admin("/resume", {}), 409)["type"] == "ConflictError"
    assert ok(admin("/wake_up?tags=weights&tags=kv_cache", {})) == {"status": "sleeping"}
    assert ok(admin("/wake_up", {})) == {"status": "awake"}
    assert ok(admin(COMPLETIONS, GREEDY))["choices"][0]["text"] == text
    ok(admin("/release_memory_occupation", {}))
    assert ok(admin("/resume_memory_occupation", {"tags": ["weights"]}))["status"] == "sleeping"
    assert ok(admin("/resume_memory_occupation", {"tags": ["kv_cache"]}))["status"] == "awake"
    assert ok(admin(COMPLETIONS, GREEDY))["choices"][0]["text"] == text
    assert (
        "together"
        in error(admin("/release_memory_occupation", {"tags": ["weights"]}), 400)["message"]
    )


def test_weights_come_from_a_checkpoint_of_the_same_model(admin, tiny_folder, tmp_path):
    text = ok(admin(COMPLETIONS, GREEDY))["choices"][0]["text"]
    ok(admin("/sleep?level=2", {}))
    assert "update_params" in error(admin("/wake_up", {}), 409)["message"]
    body = {"update_info": {"model_path": str(tiny_folder), "weight_version": "v7"}}
    done = ok(admin("/update_weights", body))
    assert (done["success"], done["weight_version"]) == (True, "v7")
    assert ok(admin("/wake_up", {})) == {"status": "awake"}
    reply = ok(admin(COMPLETIONS, GREEDY | {"return_weight_versions": True}))
    assert reply["choices"][0]["text"] == text
    assert reply["choices"][0]["weight_versions"] == [{"version": "v7", "start": 0, "end": 8}]
    other = write_tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    told = error(admin("/update_weights_from_disk", {"model_path": str(other)}), 400)
    assert "rms_norm_eps 0.5 instead of 1e-05" in told["message"]
    assert told["param"] == "model_path"
    error(admin("/update_weights", {"model_path": str(tmp_path / "none")}), 400)
    assert "model_path must say" in error(admin("/update_weights", {}), 400)["message"]
    assert ok(admin("/weight_info"))["weight_version"] == "v7"
    renamed = ok(admin("/update_weight_version", {"new_version": "v8"}))
    assert renamed["new_version"] == "v8"
    assert ok(admin("/weight_info"))["weight_version"] == "v8"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_versions_ride_on_the_last_chunk(admin, events_of, path):
    version = ok(admin("/weight_info"))["weight_version"]
    body = GREEDY | {"stream": True, "return_weight_versions": True, "n": 1}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": "Hi"}]
        del body["prompt"]
    chunks = events_of(admin(path, body).text)
    found = [c["choices"][0].get("weight_versions") for c in chunks]
    assert found[-1] == [{"version": version, "start": 0, "end": 8}]
    assert found[:-1] == [None] * (len(chunks) - 1)
    body["return_weight_versions"] = False
    chunks = events_of(admin(path, body).text)
    assert not any("weight_versions" in c["choices"][0] for c in chunks)


def test_an_interrupted_answer_goes_on(admin):
    body = {
        "prompt": "Tell me", "temperature": 1.1, "seed": 9, "max_tokens": 12, "ignore_eos": True,
        "presence_penalty": 0.5, "return_token_ids": True,
    }  # fmt: skip
    whole = ok(admin(COMPLETIONS, body))["choices"][0]
    rest = ok(admin(COMPLETIONS, body | {"output_token_ids": whole["token_ids"][:5]}))
    assert rest["choices"][0]["token_ids"] == whole["token_ids"][5:]
    assert whole["text"].endswith(rest["choices"][0]["text"])
    assert rest["usage"]["completion_tokens"] == 7
    for wrong in ({"echo": True}, {"prompt": ["a", "b"]}, {"n": 2}):
        told = error(admin(COMPLETIONS, body | {"output_token_ids": [1]} | wrong), 400)
        assert told["param"] == "output_token_ids"


def test_requests_are_aborted_by_the_ids_of_their_answers(engine, wait_for):
    app = create_app(ServerState(ServerConfig.from_settings(OPEN), model="tiny", engine=engine))
    long = GREEDY | {"max_tokens": 900}

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def start(name: str) -> httpx.Response:
                return await client.post(COMPLETIONS, json=long | {"request_id": name})

            tasks = {name: asyncio.create_task(start(name)) for name in ("one", "two-0", "x")}
            await asyncio.to_thread(wait_for, lambda: engine.num_unfinished == 3)
            gone = await client.post("/abort_requests", json={"request_ids": ["cmpl-one", "no"]})
            assert gone.json()["num_aborted"] == 1
            reply = (await tasks["one"]).json()
            assert reply["choices"][0]["finish_reason"] == "abort"
            assert not tasks["two-0"].done()
            gone = await client.post("/abort_request", json={"rid": "two-0"})
            assert gone.json()["num_aborted"] == 1
            await tasks["two-0"]
            assert (await client.post("/abort_requests")).json()["num_aborted"] == 1
            await tasks["x"]

    asyncio.run(run())


def test_caches_and_facts(admin):
    ok(admin(COMPLETIONS, GREEDY))
    assert ok(admin("/reset_prefix_cache?reset_running_requests=true", {})) == {"success": True}
    assert ok(admin("/flush_cache", {}))["success"] is True
    settings = {"api_key": ("top-secret",), "admin_api_key": "root-secret"}
    headers = {"Authorization": "Bearer root-secret"}
    reply = admin("/server_info?config_format=json", settings=settings, headers=headers)
    assert ok(reply)["config"]["model"]["max_model_len"] == 1024
    assert "secret" not in reply.text
    text = ok(admin("/server_info"))["config"]
    assert "max_model_len=1024" in text


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/pause?mode=stop", "mode"),
        ("/sleep?level=3", "level"),
        ("/sleep?level=x", "level"),
        ("/wake_up?tags=all", "tags[0]"),
    ],
)
def test_wrong_queries_are_named(admin, path, param):
    told = error(admin(path, {}), 400)
    assert told["param"] == param
    assert ok(admin("/is_paused")) == {"is_paused": False}


# Malformed ------------------------------------------------------------------------------------

NO_JSON = [b"{", b"[]", b'"x"', b"1", b"\xff", b"[" * 50_000, b'{"n": ' + b"9" * 5000 + b"}"]
WITH_BODY = [
    "/pause_generation", "/release_memory_occupation", "/resume_memory_occupation",
    "/abort_requests", "/update_weight_version", "/update_weights", "/update_weights_from_disk",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter",
    "/unload_lora_adapter",
]  # fmt: skip
WRONG = [
    ("/pause_generation", {"mode": "keep"}, "mode"),
    ("/pause_generation", {"mode": 1}, "mode"),
    ("/release_memory_occupation", {"tags": "weights"}, "tags"),
    ("/release_memory_occupation", {"tags": ["kv_cache"]}, "tags"),
    ("/resume_memory_occupation", {"tags": [1]}, "tags[0]"),
    ("/resume_memory_occupation", {"tags": ["all"]}, "tags[0]"),
    ("/abort_requests", {"request_ids": "x"}, "request_ids"),
    ("/abort_requests", {"request_ids": [1]}, "request_ids[0]"),
    ("/abort_requests", {"rid": 5}, "rid"),
    ("/abort_requests", {"abort_all": "yes"}, "abort_all"),
    *[
        ("/update_weight_version", {"new_version": version}, "new_version")
        for version in ("", 7, None, "a" * 129, "a\nb", "\ud800")
    ],
    ("/update_weight_version", {}, "new_version"),
    *[
        ("/update_weights", {"model_path": path}, "model_path")
        for path in (None, 5, "\0", "a" * 5000, "~nobody/x", "\ud800", "/dev/null", ".")
    ],
    ("/update_weights", {"update_info": {"model_path": 1}}, "update_info.model_path"),
    ("/update_weights", {"update_info": 5}, "update_info"),
    ("/update_weights", {"model_path": "TINY", "weight_version": ""}, "weight_version"),
    ("/update_weights", {"model_path": "TINY", "weight_version": "a\nb"}, "weight_version"),
    (
        "/update_weights",
        {"model_path": "TINY", "recompute": True, "flush_cache": False},
        "recompute",
    ),
    ("/v1/load_lora_adapter", {"lora_path": "x"}, "lora_name"),
    ("/v1/load_lora_adapter", {"lora_name": "", "lora_path": "x"}, "lora_name"),
    ("/v1/load_lora_adapter", {"lora_name": "a\nb", "lora_path": "x"}, "lora_name"),
    ("/v1/load_lora_adapter", {"lora_name": "\ud800", "lora_path": "x"}, "lora_name"),
    ("/v1/unload_lora_adapter", {"lora_name": 3}, "lora_name"),
]
QUERIES = [
    "/pause?mode=retract", "/pause?clear_cache=perhaps", "/sleep?level=-1", "/sleep?mode=",
    "/sleep?level=99999999999999999999", "/wake_up?tags=",
    "/reset_prefix_cache?reset_running_requests=7", "/server_info?config_format=xml",
]  # fmt: skip


@pytest.fixture(scope="module")
def opened(engine):
    """Ask one application many times; building it for each would take most of the time."""
    app = create_app(ServerState(ServerConfig.from_settings(OPEN), model="tiny", engine=engine))

    async def run(path: str, content: bytes | None) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            if content is None:
                return await client.get(path)
            headers = {"Content-Type": "application/json"}
            return await client.post(path, content=content, headers=headers)

    def send(path: str, body: Any = None, *, content: bytes | None = None) -> httpx.Response:
        if body is not None:
            content = json.dumps(body).encode()
        return asyncio.run(run(path, content))

    return send


def is_untouched(opened) -> bool:
    awake = not ok(opened("/is_sleeping"))["is_sleeping"]
    return awake and not ok(opened("/is_paused"))["is_paused"]


@pytest.mark.parametrize("path", WITH_BODY)
def test_bodies_that_are_no_json_object_are_refused(opened, path):
    for content in NO_JSON:
        told = error(opened(path, content=content), 400)
        assert (told["type"], told["code"]) == ("BadRequestError", 400)
        assert told["message"]
    assert is_untouched(opened)


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_wrong_fields_are_named_and_nothing_happens(opened, tiny_folder, path, body, param):
    if body.get("model_path") == "TINY":
        body = body | {"model_path": str(tiny_folder)}
    before = ok(opened("/weight_info"))
    told = error(opened(path, body), 400)
    assert told["param"] == param
    assert told["message"]
    assert ok(opened("/weight_info")) == before
    assert is_untouched(opened)


@pytest.mark.parametrize("path", QUERIES)
def test_wrong_queries_change_nothing(opened, path):
    reply = opened(path) if path.startswith("/server_info") else opened(path, {})
    assert error(reply, 400)["param"]
    assert is_untouched(opened)


def test_a_failed_update_aborts_nobody(engine, wait_for, tmp_path):
    app = create_app(ServerState(ServerConfig.from_settings(OPEN), model="tiny", engine=engine))
    wrong = [
        ("/update_weights", {"model_path": str(tmp_path), "abort_all_requests": True}),
        ("/update_weight_version", {"new_version": "a" * 200, "abort_all_requests": True}),
    ]

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            task = asyncio.create_task(client.post(COMPLETIONS, json=GREEDY | {"max_tokens": 200}))
            await asyncio.to_thread(wait_for, lambda: engine.num_unfinished == 1)
            for path, body in wrong:
                error(await client.post(path, json=body), 400)
            assert (await task).json()["choices"][0]["finish_reason"] == "length"
            task = asyncio.create_task(client.post(COMPLETIONS, json=GREEDY | {"max_tokens": 900}))
            await asyncio.to_thread(wait_for, lambda: engine.num_unfinished == 1)
            body = {"new_version": "renamed", "abort_all_requests": True}
            ok(await client.post("/update_weight_version", json=body))
            assert (await task).json()["choices"][0]["finish_reason"] == "abort"

    asyncio.run(run())


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None)),
    st.lists(st.text(max_size=3), max_size=2), st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip
NAMES = (
    "mode", "tags", "request_ids", "rid", "abort_all", "new_version", "model_path",
    "weight_version", "flush_cache", "recompute", "update_info", "lora_name", "lora_path",
    "load_inplace", "pinned",
)  # fmt: skip


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    path=st.sampled_from(WITH_BODY), body=st.dictionaries(st.sampled_from(NAMES), ODD, max_size=4)
)
def test_no_body_makes_an_administrative_route_fail(opened, path, body):
    reply = opened(path, body)
    assert reply.status_code in (200, 400, 404, 409), reply.text
    if reply.status_code != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    ok(opened("/wake_up", {}))
    ok(opened("/resume", {}))
    assert opened("/metrics").status_code == 200
    ok(opened(COMPLETIONS, GREEDY))


def test_profiles_are_written_once_at_a_time(admin, tmp_path: Path):
    settings = {"profiler_dir": str(tmp_path)}
    assert error(admin("/stop_profile", {}, settings=settings), 409)["type"] == "ConflictError"
    assert ok(admin("/start_profile", {}, settings=settings))["folder"] == str(tmp_path)
    try:
        error(admin("/start_profile", {}, settings=settings), 409)
        ok(admin(COMPLETIONS, GREEDY))
    finally:
        ok(admin("/stop_profile", {}, settings=settings))
    assert list(tmp_path.rglob("*.xplane.pb"))
