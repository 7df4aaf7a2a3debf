"""Attention of the caller's own in an engine, against numpy in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, AsyncLLM
from jaxserve.attention.custom import CustomAttention
from jaxserve.core.errors import ConfigError, UnsupportedError
from jaxserve.core.request import SamplingParams
from jaxserve.models import layers
from jaxserve.pallas_kernels import variant
from jaxserve.pallas_kernels.variant import AttentionVariant
from tests.bert import BERT
from tests.cases import slow
from tests.plain import DenseLoop
from tests.tiny import Bench, tiny_module

CAP, REACH, FIRST = 3.0, 24, 4
SLOPES = np.array([0.5, 0.02, 0.1, 0.3], np.float32)
_RANDOM = np.random.default_rng(8)
PROMPTS = [_RANDOM.integers(0, 299, length).tolist() for length in (5, 90, 41)]
GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=1)
GEMMA = {
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 40,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 30.0,
}


def tilted() -> AttentionVariant:
    """Bend scores, lower them by distance, and hide what is far away."""

    def score_mod(s, ctx, q_pos, k_pos, head):
        return CAP * jnp.tanh(s / CAP) + ctx["slopes"] * (k_pos - q_pos)

    def mask_mod(ctx, q_pos, k_pos, head):
        return k_pos > q_pos - REACH

    return AttentionVariant(score_mod=score_mod, mask_mod=mask_mod, extras={"slopes": "head"})


def tilted_scores(s, distance, head, key):
    return CAP * np.tanh(s / CAP) - SLOPES[head] * distance, distance < REACH


def windowed_scores(s, distance, head, key):
    return s, (distance < REACH) | (key < FIRST)


def oracle(change, q, k, v, cache, plan, *, scale, window=None, soft_cap=None, sinks=None):
    """Stand in for `dense.attend`, one query and head after the other."""
    assert sinks is None, "no model here has them"

    def attend(q, k, v):
        q, k, v = (np.asarray(part, np.float64) for part in (q, k, v))
        out, group = np.zeros_like(q), q.shape[2] // k.shape[2]
        for batch, time, head in np.ndindex(q.shape[:3]):
            key = np.arange(time + 1)
            s = k[batch, : time + 1, head // group] @ q[batch, time, head] * scale
            if soft_cap is not None:
                s = soft_cap * np.tanh(s / soft_cap)
            s, seen = change(s, time - key, head, key)
            if window is not None:
                seen = seen & (time - key < window)
            weights = np.where(seen, np.exp(s - s.max(where=seen, initial=-np.inf)), 0)
            out[batch, time, head] = weights @ v[batch, : time + 1, head // group] / weights.sum()
        return out.astype(np.float32)

    return jax.pure_callback(attend, jax.ShapeDtypeStruct(q.shape, q.dtype), q, k, v), cache


CASES = {
    "tilted": (CustomAttention(variant=tilted(), extra={"slopes": SLOPES}), tilted_scores, {}),
    "beside_own": (
        CustomAttention(variant=tilted(), extra={"slopes": SLOPES}), tilted_scores, GEMMA,
    ),
    "windowed": (
        CustomAttention(variant=variant.window(REACH, first=FIRST)), windowed_scores, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tilted", {"max_num_batched_tokens": 32}),
        slow("beside_own", {"max_num_batched_tokens": 32}),
        slow("windowed", {"batch_invariant": True}),
        slow("windowed", {"attention_backend": "pallas-reference"}),
        slow("tilted", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}),
    ],
)
def test_an_engine_attends_as_told(monkeypatch, name, settings):
    custom, change, shape = CASES[name]
    module = tiny_module(**shape)
    bench = Bench(
        module, attention=custom, **{"attention_backend": "pallas", "max_num_seqs": 2} | settings
    )
    monkeypatch.setattr(layers, "attend", functools.partial(oracle, change))
    jax.clear_caches()  # of layers that were traced before
    loop = DenseLoop(bench.graph, bench.params, length=96)
    wanted = [loop.complete(prompt, GREEDY) for prompt in PROMPTS]
    monkeypatch.undo()
    jax.clear_caches()
    plain = DenseLoop(bench.graph, bench.params, length=96)
    assert plain.complete(PROMPTS[1], GREEDY)[1] != wanted[1][1]
    for _ in range(2):  # the second time from cached prefixes, where there are any
        outputs = bench.generate(PROMPTS, [GREEDY] * len(PROMPTS))
        bench.assert_idle()
        for output, (tokens, logprobs) in zip(outputs, wanted, strict=True):
            (one,) = output.outputs
            assert one.token_ids == tokens
            found = [step[token].logprob for step, token in zip(one.logprobs, tokens, strict=True)]
            np.testing.assert_allclose(found, logprobs, atol=1e-4)


def refused(message):
    return pytest.raises(ConfigError, match=re.escape(message))


def test_a_variant_that_changes_from_step_to_step_is_refused():
    with refused("an engine has no packed masks, got a variant with one (shared); use a mask_mod."):
        CustomAttention(variant=variant.packed_mask())
    by_request = AttentionVariant(
        score_mod=lambda s, ctx, q_pos, k_pos, head: s * ctx["heat"], extras={"heat": "request"}
    )
    with refused("kinds scalar, head, array, but 'heat' is of the kind 'request'"):
        CustomAttention(variant=by_request, extra={"heat": np.ones(3)})


def test_extras_are_those_that_the_variant_reads():
    with refused("reads the extras ['slopes'], which are missing"):
        CustomAttention(variant=variant.alibi())
    with refused("unknown extra 'slope'. Did you mean 'slopes'? The variant reads: slopes."):
        CustomAttention(variant=variant.alibi(), extra={"slope": SLOPES})


def test_it_needs_kernels_that_can():
    custom = CustomAttention(variant=variant.alibi(), extra={"slopes": SLOPES})
    for backend in ("auto", "xla", "llvm"):
        with refused(f"got '{backend}'; use attention_backend='pallas'."):
            Bench(tiny_module(), attention=custom, attention_backend=backend)
    narrow = CustomAttention(variant=variant.alibi(), extra={"slopes": SLOPES[:3]})
    with refused("'slopes' is one per head, so of shape (4,) for this model, got (3,)"):
        Bench(tiny_module(), attention=narrow, attention_backend="pallas")
    with refused("encoders run no paged kernels; leave attention out."):
        LLM(BERT / "plain", attention=custom)


def test_what_knows_only_the_models_own_attention_refuses():
    custom = CustomAttention(variant=variant.soft_cap(2.0))
    settings = {"attention_backend": "pallas", "max_model_len": 64, "kv_cache_memory_bytes": 2**20}
    with LLM(tiny_module(), attention=custom, **settings) as llm:
        tokens = jnp.zeros((1, 4), jnp.int32)
        for ask in (lambda: llm.forward(tokens), lambda: llm.logprobs(llm.params, tokens)):
            with pytest.raises(UnsupportedError, match="knows the model's own attention only"):
                ask()
    engine = AsyncLLM(tiny_module(), attention=custom, warmup="lazy", **settings)
    assert engine.config.runner.attention_backend.startswith("pallas")
    engine.close()
