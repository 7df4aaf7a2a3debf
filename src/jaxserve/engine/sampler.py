"""Logits -> tokens. Every sampling parameter is an array, so no request compiles anything.

Work that no row needs is skipped at run time by `lax.cond`: a greedy batch pays for one argmax.

Top-k and top-p need no sort: the logit above which tokens are kept is found by bisection over the
bit patterns of float32, some thirty cheap passes, each exact. A token is then drawn by inverting
the cumulative distribution with one uniform number per row, which depends on nothing but the
row's seed and output position.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxserve.core.config import LogprobsMode

MAX_BANNED = 32
"""Stop tokens per row that `min_tokens` can hold back."""

_BLOCK = 256
_FORBIDDEN = -jnp.inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowState:
    """What stays on the device between steps, one entry per sequence row.

    Attributes:
        last_token: The latest token; the next decode's input.
        counts: How often each token was generated.
        prompt_seen: Which tokens the prompt holds.
        bias: Added to the logits; -inf forbids.
    """

    last_token: Int[Array, " max_rows"]
    counts: Int[Array, "max_rows vocab"]
    prompt_seen: Bool[Array, "max_rows vocab"]
    bias: Float[Array, "max_rows vocab"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingInputs:
    """Parameters of one step, one entry per sequence row.

    Attributes:
        temperature: 0 is greedy.
        top_p: 1 is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off.
        presence_penalty: 0 is off.
        frequency_penalty: 0 is off.
        top_k: 0 is off.
        seed: Key of the row's random stream.
        output_position: Index of the token to be drawn among the row's outputs.
        banned: Token ids that may not be drawn in this step; -1 is none.
        mask: Tokens that may be drawn, one bit each, lowest bit first.
        any_random: Whether some row is not greedy.
        any_filter: Whether some row uses top-k, top-p or min-p.
        any_penalty: Whether some row uses a penalty.
        any_bias: Whether some row has a bias or banned tokens.
        any_mask: Whether some row is constrained.
        any_logprobs: Whether some row reports log-probabilities.
        any_top_logprobs: Whether some row reports those of other candidates.
    """

    temperature: Float[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]
    repetition_penalty: Float[Array, " rows"]
    presence_penalty: Float[Array, " rows"]
    frequency_penalty: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    seed: UInt32[Array, "rows 2"]
    output_position: Int[Array, " rows"]
    banned: Int[Array, "rows banned"]
    mask: UInt32[Array, "rows words"]
    any_random: Bool[Array, ""]
    any_filter: Bool[Array, ""]
    any_penalty: Bool[Array, ""]
    any_bias: Bool[Array, ""]
    any_mask: Bool[Array, ""]
    any_logprobs: Bool[Array, ""]
    any_top_logprobs: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a step draws.

    Attributes:
        token: The drawn token of each row.
        logprob: Its log-probability; 0 unless some row asked.
        rank: Its rank, 1 is the most likely; 0 unless some row asked.
        top_token: The most likely tokens, if some row asked.
        top_logprob: Their log-probabilities.
    """

    token: Int[Array, " rows"]
    logprob: Float[Array, " rows"]
    rank: Int[Array, " rows"]
    top_token: Int[Array, "rows candidates"]
    top_logprob: Float[Array, "rows candidates"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """Draft tokens of one step; those of one sequence lie side by side, in order.

    Attributes:
        row: Sequence row of each.
        index: Which of its sequence's drafts it is, from 1; 0 is padding.
        token: What is supposed to come.
    """

    row: Int[Array, " drafts"]
    index: Int[Array, " drafts"]
    token: Int[Array, " drafts"]


def sample(
    logits: Float[Array, "rows vocab"],
    inputs: SamplingInputs,
    state: RowState,
    *,
    num_candidates: int,
    mode: LogprobsMode,
    drafts: Drafts | None = None,
) -> Sampled:
    """Draw one token per row.

    Args:
        logits: Raw scores, float32.
        inputs: Parameters of this step.
        state: Token counts and biases of the first `rows` rows.
        num_candidates: Most candidates reported per row.
        mode: Whether raw or processed values are reported, and as logits or log-probabilities.
        drafts: Draft tokens; behind the sequence rows, `logits` and `inputs` then have a further
            row for each, which draws the token that would follow it.

    Source: the order of vLLM: bias and bans, penalties, grammar, temperature, min-p, top-k, top-p.
    """
    rows = logits.shape[0] if drafts is None else logits.shape[0] - drafts.token.shape[0]

    def of_rows(x: Array) -> Array:
        return x[:rows] if drafts is None else jnp.concatenate([x[:rows], x[drafts.row]])

    processed = lax.cond(
        inputs.any_bias,
        lambda x: _ban(x + of_rows(state.bias), inputs.banned),
        lambda x: x,
        logits,
    )

    def with_penalties(x: Array) -> Array:
        counts = of_rows(state.counts)
        if drafts is not None:
            counts = add_drafts(counts, drafts)
        return penalize(x, inputs, counts, of_rows(state.prompt_seen))

    processed = lax.cond(inputs.any_penalty, with_penalties, lambda x: x, processed)
    processed = lax.cond(inputs.any_mask, lambda x: forbid(x, inputs.mask), lambda x: x, processed)
    greedy = _argmax(processed)

    def draw(x: Array) -> tuple[Array, Array]:
        is_greedy = inputs.temperature == 0
        scaled = x / jnp.where(is_greedy, 1.0, inputs.temperature)[:, None]
        scaled = lax.cond(
            inputs.any_filter, lambda y: filter_logits(y, inputs), lambda y: y, scaled
        )
        uniform = jax.vmap(_uniform)(inputs.seed, inputs.output_position)
        drawn = draw_by_inversion(jax.nn.softmax(scaled, axis=-1), uniform)
        return jnp.where(is_greedy, greedy, drawn), jnp.where(is_greedy[:, None], x, scaled)

    token, processed = lax.cond(inputs.any_random, draw, lambda x: (greedy, x), processed)
    values = logits if mode.startswith("raw") else processed
    return report(
        values,
        token,
        inputs.any_logprobs,
        inputs.any_top_logprobs,
        num_candidates=num_candidates,
        normalize=mode.endswith("logprobs"),
    )


def add_drafts(
    counts: Int[Array, "rows_and_drafts vocab"], drafts: Drafts
) -> Int[Array, "rows_and_drafts vocab"]:
    """Count, in the row behind each draft token, it and the drafts of its sequence before it."""
    size = drafts.token.shape[0]
    first = counts.shape[0] - size
    order = jnp.arange(size)
    seen = (drafts.row[:, None] == drafts.row[None, :]) & (order[:, None] >= order[None, :])
    seen &= drafts.index[None, :] > 0
    return counts.at[first + order[:, None], drafts.token[None, :]].add(seen.astype(counts.dtype))


def accept(
    token: Int[Array, " rows_and_drafts"], drafts: Drafts
) -> tuple[Bool[Array, " drafts"], Bool[Array, " drafts"]]:
    """Accept draft tokens for as long as each is the token that was drawn in its place.

    A proposal that is certain of its token `d` is accepted, in exact rejection sampling, with the
    target's probability of `d`, and otherwise replaced by a draw from the target without `d`.
    Drawing from the target and comparing does the same: it hits `d` just as often, and a draw that
    misses is one without `d`. Moreover it uses the row's random number of that position and no
    other, so that a seed gives the tokens that it gives without drafts.

    Args:
        token: Drawn tokens: one per row, then one behind each draft.
        drafts: The drafts.

    Returns:
        Which drafts are accepted, and which of these are the last ones of their sequences.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, theorem 3.5
        and appendix A.1, for a proposal of probability 1.
    """
    size = drafts.token.shape[0]
    rows = token.shape[0] - size
    before = jnp.where(drafts.index > 1, rows - 1 + jnp.arange(size), drafts.row)
    is_hit = (token[before] == drafts.token) & (drafts.index > 0)
    misses = jnp.cumsum(~is_hit)
    first = jnp.arange(size) - drafts.index + 1
    accepted = is_hit & is_hit[first] & (misses == misses[first])
    following = jnp.append(accepted[1:] & (drafts.index[1:] > 1), jnp.zeros((1,), bool))
    return accepted, accepted & ~following


def report(
    values: Float[Array, "rows vocab"],
    token: Int[Array, " rows"],
    any_logprobs: Bool[Array, ""],
    any_top_logprobs: Bool[Array, ""],
    *,
    num_candidates: int,
    normalize: bool,
) -> Sampled:
    """Compute the log-probabilities of chosen tokens and of the most likely ones, if wanted."""
    rows = values.shape[0]

    def chosen(x: Array) -> tuple[Array, Array, Array]:
        picked = jnp.take_along_axis(x, token[:, None], axis=-1)
        shift = jax.nn.logsumexp(x, axis=-1) if normalize else jnp.zeros((rows,), jnp.float32)
        rank = 1 + jnp.sum(x > picked, axis=-1, dtype=jnp.int32)
        return picked[:, 0] - shift, rank, shift

    zeros = jnp.zeros((rows,), jnp.float32)
    logprob, rank, shift = lax.cond(
        any_logprobs, chosen, lambda _x: (zeros, zeros.astype(jnp.int32), zeros), values
    )

    def candidates(x: Array) -> tuple[Array, Array]:
        top, index = lax.top_k(x, num_candidates)
        return index.astype(jnp.int32), top - shift[:, None]

    empty = jnp.zeros((rows, num_candidates), jnp.float32)
    top_token, top_logprob = lax.cond(
        any_top_logprobs, candidates, lambda _x: (empty.astype(jnp.int32), empty), values
    )
    return Sampled(
        token=token, logprob=logprob, rank=rank, top_token=top_token, top_logprob=top_logprob
    )


def forbid(
    logits: Float[Array, "rows vocab"], mask: UInt32[Array, "rows words"]
) -> Float[Array, "rows vocab"]:
    """Forbid the tokens whose bit is not set; bit i of word w is token 32 w + i."""
    rows, vocab = logits.shape
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(rows, -1)[:, :vocab] != 0, logits, _FORBIDDEN)


