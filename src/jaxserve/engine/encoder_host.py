"""A loaded encoder, ready to embed and score; and the choice between it and a decoder's engine."""

import dataclasses
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.attention.custom import CustomAttention
from jaxserve.attention.metadata import Backend
from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError, EngineDeadError, RequestError, UnsupportedError
from jaxserve.core.lora import Adapter, LoRARequest
from jaxserve.core.protocols import Scheduler
from jaxserve.engine.encoder import Encoder
from jaxserve.engine.encoder_metrics import EncoderMetrics
from jaxserve.engine.encoder_runner import BatchShapes, EncoderRunner, EncoderSpec
from jaxserve.engine.host import EngineHost, Progress, progress_bar
from jaxserve.engine.parallel import check_encoder
from jaxserve.engine.pooling import TextPooling, cannot
from jaxserve.engine.setup import default_compile_cache, find_tokenizer
from jaxserve.engine.source import ModelSource
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.bert import Bert, abstract_bert
from jaxserve.models.bert_checkpoint import BertCheckpoint, is_encoder
from jaxserve.models.bert_config import BertConfig
from jaxserve.models.files import read_json
from jaxserve.models.hub import resolve_model
from jaxserve.models.loading import load_params
from jaxserve.models.pooling import read_pooling
from jaxserve.models.registry import abstract_params, draw_params, fill, flatten_params
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import LogicalAxisRules

logger = logging.getLogger(__name__)

EncoderSource = str | Path | Bert | tuple[BertConfig, object]
"""A name or path, a module, or (configuration, parameters)."""

