"""Request bodies of embeddings, scores and reranking.

Embeddings follow OpenAI, scores vLLM, and reranking what the clients of Jina and Cohere send; one
body takes the names of all.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxserve.serve.openai_api import Body, ChatMessage, ChatTemplateBody

MAX_TEXTS = 4096
"""Most texts of one request."""


class PoolingBody(Body):
    """Fields that all of them share."""

    model: str | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    priority: int = Field(default=0, ge=-(2**63), lt=2**63)
    request_id: str | None = None


class EmbeddingBody(PoolingBody, ChatTemplateBody):
    """Body of `POST /v1/embeddings`, with either an input or messages."""

    input: str | list[str] | list[int] | list[list[int]] | None = Field(
        default=None, description="Text or token ids of one input, or a list of either."
    )
    messages: list[ChatMessage] = Field(default=[])
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(default=None, ge=1)
    normalize: bool | None = None
    use_activation: bool | None = Field(
        default=None, description="Another name of normalize; normalize wins."
    )


class ScoreBody(PoolingBody):
    """Body of `POST /v1/score`: one text and many, or as many of both."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = Field(default=None, description="Another name of text_1.")
    documents: str | list[str] | None = Field(default=None, description="Another name of text_2.")
    query: str | list[str] | None = Field(default=None, description="Another name of text_1.")
    items: str | list[str] | None = Field(default=None, description="Another name of text_2.")
    data_1: str | list[str] | None = Field(default=None, description="Another name of text_1.")
    data_2: str | list[str] | None = Field(default=None, description="Another name of text_2.")
    label_token_ids: list[int] | None = Field(
        default=None, description="Refused: scores of tokens are log-probabilities of completions."
    )


class Document(BaseModel):
    """A document that is more than its text; the other fields come back unchanged."""

    model_config = ConfigDict(extra="allow", strict=True)

    text: str


class RerankBody(PoolingBody):
    """Body of `POST /v1/rerank`."""

    query: str
    documents: list[str | Document]
    top_n: int | None = Field(default=None, ge=0, description="Best results; all, if 0 or absent.")
    return_documents: bool | None = None
    max_tokens_per_doc: int | None = Field(
        default=None, ge=1, description="Longer documents are cut; Cohere's truncate_prompt_tokens."
    )
