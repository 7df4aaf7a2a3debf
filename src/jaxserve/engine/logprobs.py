"""Log-probabilities on their way from the device to a `TokenEvent`."""

from collections.abc import Callable

import numpy as np

from jaxserve.core.event import Logprob, TokenLogprobs
from jaxserve.engine.sampler import Sampled


class HostLogprobs:
    """Log-probabilities of one step, fetched from the device.

    Args:
        sampled: What the step drew.
        with_candidates: Whether some entry will name other candidates than the drawn token.
    """

    def __init__(self, sampled: Sampled, *, with_candidates: bool) -> None:
        """Wait for the device."""
        self._logprob = np.asarray(sampled.logprob)
        self._rank = np.asarray(sampled.rank)
        self._tokens: np.ndarray | None = None
        self._values: np.ndarray | None = None
        if with_candidates:
            self._tokens = np.asarray(sampled.top_token)
            self._values = np.asarray(sampled.top_logprob)

    def entry(
        self, index: int, token: int, count: int, decoded: Callable[[int], str | None]
    ) -> TokenLogprobs:
        """Build the entry of one token: itself first, then the `count` most likely ones."""
        own = Logprob(
            logprob=float(self._logprob[index]),
            rank=int(self._rank[index]),
            decoded_token=decoded(token),
        )
        entry = {token: own}
        if self._tokens is None or self._values is None:
            return entry
        number = self._tokens.shape[1] if count < 0 else min(count, self._tokens.shape[1])
        for rank in range(number):
            candidate = int(self._tokens[index, rank])
            if candidate not in entry:
                entry[candidate] = Logprob(
                    logprob=float(self._values[index, rank]),
                    rank=rank + 1,
                    decoded_token=decoded(candidate),
                )
        return entry
