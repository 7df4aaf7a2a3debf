"""An engine with quantised weights: every way through it, new weights, sleep, scores, export."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams, StructuredOutputsParams, dequantize, export, load_params
from jaxserve.core.errors import ConfigError
from jaxserve.engine.lifecycle import Lifecycle
from jaxserve.engine.scoring import forward
from jaxserve.engine.weights import prepare_weights
from jaxserve.models.loading import hf_name, is_kernel
from jaxserve.models.quantization import is_scale, narrow_paths, quantized_model
from jaxserve.models.registry import flatten_params
from tests.cases import quick
from tests.tiny import Bench, tiny_module, write_tiny_model

PROMPTS = [[*range(40, 71)], [*range(40, 60), 9, 8], [7, 7, 3]]
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
WAYS = {
    "slots": ("int8", False, {}),
    "pages": ("fp8", False, {"kv_layout": "pages"}),
    "chunked": ("int8", True, {"max_num_batched_tokens": 16}),
    "batch-invariant": ("int8", False, {"batch_invariant": True}),
    "XLA alone": ("fp8", True, {"attention_backend": "xla"}),
    "drafts": (
        "int8",
        True,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    ),
}
"""Scheme, whether the output projection is the embedding, and settings."""


@pytest.fixture(scope="module")
def module():
    return tiny_module(tie_word_embeddings=True)


def choices(bench: Bench, prompt: list[int], tokens: list[int]) -> list[int]:
    """Choose greedily after each token, with the plain weights that the narrow ones stand for."""
    graph, _ = quantized_model(bench.graph, bench.params, None)
    text = [*prompt, *tokens]
    ids = jnp.asarray([text + [0] * (64 - len(text))])
    logits = forward(graph, dequantize(bench.params), ids).logits[0]
    return np.asarray(logits.argmax(-1))[len(prompt) - 1 : len(text) - 1].tolist()


@pytest.mark.parametrize("way", quick(WAYS, "slots"))
def test_tokens_are_those_of_the_weights_that_are_stood_for(way):
    scheme, is_tied, settings = WAYS[way]
    module = tiny_module(tie_word_embeddings=is_tied)
    bench = Bench(module, quantization=scheme, **settings)
    together = bench.generate(PROMPTS, [GREEDY] * len(PROMPTS))
    for prompt, output in zip(PROMPTS, together, strict=True):
        tokens = output.outputs[0].token_ids
        assert tokens == choices(bench, prompt, tokens)
        (again,) = bench.generate([prompt], [GREEDY])  # alone, with its prefix cached or not
        assert again.outputs[0].token_ids == tokens
        if way != "batch-invariant" and len(prompt) > 8:
            assert again.num_cached_tokens
    bench.assert_idle()


@pytest.mark.slow
def test_bfloat16_activations_prefer_the_same_tokens():
    bench = Bench(tiny_module("bfloat16"), quantization="int8")
    output = bench.complete(PROMPTS[0], max_tokens=32, temperature=0, ignore_eos=True)
    found = output.outputs[0].token_ids
    equal = [a == b for a, b in zip(found, choices(bench, PROMPTS[0], found), strict=True)]
    assert sum(equal) >= 0.9 * len(equal)


def test_outputs_follow_a_grammar(tmp_path):
    with LLM(write_tiny_model(tmp_path), quantization="int8", max_model_len=128) as llm:
        params = SamplingParams(
            max_tokens=20, structured_outputs=StructuredOutputsParams(regex="[a-c]{4,8}")
        )
        (output,) = llm.generate("go", params, use_tqdm=False)
        assert re.fullmatch("[a-c]{4,8}", output.outputs[0].text)


# New weights --------------------------------------------------------------------------------------


class Held(Bench):
    """An engine turned by hand, with its levers."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.lifecycle = Lifecycle(self.engine)

    def wait(self, future):
        while not future.done():
            self.engine.step()
        return future.result()

    def update(self, params, **options):
        specs = self.engine.runner.param_specs
        return self.wait(self.lifecycle.update(prepare_weights(params, specs, **options)))

    def arrays(self):
        params = flatten_params(self.engine.runner.params)
        return {path: np.asarray(array) for path, array in params.items()}

    def tokens(self):
        return self.complete(PROMPTS[0], max_tokens=8, temperature=0).outputs[0].token_ids


def others_of(module):
    state = flatten_params(Bench(module).params)
    return {p: array * (3 if p.endswith("o_proj.kernel") else 1) for p, array in state.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path].view(np.uint8), value.view(np.uint8), path)


