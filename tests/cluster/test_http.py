"""A fleet behind the HTTP server."""

import asyncio
import json
import threading
import time

import httpx
import pytest

from jaxserve.cluster.options import ClusterOptions
from jaxserve.cluster.start import open_fleet
from jaxserve.models.config import ModelConfig
from jaxserve.serve import flags
from jaxserve.serve.app import create_app
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.state import ServerState
from tests.adapters import adapter_of, write_adapter
from tests.cluster.conftest import PROMPT, SMALL, kill, wait_until
from tests.server.conftest import _running, asking

BODY = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
LONG = {**BODY, "max_tokens": 120, "stream": True, "return_token_ids": True}
ADMIN = {"enable_admin_api": True}


@pytest.fixture(scope="module")
def fleet(tiny_folder):
    made = open_fleet(
        tiny_folder, ClusterOptions(replicas=2, routing_policy="round_robin"),
        **SMALL, enable_lora=True, max_loras=2, max_lora_rank=8,
    )  # fmt: skip
    yield made
    made.close()


@pytest.fixture(scope="module")
def ask(fleet):
    return asking(fleet)


@pytest.fixture(scope="module")
def url(fleet):
    with _running(fleet, ADMIN) as address:
        yield address


def hold(fleet, index):
    engine = fleet.host.fleet.roster.slots[index].replica.host.engine
    step = engine.step
    engine.step = lambda: (time.sleep(0.01), step())


def read(url, body, at=None, then=lambda: None):
    """Read a stream; after so many chunks something happens."""
    text, ids, last = "", [], {}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line or line.endswith("[DONE]"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            (choice,) = chunk["choices"]
            text += choice["text"]
            ids += choice.get("token_ids") or []
            last = choice
            if at is not None and len(ids) == at:
                then()
    return text, ids, last["finish_reason"]


def test_a_stream_over_http_does_not_notice_a_death(url, fleet, ask):
    undisturbed = read(url, LONG)
    before = sum(one.deaths for one in fleet.replicas)
    for index in (0, 1):
        hold(fleet, index)

    def cut():
        kill(fleet, max(fleet.replicas, key=lambda one: one.num_open).index)

    assert read(url, LONG, at=20, then=cut) == undisturbed
    health = httpx.get(f"{url}/health")
    assert health.status_code == 200
    told = health.json()["replicas"]
    assert sum(one["deaths"] for one in told) == before + 1
    wait_until(lambda: httpx.get(f"{url}/health").json()["status"] == "ok")
    page = httpx.get(f"{url}/metrics").text
    assert 'jaxserve:replica_state{engine="0",model_name="tiny",state="serving"} 1.0' in page
    deaths = [x for x in page.splitlines() if x.startswith("jaxserve:replica_deaths_total")]
    assert sum(float(x.rpartition(" ")[2]) for x in deaths) == before + 1
    # Whoever runs the server is told why.
    info = httpx.get(f"{url}/server_info").json()["replicas"]
    assert any("cut for a test" in (one["failure"] or "") for one in info)


def test_leaving_a_stream_frees_the_replica_that_served_it(url, fleet):
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
    wait_until(lambda: fleet.num_unfinished == 0)
    assert [one.num_open for one in fleet.replicas] == [0, 0]


def test_chat_tokenize_and_models_work_as_with_one_engine(ask):
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "n": 2, "seed": 1}
    answer = ask("/v1/chat/completions", chat).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert ask("/tokenize", {"prompt": "ab"}).json()["count"] == 2
    assert ask("/v1/models").json()["data"][0]["id"] == "tiny"
    assert ask("/pages/live").json()["status"] == "ready"
    structured = {**BODY, "structured_outputs": {"choice": ["yes", "no"]}}
    del structured["ignore_eos"]
    assert ask("/v1/completions", structured).json()["choices"][0]["text"] in ("yes", "no")
    bad = ask("/v1/completions", {**BODY, "structured_outputs": {"regex": "("}})
    assert bad.status_code == 400
    embedded = ask("/v1/embeddings", {"input": ["a", "b"]}).json()["data"]
    assert len(embedded) == 2


def test_admin_routes_act_on_all_replicas(ask, fleet, tiny_folder):
    def call(path, body=None):
        response = ask(path, {} if body is None else body, settings=ADMIN)
        assert response.status_code == 200, response.text
        return response.json()

    call("/sleep")
    engines = [s.replica.host.engine for s in fleet.host.fleet.roster.living]
    assert not any(engine.runner.has_params for engine in engines)
    refused = ask("/v1/completions", BODY)
    assert refused.status_code == 503
    call("/wake_up")
    assert all(engine.runner.has_params for engine in engines)
    answers = {ask("/v1/completions", BODY).json()["choices"][0]["text"] for _ in range(4)}
    assert len(answers) == 1
    update = {"model_path": str(tiny_folder), "weight_version": "v2"}
    assert call("/update_weights", update)["weight_version"] == "v2"
    assert {engine.weight_version for engine in engines} == {"v2"}
    assert call("/reset_prefix_cache")["success"]
    assert answers == {ask("/v1/completions", BODY).json()["choices"][0]["text"]}


