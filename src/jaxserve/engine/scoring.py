"""Pure functions over a model's weights: log-probabilities and inner states, differentiable."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxserve.attention.metadata import CausalPlan
from jaxserve.core.errors import RequestError, did_you_mean
from jaxserve.models.layers import CausalLM

Hook = Callable[[Array], Array]
"""Takes a state, returns what replaces it; traced."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOutput:
    """What a forward pass gives.

    Attributes:
        logits: Scores of the vocabulary, float32.
        hidden: The states asked for, keyed as they were asked for.
    """

    logits: Float[Array, "batch time vocab"]
    hidden: dict[int | str, Float[Array, "batch time hidden"]]


def token_logprobs(
    graph: nnx.GraphDef[CausalLM],
    params: nnx.State,
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"] | None = None,
) -> Float[Array, "batch time"]:
    """Score each token given those before it.

    Args:
        graph: Structure of the model.
        params: Its weights.
        tokens: Token ids, padded on the right.
        mask: False entries score 0.

    Returns:
        Natural log-probabilities; 0 for the first token of each row.
    """
    output = forward(graph, params, tokens)
    scores = jax.nn.log_softmax(output.logits[:, :-1], axis=-1)
    chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    chosen = jnp.pad(chosen, ((0, 0), (1, 0)))
    return chosen if mask is None else jnp.where(mask, chosen, 0.0)


def forward(
    graph: nnx.GraphDef[CausalLM],
    params: nnx.State,
    tokens: Int[Array, "batch time"],
    *,
    return_hidden: Sequence[int | str] = (),
    hooks: Mapping[str, Hook] | None = None,
) -> ForwardOutput:
    """Run a model without a cache.

    Args:
        graph: Structure of the model.
        params: Its weights.
        tokens: Token ids, padded on the right.
        return_hidden: Which states to return; see `LLM.forward`.
        hooks: Name -> replacement function.

    Raises:
        RequestError: If a name is unknown.
    """
    model = nnx.merge(graph, params)
    num_layers = model.config.num_layers
    known = ("embed_tokens", *(f"layers.{i}" for i in range(num_layers)), "norm")
    wanted = {key: _state_name(key, known) for key in return_hidden}
    hooks = {_state_name(name, known): hook for name, hook in (hooks or {}).items()}
    seen: dict[str, Array] = {}

    def visit(name: str, value: Array) -> Array:
        value = hooks[name](value) if name in hooks else value
        seen[name] = value
        return value

    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    precision = "highest" if _dtype(params) == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        hidden, _ = model(tokens, positions, (None,) * num_layers, CausalPlan(), visit)
        logits = model.logits(hidden)
    return ForwardOutput(logits=logits, hidden={key: seen[name] for key, name in wanted.items()})


def _dtype(params: nnx.State) -> jnp.dtype:
    """Return the precision of the activations; that of a norm, which is never quantised."""
    return jax.tree.leaves(params["norm"])[0].dtype


def _state_name(key: int | str, known: Sequence[str]) -> str:
    """Name a state: 0 is the embeddings, i the output of the i-th layer, -1 the final states."""
    if isinstance(key, int) and -len(known) <= key < len(known):
        return known[key]
    if key in known:
        return str(key)
    raise RequestError(
        f"unknown state {key!r}; known: integers from {-len(known)} to {len(known) - 1}, and "
        f"{known[0]}, {known[1]}, ..., {known[-1]}.{did_you_mean(str(key), known)}",
        param="return_hidden",
    )
