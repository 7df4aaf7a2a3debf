"""The token planner in the engine: promises, refusals, failures, measurements and its log."""

import json
import time

import pytest

from jaxserve.cli import main as cli
from jaxserve.core.config import EngineConfig, SchedulerOptions
from jaxserve.core.cost import LinearCost, Plane, StepLoad
from jaxserve.core.cost_buckets import BucketCost
from jaxserve.core.cost_file import CostFile, read_cost, write_cost
from jaxserve.core.errors import ConfigError, DeclinedError, RequestError
from jaxserve.core.event import FinishReason, failure_of
from jaxserve.core.plan import Rejection, StepPlan, Work
from jaxserve.core.request import SamplingParams, Slo
from jaxserve.engine.llm import LLM
from jaxserve.engine.measure import QUICK, Effort, describe, measure_engine
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.policy import EnginePolicy
from jaxserve.scheduling.decision_log import Decision, LogReader, Observation
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.scheduling.guard import GuardedScheduler, find_fault
from jaxserve.scheduling.policies import NEED_COST, POLICIES, PolicySettings
from jaxserve.sim.replay import replay
from tests.tiny import Bench, tiny_module, write_tiny_model

PROMPT = [*range(40, 71)]
PROMPTS = [PROMPT, [*range(100, 230)], [5], [*range(3, 60)], [9] * 40, [*range(200, 290)]]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
EASY = Slo(ttft_ms=1e6, tpot_ms=1e5, tier="easy")
SLOW = LinearCost(Plane(token=0.01, base=0.001))
"""Ten milliseconds per token: some prompts of 31 tokens fit into a second, and others do not."""


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module")
def warm(module):
    """An engine whose steps are compiled, so that they take no longer than objectives allow."""
    bench = Bench(module)
    bench.engine.runner.warm_up()
    return bench


@pytest.fixture
def make(warm, tmp_path):
    """Have an engine planned by a policy that believes in a cost model; it is left idle."""

    def bench(policy="slo", cost=SLOW, *, overlap=True, **settings):
        path = tmp_path / "cost.json"
        write_cost(path, CostFile(cost=cost, margin=0.05))
        engine = warm.engine
        options = SchedulerOptions(scheduling_policy=policy, cost_model=str(path), **settings)
        engine.metrics = warm.metrics = EngineMetrics(num_speculative_tokens=3)
        clock = engine._clock
        warm.policy = EnginePolicy(options, PolicySettings(), clock=clock, metrics=warm.metrics)
        warm.policy.install(engine)
        engine.forget_now()
        engine._overlap = overlap
        return warm

    yield bench
    warm.run()
    warm.assert_idle()
    warm.policy.close()


@pytest.fixture(scope="module")
def expected(warm):
    """What the prompts are completed to, first come first served."""
    warm.engine.scheduler = FcfsScheduler()
    outputs = [warm.complete(p, max_tokens=6, temperature=0, ignore_eos=True) for p in PROMPTS]
    return [output.outputs[0].token_ids for output in outputs]


def offer(bench, slo, sampling=GREEDY, prompt=PROMPT):
    return bench.submit(prompt, sampling, slo=slo, arrival=time.monotonic())


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("overlap", [True, False])
def test_every_policy_serves_the_same_tokens(make, expected, policy, overlap):
    bench = make(policy, LinearCost(Plane(token=1e-5, base=1e-3)), overlap=overlap)
    names = [offer(bench, EASY if i % 2 else None, prompt=p) for i, p in enumerate(PROMPTS)]
    bench.run()
    assert [bench.outputs[name].outputs[0].token_ids for name in names] == expected
    assert bench.metrics.slo_attained["easy", "request"] == 3
    assert bench.metrics.policy_time.count > 0
    assert not any(bench.metrics.policy_fallbacks.values())


