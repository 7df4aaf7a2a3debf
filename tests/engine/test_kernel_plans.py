"""Paged kernels in the engine: their plans, what they share, and what they refuse."""

import json

import numpy as np
import pytest

from jaxserve.cli.main import main
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import SamplingParams
from jaxserve.engine import batcher, kernel_plans
from jaxserve.pallas_kernels.attention import backends
from jaxserve.pallas_kernels.plan import Plan
from tests.tiny import Bench, tiny_module

PREFIX = np.random.default_rng(0).integers(0, 299, 200).tolist()
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0, logprobs=1)


@pytest.fixture(scope="module")
def module():
    return tiny_module()


def figures(outputs):
    return [
        (one.token_ids, [next(iter(step.values())).logprob for step in one.logprobs])
        for output in outputs
        for one in output.outputs
    ]


def spied(bench, monkeypatch) -> list[Plan]:
    """Keep the plan of every step that runs."""
    plans: list[Plan] = []
    run = bench.engine.runner.run

    def keep(packed):
        (spec,) = packed.shape.plans
        plans.append(Plan(buffer=packed.fields["plan0"].copy(), spec=spec))
        return run(packed)

    monkeypatch.setattr(bench.engine.runner, "run", keep)
    return plans


def test_a_plan_says_what_each_sequence_sees(module, monkeypatch):
    bench = Bench(module, attention_backend="pallas", max_num_batched_tokens=32)
    plans = spied(bench, monkeypatch)
    bench.generate([PREFIX[:40], PREFIX[50:53]], [GREEDY, GREEDY])
    assert {plan.spec.max_requests for plan in plans} <= {1, 2, 4}
    longest = 0
    for plan in plans:
        q_len, kv_len = plan.q_len, plan.kv_len
        assert plan.num_tokens == q_len.sum()
        assert (kv_len >= q_len).all()
        used = np.diff(plan.kv_indptr)
        assert (used * 8 >= kv_len).all()
        assert (plan.kv_indices[: plan.kv_indptr[-1]] > 0).all()
        longest = max(longest, int(kv_len.max()))
    assert longest == 40 + 6 - 1  # the last token is drawn and never seen


def test_shared_prefixes_are_read_once_and_change_no_token(module, monkeypatch):
    prompts = [[*PREFIX, *range(i, i + 3)] for i in range(4)]
    wanted = figures(Bench(module, attention_backend="reference").generate(prompts, [GREEDY] * 4))
    monkeypatch.setattr(
        kernel_plans,
        "find_shared_prefixes",
        lambda *args, **kwargs: FIND(*args, **kwargs, min_rows=2, min_keys=16),
    )
    bench = Bench(module, attention_backend="pallas")
    bench.generate(prompts[:1], [GREEDY])
    plans = spied(bench, monkeypatch)
    outputs = bench.generate(prompts, [GREEDY] * 4)
    assert any(plan.num_prefixes for plan in plans), "nothing was shared"
    shared = next(plan for plan in plans if plan.num_prefixes)
    assert shared.shared_len.max() == 200
    for (tokens, logprobs), (known, golden) in zip(figures(outputs), wanted, strict=True):
        assert tokens == known
        np.testing.assert_allclose(logprobs, golden, atol=1e-4)


FIND = kernel_plans.find_shared_prefixes


def test_planning_adds_no_compilation(module):
    bench = Bench(module, attention_backend="pallas", enforce_no_recompile=True)
    bench.engine.runner.warm_up()
    bench.engine.runner.programs.is_sealed = True
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 299, n).tolist() for n in (1, 7, 8, 9, 60, 130)]
    bench.generate(prompts, [GREEDY] * len(prompts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_backend": "mosaic"}, "'mosaic' cannot serve this. mosaic: "),
        (
            {"attention_backend": "pallas", "kv_layout": "slots"},
            "'pallas' reads pages, but kv_layout is 'slots'; use kv_layout='pages' or 'auto'",
        ),
        (
            {"attention_backend": "pallas", "tensor_parallel_size": 2},
            "it works on one device, found 2; use 'auto'",
        ),
    ],
)
def test_what_the_kernels_cannot_serve_is_refused(module, settings, message):
    with pytest.raises(ConfigError, match=message):
        Bench(module, **settings)


def test_the_choice_of_auto_is_unchanged_on_a_cpu(module):
    assert Bench(module).engine.runner.spec.shapes.kernels is None


def test_a_better_kernel_is_the_choice_of_pallas_and_of_auto(module, monkeypatch):
    """A stranger that can do everything, by the name of the preferred kernel."""
    load = backends.load

    monkeypatch.setattr(backends, "load", lambda n: load("xla") if n == "mosaic" else load(n))
    bench = Bench(module, kv_layout="pages")
    assert bench.engine.runner.spec.backend == "mosaic"
    assert bench.generate([PREFIX[:9]], [GREEDY])[0].finished


def test_backends_have_the_names_that_the_command_line_knows():
    for name in ("pallas", "mosaic", "triton", "pallas-xla", "pallas-reference"):
        config = EngineConfig.from_settings({"attention_backend": name})
        assert config.runner.attention_backend == name
    assert batcher.fill_plans is kernel_plans.fill_plans


def test_doctor_says_what_serves_what(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "device: " in told
    assert "attention: Softmax attention" in told
    assert "reference  serves bfloat16, float16, float32" in told
    assert "* is what `auto` takes." in told
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    answers = {a["backend"]: a for a in found["answers"] if a["operation"] == "attention"}
    assert set(answers) == set(backends.BACKENDS)
    assert answers["xla"]["chosen"] == ["bfloat16", "float16", "float32"]
    assert not answers["reference"]["chosen"]
    for answer in answers.values():
        assert set(answer["dtypes"]) | set(answer["reasons"]) == {"bfloat16", "float16", "float32"}