def test_adapters_are_served_by_every_replica(ask, fleet, tiny_folder, tmp_path):
    config = ModelConfig.from_hf(json.loads((tiny_folder / "config.json").read_text()))
    folder = write_adapter(tmp_path / "sql", *adapter_of(config, seed=3, lora_alpha=8))
    load = {"lora_name": "sql", "lora_path": str(folder)}
    assert ask("/v1/load_lora_adapter", load, settings=ADMIN).status_code == 200
    plain = ask("/v1/completions", BODY).json()["choices"][0]["text"]
    adapted = {
        ask("/v1/completions", {**BODY, "model": "sql"}).json()["choices"][0]["text"]
        for _ in range(4)
    }
    assert len(adapted) == 1
    assert adapted != {plain}
    unload = {"lora_name": "sql"}
    assert ask("/v1/unload_lora_adapter", unload, settings=ADMIN).status_code == 200
    assert ask("/v1/completions", {**BODY, "model": "sql"}).status_code == 404


@pytest.mark.parametrize("is_stream", [False, True])
def test_declined_requests_get_503_with_their_reason(start, cost_model, is_stream):
    llm = start(
        2, routing_policy="polyserve", polyserve_config={"tiers": [0.05, 0.5]},
        engine={"cost_model": cost_model},
    )  # fmt: skip
    app = create_app(ServerState(ServerConfig(), model="tiny", engine=llm))
    for index in (0, 1):
        hold(llm, index)
    slo = {"ttft_ms": 100, "tpot_ms": 50, "tier": "tight", "on_decline": "reject"}
    body = {**BODY, "slo": slo, "stream": is_stream}

    async def burst():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(
                *(client.post("/v1/completions", json=body) for _ in range(16))
            )

    answers = asyncio.run(burst())
    refused = [one for one in answers if one.status_code == 503]
    assert refused
    assert {one.status_code for one in answers} == {200, 503}
    for one in refused:
        error = one.json()["error"]
        assert (error["param"], error["type"]) == ("slo.ttft_ms", "ServiceUnavailableError")
        assert error["reason"] in ("compute", "memory", "expired")
        assert int(one.headers["retry-after"]) >= 1
    impossible = asking(llm)("/v1/completions", {**BODY, "slo": {"ttft_ms": 1}})
    assert impossible.status_code == 400
    assert impossible.json()["error"]["param"] == "slo.ttft_ms"


def test_a_fleet_without_replicas_is_unhealthy(start):
    llm = start(2, max_replica_restarts=0)
    app = asking(llm)
    for index in (0, 1):
        kill(llm, index)
    wait_until(lambda: not llm.host.fleet.roster.is_hopeful)
    health = app("/health")
    assert health.status_code == 503
    assert health.json()["status"] == "unavailable"
    assert app("/v1/completions", BODY).status_code == 500


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--replicas", "0"], "replicas must be at least 1"),
        (["--replicas", "two"], "--replicas must be a whole number"),
        (["--replicas", "2", "--router", "chosen"], "--routing-policy must be one of round_robin"),
        (["--replicas", "2", "--decision-log", "x"], "use fleet_log"),
        (["--cluster", "ray", "--enable-lora"], "enable_lora needs cluster local"),
        (["--fleet-log", "x"], "fleet_log needs a fleet"),
        (["--min-replicas", "2"], "min_replicas must be between 1 and replicas=1"),
    ],
)
def test_wrong_flags_get_one_line(words, match, capsys):
    with pytest.raises(SystemExit) as caught:
        flags.parse(words, {})
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


def test_flags_name_a_fleet_as_others_do():
    found = flags.parse(["--replicas", "3", "--router", "prefix_aware"], {}).server.cluster
    assert (found.replicas, found.routing_policy, found.is_fleet) == (3, "prefix_aware", True)
    assert not flags.parse([], {}).server.cluster.is_fleet


def test_many_clients_while_a_replica_dies(url, fleet):
    """Everybody gets a whole answer, and the same one."""
    expected = read(url, LONG)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(read(url, LONG))) for _ in range(8)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    wait_until(lambda: fleet.num_unfinished >= 4)
    kill(fleet, 0)
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
