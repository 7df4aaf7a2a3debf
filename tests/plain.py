"""Plain versions, in numpy and float64, of what the engine does with many tricks."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.request import SamplingParams
from jaxserve.engine.scoring import forward


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Normalise in float64."""
    wide = np.asarray(x, np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def penalize(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> np.ndarray:
    """Apply bias and penalties token by token."""
    x = np.asarray(logits, np.float64).copy()
    if params.allowed_token_ids is not None:
        forbidden = np.ones(len(x), bool)
        forbidden[list(params.allowed_token_ids)] = False
        x[forbidden] = -np.inf
    for token, value in (params.logit_bias or {}).items():
        x[token] += value
    for token in {*prompt, *output}:
        rate = params.repetition_penalty
        x[token] = x[token] / rate if x[token] > 0 else x[token] * rate
    for token in output:
        x[token] -= params.frequency_penalty
    for token in set(output):
        x[token] -= params.presence_penalty
    return x


def kept(logits: np.ndarray, *, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Tell which tokens stay after min-p, top-k and top-p; ties with the last one stay."""
    x = np.asarray(logits, np.float64).copy()
    if min_p > 0:
        x[x < x.max() + np.log(min_p)] = -np.inf
    if top_k > 0:
        x[x < np.sort(x)[::-1][min(top_k, len(x)) - 1]] = -np.inf
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        mass = np.cumsum(np.exp(log_softmax(x))[order])
        last = min(int(np.searchsorted(mass, top_p - 1e-12)), len(x) - 1)
        x[x < x[order[last]]] = -np.inf
    return np.isfinite(x)


def uniform(seed: int, position: int) -> float:
    """Return the number that decides which token is drawn at an output position."""
    words = np.asarray([(seed % 2**64) >> 32, seed % 2**32], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    return float(jax.random.uniform(jax.random.fold_in(key, position)))


def draw(logits: np.ndarray, params: SamplingParams, seed: int, position: int) -> int:
    """Draw one token from penalised logits."""
    if params.is_greedy:
        return int(np.argmax(logits))
    scaled = logits / params.temperature
    stay = kept(scaled, top_k=max(0, params.top_k), top_p=params.top_p, min_p=params.min_p)
    mass = np.cumsum(np.exp(log_softmax(np.where(stay, scaled, -np.inf))))
    return int(np.searchsorted(mass, uniform(seed, position) * mass[-1], side="right"))


class DenseLoop:
    """Generates by running the whole sequence anew for every token, without any cache.

    Args:
        graph: Structure of the model.
        params: Its weights.
        length: Most tokens of a sequence.
    """

    def __init__(self, graph: object, params: object, length: int = 384) -> None:
        self._length = length
        run: Callable[..., jax.Array] = jax.jit(lambda p, t: forward(graph, p, t).logits)
        self._run = lambda tokens: run(params, tokens)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the scores after every token."""
        padded = np.zeros((1, self._length), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(self._run(padded))[0, : len(tokens)]

    def complete(
        self, prompt: Sequence[int], params: SamplingParams, index: int = 0
    ) -> tuple[list[int], list[float]]:
        """Return `max_tokens` tokens and their log-probabilities; nothing ends it earlier."""
        output: list[int] = []
        logprobs: list[float] = []
        for position in range(params.max_tokens or 0):
            raw = self.logits([*prompt, *output])[-1]
            wanted = penalize(raw, params, prompt, output)
            token = draw(wanted, params, (params.seed or 0) + index, position)
            logprobs.append(float(log_softmax(raw)[token]))
            output.append(token)
        return output, logprobs
