"""Decoding a known text with sparse attention: how likely are its tokens then?

All tokens behind a prompt go through a layer together, but each attends as a step of decoding does:
as a row of its own, to clusters of the prompt and to what came since.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.rooms.sparse.captures import Capture, log_likelihood, run
from jaxserve import cpu_kernels
from jaxserve.attention.tactic.attention import SpanBackend, sparse_decode
from jaxserve.attention.tactic.clustering import ClusterIndex, build_index
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.models.layers import CausalLM


def best_backend(head_dim: int, capacity: int) -> SpanBackend:
    """Return the backend that is fastest here."""
    return "llvm" if cpu_kernels.supports_slots(head_dim, capacity, "float32") else "xla"


@partial(jax.jit, static_argnames=("scale", "config", "backend"))
def _attend(
    q: Array,
    keys: Array,
    values: Array,
    length: Array,
    index: ClusterIndex,
    p: Array,
    *,
    scale: float,
    config: TacticConfig,
    backend: SpanBackend,
) -> tuple[Array, Array]:
    def row(part: tuple[Array, Array]) -> tuple[Array, Array]:
        query, own = part
        out, stats = sparse_decode(
            query[None], keys, values, own[None], index, p[None],
            scale=scale, config=config, backend=backend,
        )  # fmt: skip
        return out[0], stats.tokens[0]

    return lax.map(row, (q, length))


class SparseDecoder:
    """Attention of tokens behind a prompt.

    Args:
        prompt: What attention of each layer works on, up to the end of the prompt.
        num_tokens: Tokens behind it.
        config: Settings of the clusters.

    Attributes:
        shares: Share of the tokens that each layer has read, one after the other.
    """

    def __init__(self, prompt: Sequence[Capture], num_tokens: int, config: TacticConfig) -> None:
        """Cluster the prompt."""
        self.length, self._clusters = len(prompt[0].k), config.clusters
        unit = config.clusters.segment_len
        pad = -(self.length + num_tokens) % unit + num_tokens
        self.parts = []
        for each in prompt:
            keys, values = (
                jnp.pad(x.swapaxes(0, 1), ((0, 0), (0, pad), (0, 0)))[None]
                for x in (each.k, each.v)
            )
            self.parts.append(build_index(keys, values, jnp.asarray([self.length]), config=config))
        self.shares: list[float] = []

    def attend(self, config: TacticConfig, p: float) -> Callable[[int, Capture], Array]:
        """Return the attention of a layer at one p; first layers are read whole.

        Args:
            config: Settings, with the same clusters.
            p: Share of the mass.
        """
        assert config.clusters == self._clusters
        self.shares = []

        def layer(number: int, capture: Capture) -> Array:
            index, keys, values = self.parts[number]
            count = len(capture.q)
            places = self.length + np.arange(count)
            keys = keys.at[0, :, places].set(capture.k)
            values = values.at[0, :, places].set(capture.v)
            share = 1.0 if number < config.dense_layers else p
            lengths = jnp.asarray(places + 1)
            out, tokens = _attend(
                capture.q, keys, values, lengths, index, jnp.float32(share),
                scale=capture.scale, config=config,
                backend=best_backend(capture.q.shape[-1], keys.shape[2]),
            )  # fmt: skip
            self.shares.append(float((tokens / lengths[:, None]).mean()))
            return out

        return layer


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """How a text does behind a prompt.

    Attributes:
        log_likelihood: Mean over its tokens.
        read: Share of the tokens there are that are read, in layers that may be sparse.
        is_greedy: Whether each token is the likeliest one, as greedy decoding would have it.
    """

    log_likelihood: float
    read: float
    is_greedy: bool


def score(
    model: CausalLM,
    ids: np.ndarray,
    layers: Sequence[Capture],
    prompt: int,
    runs: Sequence[tuple[TacticConfig, float]],
    *,
    first: int | None = None,
) -> list[Score]:
    """Score what follows a prompt.

    Args:
        model: The model.
        ids: The text.
        layers: What attention works on over the whole text.
        prompt: Tokens of the prompt; those behind it are decoded.
        runs: Settings and values of p to decode with; 1 is dense attention. Clusters are alike.
        first: First token that is scored; the second one behind the prompt if absent.
    """
    before = [dataclasses.replace(x, k=x.k[:prompt], v=x.v[:prompt]) for x in layers]
    decoder = SparseDecoder(before, len(ids) - prompt, runs[0][0])
    skipped = 0 if first is None else first - prompt - 1
    found = []
    for config, p in runs:
        hidden, _ = run(model, ids[prompt:], decoder.attend(config, p), first=prompt)
        made, greedy = log_likelihood(model, hidden, ids[prompt:])
        found.append(
            Score(
                log_likelihood=float(made[skipped:].mean()),
                read=float(np.mean(decoder.shares[config.dense_layers :])),
                is_greedy=bool(greedy[skipped:].all()),
            )
        )
    return found