def test_what_cannot_be_promised_is_refused_if_it_asked_for_that(make):
    bench = make()
    slo = Slo(ttft_ms=1000, tpot_ms=1000, tier="tight", on_decline="reject")
    names = [offer(bench, slo) for _ in range(8)]
    bench.run()
    last = [bench.events[name][-1] for name in names]
    refused = [event for event in last if event.rejection is not None]
    served = [event for event in last if event.rejection is None]
    assert 1 <= len(served) <= 3  # a prompt takes 0.31 s by the model
    assert {event.finish_reason for event in refused} == {FinishReason.DECLINED}
    assert all(len(bench.events[name]) == 1 for name in names if bench.outputs[name].rejection)
    error = failure_of(refused[0])
    assert isinstance(error, DeclinedError)
    assert (error.reason, error.objective) == ("compute", "ttft_ms")
    assert "1000 ms to the first token were asked for" in str(error)
    assert error.retry_after_s >= 1
    assert bench.metrics.slo_declined["tight", "compute", "refused"] == len(refused)
    assert bench.metrics.slo_missed["tight", "request"] == len(refused)
    assert bench.metrics.slo_attained["tight", "request"] == len(served)
    assert bench.metrics.finished_by_reason["declined"] == len(refused)


@pytest.mark.parametrize("on_decline", ["best_effort", "asap"])
def test_others_are_served_with_what_is_left(make, on_decline):
    bench = make()
    slo = Slo(ttft_ms=1000, tpot_ms=1000, tier="soft", on_decline=on_decline)
    names = [offer(bench, slo) for _ in range(8)]
    bench.run()
    assert all(len(bench.outputs[name].outputs[0].token_ids) == 6 for name in names)
    declined = bench.metrics.slo_declined["soft", "compute", "best_effort"]
    assert 5 <= declined <= 7


def test_pages_can_be_what_is_short(make):
    bench = make(cost=LinearCost(Plane(token=1e-6, base=1e-4)))
    slo = Slo(ttft_ms=1e5, tpot_ms=1e5, tier="big", on_decline="reject")
    long = SamplingParams(max_tokens=470, temperature=0, ignore_eos=True)
    names = [offer(bench, slo, long) for _ in range(6)]  # there are four rows
    bench.engine.step()
    rejections = [bench.outputs[name].rejection for name in names]
    assert [one.reason for one in rejections if one is not None] == ["memory"] * 2
    for name in names:
        bench.engine.cancel(name)


def test_the_objective_that_asks_for_too_much_is_named(make):
    bench = make(cost=LinearCost(Plane(token=1e-4, request=0.02, base=1e-3)))
    patient = Slo(ttft_ms=1e5, tpot_ms=50, tier="t", on_decline="reject")
    long = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    names = [offer(bench, patient, long) for _ in range(4)]
    bench.engine.step()
    rejections = [bench.outputs[name].rejection for name in names]
    assert {one.objective for one in rejections if one is not None} == {"tpot_ms"}
    for name in names:
        bench.engine.cancel(name)


@pytest.mark.parametrize(
    ("objectives", "param", "figure"),
    [
        ({"ttft_ms": 100}, "slo.ttft_ms", "an idle server needs 311.0 ms"),
        ({"tpot_ms": 5}, "slo.tpot_ms", "an idle server needs 11.0 ms per token"),
        ({"e2e_ms": 200, "ttft_ms": 200}, "slo.ttft_ms", "311.0 ms"),
        ({"e2e_ms": 200}, "slo.e2e_ms", "311.0 ms"),
    ],
)
def test_the_impossible_is_refused_at_the_door_with_the_figure_of_an_idle_server(
    make, objectives, param, figure
):
    bench = make()
    name = offer(bench, Slo(**objectives, tier="dream"))
    bench.run()
    (event,) = bench.events[name]
    error = failure_of(event)
    assert isinstance(error, RequestError)
    assert error.param == param
    assert figure in str(error)
    assert bench.metrics.slo_declined["dream", "idle_server", "refused"] == 1
    assert bench.metrics.slo_missed["dream", "request"] == 1


