import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.request import SamplingParams
from jaxserve.engine.sampler import (
    MAX_BANNED,
    RowState,
    SamplingInputs,
    draw_by_inversion,
    filter_logits,
    penalize,
    report,
    sample,
)
from tests import plain

ROWS, VOCAB = 4, 300
filter_logits_jit = jax.jit(filter_logits)
penalize_jit = jax.jit(penalize)
draw_jit = jax.jit(draw_by_inversion)
sample_jit = jax.jit(sample, static_argnames=("num_candidates", "mode"))
report_jit = jax.jit(report, static_argnames=("num_candidates", "normalize"))


def make_inputs(rows=ROWS, **values):
    """Neutral parameters, but for those given; flags follow from what is on."""
    neutral = {
        "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    fields = {
        name: jnp.broadcast_to(jnp.asarray(values.pop(name, value), jnp.float32), (rows,))
        for name, value in neutral.items()
    }
    for name in ("top_k", "output_position"):
        fields[name] = jnp.broadcast_to(jnp.asarray(values.pop(name, 0), jnp.int32), (rows,))
    seed = np.asarray(values.pop("seed", np.arange(rows)))
    fields["seed"] = jnp.asarray(np.stack([seed >> 32, seed & 0xFFFFFFFF], -1), jnp.uint32)
    banned = np.full((rows, MAX_BANNED), -1, np.int32)
    for row, ids in values.pop("banned", {}).items():
        banned[row, : len(ids)] = ids
    fields["banned"] = jnp.asarray(banned)
    mask = values.pop("mask", np.full((rows, -(-VOCAB // 32)), 0xFFFFFFFF, np.uint32))
    fields["mask"] = jnp.asarray(mask)
    for name in ("random", "filter", "penalty", "bias", "mask", "logprobs", "top_logprobs"):
        fields[f"any_{name}"] = jnp.asarray(values.pop(f"any_{name}", True))
    assert not values
    return SamplingInputs(**fields)


def make_state(rows=ROWS, vocab=VOCAB, **values):
    return RowState(
        last_token=jnp.zeros(rows, jnp.int32),
        counts=jnp.asarray(values.get("counts", np.zeros((rows, vocab))), jnp.int32),
        prompt_seen=jnp.asarray(values.get("prompt_seen", np.zeros((rows, vocab))), bool),
        bias=jnp.asarray(values.get("bias", np.zeros((rows, vocab))), jnp.float32),
    )


@st.composite
def logit_rows(draw):
    """Rows of scores: smooth ones, ones with many ties, huge ones, and ones with one choice."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = []
    for _ in range(ROWS):
        row = random.standard_normal(VOCAB) * draw(st.sampled_from([0.1, 1.0, 5.0, 30.0]))
        kind = draw(st.sampled_from(["smooth", "ties", "huge", "one", "few", "equal"]))
        if kind == "ties":
            row = np.round(row)
        elif kind == "huge":
            row *= 1e36
        elif kind == "one":
            row[np.arange(VOCAB) != random.integers(VOCAB)] = -np.inf
        elif kind == "few":
            row[random.random(VOCAB) < 0.98] = -np.inf
            row[random.integers(VOCAB)] = 0.5
        elif kind == "equal":
            row[:] = 1.5
        rows.append(row + 0.0)
    return np.asarray(rows, np.float32) + 0.0


def several(values):
    return st.lists(values, min_size=ROWS, max_size=ROWS)


@given(
    logit_rows(),
    several(st.sampled_from([0, 1, 2, 3, 50, VOCAB - 1, VOCAB, 10**6])),
    several(st.sampled_from([1e-6, 0.01, 0.3, 0.7, 0.95, 0.999, 1.0])),
    several(st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0])),
)
@settings(max_examples=150)
def test_filters_keep_what_a_sort_in_float64_keeps(logits, top_k, top_p, min_p):
    got = np.asarray(filter_logits_jit(logits, make_inputs(top_k=top_k, top_p=top_p, min_p=min_p)))
    for row in range(ROWS):
        stay = np.isfinite(got[row])
        np.testing.assert_array_equal(got[row][stay], logits[row][stay])
        # The borders are reached in float32: either of two neighbouring ones is right.
        bounds = [
            plain.kept(
                logits[row], top_k=top_k[row],
                top_p=min(1.0, top_p[row] * (1 + nudge)) if top_p[row] < 1 else 1.0,
                min_p=min(1.0, min_p[row] * (1 - nudge)),
            )
            for nudge in (-2e-6, 2e-6)
        ]  # fmt: skip
        assert (bounds[0] <= stay).all(), "dropped too many"
        assert (stay <= bounds[1]).all(), "kept too many"


@given(logit_rows(), st.integers(1, VOCAB))
@settings(max_examples=50)
def test_top_k_keeps_exactly_the_largest_where_nothing_ties(logits, top_k):
    stay = np.isfinite(np.asarray(filter_logits_jit(logits, make_inputs(top_k=top_k))))
    for row in range(ROWS):
        values = logits[row]
        wanted = np.isfinite(values) & (values >= np.sort(values)[-top_k])
        np.testing.assert_array_equal(stay[row], wanted)


def test_no_filter_changes_nothing():
    logits = np.random.default_rng(0).standard_normal((ROWS, VOCAB)).astype(np.float32)
    np.testing.assert_array_equal(filter_logits_jit(logits, make_inputs()), logits)


def test_zeros_of_both_signs_tie():
    logits = np.full((ROWS, VOCAB), -1, np.float32)
    logits[:, 3], logits[:, 4] = 0.0, -0.0
    stay = np.isfinite(np.asarray(filter_logits_jit(logits, make_inputs(top_k=1))))
    assert np.flatnonzero(stay[0]).tolist() == [3, 4]


@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_penalties_are_what_a_loop_over_tokens_gives(data, seed):
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((ROWS, VOCAB)) * 4).astype(np.float32)
    prompts = [random.integers(0, VOCAB, 9).tolist() for _ in range(ROWS)]
    outputs = [random.integers(0, 20, 30).tolist() for _ in range(ROWS)]
    params = [
        SamplingParams(
            repetition_penalty=data.draw(st.floats(0.1, 3)),
            frequency_penalty=data.draw(st.floats(-2, 2)),
            presence_penalty=data.draw(st.floats(-2, 2)),
        )
        for _ in range(ROWS)
    ]
    counts = np.stack([np.bincount(o, minlength=VOCAB) for o in outputs])
    seen = np.zeros((ROWS, VOCAB), bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    inputs = make_inputs(**{name: [getattr(p, name) for p in params] for name in names})
    got = penalize_jit(logits, inputs, jnp.asarray(counts), jnp.asarray(seen))
    for row in range(ROWS):
        wanted = plain.penalize(logits[row], params[row], prompts[row], outputs[row])
        np.testing.assert_allclose(got[row], wanted, rtol=1e-5, atol=1e-4)


@given(logit_rows(), several(st.floats(0, 1, exclude_max=True, width=32)))
@settings(max_examples=150)
def test_inversion_finds_where_the_cumulative_mass_passes_the_number(logits, uniform):
    mass = np.exp(plain.log_softmax(logits))
    token = np.asarray(draw_jit(jnp.asarray(mass, jnp.float32), jnp.asarray(uniform, jnp.float32)))
    for row in range(ROWS):
        assert mass[row, token[row]] > 0
        end = np.cumsum(mass[row])
        low, high = end[token[row]] - mass[row, token[row]], end[token[row]]
        assert low - 1e-5 <= uniform[row] <= high + 1e-5


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 5000])
def test_tokens_without_mass_are_never_drawn(vocab):
    """Not even where rounding lets a cumulative sum end a little early or late."""
    random = np.random.default_rng(vocab)
    for _ in range(20):
        weights = random.random(vocab).astype(np.float32)
        weights[random.random(vocab) < 0.7] = 0
        blocks = np.repeat(random.random(-(-vocab // 256)) < 0.5, 256)[:vocab]
        weights[blocks] = 0
        weights[random.integers(vocab)] = 0.3
        end = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
        edges = np.unique(end.astype(np.float32))
        numbers = np.concatenate(
            [[0, 1 - 2**-24], edges, np.nextafter(edges, 0), np.nextafter(edges, 1)]
        ).astype(np.float32)
        numbers = np.resize(numbers[(numbers >= 0) & (numbers < 1)], 4096)
        drawn = np.asarray(draw_jit(np.tile(weights, (4096, 1)), numbers))
        assert drawn.max() < vocab
        assert (weights[drawn] > 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    """Chi-square over 32 tokens; a tenth more or less of one in ten tokens would be noticed."""
    count, vocab = 200_000, 32
    row = np.random.default_rng(1).standard_normal(vocab).astype(np.float32)
    inputs = make_inputs(
        count, temperature=temperature, seed=np.arange(count), output_position=3, any_filter=False
    )
    state = make_state(count, vocab)
    drawn = sample_jit(
        np.tile(row, (count, 1)), inputs, state, num_candidates=1, mode="raw_logprobs"
    ).token
    found = np.bincount(np.asarray(drawn), minlength=vocab)
    share = np.exp(plain.log_softmax(row / temperature))

    def chi_square(expected):
        return float(((found - expected) ** 2 / expected).sum())

    critical = 61.1  # 31 degrees of freedom, one in a thousand
    assert chi_square(count * share) < critical
    warped = share * (1 + 0.1 * (np.arange(vocab) % 10 == 0))
    assert chi_square(count * warped / warped.sum()) > critical, "the test has no power"


def test_the_stream_depends_on_seed_and_position_alone():
    random = np.random.default_rng(5)
    logits = np.tile(random.standard_normal(VOCAB).astype(np.float32), (ROWS, 1))
    seed, position = np.asarray([5, 2**40, 5, 5]), np.asarray([1, 7, 1, 2])

    def draw(order, neighbours=1.0):
        inputs = make_inputs(
            temperature=[neighbours, 1.0, 1.0, 1.0], seed=seed[order],
            output_position=position[order],
        )  # fmt: skip
        out = sample_jit(logits, inputs, make_state(), num_candidates=1, mode="raw_logprobs")
        return np.asarray(out.token)

    first = draw([0, 1, 2, 3])
    assert first[0] == first[2]
    np.testing.assert_array_equal(draw([3, 2, 1, 0]), first[::-1])
    np.testing.assert_array_equal(draw([0, 1, 2, 3], neighbours=0.0)[1:], first[1:])
    wanted = [
        plain.draw(logits[0].astype(np.float64), SamplingParams(), int(s), int(p))
        for s, p in zip(seed, position, strict=True)
    ]
    assert first.tolist() == wanted


def test_streams_of_neighbouring_seeds_and_positions_are_independent():
    numbers = np.asarray([[plain.uniform(s, p) for p in range(20)] for s in range(20)])
    assert len(np.unique(numbers)) == 400
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.2
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.2


@given(logit_rows(), st.booleans(), st.sampled_from([1, 5, VOCAB]))
@settings(max_examples=60)
def test_reports_agree_with_float64(logits, normalize, num_candidates):
    random = np.random.default_rng(0)
    token = np.asarray(
        [random.choice(np.flatnonzero(np.isfinite(row))) for row in logits], np.int32
    )
    yes = jnp.asarray(True)
    got = report_jit(logits, token, yes, yes, num_candidates=num_candidates, normalize=normalize)
    values = plain.log_softmax(logits) if normalize else logits.astype(np.float64)
    for row in range(ROWS):
        np.testing.assert_allclose(got.logprob[row], values[row, token[row]], rtol=1e-5, atol=2e-5)
        assert got.rank[row] == 1 + (logits[row] > logits[row, token[row]]).sum()
        order = np.argsort(-logits[row], kind="stable")[:num_candidates]
        np.testing.assert_array_equal(logits[row][got.top_token[row]], logits[row][order])
        finite = np.isfinite(values[row][order])
        np.testing.assert_allclose(
            np.asarray(got.top_logprob[row])[finite], values[row][order][finite],
            rtol=1e-5, atol=2e-5,
        )  # fmt: skip


@pytest.mark.parametrize(
    "mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]
)
def test_what_is_reported_follows_the_mode(mode):
    random = np.random.default_rng(2)
    logits = (3 * random.standard_normal((ROWS, VOCAB))).astype(np.float32)
    bias = np.zeros((ROWS, VOCAB), np.float32)
    bias[0, 5] = 50.0
    inputs = make_inputs(temperature=[0.0, 0.5, 1.0, 1.0], top_k=[0, 0, 3, 0])
    got = sample_jit(logits, inputs, make_state(bias=bias), num_candidates=2, mode=mode)
    processed = [logits[0] + bias[0], logits[1] / 0.5, logits[2].copy(), logits[3]]
    processed[2][processed[2] < np.sort(processed[2])[-3]] = -np.inf
    for row in range(ROWS):
        values = (logits[row] if mode.startswith("raw") else processed[row]).astype(np.float64)
        if mode.endswith("logprobs"):
            values = plain.log_softmax(values)
        np.testing.assert_allclose(got.logprob[row], values[got.token[row]], rtol=1e-5, atol=2e-5)
    assert got.token[0] == 5


def test_banned_and_forbidden_tokens_are_never_drawn():
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, 7] = 100
    bias = np.zeros((ROWS, VOCAB), np.float32)
    bias[2] = -np.inf
    bias[2, 11] = 0
    for position in range(5):
        inputs = make_inputs(
            temperature=[0.0, 1.0, 1.0, 1.0], banned={0: [7], 1: [7, 0, 299]},
            output_position=position,
        )  # fmt: skip
        token = np.asarray(
            sample_jit(
                logits, inputs, make_state(bias=bias), num_candidates=1, mode="raw_logprobs"
            ).token
        )
        assert token[0] != 7
        assert token[1] not in {7, 0, 299}
        assert token[2] == 11
        assert token[3] == 7


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=20)
def test_only_tokens_whose_bit_is_set_are_drawn(seed, greedy):
    random = np.random.default_rng(seed)
    allowed = random.random((ROWS, VOCAB)) < random.choice([0.01, 0.5])
    allowed[:, random.integers(VOCAB)] = True
    bits = np.zeros((ROWS, -(-VOCAB // 32) * 32), bool)
    bits[:, :VOCAB] = allowed
    mask = np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)
    logits = jnp.asarray(random.standard_normal((ROWS, VOCAB)) * 9, jnp.float32)
    bias = random.standard_normal((ROWS, VOCAB)) * 50
    inputs = make_inputs(
        mask=mask, temperature=0.0 if greedy else 1.3, top_k=3, frequency_penalty=-2.0, seed=seed
        + np.arange(ROWS),
    )  # fmt: skip
    drawn = sample_jit(logits, inputs, make_state(bias=bias), num_candidates=2, mode="raw_logprobs")
    assert allowed[np.arange(ROWS), np.asarray(drawn.token)].all()
    if greedy:
        best = np.where(allowed, np.asarray(logits) + bias.astype(np.float32), -np.inf)
        np.testing.assert_array_equal(drawn.token, best.argmax(-1))


def test_without_the_flag_a_mask_is_not_looked_at():
    logits = jnp.zeros((ROWS, VOCAB)).at[:, 7].set(5.0)
    mask = np.zeros((ROWS, -(-VOCAB // 32)), np.uint32)
    inputs = make_inputs(mask=mask, any_mask=False, temperature=0.0)
    drawn = sample_jit(logits, inputs, make_state(), num_candidates=2, mode="raw_logprobs")
    np.testing.assert_array_equal(drawn.token, 7)
