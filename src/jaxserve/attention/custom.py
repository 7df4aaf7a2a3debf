"""Attention of the caller's own, for a served model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from jaxserve.core.errors import ConfigError, did_you_mean
from jaxserve.pallas_kernels.variant import AttentionVariant

_KINDS = ("scalar", "head", "array")
"""Kinds of extras that are the same in every step."""


@dataclass(frozen=True, kw_only=True)
class CustomAttention:
    """How attention of a served model differs from the model's own; see `LLM`.

    It comes on top of what the model has: its windows and its soft cap apply first.

    Attributes:
        variant: What is different. `block_mask` is not asked: every key is visited.
        extra: The arrays that it reads, by name. They are constants of the compiled programs.

    Raises:
        ConfigError: If the variant needs what differs from step to step, or `extra` is not what it
            reads.
    """

    variant: AttentionVariant
    extra: Mapping[str, ArrayLike] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what can be known without a model."""
        variant = self.variant
        if variant.packed_mask != "none":
            raise ConfigError(
                f"an engine has no packed masks, got a variant with one ({variant.packed_mask}); "
                "use a mask_mod."
            )
        for name, kind in variant.extras.items():
            if kind not in _KINDS:
                raise ConfigError(
                    f"an engine gives a variant extras of the kinds {', '.join(_KINDS)}, but "
                    f"{name!r} is of the kind {kind!r}; a mask_mod or score_mod may use q_pos, "
                    "k_pos and head instead."
                )
        for name in self.extra:
            if name not in variant.extras:
                known = list(variant.extras)
                raise ConfigError(
                    f"unknown extra {name!r}.{did_you_mean(name, known)} "
                    f"The variant reads: {', '.join(known) or 'none'}."
                )
        missing = [name for name in variant.extras if name not in self.extra]
        if missing:
            raise ConfigError(
                f"the variant reads the extras {missing}, which are missing; pass them in extra."
            )

    def arrays(self, q_heads: int) -> dict[str, np.ndarray]:
        """Return the extras for a model with so many heads of queries.

        Raises:
            ConfigError: If one has not the shape that its kind says.
        """
        shapes = {"scalar": (), "head": (q_heads,)}
        arrays = {name: np.asarray(value) for name, value in self.extra.items()}
        for name, array in arrays.items():
            kind = self.variant.extras[name]
            if kind in shapes and array.shape != shapes[kind]:
                raise ConfigError(
                    f"the extra {name!r} is one per {kind}, so of shape {shapes[kind]} for this "
                    f"model, got {array.shape}."
                )
        return arrays