def test_a_cached_prefix_makes_the_impossible_possible(make):
    bench = make()
    offer(bench, None)
    bench.run()
    name = offer(bench, Slo(ttft_ms=100, tier="lucky"))  # 24 of 31 tokens are cached
    bench.run()
    assert bench.outputs[name].outputs[0].finish_reason == "length"


def test_a_request_with_several_completions_is_refused_as_a_whole_or_not_at_all(make):
    bench = make()
    sampling = SamplingParams(max_tokens=4, temperature=1, n=3, seed=1, ignore_eos=True)
    tight = Slo(ttft_ms=700, tpot_ms=1000, tier="n", on_decline="reject")
    names = [offer(bench, tight, sampling) for _ in range(4)]
    bench.run()
    for name in names:
        reasons = {out.finish_reason for out in bench.outputs[name].outputs}
        assert reasons in ({"declined"}, {"length"})
    refused = sum(bench.outputs[name].rejection is not None for name in names)
    assert 1 <= refused <= 3
    assert sum(
        n for (_, _, what), n in bench.metrics.slo_declined.items() if what == "refused"
    ) == (refused)


def test_one_that_is_declined_leaves_the_others_of_a_call_alone(module, tmp_path):
    path = tmp_path / "cost.json"
    write_cost(path, CostFile(cost=SLOW))
    settings = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    with LLM(module, scheduling_policy="slo", cost_model=str(path), **settings) as llm:
        slo = Slo(ttft_ms=1000, tpot_ms=1000, on_decline="reject")
        outputs = llm.generate([PROMPT] * 8, GREEDY, slo=slo, use_tqdm=False)
        declined = [out for out in outputs if out.rejection is not None]
        assert declined
        assert len(declined) < 8
        assert {out.outputs[0].finish_reason for out in declined} == {"declined"}
        with pytest.raises(RequestError, match="idle server needs"):
            llm.generate([PROMPT], GREEDY, slo=Slo(ttft_ms=1), use_tqdm=False)


# Failures --------------------------------------------------------------------------------------


class _Broken(FcfsScheduler):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.now = 0.0

    def plan(self, view):
        plan = super().plan(view)
        if self.how == "error":
            raise ZeroDivisionError("no plan today")
        if self.how == "late":
            self.now += 1.0
        if self.how == "invalid":
            return StepPlan(work=(*plan.work, Work(seq_id=10**6, num_tokens=1)))
        return plan


@pytest.mark.parametrize("how", ["error", "late", "invalid"])
def test_a_policy_that_fails_is_replaced_for_that_step_and_counted(make, how):
    policy = _Broken(how)
    failures = []
    guard = GuardedScheduler(
        policy, FcfsScheduler(), budget_s=0.5, timer=lambda: policy.now, on_failure=failures.append
    )
    bench = make()
    bench.engine.scheduler = guard
    assert bench.complete(PROMPT, max_tokens=4, temperature=0, ignore_eos=True).finished
    assert len(failures) >= 4
    assert set(failures) == {how}
    policy.how = ""
    bench.complete(PROMPT, max_tokens=4, temperature=0)
    assert set(failures) == {how}


def test_a_budget_of_nothing_is_exceeded_by_every_plan(make):
    bench = make(policy_budget_ms=1e-6)
    offer(bench, EASY)
    bench.run()
    assert bench.metrics.policy_fallbacks["late"] > 0
    assert bench.metrics.slo_attained["easy", "request"] == 1


