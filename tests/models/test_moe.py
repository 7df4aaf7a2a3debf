"""Routers and experts against plain numpy in float64, and against what transformers chooses."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.attention.metadata import CausalPlan
from jaxserve.core.errors import ConfigError
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import rope_tables
from jaxserve.models.loading import load_params
from jaxserve.models.moe import Experts, MoeMlp, block_rows, over_blocks, route
from jaxserve.models.parts import ExpertsConfig
from jaxserve.models.registry import abstract_model, abstract_params, fill
from jaxserve.sharding.mesh import host_mesh, make_mesh
from jaxserve.sharding.rules import LogicalAxisRules
from tests.cases import quick, slow
from tests.models.test_parity import GOLDEN, NAMES, TOLERANCE

MODEL = ModelConfig(
    model_type="mixtral",
    vocab_size=8,
    hidden_size=12,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position=16,
)
WITH_EXPERTS = [
    name
    for name in NAMES
    if name.startswith(("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek"))
]


CONFIGS = (
    ExpertsConfig(num_experts=4, top_k=1, inner_size=4),
    ExpertsConfig(num_experts=7, top_k=3, inner_size=6, normalize=False),
    ExpertsConfig(
        num_experts=5, top_k=2, inner_size=4, has_bias=True, swiglu_limit=0.7, swiglu_alpha=1.3
    ),
    ExpertsConfig(
        num_experts=12,
        top_k=3,
        inner_size=4,
        scale=2.5,
        normalize=False,
        num_groups=4,
        top_groups=2,
    ),
    ExpertsConfig(
        num_experts=12,
        top_k=4,
        inner_size=4,
        scoring="sigmoid",
        scale=2.5,
        num_groups=3,
        top_groups=2,
        group_score="top2",
        has_correction=True,
    ),
    ExpertsConfig(num_experts=3, top_k=3, inner_size=4, scoring="sigmoid", has_correction=True),
)
"""Every rule by which experts are chosen, and every kind of expert."""

choose = jax.jit(route, static_argnums=1)


def numpy_route(
    logits: np.ndarray, config: ExpertsConfig, correction: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose token by token, in float64, by sorting."""
    chosen, weights = [], []
    for row in logits.astype(np.float64):
        shifted = np.exp(row - row.max())
        scores = 1 / (1 + np.exp(-row)) if config.scoring == "sigmoid" else shifted / shifted.sum()
        wanted = scores if correction is None else scores + correction
        open_experts = list(range(config.num_experts))
        if config.num_groups > 1:
            groups = wanted.reshape(config.num_groups, -1)
            count = 2 if config.group_score == "top2" else 1
            of_group = np.sort(groups, axis=1)[:, -count:].sum(axis=1)
            best = np.argsort(-of_group, kind="stable")[: config.top_groups]
            open_experts = [e for e in open_experts if e // config.group_size in best]
        picked = sorted(open_experts, key=lambda e: (-wanted[e], e))[: config.top_k]
        weight = scores[picked]
        if config.normalize:
            weight = weight / weight.sum()
        chosen.append(picked)
        weights.append(weight * config.scale)
    return np.array(chosen), np.array(weights)


def gaps(logits: np.ndarray, config: ExpertsConfig, correction: np.ndarray | None) -> bool:
    """Whether float32 can tell all scores apart that decide."""
    wide = logits.astype(np.float64)
    scores = 1 / (1 + np.exp(-wide))
    if config.scoring == "softmax":
        scores = np.exp(wide - wide.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    wanted = scores if correction is None else scores + correction
    grouped = np.sort(wanted.reshape(len(wanted), config.num_groups, -1))
    count = 2 if config.group_score == "top2" else 1
    of_group = np.sort(grouped[..., -count:].sum(axis=-1))
    near = [np.diff(np.sort(wanted)), np.diff(of_group)]
    return all(part.min(initial=1.0) > 1e-6 for part in near)


@settings(max_examples=60)
@given(st.sampled_from(CONFIGS), st.integers(0, 2**32 - 1))
def test_tokens_choose_as_numpy_does(config: ExpertsConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((7, config.num_experts))).astype(np.float32)
    correction = None
    if config.has_correction:
        correction = (0.3 * rng.standard_normal(config.num_experts)).astype(np.float32)
    if not gaps(logits, config, correction):
        return
    given = None if correction is None else jnp.asarray(correction)
    chosen, weights = choose(jnp.asarray(logits), config, given)
    expected, expected_weights = numpy_route(logits, config, correction)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_first_experts_win() -> None:
    config = ExpertsConfig(num_experts=6, top_k=2, inner_size=1, num_groups=3, top_groups=2)
    chosen, weights = route(jnp.zeros((1, 6)), config)
    assert chosen.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights, [[0.5, 0.5]])


# Experts ------------------------------------------------------------------------------------------


def random_experts(config: ExpertsConfig, seed: int) -> Experts:
    experts = Experts(MODEL, config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for part in (experts.gate_proj, experts.up_proj, experts.down_proj):
        if part.bias is not None:
            part.bias[...] = jnp.asarray(rng.standard_normal(part.bias.shape), jnp.float32)
    return experts


def numpy_experts(
    experts: Experts, x: np.ndarray, chosen: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Token by token and expert by expert, in float64."""

    def linear(part: nnx.Module, expert: int, row: np.ndarray) -> np.ndarray:
        y = row @ np.asarray(part.kernel[...], np.float64)[expert]
        return y if part.bias is None else y + np.asarray(part.bias[...], np.float64)[expert]

    def one(expert: int, row: np.ndarray) -> np.ndarray:
        gate = linear(experts.gate_proj, expert, row)
        up = linear(experts.up_proj, expert, row)
        limit, alpha = experts.experts.swiglu_limit, experts.experts.swiglu_alpha
        if limit is None:
            inner = gate / (1 + np.exp(-gate)) * up
        else:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            inner = (up + 1) * gate / (1 + np.exp(-alpha * gate))
        return linear(experts.down_proj, expert, inner)

    wide = x.astype(np.float64)
    return np.array(
        [
            sum(w * one(e, row) for e, w in zip(picked, weight, strict=True))
            for row, picked, weight in zip(wide, chosen, weights, strict=True)
        ]
    )


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[2]])
def test_experts_add_up_as_in_numpy(config: ExpertsConfig, differentiable: bool) -> None:
    experts = random_experts(config, 7)
    run = nnx.jit(functools.partial(Experts.__call__, differentiable=differentiable))

    @settings(max_examples=25)
    @given(st.integers(0, 2**32 - 1), st.floats(0, 1))
    def check(seed: int, padding: float) -> None:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((9, MODEL.hidden_size)).astype(np.float32)
        choice = choose(rng.standard_normal((9, config.num_experts)).astype(np.float32), config)
        is_real = rng.random(9) >= padding
        found = run(experts, jnp.asarray(x), choice, is_real=jnp.asarray(is_real))
        weights = np.asarray(choice[1], np.float64)
        expected = numpy_experts(experts, x, np.asarray(choice[0]), weights)
        expected[~is_real] = 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)

    check()


@functools.partial(jax.jit, static_argnums=2)
def numbered(rows: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
    return over_blocks(rows, sizes, lambda x, e: x * 1000 + e, block=block)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=5, max_size=5), st.sampled_from([1, 3, 8]))
def test_blocks_give_every_row_to_its_expert(sizes: list[int], block: int) -> None:
    total, rows = sum(sizes), np.arange(1.0, 51.0, dtype=np.float32)[:, None]
    found = numbered(jnp.asarray(rows), jnp.asarray(sizes, jnp.int32), block)
    owner = np.repeat(np.arange(5), sizes)
    expected = np.concatenate([rows[:total, 0] * 1000 + owner, np.zeros(50 - total)])
    np.testing.assert_array_equal(found[:, 0], expected)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_token_does_not_notice_its_neighbours(tokens: int) -> None:
    """Not in the last bit, in steps of one shape."""
    config = ExpertsConfig(num_experts=4, top_k=2, inner_size=32)
    mlp = MoeMlp(MODEL, config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(3))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, MODEL.hidden_size)).astype(np.float32)

    @jax.jit
    def run(x: jax.Array, is_real: jax.Array) -> jax.Array:
        return mlp.experts(x, mlp.gate(x), is_real=is_real)

    whole = np.asarray(run(x, np.ones(tokens, bool)))
    for place in {0, tokens // 2, tokens - 1}:
        others = rng.standard_normal(x.shape).astype(np.float32)
        others[place] = x[place]
        for is_real in (np.ones(tokens, bool), np.arange(tokens) == place):
            found = np.asarray(run(others, is_real))
            np.testing.assert_array_equal(found[place], whole[place])
            assert (found[~is_real] == 0).all()


def test_infinite_padding_disturbs_nobody() -> None:
    config = ExpertsConfig(num_experts=4, top_k=2, inner_size=8, has_bias=True)
    mlp = MoeMlp(MODEL, config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(3))
    x = np.random.default_rng(0).standard_normal((5, MODEL.hidden_size)).astype(np.float32)
    broken = x.copy()
    broken[2:4] = np.inf
    is_real = np.array([True, True, False, False, True])
    for differentiable in (False, True):
        out = [
            np.asarray(
                mlp.experts(
                    jnp.asarray(rows),
                    mlp.gate(jnp.asarray(rows)),
                    is_real=jnp.asarray(is_real),
                    differentiable=differentiable,
                )
            )
            for rows in (x, broken)
        ]
        np.testing.assert_array_equal(out[0], out[1])


def test_gradients_are_those_of_finite_differences() -> None:
    config = ExpertsConfig(num_experts=4, top_k=2, inner_size=8, shared_size=6, has_bias=True)
    mlp = MoeMlp(MODEL, config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(3))
    graph, state = nnx.split(mlp)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((6, MODEL.hidden_size)), jnp.float32)

    @jax.jit
    def loss(state: nnx.State) -> jax.Array:
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x, CausalPlan())))

    slope, step = jax.grad(loss)(state), 2e-3
    for _ in range(3):
        way = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), state)
        ahead, back = (
            loss(jax.tree.map(lambda p, w, t=t: p + t * w, state, way)) for t in (step, -step)
        )
        along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, way)))
        np.testing.assert_allclose((ahead - back) / (2 * step), along, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (63, 1), (128, 2), (700, 8), (9999, 32)])
def test_blocks_are_as_long_as_experts_have_rows(rows: int, expected: int) -> None:
    assert block_rows(rows, 64) == expected


# Checkpoints --------------------------------------------------------------------------------------


def load(folder: Path, mesh: jax.sharding.Mesh) -> nnx.Module:
    """Load a model as plain modules, without an engine."""
    checkpoint = open_checkpoint(folder)
    graph, state = abstract_model(checkpoint.config, dtype=jnp.dtype("float32"))
    described = abstract_params(state, mesh=mesh, rules=LogicalAxisRules())
    return nnx.merge(graph, fill(state, load_params(checkpoint, described)))


def check(name: str, mesh: jax.sharding.Mesh) -> nnx.State:
    """Compare with transformers, and return the weights."""
    graph, state = nnx.split(load(GOLDEN / name, mesh))
    with np.load(GOLDEN / name / "golden.npz") as data:
        tokens, prefill, expected = (data[f"{kind}_2"] for kind in ("tokens", "prefill", "routing"))

    @jax.jit
    def run(state: nnx.State, ids: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        model, found = nnx.merge(graph, state), []
        x, positions = model.embed_tokens(ids), jnp.arange(ids.shape[1])[None]
        ropes = rope_tables(positions, model.config)
        for layer in model.layers:
            rope = ropes.get(layer.kind.rope)
            x += layer.self_attn(layer.input_layernorm(x), rope, None, CausalPlan())[0]
            inner = layer.post_attention_layernorm(x)
            if isinstance(layer.mlp, MoeMlp):
                found.append(layer.mlp.gate(inner[0])[0])
            x += layer.mlp(inner, CausalPlan())
        return found, model.logits(model.norm(x))[0]

    with jax.default_matmul_precision("highest"):
        found, logits = run(state, jnp.asarray(tokens[: len(prefill)])[None])
    np.testing.assert_array_equal(np.sort(found, axis=-1), expected)
    np.testing.assert_allclose(logits, prefill, rtol=0, atol=TOLERANCE)
    return state


@pytest.mark.parametrize(
    "name",
    quick(
        WITH_EXPERTS,
        *("qwen3_moe_plain", "mixtral_window", "olmoe_clipped", "gpt_oss_plain"),
        *("deepseek_v2_groups", "deepseek_v3_plain"),
    ),
)
def test_choices_and_logits_are_those_of_transformers(name: str) -> None:
    check(name, host_mesh())


@pytest.mark.parametrize(
    ("name", "experts", "tensor"),
    [
        ("qwen3_moe_plain", 2, 2),
        slow("mixtral_plain", 4, 1),
        slow("gpt_oss_plain", 2, 4),
        slow("deepseek_v3_plain", 4, 2),
    ],
)
def test_experts_split_among_devices_agree(name: str, experts: int, tensor: int) -> None:
    state = check(name, make_mesh(tensor, experts))
    kernels = [
        leaf.get_value()
        for path, leaf in nnx.to_flat_state(state)
        if path[-3:] == ("experts", "up_proj", "kernel")
    ]
    assert kernels
    for kernel in kernels:
        num_experts, hidden, inner = kernel.shape
        shard = kernel.addressable_shards[0].data.shape
        assert shard == (num_experts // experts, hidden, inner // tensor)


def read(**changes: object) -> ModelConfig:
    plain: Mapping[str, object] = {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }
    return ModelConfig.from_hf(json.loads(json.dumps({**plain, **changes})))


def test_families_choose_by_their_own_rules() -> None:
    mixtral = read(model_type="mixtral").experts
    assert (mixtral.num_experts, mixtral.normalize, mixtral.inner_size) == (8, True, 40)
    qwen = read(model_type="qwen3_moe").experts
    assert (qwen.num_experts, qwen.normalize, qwen.inner_size) == (128, False, 768)
    olmoe = read(model_type="olmoe")
    assert (olmoe.qk_norm, olmoe.qk_norm_per_head, olmoe.qkv_clip) == (True, False, None)
    oss = read(model_type="gpt_oss")
    assert [kind.window for kind in oss.kinds] == [128, None, 128, None]
    assert (oss.attention_sinks, oss.experts.swiglu_limit, oss.head_dim) == (True, 7.0, 64)
    assert (oss.rope_scaling.kind, oss.rope_scaling.truncate) == ("yarn", False)
    third = read(model_type="deepseek_v3")
    assert [kind.has_experts for kind in third.kinds] == [False, False, False, True]
    assert (third.num_kv_heads, third.head_dim, third.rotary_dim) == (1, 576, 64)
    assert third.attention_scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "cannot use 9 experts"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "a whole number of at least 1"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "'mlp_only_layers', expected a list"),
        ({"model_type": "deepseek_v3", "n_group": 7}, "must form equal groups, got 256"),
        ({"model_type": "deepseek_v3", "topk_group": 9}, "cannot use 9 of 8 groups"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, "expected 'sigmoid'"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob true"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "'group_limited_greedy'"),
        ({"model_type": "deepseek_v2", "moe_layer_freq": 2}, "moe_layer_freq 2, expected 1"),
        ({"model_type": "deepseek_v3", "qk_rope_head_dim": 5}, "must be even"),
        (
            {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}},
            "quant_method 'fp8'",
        ),
        (
            {"model_type": "mixtral", "quantization_config": {"quant_method": "mxfp4"}},
            "quant_method 'mxfp4'",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes, words: str) -> None:
    with pytest.raises((ConfigError, NotImplementedError), match=words):
        read(**changes)
