"""What the benchmarks of schedulers compute around the simulator."""

import argparse
import json

import numpy as np
import pytest

from benchmarks import environments, sim_check
from benchmarks.record import Recorder
from benchmarks.rooms import scenarios, slos_serve
from jaxserve.core.cost import PUBLISHED_COSTS, StepLoad
from jaxserve.sim.capacity import Capacity
from jaxserve.sim.workload import Workload, gamma_arrivals, lognormal_shapes


def test_a_profile_is_read_as_the_peer_reads_it(tmp_path):
    file = tmp_path / "p.npz"
    np.savez(
        file, prefill_isl=[10, 20], prefill_ttft_ms=[5.0, 7.0],
        decode_active_kv_tokens=[0, 100], decode_context_length=[10, 20],
        decode_itl=[[1.0, 2.0], [3.0, 4.0]],
    )  # fmt: skip
    cost = sim_check.ProfileCost(file)
    assert cost.step_time(StepLoad().with_chunk(15)) == pytest.approx(0.006)
    assert cost.step_time(StepLoad().with_chunk(30)) == pytest.approx(0.009)
    # Two prompts of 15 tokens in all count as two of 7.
    two = StepLoad().with_chunk(8).with_chunk(7)
    assert cost.step_time(two) == pytest.approx(0.0058)
    decodes = StepLoad(decodes=3, context=50)  # 16 each, rounded down
    assert cost.step_time(decodes) == pytest.approx(0.001 * (1.6 + 0.5 * 2))
    both = decodes.with_chunk(15)
    assert cost.step_time(both) == pytest.approx(0.006 + cost.step_time(decodes))
    assert cost.decode_times(decodes, 2)[1] == cost.step_time(StepLoad(decodes=3, context=53))
    longest = cost.prefill_within(0.012, decodes)
    assert cost.step_time(decodes.with_chunk(longest)) <= 0.012
    assert cost.step_time(decodes.with_chunk(longest + 1)) > 0.012


def workload():
    shapes = lognormal_shapes(
        30, prompt=(400, 0.5), output=(20, 0.5), ttft_slowdown=4, tpot_s=0.1, name="x"
    )
    return Workload(name="w", arrivals=gamma_arrivals(100), shapes=shapes)


@pytest.mark.parametrize("name", ["fcfs", "sarathi", "deadline_hybrid", slos_serve.PLANNER])
def test_runs_judge_everybody_but_those_who_warm_up(name):
    cost = PUBLISHED_COSTS["7b-a100"]
    server = scenarios.machine("a100")
    policy = next(p for p in slos_serve.policies(cost, workload()) if p.name == name)
    task = slos_serve.Task(
        machine="a100", scenario="w", policy=name, readings=("tpot",), count=44, seeds=2,
        guess=1.0, traces=scenarios.TRACES,
    )  # fmt: skip
    run = slos_serve._runner(task, policy, server, workload())
    idle, flooded = run(0.2)["tpot"], run(500.0)["tpot"]
    assert len(idle) == len(flooded) == 80
    assert idle.mean() == 1.0
    assert flooded.mean() < 0.7


def test_budgets_of_sarathi_meet_the_tightest_target():
    cost = PUBLISHED_COSTS["7b-a100"]
    budget = slos_serve.sarathi_budget(cost, workload())
    load = StepLoad(decodes=32, context=32_000).with_chunk(budget - 32)
    assert cost.step_time(load) <= 0.1 < cost.step_time(load.with_chunk(2))


def test_tables_are_made_of_what_was_recorded(tmp_path, capsys):
    recorder = Recorder("x", out=tmp_path)
    for policy, rate in (("fcfs", 2.0), (slos_serve.PLANNER, 5.0)):
        task = slos_serve.Task(
            machine="a100", scenario="chatbot", policy=policy, readings=("tpot",), count=10,
            seeds=1, guess=1.0, traces=tmp_path,
        )  # fmt: skip
        capacity = Capacity(
            rate=rate, low=0.9 * rate, high=1.1 * rate, tried=((rate, 0.9),), is_monotone=True
        )
        result = slos_serve.Result(task=task, found={"tpot": (512, capacity)}, seconds=1.0)
        slos_serve.record(result, recorder)
    found = slos_serve.recorded(recorder.path)
    slos_serve.report(found, recorder)
    shown = capsys.readouterr().out
    assert "5.00 (4.50-5.50)" in shown
    assert "slos_serve / fcfs: geometric mean 2.50" in shown
    assert "target 1.6" in shown
    ratio = json.loads(recorder.path.read_text().splitlines()[-1])
    assert ratio["by_scenario"] == {"chatbot": 2.5}


def test_the_scenarios_are_those_of_the_traces(shared_data):
    traces = shared_data / "traces"
    for name in scenarios.NAMES:
        found = scenarios.load(name, traces)
        assert len(found.shapes) > 1000
    args = argparse.Namespace(
        machines=["a100"], scenarios=["chatbot"], policies=[], traces=traces, requests=10, seeds=1,
        readings=slos_serve.READINGS,
    )  # fmt: skip
    tasks = slos_serve.tasks(args)
    names = {task.policy for task in tasks}
    assert len(names) == 10
    assert len([task for task in tasks if task.policy == slos_serve.PLANNER]) == 3
    assert 2 < tasks[0].guess < 20
    assert slos_serve.clairvoyant(tasks[0]) > 1


def test_an_environment_without_dependencies_is_made_without_them(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(environments, "_install", lambda command, name: commands.append(command))
    monkeypatch.setattr(environments.Path, "write_text", lambda self, text: None)
    environments.python_of("dynamo", folder=tmp_path)
    environments.python_of("openai", folder=tmp_path)
    assert ["--no-deps" in command for command in commands] == [False, True, False, False]
