"""The routes of the page: who gets what at `/`, headers, caching, and files in the package."""

import asyncio
import hashlib
import json
import logging
import re
import zipfile
from pathlib import Path

import httpx
import pytest
from hatchling.builders.wheel import WheelBuilder

from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.serve.app import create_app
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.page import INDEX, LIVE, POLICY, WithoutPolls, live_numbers, load_files
from jaxserve.serve.process import log_config
from jaxserve.serve.state import ServerState

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "src" / "jaxserve" / "serve" / "pages"
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
FILES = sorted(path.name for path in PAGES.iterdir())
ASSETS = [name for name in FILES if name != INDEX]


def get(
    path: str, settings: dict[str, object] | None = None, method: str = "GET", **headers: str
) -> httpx.Response:
    """Send one request to a server whose model is still being loaded."""
    app = create_app(ServerState(ServerConfig.from_settings(settings or {}), model="m"))

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


def test_a_browser_gets_the_page():
    response = get("/", **BROWSER)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.content == (PAGES / INDEX).read_bytes()
    assert response.headers["vary"] == "Accept"


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html;q=0, */*", "text/plain"])
def test_other_clients_get_a_signpost(accept: str):
    response = get("/", Accept=accept)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["vary"] == "Accept"
    body = response.json()
    assert (body["name"], body["model"]) == ("jaxserve", "m")
    for door in ("health", "metrics", "docs"):
        assert get(body[door]).status_code in (200, 503)
    assert get(body["openai_api"] + "/models").status_code == 503


def test_the_signpost_knows_what_is_switched_off_and_where_it_stands():
    body = get("/", {"disable_fastapi_docs": True, "root_path": "/api/"}, Accept="*/*").json()
    assert body["docs"] is None
    assert body["openai_api"] == "/api/v1"


@pytest.mark.parametrize("path", ["/", *(f"/pages/{name}" for name in ASSETS)])
def test_every_file_carries_the_policy_and_can_be_asked_about(path: str):
    response = get(path, **BROWSER)
    assert response.status_code == 200
    headers = response.headers
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"
    assert headers["etag"] == f'"{hashlib.sha256(response.content).hexdigest()[:32]}"'
    known = get(path, **BROWSER, **{"If-None-Match": f'"other", W/{headers["etag"]}'})
    assert (known.status_code, known.content) == (304, b"")
    assert known.headers["etag"] == headers["etag"]
    assert known.headers["content-security-policy"] == POLICY
    assert get(path, **BROWSER, **{"If-None-Match": '"other"'}).status_code == 200
    head = get(path, method="HEAD", **BROWSER)
    assert (head.status_code, head.headers["etag"]) == (200, headers["etag"])


def test_the_policy_allows_this_server_and_nothing_else():
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert set(rules.values()) == {"'self'", "'none'"}
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("page.css", "text/css; charset=utf-8"),
        ("page.js", "text/javascript; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_files_say_what_they_are(name: str, kind: str):
    assert get(f"/pages/{name}").headers["content-type"] == kind


@pytest.mark.parametrize(
    "name", ["nothing.js", INDEX, "..%2Fpage.py", "%2e%2e%2fpage.py", "page.py", "page.js%00"]
)
def test_nothing_but_the_pages_own_files_is_served(name: str):
    response = get(f"/pages/{name}", **BROWSER)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NotFoundError"


def test_the_page_can_be_switched_off():
    for path in ("/", "/pages/page.js", LIVE):
        assert get(path, {"disable_page": True}, **BROWSER).status_code == 404
    assert get("/version", {"disable_page": True}).status_code == 200


@pytest.mark.parametrize("path", ["/api/", "/"])
def test_the_page_works_below_a_root_path(path: str):
    settings = {"root_path": "/api"}
    response = get(path, settings, **BROWSER)
    assert response.headers["content-type"].startswith("text/html")
    for link in re.findall(r'(?:href|src)="([^"#]+)"', response.text):
        assert not link.startswith(("/", "http", "//")), f"{link} would leave the root path"
        assert get(path + link, settings).status_code == 200


def test_without_its_slash_the_root_path_leads_to_the_page():
    response = get("/api", {"root_path": "/api"}, **BROWSER)
    assert response.status_code == 307
    assert response.headers["location"].endswith("/api/")


def test_no_file_refers_to_another_host_or_writes_markup():
    for name in FILES:
        text = (PAGES / name).read_text()
        # names of XML languages are no addresses, and markdown.js looks for addresses
        foreign = re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]{2,}[^\s\"']*", text)
        assert set(foreign) <= {"http://www.w3.org/2000/svg"}, name
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in text, name
        if name.endswith(".html"):
            assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", text)


