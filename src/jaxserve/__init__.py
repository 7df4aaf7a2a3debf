"""LLM serving on JAX: an OpenAI-compatible server and a library over one engine.

Importing this package touches no device and loads neither JAX nor a web library; each public name
is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.attention.custom import CustomAttention
    from jaxserve.core.config import EngineConfig
    from jaxserve.core.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DeclinedError,
        EngineDeadError,
        JaxserveError,
        MissingExtraError,
        ModelNotFoundError,
        RequestError,
        UnsupportedError,
    )
    from jaxserve.core.event import (
        CompletionOutput,
        FinishReason,
        Logprob,
        RequestOutput,
        SloOutcome,
        SpecDecodeMetrics,
        TokenEvent,
    )
    from jaxserve.core.lora import LoRARequest
    from jaxserve.core.request import Request, SamplingParams, Slo
    from jaxserve.core.structured import StructuredOutputsParams
    from jaxserve.engine.async_engine import AsyncLLM
    from jaxserve.engine.export import export, load_params
    from jaxserve.engine.llm import LLM
    from jaxserve.models.quantization import dequantize

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "CustomAttention",
    "DeclinedError",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "JaxserveError",
    "LoRARequest",
    "Logprob",
    "MissingExtraError",
    "ModelNotFoundError",
    "Request",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Slo",
    "SloOutcome",
    "SpecDecodeMetrics",
    "StructuredOutputsParams",
    "TokenEvent",
    "UnsupportedError",
    "__version__",
    "dequantize",
    "export",
    "load_params",
]

_HOMES = {
    "LLM": "jaxserve.engine.llm",
    "AsyncLLM": "jaxserve.engine.async_engine",
    "export": "jaxserve.engine.export",
    "load_params": "jaxserve.engine.export",
    "dequantize": "jaxserve.models.quantization",
    "CustomAttention": "jaxserve.attention.custom",
    "EngineConfig": "jaxserve.core.config",
    "CompletionOutput": "jaxserve.core.event",
    "FinishReason": "jaxserve.core.event",
    "Logprob": "jaxserve.core.event",
    "RequestOutput": "jaxserve.core.event",
    "TokenEvent": "jaxserve.core.event",
    "LoRARequest": "jaxserve.core.lora",
    "Request": "jaxserve.core.request",
    "SamplingParams": "jaxserve.core.request",
    "Slo": "jaxserve.core.request",
    "SloOutcome": "jaxserve.core.event",
    "SpecDecodeMetrics": "jaxserve.core.event",
    "StructuredOutputsParams": "jaxserve.core.structured",
}


def __getattr__(name: str) -> object:
    """Load a public name at its first use.

    Raises:
        AttributeError: If there is no such name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "jaxserve.core.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
