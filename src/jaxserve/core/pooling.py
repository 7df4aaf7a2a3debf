"""What embedding and scoring give back, and the ways to make one vector of many."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np


PoolingType = Literal["mean", "last", "cls", "max"]
"""mean and max go over all tokens of a text, cls takes its first token and last its last one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingOutput:
    """The vector of one text.

    Attributes:
        vector: The embedding, float32.
    """

    vector: "np.ndarray"

    @property
    def embedding(self) -> list[float]:
        """The vector as plain numbers."""
        return self.vector.tolist()

    @property
    def hidden_size(self) -> int:
        """How many numbers there are."""
        return len(self.vector)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingRequestOutput:
    """A text with its vector.

    Attributes:
        request_id: Identity of the text.
        prompt_token_ids: Its tokens, as far as they were used.
        outputs: The vector.
        finished: Always true; there are no partial results.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOutput:
    """How well two texts go together.

    Attributes:
        score: From -1 to 1 where vectors are compared; what its head says from a cross-encoder.
    """

    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRequestOutput:
    """A pair of texts with its score.

    Attributes:
        request_id: Identity of the pair.
        prompt_token_ids: Tokens of both texts, as far as they were used.
        outputs: The score.
        finished: Always true; there are no partial results.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: ScoringOutput
    finished: bool = True
