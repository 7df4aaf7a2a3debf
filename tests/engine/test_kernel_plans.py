"""Paged kernels in the engine: their plans, what they share, and what they refuse."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import SamplingParams
from jaxserve.engine import kernel_choice
from jaxserve.engine.compiling import forget_programs
from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.attention import api, backends
from jaxserve.pallas_kernels.plan import Plan
from tests.cases import slow
from tests.plain import DenseLoop
from tests.tiny import Bench, tiny_module, write_tiny_model

PREFIX = np.random.default_rng(0).integers(0, 299, 640).tolist()
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0, logprobs=1)
LONG = {"max_model_len": 1024, "num_gpu_blocks_override": 400}


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module")
def wide():
    """A model of eight query heads per key-value head: four rows are enough to share keys."""
    return tiny_module(num_attention_heads=8, num_key_value_heads=1)


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
        assert (np.diff(plan.kv_indptr) == -(-kv_len // 8)).all()
        assert (plan.kv_indices[: plan.kv_indptr[-1]] > 0).all()
        assert plan.spec.split_mode == "balanced"
        longest = max(longest, int(kv_len.max()))
    assert longest == 40 + 6 - 1  # the last token is drawn and never seen


def with_prefix(count: int) -> list[list[int]]:
    return [[*PREFIX, *range(i, i + 3 + i)] for i in range(count)]


@pytest.mark.parametrize("backend", ["pallas-xla", slow("pallas-reference")])
def test_shared_prefixes_are_read_once_and_change_no_token(wide, monkeypatch, backend):
    loop = DenseLoop(Bench(wide).graph, Bench(wide).params, length=704)
    prompts = with_prefix(4)
    wanted = [loop.complete(prompt, GREEDY) for prompt in prompts]
    bench = Bench(wide, attention_backend=backend, **LONG)
    bench.generate(prompts[:1], [GREEDY])
    plans = spied(bench, monkeypatch)
    outputs = bench.generate(prompts, [GREEDY] * 4)
    decodes = [plan for plan in plans if plan.spec.max_tokens == 4]
    sharing = [plan for plan in decodes if plan.spec.cascade_levels]
    assert len(sharing) >= 3, "decodes did not share the prefix that all rows have"
    for plan in sharing:
        assert plan.num_prefixes == 1
        assert (plan.shared_len == len(PREFIX)).all()
    for (tokens, logprobs), (known, golden) in zip(figures(outputs), wanted, strict=True):
        assert tokens == known
        np.testing.assert_allclose(logprobs, golden, atol=1e-4)
    plans.clear()
    bench.generate([[*PREFIX[:400], i] for i in range(4)], [GREEDY] * 4)  # too short to pay
    assert {plan.spec.max_tokens for plan in plans} >= {4}
    assert not any(plan.num_prefixes for plan in plans if plan.spec.cascade_levels)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, {4}),
        ({"max_num_seqs": 3}, set()),
        ({"max_model_len": 512}, set()),
        ({"enable_prefix_caching": False}, set()),
        ({"batch_invariant": True}, set()),
    ],
)
def test_decodes_that_share_are_compiled_only_where_it_can_pay(wide, settings, rows):
    bench = Bench(wide, attention_backend="pallas", **LONG | settings)
    shapes = bench.engine.runner.spec.shapes.all_shapes()
    decodes = [shape for shape in shapes if not shape.prefill]
    assert {shape.rows for shape in decodes if shape.shares} == rows
    assert {shape.rows for shape in decodes if not shape.shares} == {s.rows for s in decodes}


def test_planning_adds_no_compilation(wide):
    """Lengths change, prefixes are shared and not: after the warm-up nothing is compiled."""
    bench = Bench(
        wide,
        attention_backend="pallas",
        enforce_no_recompile=True,
        max_num_batched_tokens=32,
        **LONG,
    )
    bench.engine.runner.warm_up()
    assert bench.engine.runner.programs.is_sealed
    before = bench.metrics.num_compilations
    assert before > 0
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 299, n).tolist() for n in (1, 7, 8, 9, 60, 130)]
    outputs = bench.generate(prompts, [GREEDY] * len(prompts))
    outputs += bench.generate(with_prefix(1), [GREEDY])
    outputs += bench.generate(with_prefix(4), [GREEDY] * 4)
    assert all(output.finished for output in outputs)
    assert bench.metrics.num_compilations == before


@pytest.mark.slow
def test_half_precision_takes_the_same_way():
    """Log-probabilities, since tokens may be nearly equal."""
    narrow = tiny_module(dtype="bfloat16")
    prompts = [PREFIX[:50], PREFIX[60:67]]
    first = SamplingParams(max_tokens=1, temperature=0, logprobs=1)
    wanted = figures(Bench(narrow, attention_backend="reference").generate(prompts, [first] * 2))
    found = figures(Bench(narrow, attention_backend="pallas").generate(prompts, [first] * 2))
    for (_, values), (_, golden) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(values, golden, atol=0.05)


def test_batch_invariant_plans_cut_at_fixed_places(wide):
    bench = Bench(wide, attention_backend="pallas", batch_invariant=True, **LONG)
    for shape in bench.engine.runner.spec.shapes.all_shapes():
        (spec,) = shape.plans
        assert spec.split_mode == "fixed"
        assert spec.fixed_split_size == 512
        assert not spec.cascade_levels


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention_backend": "mosaic"},
            "attention_backend='mosaic' cannot serve this. mosaic: it needs a GPU of compute "
            "capability 9.0, found cpu; use 'pallas'",
        ),
        (
            {"attention_backend": "pallas", "kv_layout": "slots"},
            "'pallas' reads pages, but kv_layout is 'slots'; use kv_layout='pages' or 'auto'",
        ),
    ],
)
def test_what_the_kernels_cannot_serve_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Bench(write_tiny_model(tmp_path / "model"), **settings)


def test_the_choice_of_auto_is_unchanged_on_a_cpu(module):
    for layout in ("auto", "pages"):
        spec = Bench(module, kv_layout=layout).engine.runner.spec
        assert spec.shapes.kernels is None
        assert spec.backend in ("llvm", "xla")


@pytest.fixture
def stranger(monkeypatch):
    """A GPU, and something that can do everything by the name of the preferred kernel."""
    load, other = backends.load, types.SimpleNamespace(**vars(backends.load("xla")))

    for place in (api, backends):
        monkeypatch.setattr(place, "load", lambda n: other if n == "mosaic" else load(n))
    monkeypatch.setattr(kernel_choice, "present_device", lambda: ("gpu", "9.0"))
    forget_programs()
    yield other
    forget_programs()  # those of the stranger are none of the kernel whose name it has


def test_a_kernel_that_computes_what_it_should_is_the_choice_of_auto(module, stranger):
    bench = Bench(module, kv_layout="pages")
    assert bench.engine.runner.spec.backend == "mosaic"
    assert bench.generate([PREFIX[:9]], [GREEDY])[0].finished
    assert Bench(module, kv_layout="slots").engine.runner.spec.shapes.kernels is None


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            lambda state: dataclasses.replace(state, o=state.o * 1.01),
            "outputs differ from the reference, by",
        ),
        (
            lambda state: dataclasses.replace(state, o=state.o.at[0].set(jnp.nan)),
            "outputs differ from the",
        ),
        (lambda _: jnp.zeros(3) + jnp.zeros(4), "fails on this device: TypeError: add got"),
    ],
)
def test_a_kernel_that_does_not_is_nobodys(module, stranger, monkeypatch, caplog, fault, told):
    run = stranger.run
    jax.clear_caches()  # what was traced for the name of the kernel is not this
    monkeypatch.setattr(stranger, "run", lambda *a, **k: fault(run(*a, **k)))
    monkeypatch.setattr(triton_launch, "is_interpreting", lambda: True)
    spec = Bench(module, kv_layout="pages").engine.runner.spec
    assert spec.backend in ("xla", "llvm")
    assert "attention runs on 'xla', without kernels. mosaic: it" in caplog.text
    assert told in caplog.text
    with pytest.raises(ConfigError, match=f"'mosaic' cannot serve this. mosaic: it .*{told}"):
        Bench(module, attention_backend="mosaic")


def test_nobody_but_who_names_it_gets_the_interpreter(module, monkeypatch):
    load = backends.load

    monkeypatch.setattr(backends, "load", lambda n: load("xla") if n == "triton" else load(n))
    monkeypatch.setattr(triton_launch, "is_interpreting", lambda: True)
    for backend, chosen in (("pallas", "pallas-xla"), ("triton", "triton")):
        spec = Bench(module, attention_backend=backend).engine.runner.spec
        assert spec.backend == chosen
    monkeypatch.setattr(triton_launch, "is_interpreting", lambda: False)
    spec = Bench(module, attention_backend="pallas").engine.runner.spec
    assert spec.backend == "triton"


def test_backends_have_the_names_that_the_command_line_knows():
    for name in ("pallas", "mosaic", "triton", "pallas-xla", "pallas-reference"):
        config = EngineConfig.from_settings({"attention_backend": name})
        assert config.runner.attention_backend == name
    with pytest.raises(ConfigError, match="mosaik"):
        EngineConfig.from_settings({"attention_backend": "mosaik"})
