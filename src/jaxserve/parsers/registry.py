"""Parsers by name: the names of both leading engines, with dashes or underscores."""

from jaxserve.core.registry import Registry
from jaxserve.parsers.base import ToolParser
from jaxserve.parsers.code_tools import PythonicParser, QwenXmlParser
from jaxserve.parsers.harmony import HarmonyReasoning, HarmonyTools
from jaxserve.parsers.json_tools import (
    DeepSeek31Parser,
    DeepSeekParser,
    HermesParser,
    Llama3Parser,
    MistralParser,
)
from jaxserve.parsers.reasoning import (
    ImplicitThinkParser,
    KimiReasoning,
    MistralReasoning,
    ReasoningParser,
    SeedReasoning,
    ThinkParser,
)

TOOL_PARSERS: Registry[type[ToolParser]] = Registry("tool parser")
REASONING_PARSERS: Registry[type[ReasoningParser]] = Registry("reasoning parser")

TOOL_PARSERS.register("hermes", "qwen", "qwen25", "qwen3")(HermesParser)
TOOL_PARSERS.register("llama3_json", "llama3", "llama4_json")(Llama3Parser)
TOOL_PARSERS.register("mistral")(MistralParser)
TOOL_PARSERS.register("pythonic")(PythonicParser)
TOOL_PARSERS.register("qwen3_coder", "qwen3_xml")(QwenXmlParser)
TOOL_PARSERS.register("deepseek_v3", "deepseekv3")(DeepSeekParser)
TOOL_PARSERS.register("deepseek_v31", "deepseekv31")(DeepSeek31Parser)
TOOL_PARSERS.register("openai", "gpt_oss")(HarmonyTools)

REASONING_PARSERS.register(
    "deepseek_r1", "qwen3_thinking", "step3", "minimax_m2", "minimax", "kimi_k2"
)(ImplicitThinkParser)
REASONING_PARSERS.register("qwen3", "deepseek_v3", "glm45", "glm")(ThinkParser)
REASONING_PARSERS.register("mistral", "magistral")(MistralReasoning)
REASONING_PARSERS.register("seed_oss")(SeedReasoning)
REASONING_PARSERS.register("kimi")(KimiReasoning)
REASONING_PARSERS.register("openai_gptoss", "gpt_oss")(HarmonyReasoning)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def tool_parser(name: str | None) -> type[ToolParser] | None:
    """Return the tool parser of a name; None for no name and `none`.

    Raises:
        ConfigError: If there is none of that name; the message lists the known ones.
    """
    return None if not name or _plain(name) == "none" else TOOL_PARSERS[_plain(name)]


def reasoning_parser(name: str | None) -> type[ReasoningParser] | None:
    """Return the reasoning parser of a name; None for no name and `none`.

    Raises:
        ConfigError: If there is none of that name; the message lists the known ones.
    """
    return None if not name or _plain(name) == "none" else REASONING_PARSERS[_plain(name)]
