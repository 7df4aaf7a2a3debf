"""Layers with a window, over contexts of many windows and several tiles of keys."""

import numpy as np
import pytest

from jaxserve.core.request import SamplingParams
from tests.cases import slow
from tests.plain import DenseLoop
from tests.tiny import Bench, tiny_module

WINDOW, COUNT = 40, 6
LENGTHS = (12, 300, 530)
_RANDOM = np.random.default_rng(8)
PROMPTS = [_RANDOM.integers(0, 299, length).tolist() for length in LENGTHS]
GREEDY = SamplingParams(max_tokens=COUNT, temperature=0, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def module():
    return tiny_module(
        model_type="gemma3_text",
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_local_base_freq=500.0,
        query_pre_attn_scalar=6,
        final_logit_softcapping=30.0,
    )


@pytest.fixture(scope="module")
def expected(module):
    bench = Bench(module)
    loop = DenseLoop(bench.graph, bench.params, length=640)
    return [loop.complete(prompt, GREEDY) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "settings",
    [
        slow({}),
        slow({"kv_layout": "pages"}),
        {"batch_invariant": True, "kv_layout": "pages"},
        slow({"attention_backend": "pallas"}),
        slow({"batch_invariant": True}),
    ],
    ids=str,
)
def test_contexts_longer_than_the_window_agree_with_the_dense_loop(module, expected, settings):
    bench = Bench(module, max_model_len=640, num_gpu_blocks_override=400, **settings)
    for _ in range(2):  # the second time from cached prefixes, where there are any
        outputs = bench.generate(PROMPTS, [GREEDY] * len(PROMPTS))
        bench.assert_idle()
        for output, (tokens, logprobs) in zip(outputs, expected, strict=True):
            (one,) = output.outputs
            assert one.token_ids == tokens
            found = [step[token].logprob for step, token in zip(one.logprobs, tokens, strict=True)]
            np.testing.assert_allclose(found, logprobs, atol=1e-4)


def test_the_window_hides_what_is_far_away(module):
    """One token changes; only the layer that sees everything can tell."""
    bench = Bench(module)
    loop = DenseLoop(bench.graph, bench.params)
    narrow = tiny_module(
        model_type="mistral", num_hidden_layers=2, sliding_window=10, num_key_value_heads=2
    )
    near = DenseLoop(Bench(narrow).graph, Bench(narrow).params)
    one, other = list(PROMPTS[1]), list(PROMPTS[1])
    other[3] = (other[3] + 1) % 299
    assert np.abs(loop.logits(one)[-1] - loop.logits(other)[-1]).max() > 1e-4
    # Two layers of windows of 10 reach 18 tokens back.
    changed = np.abs(near.logits(one) - near.logits(other)).max(axis=-1) > 0
    assert changed[3]
    assert not changed[3 + 19 :].any()
