"""Replicas in Ray actors; needs Ray, which only its own environment has."""

import asyncio
import os
import signal

import pytest

from jaxserve.cluster.options import ClusterOptions
from jaxserve.cluster.remote import import_ray
from jaxserve.cluster.start import open_fleet
from jaxserve.core.errors import ConfigError, MissingExtraError, RequestError, UnsupportedError
from jaxserve.core.event import FinishReason
from jaxserve.core.request import SamplingParams, Slo
from tests.cluster.conftest import LONG, PROMPT, SMALL, collect, run, tokens_of, wait_until

try:
    import ray
except ImportError:
    ray = None

needs_ray = pytest.mark.skipif(ray is None, reason="needs ray: pip install 'jaxserve[ray]'")
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def fleet(tiny_folder):
    options = ClusterOptions(
        replicas=2, cluster="ray", routing_policy="round_robin",
        ray_actor_options={"num_cpus": 0.1},
    )  # fmt: skip
    made = open_fleet(tiny_folder, options, **SMALL)
    yield made
    made.close()


@pytest.mark.skipif(ray is not None, reason="ray is installed")
def test_without_ray_the_message_says_what_to_install(tiny_folder):
    with pytest.raises(MissingExtraError, match=r"pip install 'jaxserve\[ray\]'"):
        import_ray()
    with pytest.raises(MissingExtraError, match="--cluster local"):
        open_fleet(tiny_folder, ClusterOptions(replicas=2, cluster="ray"), **SMALL)


@needs_ray
def test_actors_complete_what_one_engine_does(fleet, tiny_folder):
    alone = open_fleet(tiny_folder, ClusterOptions(replicas=1), **SMALL)
    expected = [tokens_of(run(collect(alone, PROMPT, s))) for s in (GREEDY, LONG)]
    alone.close()

    async def go():
        return await asyncio.gather(
            *(collect(fleet, PROMPT, s) for s in (GREEDY, LONG, GREEDY, LONG))
        )

    found = run(go())
    assert [tokens_of(events) for events in found] == expected * 2
    assert fleet.host.fleet.metrics.routed == {0: 2, 1: 2}
    times = found[0][-1].metrics
    assert 0 <= times.first_token_time - times.arrival_time < 60, "in this process's time"
    wait_until(lambda: fleet.metrics.generation_tokens == 160)
    assert 'engine="1"' in fleet.metrics.render("tiny")


def pid_of(fleet, index):
    actor = fleet.host.fleet.roster.slots[index].replica._actor
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


@needs_ray
@pytest.mark.parametrize("sampling", [GREEDY.replace(max_tokens=200), LONG.replace(max_tokens=200)])
def test_a_stream_goes_on_when_the_process_of_its_actor_is_killed(fleet, sampling):
    whole = tokens_of(run(collect(fleet, PROMPT, sampling)))

    async def go():
        events = []
        async for event in fleet.events(fleet.make_request(PROMPT, sampling)):
            events.append(event)
            if len(events) == 3:
                index = next(one.index for one in fleet.replicas if one.num_open)
                os.kill(pid_of(fleet, index), signal.SIGKILL)
        return events

    deaths = sum(one.deaths for one in fleet.replicas)
    events = run(go())
    assert tokens_of(events) == whole
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert sum(one.deaths for one in fleet.replicas) == deaths + 1
    assert any("actor has died" in (one.failure or "") for one in fleet.replicas)
    wait_until(lambda: all(one.state == "serving" for one in fleet.replicas), 120)
    assert tokens_of(run(collect(fleet, PROMPT, GREEDY)))


@needs_ray
def test_levers_reach_every_actor(fleet, tiny_folder):
    async def go():
        await fleet.pause_generation("keep")
        assert fleet.is_paused()
        await fleet.resume_generation()
        await fleet.sleep(1)
        assert fleet.is_sleeping()
        assert await fleet.wake_up()
        done = await fleet.update_weights_from_disk(tiny_folder, version="seven")
        assert done.version == "seven"
        assert await fleet.reset_prefix_cache()

    run(go())
    found = [run(collect(fleet, PROMPT, GREEDY)) for _ in range(2)]
    assert {e.weight_version for events in found for e in events if e.token_ids} == {"seven"}
    with pytest.raises(UnsupportedError, match="write the weights to a folder"):
        run(fleet.update_params({}))
    with pytest.raises(RequestError, match="level must be 0, 1 or 2"):
        run(fleet.sleep(9))


@needs_ray
def test_whoever_leaves_frees_the_actor(fleet):
    async def go():
        stream = fleet.events(fleet.make_request(PROMPT, LONG.replace(max_tokens=200)))
        await anext(stream)
        await stream.aclose()

    run(go())
    wait_until(lambda: fleet.num_unfinished == 0)
    assert [one.num_open for one in fleet.replicas] == [0, 0]


@needs_ray
def test_polyserve_drives_actors_as_well(tiny_folder, cost_model):
    options = ClusterOptions(
        replicas=2, cluster="ray", routing_policy="polyserve",
        polyserve_config={"tiers": [0.05, 0.5]}, ray_actor_options={"num_cpus": 0.1},
    )  # fmt: skip
    llm = open_fleet(tiny_folder, options, **SMALL, cost_model=cost_model)
    try:

        async def go():
            slos = [Slo(ttft_ms=5000, tpot_ms=tpot, tier=f"t{tpot}") for tpot in (50, 500, 50)]
            return await asyncio.gather(*(collect(llm, PROMPT, GREEDY, slo=slo) for slo in slos))

        assert all(len(tokens_of(events)) == 20 for events in run(go()))
        assert sorted(one.tier for one in llm.replicas) == [0.05, 0.5]
    finally:
        llm.close()


@needs_ray
def test_what_actors_cannot_be_given_is_refused(tiny_folder):
    for source, options, settings, match in (
        (({}, {}), {}, {}, "need a name or a path"),
        (tiny_folder, {}, {"enable_lora": True}, "replicas of this process only"),
        (tiny_folder, {"ray_actor_options": {"cpus": 1}}, {}, "ray_actor_options cannot be used"),
    ):
        with pytest.raises((ConfigError, UnsupportedError), match=match):
            open_fleet(
                source, ClusterOptions(replicas=2, cluster="ray", **options), **SMALL | settings
            )