_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 1024, 16384
_CPU_BATCH_TEXTS, _GPU_BATCH_TEXTS = 64, 512
_BACKENDS: dict[str, Backend] = {"auto": "xla", "xla": "xla", "reference": "reference"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEncoder:
    """An encoder in device memory.

    Attributes:
        name: What to call it.
        config: Its shape.
        graph: Structure of the module.
        state: Its weights.
        mesh: Where they lie.
        path: Where it came from; None for live parameters.
    """

    name: str
    config: BertConfig
    graph: nnx.GraphDef[Bert]
    state: nnx.State
    mesh: jax.sharding.Mesh
    path: Path | None


class EncoderHost:
    """An encoder, loaded and warm, with its batches running on a thread of its own.

    Args:
        source: Name, path, module, or (configuration, parameters).
        tokenizer: Used instead of the model's own.
        config: Settings.
        mesh: Devices.
        progress: Whether to show progress bars on stderr.
        on_warm_up: Told about the progress of compilation.

    Attributes:
        name: What the model is called.
        tokenizer: Its tokenizer, if it has one.
        model_config: Its shape.
        config: Settings with every "auto" resolved.
        default_sampling: Empty; nothing is sampled.
        pooling: Embeds and scores.
        tasks: What the model is used for.

    Raises:
        ConfigError: If the model is to generate, or settings do not fit it.
    """

    tasks: frozenset[str] = frozenset({"pooling"})

    def __init__(
        self,
        source: EncoderSource,
        *,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        mesh: jax.sharding.Mesh | None = None,
        progress: bool = False,
        on_warm_up: Progress | None = None,
    ) -> None:
        """Load, warm up, start the thread."""
        if config.pooling.runner == "generate":
            raise ConfigError(
                "this model is an encoder, which embeds and scores but does not generate; use "
                "--runner pooling or auto, or choose another model."
            )
        if config.model.quantization is not None:
            raise ConfigError(
                f"this model is an encoder, whose weights cannot be quantised, but quantization is "
                f"{config.model.quantization!r}; leave it out."
            )
        model = _load(source, config, mesh, progress=progress)
        self.name = model.name
        self.model_config = model.config
        self.graph = model.graph
        self.default_sampling: dict[str, Any] = {}
        spec, self.config = _plan(model, config)
        self.metrics = EncoderMetrics(max_length=spec.shapes.lengths[-1])
        self.runner = EncoderRunner(
            spec,
            model.graph,
            model.state,
            mesh=model.mesh,
            on_compile=self.metrics.compiled,
            cache_dir=config.runner.compilation_cache_dir or default_compile_cache(),
            forbid_late=config.runner.enforce_no_recompile,
        )
        self.tokenizer = tokenizer or find_tokenizer(config.model, model.path)
        self._compiler: threading.Thread | None = None
        self._warm_up(on_warm_up or (progress_bar() if progress else None))
        self.encoder = Encoder(
            self.runner,
            clock=WallClock(),
            metrics=self.metrics,
            max_num_queued_reqs=config.scheduler.max_num_queued_reqs,
        )
        self.pooling = TextPooling(self.encoder, self.tokenizer)

    def _warm_up(self, on_progress: Progress | None) -> None:
        mode = self.config.runner.warmup
        if mode == "full":
            self.runner.warm_up(on_progress)
        elif mode == "background":
            self.runner.warm_up_essentials()
            self._compiler = threading.Thread(
                target=self._warm_up_rest, args=(on_progress,), name="jaxserve-warm-up", daemon=True
            )
            self._compiler.start()

    def _warm_up_rest(self, on_progress: Progress | None) -> None:
        try:
            self.runner.warm_up(on_progress)
        except Exception:
            # Serving goes on with the shapes that are ready.
            logger.exception("compiling the remaining batch shapes failed")

    @property
    def is_warm(self) -> bool:
        """Whether every program has been compiled."""
        return self.runner.programs.is_sealed

    @property
    def max_model_len(self) -> int:
        """Most tokens of a text."""
        return self.runner.spec.shapes.lengths[-1]

    @property
    def num_unfinished(self) -> int:
        """Requests under way."""
        return self.encoder.num_unfinished

    def check_health(self) -> None:
        """Raise if the encoder has stopped.

        Raises:
            EngineDeadError: With the reason.
        """
        if self.encoder.dead is not None:
            raise EngineDeadError(f"the engine has stopped: {self.encoder.dead}")

    def get_adapter(self, lora_request: LoRARequest | Adapter | None) -> Adapter | None:
        """Refuse adapters.

        Raises:
            RequestError: If one is asked for.
        """
        if lora_request is not None:
            raise RequestError("encoders serve no adapters.", param="lora_request")
        return None

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; see `Encoder.drain`."""
        return self.encoder.drain(timeout_s)

    def close(self) -> None:
        """End what is under way, stop the thread and free the programs; weights stay."""
        self.encoder.close()
        self.runner.programs.stop()
        if self._compiler is not None:
            self._compiler.join()  # XLA must not be compiling while the process winds down
        self.runner.close()


def open_host(
    source: ModelSource | EncoderSource,
    *,
    tokenizer: Tokenizer | None = None,
    config: EngineConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    scheduler: Scheduler | None = None,
    attention: CustomAttention | None = None,
    progress: bool = False,
    on_warm_up: Progress | None = None,
    **settings: Any,  # noqa: ANN401  checked by EngineConfig
) -> EngineHost | EncoderHost:
    """Load a model, and start what runs it: a decoder's engine, or an encoder.

    Args:
        source: Name, path, module, or (configuration, parameters).
        tokenizer: Used instead of the model's own.
        config: Settings; or give them one by one.
        mesh: Devices.
        scheduler: Used instead of the configured policy; encoders have none.
        attention: How attention differs from the model's own; for decoders.
        progress: Whether to show progress bars on stderr.
        on_warm_up: Told about the progress of compilation.
        **settings: Single settings, named as in `EngineConfig`.

    Raises:
        ConfigError: If settings, name, files or parameters are wrong.
        CapacityError: If the cache does not fit into memory.
    """
    if config is not None and settings:
        raise ConfigError(
            f"give settings either in `config` or one by one, got both ({', '.join(settings)})."
        )
    chosen = config or EngineConfig.from_settings(settings)
    shared: dict[str, Any] = {
        "tokenizer": tokenizer, "config": chosen, "mesh": mesh, "progress": progress,
        "on_warm_up": on_warm_up,
    }  # fmt: skip
    encoder = _as_encoder(source, chosen, progress=progress)
    if encoder is None:
        return EngineHost(
            cast(ModelSource, source), scheduler=scheduler, attention=attention, **shared
        )
    if scheduler is not None:
        raise ConfigError("an encoder has no scheduler; leave scheduler out.")
    if attention is not None:
        raise ConfigError("encoders run no paged kernels; leave attention out.")
    if chosen.lora.enable_lora:
        raise ConfigError("encoders serve no adapters; leave enable_lora out.")
    return EncoderHost(encoder, **shared)


def decoder_host(loaded: EngineHost | EncoderHost) -> EngineHost:
    """Return the engine of a decoder.

    Raises:
        RequestError: If it is an encoder, which has none.
    """
    if isinstance(loaded, EncoderHost):
        raise cannot("generate")
    return loaded


def is_encoder_source(source: object, config: EngineConfig) -> bool:
    """Tell whether a model is an encoder."""
    return _as_encoder(source, config, progress=False) is not None


def _as_encoder(source: object, config: EngineConfig, *, progress: bool) -> EncoderSource | None:
    """Return an encoder's source, or None for a decoder's."""
    if isinstance(source, Bert):
        return source
    if isinstance(source, tuple):
        raw, params = cast("tuple[object, object]", source)
        if isinstance(raw, Mapping) and raw.get("model_type") == "bert":
            raw = BertConfig.from_hf(cast("Mapping[str, object]", raw))
        return (raw, params) if isinstance(raw, BertConfig) else None
    if not isinstance(source, str | Path):
        return None
    path = Path(source)
    if config.model.load_format == "dummy":
        path = path.parent if path.is_file() else path
    else:
        path = resolve_model(source, revision=config.model.revision, progress=progress)
    return source if is_encoder(path) else None


def _load(
    source: EncoderSource,
    config: EngineConfig,
    mesh: jax.sharding.Mesh | None,
    *,
    progress: bool,
) -> LoadedEncoder:
    if isinstance(source, Bert):
        graph, state = nnx.split(source)
        return LoadedEncoder(
            name="bert", config=source.config, graph=graph, state=state,
            mesh=mesh or make_mesh(), path=None,
        )  # fmt: skip
    if isinstance(source, tuple):
        shape, params = source
        arrays = flatten_params(params)
        dtype = next(iter(arrays.values())).dtype if arrays else jnp.dtype("float32")
        graph, state = abstract_bert(shape, dtype=dtype)
        return LoadedEncoder(
            name="bert", config=shape, graph=graph, state=fill(state, arrays),
            mesh=mesh or make_mesh(), path=None,
        )  # fmt: skip
    return _load_files(source, config, mesh, progress=progress)


def _load_files(
    source: str | Path, config: EngineConfig, mesh: jax.sharding.Mesh | None, *, progress: bool
) -> LoadedEncoder:
    if config.model.load_format == "gguf":
        raise UnsupportedError("encoders are read from safetensors; --load-format gguf is not.")
    check_encoder(config.parallel)
    mesh = mesh or make_mesh(config.parallel.tensor_parallel_size)
    is_dummy = config.model.load_format == "dummy"
    if is_dummy:
        path = Path(source).parent if Path(source).is_file() else Path(source)
        shape, checkpoint = BertConfig.from_hf(read_json(path / "config.json")), None
    else:
        path = resolve_model(source, revision=config.model.revision, progress=progress)
        checkpoint = BertCheckpoint(path)
        shape = checkpoint.config
    graph, state = abstract_bert(shape, dtype=jnp.dtype(_dtype(config, shape)))
    described = abstract_params(state, mesh=mesh, rules=LogicalAxisRules())
    if checkpoint is None:
        arrays = draw_params(described, seed=config.model.seed)
    else:
        try:
            arrays = load_params(checkpoint, described, progress=progress)
        finally:
            checkpoint.close()
    return LoadedEncoder(
        name=str(source), config=shape, graph=graph, state=fill(state, arrays), mesh=mesh,
        path=path,
    )  # fmt: skip


def _dtype(config: EngineConfig, shape: BertConfig) -> str:
    """Choose the precision: what was asked for, else the checkpoint's own; on a CPU float32."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "float32" if jax.default_backend() == "cpu" else shape.torch_dtype or "float32"


def _plan(model: LoadedEncoder, config: EngineConfig) -> tuple[EncoderSpec, EngineConfig]:
    """Turn every "auto" into a number."""
    pooling = read_pooling(model.path, default="mean")
    pooling = pooling.with_overrides(config.pooling.pooler_config)
    longest = config.model.max_model_len
    if longest is not None and longest > model.config.max_position:
        raise ConfigError(
            f"max_model_len={longest} exceeds the model's {model.config.max_position} positions."
        )
    if longest is None:
        longest = min(pooling.max_length or model.config.max_position, model.config.max_position)
    on_cpu = model.mesh.devices.flat[0].platform == "cpu"
    options = config.scheduler
    max_tokens = options.max_num_batched_tokens or (
        _CPU_BATCH_TOKENS if on_cpu else _GPU_BATCH_TOKENS
    )
    max_rows = options.max_num_seqs or (_CPU_BATCH_TEXTS if on_cpu else _GPU_BATCH_TEXTS)
    chosen = config.runner.attention_backend
    if chosen not in _BACKENDS:
        raise ConfigError(
            f"attention_backend={chosen!r} serves decoders only, and this model is an encoder; use "
            f"one of {', '.join(map(repr, _BACKENDS))}."
        )
    backend = _BACKENDS[chosen]
    dtype = str(jax.tree.leaves(model.state)[0].dtype)
    spec = EncoderSpec(
        config=model.config,
        pooling=pooling,
        shapes=BatchShapes.build(
            max_length=longest,
            max_tokens=max_tokens,
            max_rows=max_rows,
            one_per_length=config.runner.batch_invariant,
        ),
        backend=backend,
        matmul_precision="highest" if dtype == "float32" else "default",
    )
    resolved = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, max_model_len=longest, dtype=dtype),
        scheduler=dataclasses.replace(
            options, max_num_seqs=max_rows, max_num_batched_tokens=max_tokens
        ),
        runner=dataclasses.replace(config.runner, attention_backend=backend),
    )
    return spec, resolved
