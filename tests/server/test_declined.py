"""Requests that the token planner declines, over HTTP."""

import asyncio

import httpx
import pytest

from jaxserve.core.cost import LinearCost, Plane
from jaxserve.core.cost_file import CostFile, write_cost
from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.serve.app import create_app
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.state import ServerState
from tests.server.conftest import _running, asking, wait_until

PROMPT = [*range(40, 71)]
BODY = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
TIGHT = {"ttft_ms": 700, "tpot_ms": 1000, "tier": "tight", "on_decline": "reject"}


@pytest.fixture(scope="module")
def planned(tiny_folder, tmp_path_factory):
    """An engine that believes that a token of a prompt takes it ten milliseconds."""
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    write_cost(path, CostFile(cost=LinearCost(Plane(token=0.01, base=0.001))))
    made = AsyncLLM(
        tiny_folder,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=32 << 20,
        warmup="lazy",
        scheduling_policy="slo",
        cost_model=str(path),
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def request_of(planned):
    return asking(planned)


@pytest.fixture(scope="module")
def burst(planned):
    """Ask many times at once."""
    app = create_app(ServerState(ServerConfig(), model="tiny", engine=planned))

    def send(path, body, count=8):
        async def run():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                asks = [client.post(path, json=body) for _ in range(count)]
                return await asyncio.gather(*asks)

        return asyncio.run(run())

    return send


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_declined_request_gets_503_with_its_reason(burst, planned, path, is_stream):
    body = {**BODY, "slo": TIGHT, "stream": is_stream}
    if path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": "x" * 16}]
        del body["prompt"]
    answers = burst(path, body)
    wait_until(lambda: planned.num_unfinished == 0)
    refused = [one for one in answers if one.status_code == 503]
    served = [one for one in answers if one.status_code == 200]
    assert len(refused) + len(served) == 8
    assert served
    assert refused
    for one in refused:
        error = one.json()["error"]
        assert error["type"] == "ServiceUnavailableError"
        assert error["param"] in ("slo.ttft_ms", "slo.tpot_ms")  # as fast as the machine is
        assert error["reason"] in ("compute", "memory", "expired")  # there are four rows
        assert "an idle server needs" in error["message"]
        assert int(one.headers["retry-after"]) >= 1
    for one in served:
        assert ("data: [DONE]" in one.text) == is_stream


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_impossible_is_a_bad_request(request_of, is_stream):
    body = {**BODY, "slo": {"ttft_ms": 5}, "stream": is_stream, "prompt": [*range(5, 55)]}
    answer = request_of("/v1/completions", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "slo.ttft_ms"
    assert "an idle server needs" in error["message"]
    assert "retry-after" not in answer.headers


def test_one_of_several_prompts_that_is_impossible_refuses_all(request_of, planned):
    prompts = [[7, 8, 9], [*range(10, 90)], [3]]
    body = {**BODY, "prompt": prompts, "slo": {"ttft_ms": 60}, "stream": True}
    answer = request_of("/v1/completions", body)
    assert answer.status_code == 400
    wait_until(lambda: planned.num_unfinished == 0)


def test_best_effort_is_served_and_says_that_it_was_late_or_not(burst):
    body = {**BODY, "slo": {**TIGHT, "on_decline": "best_effort", "tier": "soft"}}
    answers = burst("/v1/completions", body)
    assert {one.status_code for one in answers} == {200}
    assert all("attained" in one.json()["metrics"]["slo"] for one in answers)


def test_metrics_tell_about_declined_requests_and_plans(burst, request_of):
    burst("/v1/completions", {**BODY, "slo": TIGHT})
    page = request_of("/metrics").text
    lines = [line for line in page.splitlines() if line.startswith("jaxserve:")]
    declined = [line for line in lines if line.startswith("jaxserve:slo_declined_total")]
    assert any('tier="tight"' in line and 'outcome="refused"' in line for line in declined)
    assert any(line.startswith("jaxserve:policy_time_seconds_count") for line in lines)
    for name in ("policy_fallbacks_total", "cost_model_drift_ratio", "cost_model_drift_alarm"):
        assert any(line.startswith(f"jaxserve:{name}") for line in lines)


def test_a_client_that_leaves_before_its_stream_begins_frees_its_place(planned):
    with _running(planned, {}) as url:
        slow = {**BODY, "max_tokens": 200, "slo": {"ttft_ms": 1e5}, "stream": True}
        with (
            httpx.Client(base_url=url, timeout=0.001) as client,
            pytest.raises(httpx.TimeoutException),
        ):
            client.post("/v1/completions", json=slow)
        wait_until(lambda: planned.num_unfinished == 0)
