"""Several engines behind one face: routing, death, continuation, levers, health."""

import asyncio
import dataclasses
import json

import jax
import pytest

from jaxserve import LoRARequest
from jaxserve.core.errors import CapacityError, ConfigError, EngineDeadError, RequestError
from jaxserve.core.event import FinishReason
from jaxserve.core.request import SamplingParams
from jaxserve.engine.llm import LLM
from jaxserve.models.config import ModelConfig
from tests.adapters import adapter_of, write_adapter
from tests.cluster.conftest import (
    LONG,
    PROMPT,
    SMALL,
    collect,
    kill,
    run,
    tokens_of,
    wait_until,
)
from tests.tiny import pointers

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(tiny_folder):
    """What a single engine completes, as the oracle."""
    llm = LLM(tiny_folder, **SMALL)
    yield lambda prompt, sampling: llm.generate(prompt, sampling, use_tqdm=False)[0]
    llm.close()


def engines(llm):
    return [slot.replica.host.engine for slot in llm.host.fleet.roster.living]


def hold(llm, index):
    """Slow a replica's steps down, so that there is time to do something meanwhile."""
    import time

    engine = llm.host.fleet.roster.slots[index].replica.host.engine
    step = engine.step

    def slow():
        time.sleep(0.01)
        step()

    engine.step = slow


def test_replicas_share_weights_and_programs(start):
    llm = start(3)
    first, *others = engines(llm)
    for other in others:
        assert pointers(other.runner.params) == pointers(first.runner.params)
        assert other.runner.slots is not first.runner.slots or not first.runner.slots
    run(collect(llm, PROMPT, GREEDY))
    compiled = first.metrics.num_compilations
    assert compiled


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "prefix_aware"])
def test_a_fleet_completes_what_one_engine_does(start, alone, policy):
    llm = start(2, routing_policy=policy)
    prompts = [PROMPT, [5], [*range(3, 60)], [9] * 40]

    async def go():
        return await asyncio.gather(*(collect(llm, p, LONG) for p in prompts))

    for prompt, events in zip(prompts, run(go()), strict=True):
        assert tokens_of(events) == alone(prompt, LONG).outputs[0].token_ids
    routed = llm.host.fleet.metrics.routed
    assert sum(routed.values()) == 4
    if policy == "round_robin":
        assert routed == {0: 2, 1: 2}
    assert llm.num_unfinished == 0


def test_prefixes_are_followed_while_loads_are_alike(start):
    llm = start(2, routing_policy="prefix_aware")
    run(collect(llm, [*range(100, 180)], GREEDY))
    first = llm.host.fleet.metrics.routed.copy()
    (home,) = first
    for _ in range(3):
        events = run(collect(llm, [*range(100, 180)], GREEDY))
        assert events[-1].num_cached_tokens >= 64
    assert llm.host.fleet.metrics.routed == {home: 4}
    run(collect(llm, [*range(10, 90)], GREEDY))


@pytest.mark.parametrize("sampling", [GREEDY, LONG, LONG.replace(seed=None, logprobs=2)])
def test_a_stream_goes_on_when_its_replica_dies(start, alone, sampling, caplog):
    llm = start(2, routing_policy="round_robin")
    hold(llm, 0)
    request = llm.make_request(PROMPT, sampling)

    async def go():
        events = []
        async for event in llm.events(request):
            events.append(event)
            if len(tokens_of(events)) == 7:
                kill(llm, 0)
        return events

    events = run(go())
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert {event.request_id for event in events} == {request.request_id}
    got = tokens_of(events)
    assert len(got) == sampling.max_tokens
    if sampling.seed is None and not sampling.is_greedy:
        # The fleet has chosen a seed; what was drawn before the cut fixes the rest.
        seen = llm.host.fleet
        assert seen.metrics.moved == {0: 1}
        assert all(event.logprobs for event in events if event.token_ids)
    else:
        whole = alone(PROMPT, sampling).outputs[0]
        assert got == whole.token_ids
        assert "".join(event.text for event in events) == whole.text
    status = llm.replicas[0]
    assert (status.deaths, "cut for a test" in status.failure) == (1, True)
    page = llm.metrics.render("tiny")
    assert 'jaxserve:replica_deaths_total{engine="0",model_name="tiny"} 1.0' in page
    assert 'jaxserve:completions_moved_total{engine="0",model_name="tiny"} 1.0' in page
    wait_until(lambda: llm.replicas[0].state == "serving")
    assert 'jaxserve:replica_restarts_total{engine="0",model_name="tiny"} 1.0' in (
        llm.metrics.render("tiny")
    )
    # Who has come back serves again, with the same weights.
    a, b = engines(llm)
    assert pointers(a.runner.params) == pointers(b.runner.params)
    again = [tokens_of(run(collect(llm, PROMPT, GREEDY))) for _ in range(2)]
    assert again[0] == again[1] == alone(PROMPT, GREEDY).outputs[0].token_ids


