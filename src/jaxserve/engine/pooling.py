"""From texts to vectors and scores, whatever computes them: an encoder, or a decoder's states."""

import operator
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from jaxserve.core.errors import RequestError
from jaxserve.core.lora import Adapter
from jaxserve.core.pooling import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from jaxserve.core.request import new_request_id
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.pooling import PoolingConfig

Prompt = str | Sequence[int] | Mapping[str, object]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledText:
    """A text, or a pair of texts, ready to be pooled.

    Attributes:
        token_ids: Its tokens; never empty.
        num_first: How many of them belong to the first text of a pair; all, if it is no pair.
    """

    token_ids: Sequence[int]
    num_first: int


class Pooler(Protocol):
    """Computes one vector per text.

    Attributes:
        pooling: How it does so.
        max_length: Most tokens of a text.
        vocab_size: Token ids are below this.
        hidden_size: Length of a vector.
        num_labels: Outputs of a classification head, which then stand in the vector's place; 0
            without one.
        applies_sigmoid: Whether a single output passes a sigmoid to become a score.
    """

    pooling: PoolingConfig
    max_length: int
    vocab_size: int
    hidden_size: int
    num_labels: int
    applies_sigmoid: bool

    def submit(
        self,
        texts: Sequence[PooledText],
        *,
        priority: int = 0,
        adapter: Adapter | None = None,
    ) -> "Future[list[np.ndarray]]":
        """Hand texts over; the future holds their vectors, in order.

        Cancelling the future drops the texts that have not been started.

        Args:
            texts: The texts.
            priority: Lower is served first, where the engine knows priorities.
            adapter: Low-rank adapter to add to a decoder's weights.

        Raises:
            RequestError: If one of them can never be served.
            CapacityError: If too many requests are under way.
            EngineDeadError: If the engine has stopped.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """What happens to texts that are too long.

    Attributes:
        limit: Most tokens to keep; -1 is as many as the model takes; None refuses longer texts.
        keeps_end: Whether the end of a text is kept instead of its beginning.
    """

    limit: int | None = None
    keeps_end: bool = False


KEEP_WHOLE = Truncation()
"""Texts that are too long are refused."""


class TextPooling:
    """Embeds and scores.

    Args:
        pooler: Computes the vectors.
        tokenizer: For text; None takes token ids only.
    """

    def __init__(self, pooler: Pooler, tokenizer: Tokenizer | None) -> None:
        """Keep both."""
        self.pooler = pooler
        self._tokenizer = tokenizer

    @property
    def is_cross_encoder(self) -> bool:
        """Whether pairs of texts are scored by the model's own head."""
        return self.pooler.num_labels > 0

    # Reading -----------------------------------------------------------------------------------

    def read(
        self,
        prompts: Sequence[Prompt],
        truncation: Truncation,
        *,
        add_special_tokens: bool = True,
        param: str = "input",
    ) -> list[PooledText]:
        """Turn prompts into tokens and check them; takes a while for many.

        Args:
            prompts: Texts, token ids, or mappings.
            truncation: What happens to long ones.
            add_special_tokens: Add what the model expects around a text.
            param: Name of the request field, for errors.

        Raises:
            RequestError: If one of them cannot be served.
        """
        plain = [_plain(prompt, param) for prompt in prompts]
        limit = self._limit(truncation)
        texts = [prompt for prompt in plain if isinstance(prompt, str)]
        found = iter(
            self._encode(texts, None, limit, truncation, special=add_special_tokens, param=param)
        )
        read: list[PooledText] = []
        for prompt in plain:
            if isinstance(prompt, str):
                ids = next(found)[0]
            else:
                ids = _cut(prompt, limit, keeps_end=truncation.keeps_end)
            self._check(ids, param, is_text=isinstance(prompt, str))
            read.append(PooledText(token_ids=ids, num_first=len(ids)))
        return read

    def read_pairs(
        self, first: Sequence[str], second: Sequence[str], truncation: Truncation
    ) -> list[PooledText]:
        """Turn pairs of texts into tokens for a cross-encoder.

        Args:
            first: The first text of each pair.
            second: The second one.
            truncation: What happens to long pairs.

        Raises:
            RequestError: If one of them cannot be served.
        """
        limit = self._limit(truncation)
        read: list[PooledText] = []
        for ids, segments in self._encode(
            first, second, limit, truncation, special=True, param="input"
        ):
            self._check(ids, "input", is_text=True)
            read.append(PooledText(token_ids=ids, num_first=segments.count(0)))
        return read

    def _limit(self, truncation: Truncation) -> int | None:
        limit, longest = truncation.limit, self.pooler.max_length
        if limit is None:
            return None
        if limit == 0 or limit < -1 or limit > longest:
            raise RequestError(
                f"truncate_prompt_tokens must be from 1 to {longest} for this model, or -1 for as "
                f"many tokens as it takes, got {limit}.",
                param="truncate_prompt_tokens",
            )
        return longest if limit == -1 else limit

    def _encode(
        self,
        texts: Sequence[str],
        seconds: Sequence[str] | None,
        limit: int | None,
        truncation: Truncation,
        *,
        special: bool,
        param: str,
    ) -> list[tuple[list[int], list[int]]]:
        if not texts:
            return []
        if self._tokenizer is None:
            raise RequestError(
                "this model has no tokenizer; give token ids, or pass --tokenizer.", param=param
            )
        if self.pooler.pooling.lowercase:
            texts = [text.lower() for text in texts]
            seconds = None if seconds is None else [text.lower() for text in seconds]
        return self._tokenizer.encode_texts(
            texts,
            seconds,
            max_tokens=limit,
            from_left=truncation.keeps_end,
            add_special_tokens=special,
        )

    def _check(self, ids: Sequence[int], param: str, *, is_text: bool) -> None:
        longest, vocab = self.pooler.max_length, self.pooler.vocab_size
        if not ids:
            raise RequestError(
                f"{param} must not hold a text without tokens; give at least one.", param=param
            )
        if len(ids) > longest:
            raise RequestError(
                f"This model's maximum context length is {longest} tokens, but a text of {param} "
                f"has {len(ids)}. Shorten it, or set truncate_prompt_tokens to -1 to cut it.",
                param=param,
            )
        if not is_text and not (min(ids) >= 0 and max(ids) < vocab):
            bad = min(ids) if min(ids) < 0 else max(ids)
            raise RequestError(
                f"token ids must be in [0, {vocab}), got {str(bad)[:40]}.", param=param
            )

    # Embedding ---------------------------------------------------------------------------------

    def check_embeds(self) -> None:
        """Check that the model gives vectors.

        Raises:
            RequestError: If it is a cross-encoder.
        """
        if self.is_cross_encoder:
            raise RequestError(
                "This model is a cross-encoder, which scores pairs of texts and has no embeddings; "
                "use /v1/score or /v1/rerank, or serve an embedding model."
            )

    def check_dimensions(self, dimensions: int | None) -> None:
        """Check that vectors may be cut to a length.

        Raises:
            RequestError: If they may not.
        """
        pooling, size = self.pooler.pooling, self.pooler.hidden_size
        if dimensions is None or dimensions == size:
            return
        if not pooling.is_matryoshka:
            raise RequestError(
                f"dimensions must be {size} for this model or be left out, got {dimensions}: its "
                "vectors keep no meaning when they are cut (it is no matryoshka model).",
                param="dimensions",
            )
        allowed = pooling.dimensions
        if not 1 <= dimensions <= size or (allowed and dimensions not in allowed):
            known = ", ".join(map(str, allowed)) if allowed else f"from 1 to {size}"
            raise RequestError(
                f"dimensions must be {known} for this model, got {dimensions}.", param="dimensions"
            )

    def finish(
        self, vector: np.ndarray, *, dimensions: int | None = None, normalize: bool | None = None
    ) -> np.ndarray:
        """Cut and normalise a vector as a request asks.

        Args:
            vector: What the pooler gave.
            dimensions: Length to cut to; None keeps it.
            normalize: Whether to bring it to length 1; None does as the model's files say.
        """
        if dimensions is not None:
            vector = vector[:dimensions]
        wanted = self.pooler.pooling.normalize if normalize is None else normalize
        if not wanted:
            return vector
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        return (vector / max(norm, 1e-12)).astype(np.float32)

    def embeddings(
        self,
        texts: Sequence[PooledText],
        vectors: Sequence[np.ndarray],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Put texts and their vectors together."""
        return [
            EmbeddingRequestOutput(
                request_id=new_request_id(),
                prompt_token_ids=list(text.token_ids),
                outputs=EmbeddingOutput(
                    vector=self.finish(vector, dimensions=dimensions, normalize=normalize)
                ),
            )
            for text, vector in zip(texts, vectors, strict=True)
        ]

    # Scoring -----------------------------------------------------------------------------------

    def check_scores(self) -> None:
        """Check that the model scores pairs with one number.

        Raises:
            RequestError: If it is a classifier with several outputs.
        """
        if self.pooler.num_labels > 1:
            raise RequestError(
                f"This model is a classifier with {self.pooler.num_labels} outputs; scores need a "
                "cross-encoder with one output, or an embedding model."
            )

    def read_scored(
        self, first: Sequence[str], second: Sequence[str], truncation: Truncation
    ) -> list[PooledText]:
        """Turn what is to be scored into tokens: pairs for a cross-encoder, else all texts.

        Args:
            first: One text, or as many as `second`.
            second: The texts that they are compared with.
            truncation: What happens to long ones.

        Raises:
            RequestError: If the numbers do not fit together or a text cannot be served.
        """
        check_pairs(first, second)
        if self.is_cross_encoder:
            return self.read_pairs(_spread(first, len(second)), second, truncation)
        return self.read([*first, *second], truncation)

    def scores(
        self,
        first: Sequence[str],
        second: Sequence[str],
        texts: Sequence[PooledText],
        vectors: Sequence[np.ndarray],
    ) -> list[ScoringRequestOutput]:
        """Compute the scores from what the pooler gave for the texts of `read_scored`."""
        if self.is_cross_encoder:
            return [
                _scored(text.token_ids, self._head_score(float(vector[0])))
                for text, vector in zip(texts, vectors, strict=True)
            ]
        left = [*range(len(first))] * (len(second) if len(first) == 1 else 1)
        outputs: list[ScoringRequestOutput] = []
        for a, b in zip(left, range(len(first), len(texts)), strict=True):
            ids = [*texts[a].token_ids, *texts[b].token_ids]
            outputs.append(_scored(ids, cosine(vectors[a], vectors[b])))
        return outputs

    def _head_score(self, logit: float) -> float:
        return float(1 / (1 + np.exp(-logit))) if self.pooler.applies_sigmoid else logit


def check_pairs(first: Sequence[str], second: Sequence[str]) -> None:
    """Check that texts can be compared one with many, or one by one.

    Raises:
        RequestError: If they cannot.
    """
    for name, texts in (("data_1", first), ("data_2", second)):
        if not texts:
            raise RequestError(f"{name} must hold at least one text, got none.", param=name)
        for text in texts:
            if not isinstance(text, str):
                raise RequestError(
                    f"{name} must hold texts, got {type(text).__name__}.", param=name
                )
            if not text:
                raise RequestError(
                    f"{name} must not hold an empty string: nothing can be compared with it.",
                    param=name,
                )
    if len(first) not in (1, len(second)):
        raise RequestError(
            f"data_1 must hold one text, or as many as data_2; got {len(first)} and {len(second)}.",
            param="data_1",
        )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of the angle between two vectors, in float64; 0 for a vector of zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))


def _spread(texts: Sequence[str], count: int) -> list[str]:
    return list(texts) * count if len(texts) == 1 else list(texts)


def _scored(ids: Sequence[int], score: float) -> ScoringRequestOutput:
    return ScoringRequestOutput(
        request_id=new_request_id(), prompt_token_ids=list(ids), outputs=ScoringOutput(score=score)
    )


def _cut(ids: Sequence[int], limit: int | None, *, keeps_end: bool) -> Sequence[int]:
    if limit is None or len(ids) <= limit:
        return ids
    return ids[-limit:] if keeps_end else ids[:limit]


def _plain(prompt: object, param: str) -> str | list[int]:
    """Return a prompt as text or token ids.

    Raises:
        RequestError: If it is neither, or empty.
    """
    if isinstance(prompt, Mapping):
        fields = cast("Mapping[str, object]", prompt)
        ids = fields.get("prompt_token_ids")
        prompt = fields.get("prompt") if ids is None else ids
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError(
                f"{param} must not hold an empty string: it has no embedding. Leave it out.",
                param=param,
            )
        return prompt
    try:
        # operator.index takes every kind of integer and nothing that would have to be rounded.
        return [operator.index(token) for token in prompt]  # type: ignore[attr-defined]
    except TypeError:
        raise RequestError(
            f"{param} must hold texts or lists of token ids, got {type(prompt).__name__}.",
            param=param,
        ) from None


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt or many as a list of prompts."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    listed = list(prompts)
    is_one = bool(listed) and not isinstance(listed[0], str | Mapping | Sequence | np.ndarray)
    if is_one:
        return [prompts]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def as_texts(texts: str | Sequence[str]) -> list[str]:
    """Return one text or many as a list of texts."""
    return [texts] if isinstance(texts, str) else list(texts)


def require_task(tasks: frozenset[str], task: str) -> None:
    """Check that a model is used for a task.

    Args:
        tasks: What it is used for.
        task: `generate` or `pooling`.

    Raises:
        RequestError: If it is not.
    """
    if task not in tasks:
        raise cannot(task)


def cannot(task: str) -> RequestError:
    """Say that the model is not used for a task."""
    if task == "generate":
        return RequestError(
            "This model does not generate here: it is an encoder or runs with --runner pooling. It "
            "serves /v1/embeddings, /v1/score and /v1/rerank."
        )
    return RequestError(
        "This model does not embed or score here: it runs with --runner generate. Start it with "
        "--runner auto or pooling."
    )
