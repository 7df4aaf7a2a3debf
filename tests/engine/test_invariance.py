"""What a request generates does not depend on how the engine happens to serve it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.request import SamplingParams
from jaxserve.engine.scoring import forward
from tests.cases import slow
from tests.plain import DenseLoop
from tests.tiny import Bench, tiny_module

COUNT = 12
_RANDOM = np.random.default_rng(3)
SHARED = _RANDOM.integers(0, 299, 40).tolist()


def _prompt(length):
    return _RANDOM.integers(0, 299, length).tolist()


def _params(**settings):
    return SamplingParams(max_tokens=COUNT, ignore_eos=True, logprobs=2, **settings)


CASES = {
    "greedy": (_prompt(21), _params(temperature=0)),
    "greedy over several tiles": (_prompt(290), _params(temperature=0)),
    "greedy with penalties": (
        [*SHARED, *_prompt(5)],
        _params(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.4),
    ),
    "greedy with bias": (_prompt(9), _params(temperature=0, logit_bias={7: 3.0, 8: -100, 9: 2.5})),
    "seeded": (_prompt(33), _params(seed=11)),
    "seeded and filtered": (
        [*SHARED, *_prompt(17)],
        _params(seed=-5, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01),
    ),
    "seeded among a few": (
        _prompt(1),
        _params(seed=2**62, allowed_token_ids=list(range(10, 40)), presence_penalty=1.5),
    ),
    "seeded siblings": (_prompt(30), _params(seed=3, n=3)),
}


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module")
def expected(module):
    bench = Bench(module)
    loop = DenseLoop(bench.graph, bench.params)
    return {
        name: [loop.complete(prompt, params, index) for index in range(params.n)]
        for name, (prompt, params) in CASES.items()
    }


def assert_as_expected(output, expected):
    assert output.finished
    assert len(output.outputs) == len(expected)
    for one, (tokens, logprobs) in zip(output.outputs, expected, strict=True):
        assert one.token_ids == tokens
        assert one.finish_reason == "length"
        got = [entry[token].logprob for entry, token in zip(one.logprobs, tokens, strict=True)]
        np.testing.assert_allclose(got, logprobs, atol=1e-4)


def run_all(bench):
    names = list(CASES)
    outputs = bench.generate([CASES[n][0] for n in names], [CASES[n][1] for n in names])
    bench.assert_idle()
    return dict(zip(names, outputs, strict=True))


def test_one_request_at_a_time_agrees_with_the_dense_loop(module, expected):
    bench = Bench(module, enable_prefix_caching=False)
    for name, (prompt, params) in CASES.items():
        (output,) = bench.generate([prompt], [params])
        assert_as_expected(output, expected[name])
        bench.assert_idle()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        slow({"async_scheduling": False}),
        {"enable_prefix_caching": False},
        slow({"max_num_batched_tokens": 16}),
        slow({"max_num_seqs": 7, "max_num_batched_tokens": 128}),
        slow({"kv_layout": "pages"}),
        {"kv_layout": "pages", "async_scheduling": False, "max_num_batched_tokens": 40},
        slow({"attention_backend": "reference"}),
        slow({"attention_backend": "reference", "kv_layout": "pages"}),
        {"attention_backend": "pallas"},
        slow(
            {"attention_backend": "pallas", "async_scheduling": False, "max_num_batched_tokens": 16}
        ),
        slow({"attention_backend": "pallas-reference", "max_num_batched_tokens": 40}),
        {"batch_invariant": True},
        slow({"scheduling_policy": "priority", "block_size": 16}),
    ],
    ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items()) or "defaults",
)
def test_requests_side_by_side_agree_with_the_dense_loop(module, expected, settings):
    outputs = run_all(Bench(module, **settings))
    for name, output in outputs.items():
        assert_as_expected(output, expected[name])


@pytest.mark.parametrize(
    "settings",
    [{"kv_layout": "slots"}, {"kv_layout": "pages"}, slow({"attention_backend": "pallas"})],
)
def test_a_prefix_from_the_cache_changes_nothing(module, expected, settings):
    bench = Bench(module, **settings)
    run_all(bench)
    for name, output in run_all(bench).items():
        assert_as_expected(output, expected[name])
        prompt_len = len(CASES[name][0])
        assert output.num_cached_tokens == (prompt_len - 1) // 8 * 8
    bench.engine.forget_prefixes()
    prompt, params = CASES["greedy"]
    (output,) = bench.generate([prompt], [params])
    assert output.num_cached_tokens == 0


@pytest.mark.parametrize(
    ("layout", "caching"),
    [("slots", True), slow("slots", False), slow("pages", True), ("pages", False)],
)
def test_losing_the_pages_and_coming_back_changes_nothing(module, expected, layout, caching):
    bench = Bench(
        module,
        kv_layout=layout,
        block_size=2,
        num_gpu_blocks_override=38,  # just enough for the longest of these by itself
        enable_prefix_caching=caching,
    )
    names = [name for name in CASES if name != "greedy over several tiles"] * 2
    outputs = bench.generate([CASES[n][0] for n in names], [CASES[n][1] for n in names])
    for name, output in zip(names, outputs, strict=True):
        assert_as_expected(output, expected[name])
    assert bench.metrics.num_preemptions > 0
    events = [event for found in bench.events.values() for event in found if event.metrics]
    assert sum(event.metrics.num_preemptions for event in events) == bench.metrics.num_preemptions
    bench.assert_idle()


@pytest.mark.slow
def test_rows_that_move_together_change_nothing(module, expected):
    moves = []
    bench = Bench(module, max_num_seqs=8)
    runner = bench.engine.runner
    move_row = runner.move_row
    runner.move_row = lambda *args: (moves.append(args), move_row(*args))
    for index in range(5):  # short neighbours in the low rows, which leave holes
        bench.submit([index, 5], SamplingParams(max_tokens=2 + index % 2, logit_bias={3: 50.0}))
    names = ["greedy with penalties", "seeded and filtered", "greedy with bias"]
    outputs = bench.generate([CASES[n][0] for n in names], [CASES[n][1] for n in names])
    for name, output in zip(names, outputs, strict=True):
        assert_as_expected(output, expected[name])
    assert moves
    bench.assert_idle()


def test_a_row_forgets_the_bias_of_the_request_before(module, expected):
    bench = Bench(module, max_num_seqs=1)
    prompt, params = CASES["greedy"]
    bench.complete([1, 2, 3], logit_bias={5: 100.0}, allowed_token_ids=[5, 6], max_tokens=4)
    (output,) = bench.generate([prompt], [params])
    assert_as_expected(output, expected["greedy"])


@pytest.mark.parametrize(
    "settings",
    [{"kv_layout": "slots"}, {"kv_layout": "pages"}, slow({"attention_backend": "pallas"})],
)
def test_batch_invariant_results_are_equal_bit_by_bit(module, settings):
    def exact(output):
        return [
            (one.token_ids, [tuple(lp.logprob for lp in e.values()) for e in one.logprobs])
            for one in output.outputs
        ]

    settings = {**settings, "batch_invariant": True, "max_num_batched_tokens": 32}
    alone = Bench(module, **settings)
    wanted = {n: exact(alone.generate([p], [s])[0]) for n, (p, s) in CASES.items()}
    bench = Bench(module, **settings)
    for _ in range(2):  # the second time a cache could help
        assert {name: exact(output) for name, output in run_all(bench).items()} == wanted


def test_a_last_chunk_of_one_token_leaves_batch_invariance_intact(module):
    settings = {"batch_invariant": True, "max_num_batched_tokens": 32}
    prompt = SHARED[:33]  # 32 tokens, and one more
    shapes = []
    bench = Bench(module, **settings)
    run = bench.engine.runner.run
    bench.engine.runner.run = lambda packed: (shapes.append(packed), run(packed))[1]
    first = bench.submit(SHARED[:3], _params(temperature=0))
    for _ in range(4):
        bench.engine.step()
    bench.submit(prompt, _params(temperature=0))
    bench.run()
    assert len(bench.outputs[first].outputs[0].token_ids) == COUNT
    for packed in shapes:
        rows = packed.fields["token_row"][: packed.shape.rows]
        assert not packed.shape.prefill or (rows < 0).all(), "decodes shared a step with a prefill"


@pytest.mark.slow
def test_bfloat16_prefers_the_tokens_that_float32_prefers():
    module = tiny_module("bfloat16")
    bench = Bench(module)
    graph, params = bench.graph, bench.params
    wide = jax.tree.map(lambda x: x.astype("float32"), params)
    agreed = total = 0
    for name in ("greedy", "greedy with bias", "greedy over several tiles"):
        prompt = CASES[name][0]
        output = bench.complete(prompt, max_tokens=40, temperature=0, ignore_eos=True)
        tokens = np.asarray([*prompt, *output.outputs[0].token_ids])[None]
        choice = np.argmax(forward(graph, wide, jnp.asarray(tokens)).logits[0], axis=-1)
        agreed += int((choice[len(prompt) - 1 : -1] == tokens[0, len(prompt) :]).sum())
        total += 40
    assert agreed >= 0.9 * total
    bench.assert_idle()