def test_faults_of_plans_are_found(make):
    seen = []

    class Watching(FcfsScheduler):
        def plan(self, view):
            seen.append(view)
            return super().plan(view)

    bench = make()
    bench.engine.scheduler = Watching()
    bench.submit(PROMPT, GREEDY)
    bench.engine.step()
    (view,) = seen[:1]
    seq = view.waiting[0].seq_id
    fine = StepPlan(admit=(seq,), work=(Work(seq_id=seq, num_tokens=31),))
    no = Rejection(seq_id=seq, reason="compute", objective="ttft_ms", detail="")
    assert find_fault(fine, view) is None
    for plan, told in (
        (StepPlan(admit=(99,)), "admits 99"),
        (StepPlan(preempt=(seq,)), "preempts"),
        (StepPlan(work=(Work(seq_id=seq, num_tokens=1),)), "does not run"),
        (StepPlan(admit=(seq,), reject=(no,)), "admits and refuses"),
        (StepPlan(admit=(seq,), work=fine.work * 2), "twice"),
        (StepPlan(admit=(seq,), work=(Work(seq_id=seq, num_tokens=999),)), "at most 64"),
    ):
        assert told in find_fault(plan, view)
    bench.run()


# Times of steps --------------------------------------------------------------------------------


def test_an_engine_without_a_file_measures_itself_and_keeps_its_counters(module):
    settings = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    with LLM(module, scheduling_policy="slo", num_gpu_blocks_override=128, **settings) as llm:
        assert llm.metrics.num_steps == 0
        assert llm.metrics.prompt_tokens == 0
        engine = llm.host.engine
        assert engine.pool.num_free == engine.pool.num_pages
        cost = engine.times.cost
        small = cost.step_time(StepLoad(decodes=1, context=10))
        large = cost.step_time(StepLoad().with_chunk(64))
        assert 0 < small <= large < 1
        (output,) = llm.generate([PROMPT], GREEDY, slo=EASY, use_tqdm=False)
        assert output.slo.attained
        assert cost.drift().observations > 0
        assert llm.metrics.drift != 1.0


def test_measured_times_fit_every_shape_and_survive_a_file(make, tmp_path):
    bench = make()
    effort = Effort(repeats=2, contexts=(128,), with_past=True)
    measured = measure_engine(bench.engine, bench.engine._clock, effort)
    cost = measured.file.cost
    assert isinstance(cost, BucketCost)
    table = bench.engine.runner.spec.shapes
    assert {row for row, _, _ in cost.to_json()["decode"]} == set(table.row_buckets)
    assert {(r, p) for r, p, _ in cost.to_json()["mixed"]} == {
        (r, p) for r in table.mixed_row_buckets for p in table.prefill_buckets
    }
    assert measured.report.under_predicted <= 1
    write_cost(tmp_path / "cost.json", measured.file)
    again = read_cost(tmp_path / "cost.json")
    assert again.facts["engine"] == describe(bench.engine)
    for load in (StepLoad(decodes=3, context=70), StepLoad(decodes=1, context=9).with_chunk(50, 7)):
        assert again.cost.step_time(load) == cost.step_time(load)


def test_the_planner_speculates(module, warm, tmp_path):
    method = {"method": "ngram", "num_speculative_tokens": 3}
    path = tmp_path / "cost.json"
    write_cost(path, CostFile(cost=LinearCost(Plane(token=1e-5, base=1e-2))))
    bench = Bench(module, scheduling_policy="slo", cost_model=str(path), speculative_config=method)
    long = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    name = offer(bench, EASY, long, prompt=[7, 8, 9] * 8)
    bench.run()
    assert bench.metrics.num_draft_tokens > 0
    warm.engine.scheduler = FcfsScheduler()
    plain = warm.complete([7, 8, 9] * 8, max_tokens=60, temperature=0, ignore_eos=True)
    assert bench.outputs[name].outputs[0].token_ids == plain.outputs[0].token_ids


def test_a_quick_effort_is_less_than_a_whole_one():
    assert QUICK.repeats < Effort().repeats
    assert len(QUICK.contexts) < len(Effort().contexts)


def test_views_are_as_of_the_end_of_the_step_on_the_device(make, monkeypatch):
    bench = make(cost=LinearCost(Plane(base=5.0)))
    views = []
    policy = bench.engine.scheduler
    plan = policy.plan
    watched = lambda view: (views.append((time.monotonic(), view)), plan(view))[1]  # noqa: E731
    monkeypatch.setattr(policy, "plan", watched)
    offer(bench, None)
    bench.run()
    ahead = [view.now - now for now, view in views]
    assert ahead[0] == pytest.approx(0, abs=0.5)
    assert max(ahead) > 2  # a step of "five seconds" is on the device