def test_every_file_is_preloaded_or_linked_by_the_page():
    index = (PAGES / INDEX).read_text()
    assert [name for name in ASSETS if f'"pages/{name}"' not in index] == []


def test_every_file_is_known_by_its_ending():
    assert sorted(load_files()) == FILES


def test_the_wheel_carries_the_files(tmp_path: Path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert {f"jaxserve/serve/pages/{name}" for name in FILES} <= inside


def test_live_numbers_while_loading_need_no_key():
    response = get(LIVE, {"api_key": ("k",)})
    assert response.headers["cache-control"] == "no-store"
    body = response.json()
    assert (body["status"], body["model"], body["needs_key"]) == ("loading", "m", True)
    assert "running" not in body
    assert get(LIVE).json()["needs_key"] is False


def test_live_numbers_are_those_of_the_metrics(ask, engine: AsyncLLM):
    before = ask(LIVE).json()
    answer = ask("/v1/completions", {"prompt": "Hello", "max_tokens": 5, "ignore_eos": True})
    after = ask(LIVE).json()
    assert after["status"] == "ready"
    usage = answer.json()["usage"]
    assert after["generation_tokens"] - before["generation_tokens"] == usage["completion_tokens"]
    assert after["prompt_tokens"] - before["prompt_tokens"] == usage["prompt_tokens"]
    assert after["finished"] - before["finished"] == 1
    assert after["time"] >= before["time"]
    assert (after["running"], after["waiting"], after["kv_usage"]) == (0, 0, 0)
    page = ask("/metrics").text
    for name, key in (
        ("prompt_tokens_cached_total", "cached_tokens"),
        ("generation_tokens_total", "generation_tokens"),
        ("num_preemptions_total", "preemptions"),
    ):
        found = re.search(rf"^jaxserve:{name}{{[^}}]*}} (\S+)$", page, re.MULTILINE)
        assert float(found[1]) == after[key]


def test_live_numbers_say_that_the_server_stops(engine: AsyncLLM):
    state = ServerState(ServerConfig(), model="m", engine=engine)
    state.is_draining = True
    assert live_numbers(state)["status"] == "stopping"
    assert len(json.dumps(live_numbers(state))) < 500, "polled every second, so it stays small"


def test_live_numbers_say_that_the_engine_rests(engine: AsyncLLM):
    state = ServerState(ServerConfig(), model="m", engine=engine)

    async def rest() -> list[str]:
        found = []
        await engine.pause_generation()
        found.append(live_numbers(state)["status"])
        await engine.resume_generation()
        await engine.sleep(1)
        found.append(live_numbers(state)["status"])
        await engine.wake_up()
        found.append(live_numbers(state)["status"])
        return found

    assert asyncio.run(rest()) == ["paused", "sleeping", "ready"]


@pytest.mark.parametrize(
    ("path", "status", "is_kept"),
    [
        ("/pages/live", 200, False),
        ("/api/pages/live?x=1", 200, False),
        ("/pages/live", 404, True),
        ("/pages/live.js", 200, True),
        ("/v1/models", 200, True),
    ],
)
def test_polls_stay_out_of_the_access_log(path: str, status: int, is_kept: bool):
    arguments = ("127.0.0.1:1", "GET", path, "1.1", status)
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "%s", arguments, None)
    assert WithoutPolls().filter(record) is is_kept


def test_the_access_log_uses_the_filter():
    config = log_config(ServerConfig())
    (name,) = config["loggers"]["uvicorn.access"]["filters"]
    assert config["filters"][name]["()"] is WithoutPolls
