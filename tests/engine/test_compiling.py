"""Programs that runners of one process share: only between those that nothing tells apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.attention.custom import CustomAttention
from jaxserve.core.request import SamplingParams
from jaxserve.engine import compiling
from jaxserve.engine.compiling import LateCompileError, Programs, forget_programs
from jaxserve.pallas_kernels.variant import AttentionVariant
from tests.cases import slow
from tests.tiny import Bench, tiny_module

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=1)
PROMPT = list(range(20, 50))


@pytest.fixture(autouse=True)
def _fresh():
    forget_programs()
    yield
    forget_programs()


@pytest.fixture
def traced(monkeypatch):
    """Names of the functions that are traced for programs."""
    names, jit = [], jax.jit

    def note(fn, **settings):
        names.append(getattr(fn, "func", fn).__name__)
        return jit(fn, **settings)

    monkeypatch.setattr(compiling.jax, "jit", note)
    return names


def programs(**settings) -> Programs:
    kept = {"matmul_precision": "highest", "cache_dir": None, "forbid_late": False}
    return Programs(**{**kept, "on_compile": lambda _: None, **settings})


def scaled(factor, x):
    return factor * x


VECTOR = jax.ShapeDtypeStruct(
    (3,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
)


def answer(bench):
    (output,) = bench.generate([PROMPT], [GREEDY])
    (one,) = output.outputs
    return one.token_ids, [
        step[t].logprob for step, t in zip(one.logprobs, one.token_ids, strict=True)
    ]


def test_a_second_engine_of_one_kind_traces_nothing(traced):
    first = answer(Bench(tiny_module()))
    assert "run_step" in traced
    traced.clear()
    bench = Bench(tiny_module())
    assert answer(bench) == first
    assert traced == []
    assert bench.metrics.num_compilations > 0, "what is new to a runner counts as compiled"


def test_other_weights_in_the_same_programs_give_other_answers(traced):
    first = answer(Bench(tiny_module()))
    traced.clear()
    module = tiny_module()
    for leaf in jax.tree.leaves(module, is_leaf=lambda x: hasattr(x, "get_value")):
        leaf.set_value(leaf.get_value() * 1.5)
    bench = Bench(module)
    second = answer(bench)
    assert traced == []
    assert second != first
    forget_programs()
    assert answer(Bench(module)) == second


@pytest.mark.parametrize(
    "settings",
    [{"max_num_seqs": 3}, slow({"kv_layout": "pages"}), slow({"batch_invariant": True})],
    ids=str,
)
def test_what_differs_is_compiled_anew(traced, settings):
    answer(Bench(tiny_module()))
    traced.clear()
    bench = Bench(tiny_module(), **settings)
    found = answer(bench)
    assert "run_step" in traced
    forget_programs()
    assert answer(Bench(tiny_module(), **settings)) == found


def test_arrays_of_the_callers_own_attention_are_nobody_elses():
    def score_mod(s, ctx, q_pos, k_pos, head):
        return s + ctx["slope"] * (k_pos - q_pos)

    variant = AttentionVariant(score_mod=score_mod, extras={"slope": "scalar"})

    def run(slope):
        custom = CustomAttention(variant=variant, extra={"slope": np.float32(slope)})
        return answer(Bench(tiny_module(), attention=custom, attention_backend="pallas"))[1]

    steep, flat = run(2.0), run(0.0)
    assert not np.allclose(steep, flat, atol=1e-4)
    np.testing.assert_allclose(run(2.0), steep, atol=1e-6)


def test_functions_with_hidden_values_are_not_shared(traced):
    for factor in (2.0, 3.0):

        def hidden(x, factor=factor):
            return factor * x

        def closed(x):
            return hidden(x)

        program = programs().get("closed", closed, (), VECTOR)
        np.testing.assert_array_equal(program(jnp.ones(3)), factor)
    assert traced == ["closed", "closed"]


def test_bound_values_tell_programs_apart(traced):
    for factor in (2.0, 3.0, 2.0):
        program = programs().get("scaled", functools.partial(scaled, factor), (), VECTOR)
        np.testing.assert_array_equal(program(jnp.ones(3)), factor)
    assert traced == ["scaled"] * 2


def test_what_cannot_be_hashed_is_compiled_each_time(traced):
    factor = np.arange(3.0)
    for _ in range(2):
        program = programs().get("scaled", functools.partial(scaled, factor), (), VECTOR)
        np.testing.assert_array_equal(program(jnp.ones(3)), factor)
    assert traced == ["scaled"] * 2


def test_precision_and_donation_tell_programs_apart(traced):
    fn = functools.partial(scaled, 2.0)
    programs().get("a", fn, (), VECTOR)
    programs(matmul_precision="default").get("a", fn, (), VECTOR)
    programs().get("a", fn, (0,), VECTOR)
    programs(shares=False).get("a", fn, (), VECTOR)
    assert len(traced) == 4


def test_a_shared_program_is_late_all_the_same():
    fn = functools.partial(scaled, 2.0)
    programs().get("a", fn, (), VECTOR)
    late = programs(forbid_late=True)
    late.warm_up([])
    with pytest.raises(LateCompileError, match="a would be compiled after warm-up"):
        late.get("a", fn, (), VECTOR)


def test_the_oldest_programs_make_room(traced, monkeypatch):
    monkeypatch.setattr(compiling, "MOST_SHARED", 2)
    for factor in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):
        programs().get("scaled", functools.partial(scaled, factor), (), VECTOR)
    assert len(traced) == 4, "1, 2, 3, and 2 again, which had made room for 3"