def test_the_command_writes_a_file_that_an_engine_takes(tmp_path, capsys):
    folder, out = write_tiny_model(tmp_path / "tiny"), tmp_path / "cost.json"
    sizes = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 32}
    sizes |= {"num_gpu_blocks_override": 64}
    flags = [w for k, v in sizes.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert cli.main(["profile", str(folder), "--quick", "--output", str(out), *flags]) == 0
    assert "with it, 95 % of the steps took no longer" in capsys.readouterr().out
    facts = read_cost(out).facts
    assert facts["engine"]["max_num_seqs"] == 2
    assert facts["model"]
    bench = Bench(folder, scheduling_policy="slo", cost_model=str(out), **sizes)
    name = offer(bench, EASY, prompt=[5, 6, 7])
    bench.run()
    assert bench.outputs[name].slo.attained
    with pytest.raises(SystemExit):
        cli.main(["profile", "--repeats", "0"])


# The log ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["slo", "deadline_hybrid", "edf", "fcfs"])
def test_a_log_replays_to_the_same_decisions(make, tmp_path, policy):
    log = tmp_path / "decisions.jsonl"
    bench = make(policy, decision_log=str(log))
    tight = Slo(ttft_ms=1000, tpot_ms=1000, tier="tight", on_decline="reject")
    for number in range(8):
        offer(bench, tight if number % 2 else EASY, prompt=[*range(number, number + 40)])
        bench.engine.step()
    bench.run()
    bench.policy.flush()
    assert {type(entry) for entry in LogReader(log)} == {Decision, Observation}
    bench.policy.close()
    found = replay(log)
    assert found.policy == policy
    assert found.plans >= 8
    assert found.observations > 0
    assert found.differences == 0, found.shown


def test_a_log_that_was_tampered_with_shows_what_differs(make, tmp_path):
    log = tmp_path / "decisions.jsonl"
    bench = make(decision_log=str(log))
    offer(bench, EASY)
    bench.run()
    bench.policy.close()
    lines = log.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if '"work":[[' in line)
    changed = json.loads(lines[place])
    changed["plan"]["work"][0][1] += 1
    lines[place] = json.dumps(changed) + "\n"
    log.write_text("".join(lines) + '{"now":')  # and cut short
    found = replay(log)
    assert found.differences == 1
    assert f"line {place + 1}: work" in found.shown[0]
    lines[place] = '{"now": 3}\n'
    log.write_text("".join(lines))
    with pytest.raises(ConfigError, match=f"line {place + 1} of decisions.jsonl is damaged: "):
        replay(log)
    log.write_text("{}\n")
    with pytest.raises(ConfigError, match="is no decision log"):
        replay(log)


# Settings --------------------------------------------------------------------------------------


def test_policies_of_the_settings_are_those_of_the_registry():
    from typing import get_args

    from jaxserve.core.config import SchedulingPolicy

    assert set(get_args(SchedulingPolicy)) == set(POLICIES)
    assert set(POLICIES) > NEED_COST


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduling_policy": "slow"}, "Did you mean 'slo'"),
        ({"policy_budget_ms": 0}, "policy_budget_ms must be greater than zero"),
        ({"slo_pace": "gap"}, "slo_pace must be one of"),
        ({"scheduling_policy": "slo", "batch_invariant": True}, "batch_invariant needs"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_settings(settings)


def test_a_bad_file_of_times_is_refused_by_name(module, tmp_path):
    path = tmp_path / "cost.json"
    path.write_text('{"format": "jaxserve cost model", "version": 1, "cost": {"kind": "x"}}')
    with pytest.raises(ConfigError, match=r"the cost of cost\.json must be of kind"):
        Bench(module, scheduling_policy="slo", cost_model=str(path))
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        Bench(module, cost_model=str(tmp_path / "none.json"))