def test_a_free_seed_is_kept_across_a_death(start):
    """The rest of an unseeded completion is what its replica would have drawn."""
    llm = start(2, routing_policy="round_robin")
    hold(llm, 0)
    free = LONG.replace(seed=None)
    seeds = []
    engine = llm.host.fleet.roster.slots[0].replica.host.engine
    submit = engine.submit
    engine.submit = lambda request, sink: (seeds.append(request.sampling.seed),
                                           submit(request, sink))[1]  # fmt: skip

    async def go():
        events = []
        async for event in llm.events(llm.make_request(PROMPT, free)):
            events.append(event)
            if len(tokens_of(events)) == 5:
                kill(llm, 0)
        return tokens_of(events)

    got = run(go())
    assert seeds[0] is not None
    assert got == tokens_of(run(collect(llm, PROMPT, free.replace(seed=seeds[0]))))


def test_every_completion_of_a_request_goes_on(start, alone):
    llm = start(2, routing_policy="round_robin")
    hold(llm, 0)
    many = LONG.replace(n=3, max_tokens=30)
    whole = alone(PROMPT, many)

    async def go():
        found = {0: [], 1: [], 2: []}
        async for event in llm.events(llm.make_request(PROMPT, many)):
            found[event.index] += event.token_ids
            if sum(map(len, found.values())) == 12:
                kill(llm, 0)
        return found

    assert run(go()) == {o.index: list(o.token_ids) for o in whole.outputs}
    assert llm.host.fleet.metrics.moved == {0: 3}


def test_who_comes_back_has_the_pinned_adapters(start, tiny_folder, tmp_path):
    llm = start(2, routing_policy="round_robin", engine={"enable_lora": True, "max_loras": 2})
    config = ModelConfig.from_hf(json.loads((tiny_folder / "config.json").read_text()))
    folder = write_adapter(tmp_path / "sql", *adapter_of(config, seed=3, lora_alpha=8))
    request = LoRARequest("sql", 1, str(folder))

    async def go():
        assert await llm.add_lora(request)
        assert await llm.pin_lora(1)

    run(go())
    held = engines(llm)[0].adapters.held
    assert held
    kill(llm, 0)
    wait_until(lambda: llm.replicas[0].deaths == 1)
    wait_until(lambda: llm.replicas[0].state == "serving")
    assert [engine.adapters.held for engine in engines(llm)] == [held, held]


def test_nothing_is_lost_when_a_replica_dies_under_load(start, alone):
    llm = start(2, routing_policy="round_robin")
    hold(llm, 1)
    prompts = [[*range(20 + i, 50 + i)] for i in range(12)]

    async def go():
        asks = [asyncio.ensure_future(collect(llm, p, LONG)) for p in prompts]
        await asyncio.sleep(0.2)
        kill(llm, 1)
        return await asyncio.gather(*asks)

    for prompt, events in zip(prompts, run(go()), strict=True):
        assert events[-1].finish_reason is FinishReason.LENGTH
        assert tokens_of(events) == alone(prompt, LONG).outputs[0].token_ids
    assert llm.host.fleet.metrics.moved[1] >= 1


