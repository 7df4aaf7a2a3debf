"""Configuration: composed frozen records from which the command line and the docs are made.

A field of None means "auto"; `engine.setup` turns it into a number for one model on one
device. Each record checks itself and changes nothing.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.core.errors import ConfigError, did_you_mean
from jaxserve.core.parallel import ParallelOptions
from jaxserve.core.setting import check_at_least, check_one_of, option
from jaxserve.core.sparse import SparseConfig
from jaxserve.core.speculative import SpeculativeConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationScheme = Literal["int8", "fp8"]
LoadFormat = Literal["auto", "safetensors", "gguf", "orbax", "dummy"]
WarmupMode = Literal["none", "lazy", "background", "full"]
LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]
AttentionBackend = Literal[
    "auto",
    "xla",
    "llvm",
    "reference",
    "pallas",
    "mosaic",
    "triton",
    "pallas-xla",
    "pallas-reference",
]
KvLayout = Literal["auto", "slots", "pages"]
SchedulingPolicy = Literal[
    "fcfs", "priority", "slo", "edf", "prefill_first", "deadline_hybrid", "slack_greedy"
]
SloPace = Literal["tpot", "tpot_gap", "tpot_mean"]
ContentFormat = Literal["auto", "string", "openai"]
GrammarBackend = Literal["auto", "llguidance", "guidance", "none"]
RunnerType = Literal["auto", "generate", "pooling"]


_STORED_SCHEMES: tuple[str, ...] = (
    "auto-round", "awq", "awq_marlin", "bitblas", "bitsandbytes", "compressed-tensors", "gguf",
    "gptq", "gptq_marlin", "modelopt", "mxfp4", "quark", "torchao", "w8a8_fp8", "w8a8_int8",
)  # fmt: skip
"""Words of other engines for checkpoints that come quantised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, in which precision, up to which length."""

    dtype: Dtype = option(
        "auto",
        "Precision of weights and activations. auto: the checkpoint's; for quantised files "
        "bfloat16, on CPUs without bfloat16 instructions float32.",
    )
    quantization: QuantizationScheme | None = option(
        None,
        "Narrow weights, made of the checkpoint's as they are loaded: int8 or fp8 (float8_e4m3fn) "
        "with a scale per output channel. Activations keep their precision.",
        "q",
    )
    quantization_config: Mapping[str, Any] | None = option(
        None,
        "JSON object with ignore, a list of layers that keep their precision: names such as "
        "lm_head or model.layers.0.mlp.down_proj, or re: and a regular expression.",
    )
    max_model_len: int | None = option(
        None,
        "Most tokens of prompt and output together. Default: the model's, as far as memory allows.",
        "context-length",
        count=True,
    )
    tokenizer: str | None = option(None, "Tokenizer directory or file, if not the model's own.")
    revision: str | None = option(None, "Branch, tag or commit on the model hub.")
    load_format: LoadFormat = option(
        "auto", "Format of the checkpoint; dummy draws random weights (for measurements)."
    )
    seed: int = option(0, "Seed for requests without one and for dummy weights.", "random-seed")
    chat_template: str | None = option(None, "Jinja chat template: a file, or the text itself.")
    generation_config: str = option(
        "auto",
        "auto: sampling defaults from the model's generation_config.json; vllm or none: ignore it.",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_one_of(self, dtype=Dtype, load_format=LoadFormat)
        check_at_least(self, 2, "max_model_len")
        self._check_quantization()

    def _check_quantization(self) -> None:
        if self.quantization in _STORED_SCHEMES:
            raise ConfigError(
                f"quantization {self.quantization!r} reads checkpoints that were quantised before, "
                "which is not supported; give the original model, and int8 or fp8 to quantise it "
                "as it is loaded, or a GGUF file."
            )
        if self.quantization is not None:
            check_one_of(self, quantization=QuantizationScheme)
        settings = self.quantization_config
        if settings is None:
            return
        if self.quantization is None:
            raise ConfigError(
                "quantization_config needs quantization, found none; give int8 or fp8."
            )
        for key in settings:
            if key != "ignore":
                raise ConfigError(
                    f"quantization_config has no key {key!r}.{did_you_mean(key, ['ignore'])} "
                    "Known: ignore."
                )
        names = settings.get("ignore", [])
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise ConfigError(
                f"quantization_config.ignore must be a list of names of layers, got {names!r}."
            )

    @property
    def unquantized_layers(self) -> tuple[str, ...]:
        """Layers that keep their precision."""
        return tuple((self.quantization_config or {}).get("ignore", ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """The key-value cache."""

    block_size: int = option(16, "Tokens per page of the key-value cache.", "page-size")
    gpu_memory_utilization: float = option(
        0.9,
        "Share of free device memory for weights and cache; on a CPU, see kv-cache-memory-bytes.",
        "device-memory-utilization",
        "mem-fraction-static",
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "Memory for the key-value cache. Default: what gpu-memory-utilization leaves; on a CPU a "
        "quarter of the free memory, at most 4 GiB.",
        count=True,
    )
    num_gpu_blocks_override: int | None = option(
        None,
        "Exact number of pages, of each group of devices, whatever the memory; for tests of "
        "preemption.",
    )
    enable_prefix_caching: bool = option(True, "Reuse the pages of equal prompt prefixes.")
    kv_layout: KvLayout = option(
        "auto", "slots (dense rows; fast on a CPU) or pages (gathered). Default: by platform."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_one_of(self, kv_layout=KvLayout)
        check_at_least(self, 1, "block_size", "num_gpu_blocks_override", "kv_cache_memory_bytes")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """How work is shared among requests."""

    max_num_seqs: int | None = option(
        None,
        "Most sequences running at once. Default: 256 on a GPU, 16 on a CPU; as many in each group "
        "of devices that has its own.",
        "max-running-requests",
    )
    max_num_batched_tokens: int | None = option(
        None,
        "Most tokens per step, decodes included. Default: 8192 on a GPU, 512 on a CPU.",
        "chunked-prefill-size",
        count=True,
    )
    scheduling_policy: SchedulingPolicy = option(
        "fcfs",
        "fcfs; priority (lower value first, ties by arrival); slo: a planner that promises "
        "requests their objectives where it can; or, to compare with, edf (prompts by deadline), "
        "prefill_first, deadline_hybrid, slack_greedy.",
        "schedule-policy",
    )
    slo_pace: SloPace = option(
        "tpot",
        "How the slo policy reads a target per token: tpot (as deadlines, for which early tokens "
        "bank), tpot_gap (every gap), tpot_mean (the mean gap).",
    )
    cost_model: str | None = option(
        None,
        "File with the times of steps, as `jaxserve profile` writes it. Default: policies that "
        "need times measure every step shape at start-up.",
    )
    policy_budget_ms: float = option(
        50.0,
        "Milliseconds of processor time that a policy may take for one step; beyond, that step is "
        "planned by fcfs.",
    )
    decision_log: str | None = option(
        None,
        "File to which every view and plan is written, for `jaxserve sim replay`; it is replaced.",
    )
    max_num_queued_reqs: int | None = option(
        None,
        "Most unfinished completions; more are refused with 503 and Retry-After.",
        "max-queued-requests",
    )
    priority_ageing_s: float | None = option(
        None, "Under the priority policy: seconds of waiting that count as one step of priority."
    )
    max_mixed_prefill_tokens: int | None = option(
        None,
        "Most prefill tokens in a step that decodes as well, while more requests decode than wait; "
        "keeps streams smooth beside a long prompt. Default: 512 on a GPU, 64 on a CPU.",
        count=True,
    )
    async_scheduling: bool = option(
        True, "Prepare the next step while the device computes the current one."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_one_of(self, scheduling_policy=SchedulingPolicy, slo_pace=SloPace)
        check_at_least(self, 1, "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs")
        check_at_least(self, 1, "max_mixed_prefill_tokens")
        if not self.policy_budget_ms > 0:
            raise ConfigError(
                f"policy_budget_ms must be greater than zero, got {self.policy_budget_ms}."
            )
        if self.priority_ageing_s is not None and self.priority_ageing_s <= 0:
            raise ConfigError(
                f"priority_ageing_s must be greater than zero, got {self.priority_ageing_s}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How steps are compiled and run."""

    attention_backend: AttentionBackend = option(
        "auto",
        "Implementation of attention and, with llvm, of decoding's matrix products: kernels that "
        "LLVM compiles for this CPU, the choice of auto where there are some. pallas: planned "
        "paged kernels, the best that this device has; mosaic, triton, pallas-xla, "
        "pallas-reference: one of them.",
    )
    warmup: WarmupMode = option(
        "background",
        "background: compile two step shapes that serve everything, then the others while serving; "
        "full: compile all before serving; lazy, none: each at first use.",
    )
    enforce_no_recompile: bool = option(False, "Fail instead of compiling after warm-up.")
    batch_invariant: bool = option(
        False,
        "One fixed step shape and no prefix cache, so that a request's tokens do not depend on "
        "other requests.",
        "enable-deterministic-inference",
    )
    compilation_cache_dir: str | None = option(
        None, "Where compiled steps are kept. Default: below JAXSERVE_CACHE_DIR."
    )
    logprobs_mode: LogprobsMode = option(
        "raw_logprobs", "Which values are reported as log-probabilities."
    )
    max_logprobs: int = option(
        20, "Most candidates per token that a request may ask for; -1 is the vocabulary."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_one_of(
            self,
            attention_backend=AttentionBackend,
            warmup=WarmupMode,
            logprobs_mode=LogprobsMode,
        )
        check_at_least(self, -1, "max_logprobs")


_STRUCTURED_KEYS = {
    "backend": str,
    "disable_any_whitespace": bool,
    "disable_additional_properties": bool,
    "enable_in_reasoning": bool,
}
_FOREIGN_BACKENDS = ("xgrammar", "outlines", "lm-format-enforcer")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOptions:
    """Outputs that follow a grammar."""

    structured_outputs_config: Mapping[str, Any] | None = option(
        None,
        "JSON object with backend, disable_any_whitespace, disable_additional_properties, "
        "enable_in_reasoning; single keys also as --structured-outputs-config.KEY.",
    )
    structured_outputs_backend: GrammarBackend = option(
        "auto",
        "Grammar engine: auto and guidance mean llguidance; none refuses constraints. Wins over "
        "the backend in structured-outputs-config.",
        "grammar-backend",
    )
    grammar_compile_timeout: float = option(
        10.0, "Seconds that one grammar may take to compile; a slower one is refused with 400."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        if self.backend in _FOREIGN_BACKENDS:
            raise ConfigError(_foreign_backend(self.backend))
        check_one_of(self, structured_outputs_backend=GrammarBackend)
        if self.grammar_compile_timeout <= 0:
            raise ConfigError(
                "grammar_compile_timeout must be greater than zero, got "
                f"{self.grammar_compile_timeout}."
            )
        for key, value in (self.structured_outputs_config or {}).items():
            kind = _STRUCTURED_KEYS.get(key)
            if kind is None:
                raise ConfigError(
                    f"structured_outputs_config has no key {key!r}."
                    f"{did_you_mean(key, _STRUCTURED_KEYS)} Known: {', '.join(_STRUCTURED_KEYS)}."
                )
            if not isinstance(value, kind):
                raise ConfigError(
                    f"structured_outputs_config.{key} must be a {kind.__name__}, got {value!r}."
                )
        if self.backend not in typing.get_args(GrammarBackend):
            raise ConfigError(
                "structured_outputs_config.backend must be one of "
                f"{', '.join(typing.get_args(GrammarBackend))}, got {self.backend!r}."
            )

    @property
    def backend(self) -> str:
        """The grammar engine's name."""
        if self.structured_outputs_backend != "auto":
            return self.structured_outputs_backend
        return (self.structured_outputs_config or {}).get("backend", "auto")

    def flag(self, name: str) -> bool:
        """Return one of the switches in `structured_outputs_config`; off by default."""
        return bool((self.structured_outputs_config or {}).get(name, False))


def _foreign_backend(name: str) -> str:
    return (
        f"the grammar engine {name} is not built in; use llguidance, which takes the same "
        "constraints, or leave the backend out."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingOptions:
    """Embeddings and scores."""

    runner: RunnerType = option(
        "auto",
        "What the model is used for: generate, pooling (embeddings and scores), or auto: all that "
        "it can do. Encoders such as BERT can only pool.",
    )
    pooler_config: Mapping[str, Any] | None = option(
        None,
        "JSON object that overrides how states are pooled: pooling_type (mean, last, cls or max) "
        "and normalize (true or false). Default: as the model's files say; else the last state of "
        "a decoder or the mean of an encoder, normalised.",
        "override-pooler-config",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_one_of(self, runner=RunnerType)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeOptions:
    """Several tokens per step, where they can be guessed."""

    speculative_config: Mapping[str, Any] | None = option(
        None,
        "JSON object that switches speculative decoding on: method (ngram or draft_model), model "
        "(a smaller checkpoint with the same vocabulary), num_speculative_tokens, "
        "prompt_lookup_min, prompt_lookup_max; single keys also as --speculative-config.KEY.",
        "sc",
    )
    spec_method: str | None = option(None, "The method in speculative-config.")
    spec_model: str | None = option(None, "The model in speculative-config.")
    spec_tokens: int | None = option(None, "The num_speculative_tokens in speculative-config.")

    def __post_init__(self) -> None:
        """Check the values."""
        _ = self.speculation

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """The checked settings; None if nothing is drafted.

        Raises:
            ConfigError: If they are no good.
        """
        whole = self.speculative_config
        if whole is not None and not isinstance(whole, Mapping):
            raise ConfigError(
                "speculative_config must be a mapping such as "
                '{"method": "ngram", "num_speculative_tokens": 5}, got '
                f"{whole!r}."
            )
        given = dict(whole or {})
        flags = {
            "method": self.spec_method,
            "model": self.spec_model,
            "num_speculative_tokens": self.spec_tokens,
        }
        given |= {key: value for key, value in flags.items() if value is not None}
        if whole is None and not given:
            return None
        return SpeculativeConfig.from_mapping(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters."""

    enable_lora: bool = option(False, "Serve low-rank adapters beside the model itself.")
    max_loras: int = option(
        1, "Most different adapters in one batch; each has a slot on the device.",
        "max-loras-per-batch",
    )  # fmt: skip
    max_lora_rank: int = option(
        16, "Largest rank of an adapter; memory and time of every slot grow with it."
    )
    max_cpu_loras: int | None = option(
        None,
        "Adapters whose weights are kept in host memory; others are read again when they are asked "
        "for. Default: max-loras.",
        "max-loaded-loras",
    )
    lora_drain_wait_threshold: float = option(
        1.0,
        "Seconds that a request may wait for a slot for its adapter while later ones of adapters "
        "that have a slot are admitted.",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_at_least(self, 1, "max_loras", "max_lora_rank")
        check_at_least(self, 0, "lora_drain_wait_threshold")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ConfigError(
                f"max_cpu_loras must be at least max_loras={self.max_loras}, got "
                f"{self.max_cpu_loras}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseOptions:
    """Attention that reads a part of long contexts."""

    sparse_attention: str | None = option(
        None,
        "Let decodes of long contexts read the tokens that hold a share p of the attention mass, "
        "such as p=0.9. Further keys, separated by commas: estimator (sampled, hyperbola or "
        "centroid), failure_rate, tail (mean or drop), min_context, dense_layers, window, sinks, "
        "segment, cluster_size, max_share, measure_every.",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        _ = self.sparse

    @property
    def sparse(self) -> SparseConfig | None:
        """The checked settings; None if every context is read whole.

        Raises:
            ConfigError: If they are no good.
        """
        given = self.sparse_attention
        if given is None:
            return None
        if not isinstance(given, str):
            raise ConfigError(
                f"sparse_attention must be a text such as 'p=0.9,min_context=4096', got {given!r}."
            )
        return SparseConfig.from_text(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to know besides the weights."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    runner: RunnerOptions = field(default_factory=RunnerOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    structured: StructuredOptions = field(default_factory=StructuredOptions)
    pooling: PoolingOptions = field(default_factory=PoolingOptions)
    speculative: SpeculativeOptions = field(default_factory=SpeculativeOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    sparse: SparseOptions = field(default_factory=SparseOptions)

    def __post_init__(self) -> None:
        """Check what concerns several parts."""
        policy = self.scheduler.scheduling_policy
        if self.runner.batch_invariant and self.parallel.enable_eplb:
            raise ConfigError(
                "batch_invariant cannot be kept with enable_eplb: which devices add a token's "
                "results up depends on other requests. Leave one of them out."
            )
        if self.runner.batch_invariant and policy not in ("fcfs", "priority"):
            raise ConfigError(
                f"batch_invariant needs scheduling_policy fcfs or priority, got {policy!r}, which "
                "mixes prompts and decodes; use one of them, or leave batch_invariant out."
            )

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> "EngineConfig":
        """Build a configuration from flat names, such as keyword arguments of `LLM`.

        Raises:
            ConfigError: For an unknown name (the nearest known one is suggested) or a bad value.

        >>> EngineConfig.from_settings({"max_num_seqs": 4}).scheduler.max_num_seqs
        4
        """
        homes = {spec.name: part for part, spec in iter_options()}
        parts: dict[str, dict[str, object]] = {}
        for name, value in settings.items():
            if name not in homes:
                hint = did_you_mean(name, homes)
                raise ConfigError(f"unknown setting {name!r}.{hint}")
            parts.setdefault(homes[name], {})[name] = value
        made: dict[str, Any] = {}
        for part in dataclasses.fields(cls):
            made[part.name] = part.type(**parts.get(part.name, {}))  # type: ignore[operator]
        return cls(**made)


def iter_options() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every setting with the name of the part that holds it."""
    for part in dataclasses.fields(EngineConfig):
        for spec in dataclasses.fields(part.type):  # type: ignore[arg-type]
            yield part.name, spec