@pytest.mark.parametrize("form", ["device", "host", "bfloat16", "hf", "narrow"])
def test_new_weights_are_quantised_as_at_the_start(module, form):
    others = others_of(module)
    if form == "bfloat16":
        others = {path: array.astype("bfloat16") for path, array in others.items()}
    norms = {p: a.astype("float32") for p, a in others.items() if p.endswith(".scale")}
    fresh = Held((module.config, others | norms), quantization="fp8")
    held = Held(module, quantization="fp8")
    given, options = others, {}
    if form == "host":
        given = {path: np.asarray(array) for path, array in others.items()}
    if form == "hf":
        options = {"names": "hf"}
        given = {hf_name(p): array.T if is_kernel(p) else array for p, array in others.items()}
    if form == "narrow":
        given = fresh.engine.runner.params
    update = held.update(given, **options)
    assert update.num_cast == (0 if form == "narrow" else len(narrow_paths(held.arrays()))) or (
        form == "bfloat16"
    )
    expected = fresh.arrays()
    if form == "bfloat16":  # a plain embedding is widened
        expected = {
            path: value.astype(held.arrays()[path].dtype) for path, value in expected.items()
        }
    assert_same(held.arrays(), expected)
    if form != "bfloat16":
        assert held.tokens() == fresh.tokens()


def test_an_update_and_a_sleep_compile_nothing(module):
    held, others = Held(module, quantization="int8"), others_of(module)
    held.update(others)
    before, tokens = held.arrays(), held.tokens()
    heard, listening = [], True

    def listen(name, _seconds, **_facts):
        if listening and name == "/jax/core/compile/backend_compile_duration":
            heard.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    held.update(others)
    held.wait(held.lifecycle.sleep(1))
    assert held.wait(held.lifecycle.wake_up())
    listening = False
    assert heard == []
    assert_same(held.arrays(), before)
    assert held.tokens() == tokens


def test_what_does_not_fit_is_named_and_nothing_is_changed(module):
    held, others = Held(module, quantization="int8"), others_of(module)
    before = held.arrays()
    path = "layers.1.mlp.up_proj.kernel"
    narrow = dict(before)
    narrow.pop(path + "_scale")
    broken = others[path].at[2, 3].set(jnp.nan)
    cases = [
        (others | {path: broken}, {}, rf"not finite numbers in {path};.*Nothing was changed"),
        (others | {path: np.asarray(broken)}, {}, rf"not finite numbers in {path};"),
        (narrow, {}, rf"missing: {path}_scale"),
        (others | {path: others[path].astype("float8_e4m3fn")}, {}, f"of a wrong type: {path}"),
        (others | {path: others[path].astype("int32")}, {}, f"of a wrong type: {path} int32"),
        (others | {path + "_scale": jnp.ones(64)}, {}, rf"unknown: {path}_scale"),
    ]
    for params, options, words in cases:
        with pytest.raises(ConfigError, match=words):
            held.update(params, **options)
        assert_same(held.arrays(), before)
    held.update({path: others[path] * 2}, partial=True)
    changed = {p for p, value in held.arrays().items() if (value != before[p]).any()}
    assert changed == {path + "_scale"}  # twice the weights are the same numbers at twice the scale


def test_plain_weights_do_not_take_narrow_ones(module):
    narrow = Held(module, quantization="int8").engine.runner.params
    with pytest.raises(ConfigError, match=r"unknown: .*kernel_scale"):
        Held(module).update(narrow)


# Scores and export --------------------------------------------------------------------------------


def test_scores_take_narrow_and_plain_weights_and_gradients_the_plain_ones(module):
    with LLM(module, quantization="int8", max_model_len=128) as llm:
        plain = dequantize(llm.params)
        tokens = jnp.asarray([[5, 6, 7, 8, 9]])
        found = llm.logprobs(llm.params, tokens)
        np.testing.assert_allclose(found, llm.logprobs(plain, tokens), atol=1e-4)
        slopes = flatten_params(jax.grad(lambda p: llm.logprobs(p, tokens).sum())(plain))
        assert not any(map(is_scale, slopes))
        (output,) = llm.generate([[5, 6]], GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids
    # The slope along one weight, from a step to either side in float32.
    path, place, step = "layers.0.mlp.down_proj.kernel", (3, 4), 0.05

    def score(change):
        arrays = dict(flatten_params(plain))
        arrays[path] = arrays[path].at[place].add(change)
        with LLM((module.config, arrays), max_model_len=128) as changed:
            return float(changed.logprobs(changed.params, tokens).sum())

    slope = (score(step) - score(-step)) / (2 * step)
    np.testing.assert_allclose(slopes[path][place], slope, rtol=0.05, atol=1e-3)


def test_an_export_holds_what_is_computed_with(module, tmp_path):
    with LLM(module, quantization="fp8", max_model_len=128) as llm:
        tokens = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        expected = flatten_params(dequantize(llm.params))
        folder = export((llm.model_config, llm.params), tmp_path / "out")
    with LLM(load_params(folder), max_model_len=128) as llm:
        found = flatten_params(llm.params)
        assert llm.config.model.quantization is None
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path], value, path)
        again = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in tokens]