def test_a_slow_death_aborts_nobody(start, alone):
    """A replica is taken out while its loop still waits for the device."""
    import time

    llm = start(2, routing_policy="round_robin")
    hold(llm, 0)
    engine = llm.host.fleet.roster.slots[0].replica.host.engine
    take = engine._take

    def slow_take():
        if engine.dead is not None:
            time.sleep(0.6)
        take()

    engine._take = slow_take

    async def go():
        events = []
        async for event in llm.events(llm.make_request(PROMPT, LONG)):
            events.append(event)
            if len(events) == 4:
                kill(llm, 0)
        return events

    assert tokens_of(run(go())) == alone(PROMPT, LONG).outputs[0].token_ids


def test_a_request_that_kills_whoever_serves_it_is_given_up(start):
    llm = start(3, max_request_moves=1, max_replica_restarts=0)
    for index in range(3):
        hold(llm, index)

    async def go():
        events = []
        async for event in llm.events(llm.make_request(PROMPT, LONG)):
            events.append(event)
            if event.finish_reason is None and len(events) in (3, 8):
                kill(llm, max(llm.replicas, key=lambda one: one.num_open).index)
        return events

    events = run(go())
    assert events[-1].finish_reason is FinishReason.ERROR
    assert "its loop has ended" in events[-1].error
    wait_until(lambda: [one.state for one in llm.replicas].count("removed") == 2)
    assert len(tokens_of(run(collect(llm, PROMPT, GREEDY)))) == 20


def test_when_nobody_is_left_requests_are_told(start):
    llm = start(2, max_replica_restarts=0)
    hold(llm, 0)
    hold(llm, 1)

    async def go():
        asks = [asyncio.ensure_future(collect(llm, PROMPT, LONG)) for _ in range(4)]
        await asyncio.sleep(0.1)
        kill(llm, 0)
        kill(llm, 1)
        return await asyncio.gather(*asks)

    for events in run(go()):
        assert events[-1].finish_reason is FinishReason.ERROR
    wait_until(lambda: [one.state for one in llm.replicas] == ["removed", "removed"])
    with pytest.raises(EngineDeadError, match="no replica is left"):
        run(collect(llm, PROMPT, GREEDY))
    with pytest.raises(EngineDeadError, match="no replica is left"):
        llm.check_health()


def test_whoever_leaves_frees_the_right_replica(start):
    llm = start(2, routing_policy="round_robin")
    endless = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)

    async def go():
        requests = [llm.make_request(PROMPT, endless) for _ in range(2)]
        streams = [llm.events(request) for request in requests]
        for stream in streams:
            await anext(stream)
        await llm.abort(requests[1].request_id)
        last = [event async for event in streams[1]][-1]
        await streams[0].aclose()
        return last

    assert run(go()).finish_reason is FinishReason.ABORT
    wait_until(lambda: llm.num_unfinished == 0)
    for engine in engines(llm):
        assert engine.metrics.finished_by_reason["abort"] == 1
        assert engine.pool.num_free == engine.pool.num_pages
    assert [one.num_open for one in llm.replicas] == [0, 0]


def test_levers_are_pulled_everywhere(start):
    llm = start(2, routing_policy="round_robin")
    before = [tokens_of(run(collect(llm, PROMPT, GREEDY))) for _ in range(2)]
    params = engines(llm)[0].runner.params
    other = jax.tree.map(lambda x: x * 1.5, params)

    async def update():
        await llm.update_params(other, version="new")

    run(update())
    after = [run(collect(llm, PROMPT, GREEDY)) for _ in range(2)]
    assert tokens_of(after[0]) == tokens_of(after[1]) != before[0]
    assert {e.weight_version for events in after for e in events if e.token_ids} == {"new"}
    assert llm.get_weight_version() == "new"
    assert pointers(engines(llm)[0].runner.params) == pointers(engines(llm)[1].runner.params)
    # Whoever dies comes back with the new weights.
    kill(llm, 0)
    wait_until(lambda: llm.replicas[0].deaths == 1 and llm.replicas[0].state == "serving")
    again = [run(collect(llm, PROMPT, GREEDY)) for _ in range(2)]
    assert tokens_of(again[0]) == tokens_of(again[1]) == tokens_of(after[0])
    assert {e.weight_version for events in again for e in events if e.token_ids} == {"new"}

    async def sleep():
        await llm.sleep(1)
        assert llm.is_sleeping()
        with pytest.raises(CapacityError, match="paused"):
            llm.submit(llm.make_request(PROMPT, GREEDY))
        assert not any(engine.runner.has_params for engine in engines(llm))
        assert await llm.wake_up()
        await llm.reset_prefix_cache()
        await llm.pause_generation("keep")
        assert llm.is_paused()
        await llm.resume_generation()

    run(sleep())
    assert tokens_of(run(collect(llm, PROMPT, GREEDY))) == tokens_of(after[0])
    with pytest.raises(RequestError, match="mode must be abort, wait or keep"):
        run(llm.pause_generation("never"))


