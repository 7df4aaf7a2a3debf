"""The tier router and the scaler over real engines: the very policies of the simulator."""

import asyncio
import time

import pytest

from jaxserve.cli import main as cli
from jaxserve.core.cost import LinearCost, Plane, StepLoad
from jaxserve.core.cost_buckets import BucketCost
from jaxserve.core.errors import ConfigError, DeclinedError, RequestError
from jaxserve.core.event import FinishReason, failure_of
from jaxserve.core.request import SamplingParams, Slo
from jaxserve.scheduling.fleet_log import FleetLogReader
from jaxserve.scheduling.polyserve import TierRouter, TierScaler
from jaxserve.scheduling.step_times import step_seconds, step_times
from jaxserve.sim.replay import replay
from tests.cluster.conftest import PROMPT, collect, kill, run, tokens_of, wait_until

SHORT = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
TIERS = [0.05, 0.5]


@pytest.fixture
def tiers(start, cost_model):
    """Start a fleet with a tier of 50 and one of 500 ms per token."""

    def begin(replicas=2, *, polyserve=None, **options):
        config = {"tiers": TIERS, **(polyserve or {})}
        return start(
            replicas, routing_policy="polyserve", polyserve_config=config,
            engine={"cost_model": cost_model}, **options,
        )  # fmt: skip

    return begin


def slo(tpot_ms, ttft_ms=5000, **fields):
    return Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms, tier=f"t{tpot_ms:g}", **fields)


def slow_down(llm, seconds):
    for one in llm.host.fleet.roster.living:
        engine = one.replica.host.engine
        step = engine.step
        engine.step = lambda step=step: (time.sleep(seconds), step())


def test_tiers_get_replicas_of_their_own(tiers, tmp_path, capsys):
    log = tmp_path / "fleet.log"
    llm = tiers(fleet_log=str(log))
    assert {one.state for one in llm.replicas} == {"pooled"}

    async def go():
        asks = [collect(llm, PROMPT, SHORT, slo=slo(tpot)) for tpot in (50, 500, 60, 1000, 50, 500)]
        return await asyncio.gather(*asks, collect(llm, [7, 8], SHORT))

    events = run(go())
    assert all(e[-1].finish_reason is FinishReason.LENGTH for e in events)
    assert len({tuple(tokens_of(e)) for e in events[:6]}) == 1
    assert sorted(one.tier for one in llm.replicas) == TIERS
    page = llm.metrics.render("tiny")
    for tier in ("t50", "t500", "t60", "t1000"):
        lines = [x for x in page.splitlines() if x.startswith("jaxserve:slo_attained_total")]
        assert any(f'tier="{tier}",objective="request"' in line for line in lines), tier
    seen = {x.partition("}")[0] for x in page.splitlines() if 'objective="request"' in x}
    assert len({x.partition('engine="')[2][0] for x in seen}) == 2, "by replica as well"
    llm.close()
    # What was decided is decided again, offline, by the same policies.
    found = replay(log)
    assert (found.differences, found.policy) == (0, "polyserve")
    assert found.plans >= 7
    assert found.observations >= 7
    assert cli.main(["sim", "replay", str(log)]) == 0
    assert "polyserve: " in capsys.readouterr().out
    heads = FleetLogReader(log).head
    assert heads.settings.polyserve.tiers == tuple(TIERS)


def test_the_policies_are_the_simulators(tiers):
    llm = tiers()
    parts = llm.host.fleet._parts
    assert type(parts.router) is TierRouter
    assert type(parts.scaler) is TierScaler
    assert parts.scaler._router is parts.router


def test_what_no_idle_replica_could_do_is_a_bad_request(tiers):
    llm = tiers()
    with pytest.raises(RequestError, match=r"10 ms per token .* tightest tier .* 50 ms") as caught:
        run(collect(llm, PROMPT, SHORT, slo=slo(10)))
    assert caught.value.param == "slo.tpot_ms"
    with pytest.raises(RequestError, match="even an idle replica needs") as caught:
        run(collect(llm, PROMPT, SHORT, slo=slo(50, ttft_ms=5)))
    assert caught.value.param == "slo.ttft_ms"
    assert llm.num_unfinished == 0
    assert llm.metrics.slo_declined["t10", "idle_server", "refused"] == 1


@pytest.mark.parametrize("on_decline", ["reject", "best_effort"])
def test_what_finds_no_room_is_declined_or_served_late(tiers, on_decline):
    llm = tiers()
    slow_down(llm, 0.02)
    wanted = slo(50, ttft_ms=100, on_decline=on_decline)

    async def go():
        # A prompt takes 33 ms by the model, so that three wait for a replica at most.
        return await asyncio.gather(
            *(collect(llm, PROMPT, SHORT, slo=wanted) for _ in range(16))
        )  # fmt: skip

    ends = [events[-1] for events in run(go())]
    declined = [end for end in ends if end.rejection is not None]
    if on_decline == "best_effort":
        assert not declined
        assert {end.finish_reason for end in ends} == {FinishReason.LENGTH}
        assert sum(llm.metrics.slo_declined.values()) >= 1
        assert {key[2] for key in llm.metrics.slo_declined} == {"best_effort"}
        return
    assert declined
    assert len(declined) < 16
    error = failure_of(declined[0])
    assert isinstance(error, DeclinedError)
    assert error.reason in ("compute", "memory", "expired")
    assert error.objective == "ttft_ms"
    assert "slo.ttft_ms=100 was asked for" in str(error)
    counts = llm.metrics.slo_declined
    assert counts["t50", error.reason, "refused"] == len(declined)
    assert llm.metrics.slo_missed["t50", "request"] >= len(declined)
    assert llm.num_unfinished == 0