def penalize(
    logits: Float[Array, "rows vocab"],
    inputs: SamplingInputs,
    counts: Int[Array, "rows vocab"],
    prompt_seen: Bool[Array, "rows vocab"],
) -> Float[Array, "rows vocab"]:
    """Apply repetition, frequency and presence penalties.

    Source: CTRL (repetition: divide positive, multiply negative logits of tokens in prompt or
    output); OpenAI API (frequency and presence: subtract, for generated tokens).
    """
    generated = counts > 0
    factor = jnp.where(generated | prompt_seen, inputs.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = logits - inputs.frequency_penalty[:, None] * counts
    return logits - inputs.presence_penalty[:, None] * generated


def filter_logits(
    logits: Float[Array, "rows vocab"], inputs: SamplingInputs
) -> Float[Array, "rows vocab"]:
    """Forbid tokens outside min-p, then top-k, then top-p; ties with the last kept one stay."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.where(logits < top + jnp.log(inputs.min_p)[:, None], _FORBIDDEN, logits)
    vocab = logits.shape[-1]
    wanted = jnp.where(inputs.top_k > 0, jnp.minimum(inputs.top_k, vocab), vocab)

    def enough_tokens(kept: Array) -> Array:
        return jnp.sum(kept, axis=-1) >= wanted

    floor = _largest_floor(logits, enough_tokens)
    logits = jnp.where(_ordered(logits) < floor[:, None], _FORBIDDEN, logits)
    probability = jax.nn.softmax(logits, axis=-1)

    def enough_mass(kept: Array) -> Array:
        return jnp.sum(jnp.where(kept, probability, 0.0), axis=-1) >= inputs.top_p

    floor = _largest_floor(logits, enough_mass)
    is_on = (inputs.top_p < 1)[:, None]
    return jnp.where(is_on & (_ordered(logits) < floor[:, None]), _FORBIDDEN, logits)


def draw_by_inversion(
    probability: Float[Array, "rows vocab"], uniform: Float[Array, " rows"]
) -> Int[Array, " rows"]:
    """Draw from each row by inverting its cumulative distribution, in two levels.

    Args:
        probability: Rows of non-negative weights, at least one positive each.
        uniform: One number in [0, 1) per row.
    """
    rows, vocab = probability.shape
    padded = jnp.pad(probability, ((0, 0), (0, -vocab % _BLOCK)))
    blocks = padded.reshape(rows, -1, _BLOCK)
    block_end = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    total = block_end[:, -1]
    target = jnp.minimum(uniform * total, total * (1 - 2.0**-23))
    block = jnp.argmax(block_end > target[:, None], axis=-1)
    before = jnp.where(
        block > 0, jnp.take_along_axis(block_end, (block - 1)[:, None], axis=1)[:, 0], 0.0
    )
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    end = jnp.cumsum(inside, axis=-1)
    # Rounding can leave the target at or behind the block's own end: then its last token counts.
    passed = (end > (target - before)[:, None]) & (inside > 0)
    last = _BLOCK - 1 - jnp.argmax((inside > 0)[:, ::-1], axis=-1)
    index = jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)
    return jnp.minimum(block * _BLOCK + index, vocab - 1).astype(jnp.int32)


def _argmax(x: Array) -> Array:
    """Find the first largest element of each row, block first, element second.

    XLA's CPU backend takes maxima sixteen times faster than it finds their places.
    """
    rows, vocab = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -vocab % _BLOCK)), constant_values=_FORBIDDEN)
    blocks = padded.reshape(rows, -1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def _ban(logits: Array, banned: Array) -> Array:
    row = jnp.arange(logits.shape[0])[:, None]
    index = jnp.where(banned < 0, logits.shape[1], banned)
    return logits.at[row, index].set(_FORBIDDEN, mode="drop")


def _uniform(seed: Array, position: Array) -> Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.uniform(key)


def _ordered(x: Array) -> Array:
    """Map float32 to int32 so that the order stays the same; zeros of both signs are equal."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_floor(
    logits: Float[Array, "rows vocab"], is_enough: Callable[[Array], Array]
) -> Int[Array, " rows"]:
    """Find, per row, the highest floor (as ordered bits) for which what is kept is enough.

    Args:
        logits: The scores.
        is_enough: Given which tokens are kept, tells per row whether they suffice; true when all
            are kept.
    """
    bits = _ordered(logits)
    low = jnp.min(bits, axis=-1)
    high = jnp.max(bits, axis=-1)

    def unsettled(bounds: tuple[Array, Array]) -> Array:
        return jnp.any(bounds[0] < bounds[1])

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # The mean rounded up, without overflow: low < middle <= high.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        ok = is_enough(bits >= middle[:, None])
        settled = low >= high
        low = jnp.where(settled | ~ok, low, middle)
        high = jnp.where(settled | ok, high, middle - 1)
        return low, high

    return lax.while_loop(unsettled, halve, (low, high))[0]