def test_bad_requests_are_refused_at_the_door(start):
    llm = start(2)
    with pytest.raises(RequestError, match="maximum context length is 256"):
        run(collect(llm, [1] * 300, GREEDY))
    with pytest.raises(RequestError, match=r"must be in \[0, 259\)"):
        run(collect(llm, [999], GREEDY))
    assert llm.num_unfinished == 0

    async def twice():
        request = llm.make_request(PROMPT, LONG)
        queue = llm.submit(request)
        with pytest.raises(RequestError, match="already in use"):
            llm.submit(request)
        async for _ in llm.follow(request, queue):
            pass

    run(twice())


def test_a_full_fleet_says_so(start):
    llm = start(2, engine={"max_num_queued_reqs": 1})
    hold(llm, 0)
    hold(llm, 1)

    async def go():
        requests = [llm.make_request(PROMPT, LONG) for _ in range(3)]
        queues = [llm.submit(request) for request in requests[:2]]
        with pytest.raises(CapacityError, match="at most 1 are accepted"):
            llm.submit(requests[2])
        for request, queue in zip(requests, queues, strict=False):
            async for _ in llm.follow(request, queue):
                pass

    run(go())
    assert llm.num_unfinished == 0


def test_embeddings_come_from_any_replica(start):
    llm = start(2, routing_policy="round_robin")

    async def embed():
        return await llm.embed(["a text", "another one", "a text"])

    first, other, twin = run(embed())
    assert list(first.outputs.embedding) == pytest.approx(list(twin.outputs.embedding), abs=1e-5)
    assert list(first.outputs.embedding) != list(other.outputs.embedding)


def test_settings_that_contradict_each_other_are_refused(start, tmp_path):
    for options, match in (
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"routing_policy": "cheapest"}, "routing_policy must be one of round_robin"),
        ({"cluster": "rays"}, "Did you mean 'ray'"),
        ({"min_replicas": 3}, "min_replicas must be between 1 and replicas=2, got 3"),
        ({"min_replicas": 1}, "needs routing_policy polyserve"),
        ({"polyserve_config": {}}, "polyserve_config needs routing_policy polyserve"),
        ({"ray_address": "auto"}, "ray_address needs cluster ray"),
        ({"max_request_moves": -1}, "max_request_moves must be at least 0"),
        ({"engine": {"decision_log": str(tmp_path / "x")}}, "would be written by every replica"),
        ({"replicas": 1, "fleet_log": "x"}, "needs a fleet"),
    ):
        with pytest.raises(ConfigError, match=match):
            start(**options)


def test_health_and_metrics_tell_of_each(start):
    llm = start(2)
    run(collect(llm, PROMPT, GREEDY))
    page = llm.metrics.render("tiny", aliases=("vllm",))
    lines = page.splitlines()
    heads = [line for line in lines if line.startswith("# TYPE ")]
    assert len(heads) == len(set(heads))
    samples = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(samples) == len(set(samples))
    for index in "01":
        assert f'jaxserve:num_requests_running{{engine="{index}",model_name="tiny"}} 0.0' in lines
    assert llm.metrics.generation_tokens == 20
    told = json.dumps([dataclasses.asdict(one) for one in llm.replicas])
    assert '"state": "serving"' in told