def test_a_tier_without_replicas_takes_one_over(tiers):
    """Fewer replicas than tiers: the tight one is served although a looser one came first."""
    llm = tiers(max_replica_restarts=0)
    kill(llm, 1)
    wait_until(lambda: llm.replicas[1].deaths == 1)
    run(collect(llm, PROMPT, SHORT, slo=slo(500)))
    assert llm.replicas[0].tier == 0.5

    async def both():
        long = SHORT.replace(max_tokens=100)
        loose = asyncio.ensure_future(collect(llm, PROMPT, long, slo=slo(500)))
        await asyncio.sleep(0.05)
        tight = await collect(llm, PROMPT, SHORT, slo=slo(50))
        return tight, await loose

    tight, loose = run(both())
    assert tight[-1].finish_reason is FinishReason.LENGTH
    assert loose[-1].finish_reason is FinishReason.LENGTH


def test_the_scaler_starts_and_turns_off_replicas(tiers):
    quick = {"check_s": 0.05, "hold_checks": 2, "cooldown_s": 0.1, "start_s": 0.1}
    llm = tiers(3, min_replicas=1, polyserve=quick)
    states = lambda: sorted(one.state for one in llm.replicas)  # noqa: E731
    assert states().count("off") == 2
    slow_down(llm, 0.01)

    async def burst():
        long = SHORT.replace(max_tokens=60)
        return await asyncio.gather(
            *(collect(llm, PROMPT, long, slo=slo(500, 20_000)) for _ in range(12))
        )

    events = run(burst())
    assert all(len(tokens_of(e)) == 60 for e in events)
    assert len(llm.host.fleet.metrics.routed) >= 2, "others were started, and served"
    # Quiet again: the tail drains, and what is not needed is turned off.
    wait_until(lambda: states().count("off") >= 1)
    assert all(one.deaths == 0 for one in llm.replicas)
    assert len(tokens_of(run(collect(llm, PROMPT, SHORT, slo=slo(500))))) == 8


def test_a_death_under_polyserve_loses_nothing(tiers):
    llm = tiers()
    slow_down(llm, 0.005)

    async def go():
        long = SHORT.replace(max_tokens=40, temperature=1.0, seed=3)
        whole = tokens_of(await collect(llm, PROMPT, long, slo=slo(500, 20_000)))
        asks = [
            asyncio.ensure_future(collect(llm, PROMPT, long, slo=slo(500, 20_000)))
            for _ in range(4)
        ]
        await asyncio.sleep(0.1)
        kill(llm, max(llm.replicas, key=lambda one: one.num_open).index)
        return whole, await asyncio.gather(*asks)

    whole, events = run(go())
    assert all(tokens_of(e) == whole for e in events)
    assert sum(llm.host.fleet.metrics.moved.values()) >= 1
    ends = [e[-1].metrics.slo for e in events]
    assert all(end is not None and end.ttft for end in ends), "the first token came in time"
    wait_until(lambda: all(one.state in ("serving", "pooled") for one in llm.replicas))


def test_settings_of_polyserve_are_checked(tiers):
    with pytest.raises(ConfigError, match="no setting 'tier' of polyserve"):
        tiers(polyserve={"tier": 1})
    with pytest.raises(ConfigError, match="ascending"):
        tiers(polyserve={"tiers": [0.5, 0.1]})


def test_times_of_padded_steps_are_those_of_their_model():
    rows, sizes = (1, 2, 4, 8), (16, 64)
    cost = BucketCost(
        decode=[(r, 0, 0.01 + 0.002 * r) for r in rows],
        mixed=[(r, s, 0.01 + 0.002 * r + 0.0003 * s) for r in rows for s in sizes],
        context=1e-6, pair=1e-8,
    )  # fmt: skip
    times = step_times(cost)
    for decodes in range(8):
        for context in (0, 300):
            for chunk in (0, 1, 15, 16, 17, 60, 64):
                for past in (0, 500):
                    if not decodes and not chunk:
                        continue
                    load = StepLoad(decodes=decodes, context=context * decodes)
                    load = load.with_chunk(chunk, past) if chunk else load
                    got = step_seconds(
                        times, load.prefill, load.pairs, load.prefills, load.past, decodes,
                        load.context,
                    )  # fmt: skip
                    wanted = cost.step_time(load)
                    # Pairs are those of a chord over a bucket of tokens.
                    assert wanted - 1e-9 <= got <= wanted + 1e-8 * 48 * 48, (load, got, wanted)
    with pytest.raises(ConfigError, match="BucketCost, got object"):
        step_times(object())
    assert step_times(LinearCost(Plane(base=1.0))).planes.shape == (1, 4)
