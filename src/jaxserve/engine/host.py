"""What the synchronous and the asynchronous face share: a loaded engine on its thread."""

import functools
import logging
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from flax import nnx
from tqdm.auto import tqdm

from jaxserve.attention.custom import CustomAttention
from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError, EngineDeadError, RequestError
from jaxserve.core.lora import Adapter, LoRARequest
from jaxserve.core.protocols import Scheduler
from jaxserve.core.request import Request, RequestId, SamplingParams, Slo, new_request_id
from jaxserve.engine.adapters import AdapterStore, make_reader
from jaxserve.engine.decoder_pooling import DecoderPooler
from jaxserve.engine.lifecycle import Lifecycle
from jaxserve.engine.loop import EngineThread
from jaxserve.engine.measure import measure_engine
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.pooling import TextPooling
from jaxserve.engine.profiling import Profiler
from jaxserve.engine.setup import ModelSource, assemble
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.grammar.compiler import PendingGrammar
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import CausalLM
from jaxserve.models.peft import LoraAdapter
from jaxserve.models.pooling import read_pooling
from jaxserve.models.quantization import narrow_paths, quantized_model
from jaxserve.models.registry import flatten_params

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, object]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`, and maybe `cache_salt` and
`output_token_ids`."""

SloFields = Slo | Mapping[str, object]
"""Service-level objectives, or a mapping with their names and values."""

Progress = Callable[[int, int], None]
"""Called with (programs compiled, programs in all) during warm-up."""


class EngineHost:
    """A model, loaded and warm, with its engine running on a thread of its own.

    Args:
        source: Name, path, module, or (configuration, parameters).
        tokenizer: Used instead of the model's own.
        config: Settings; or give them one by one.
        mesh: Devices.
        scheduler: Used instead of the configured policy.
        attention: How attention differs from the model's own; needs `attention_backend="pallas"`.
        progress: Whether to show progress bars on stderr.
        on_warm_up: Told about the progress of compilation.
        **settings: Single settings, named as in `EngineConfig`.

    Attributes:
        name: What the model is called.
        tokenizer: Its tokenizer, if it has one.
        model_config: Its shape.
        config: Settings with every "auto" resolved.
        default_sampling: Sampling defaults of the model.
        adapters: Low-rank adapters that have been read.
        policy: The configured policy; None if a scheduler was given.
        has_custom_attention: Whether attention is not the model's own.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        mesh: jax.sharding.Mesh | None = None,
        scheduler: Scheduler | None = None,
        attention: CustomAttention | None = None,
        progress: bool = False,
        on_warm_up: Progress | None = None,
        **settings: Any,  # noqa: ANN401  checked by EngineConfig
    ) -> None:
        """Load, warm up, start the thread."""
        if config is not None and settings:
            raise ConfigError(
                f"give settings either in `config` or one by one, got both ({', '.join(settings)})."
            )
        self.clock = WallClock()
        made = assemble(
            source,
            config or EngineConfig.from_settings(settings),
            clock=self.clock,
            tokenizer=tokenizer,
            mesh=mesh,
            scheduler=scheduler,
            attention=attention,
            progress=progress,
        )
        self.has_custom_attention = attention is not None
        # Not kept whole: it holds the first weights, which an update lets go.
        self.engine = made.engine
        self.name = made.model.name
        self._path = made.model.path
        self.tokenizer = made.tokenizer
        self.model_config: ModelConfig = made.model.config
        self.graph = made.model.graph
        self.config = made.config
        self.default_sampling = made.default_sampling
        self._compiler: threading.Thread | None = None
        self.policy = made.policy
        on_progress = on_warm_up or (_progress_bar() if progress else None)
        if self.policy is not None and self.policy.needs_times:
            self._measure(on_progress)
        else:
            self._warm_up(on_progress)
        self.thread = EngineThread(self.engine)
        self.lifecycle = Lifecycle(self.engine, self.thread.call)
        options = self.config.lora
        self.adapters = AdapterStore(
            make_reader(self.engine.runner, self.name),
            max_cpu_loras=options.max_cpu_loras or options.max_loras,
        )
        self.profiler = Profiler()
        if self.config.pooling.pooler_config or self.config.pooling.runner == "pooling":
            _ = self.pooling  # so that a wrong setting is found now

    def _measure(self, on_progress: Progress | None) -> None:
        """Compile and measure every step shape, as the policy needs their times."""
        engine = self.engine
        engine.runner.warm_up(on_progress)
        if self.policy is not None:
            measured = measure_engine(engine, self.clock)
            logger.info(
                "measured %d steps; the cost model errs by %.1f %% in the mean",
                len(measured.samples.seconds), 100 * measured.report.mean_error,
            )  # fmt: skip
            self.policy.install(engine, measured.file)

    def _warm_up(self, on_progress: Progress | None) -> None:
        runner, mode = self.engine.runner, self.config.runner.warmup
        if mode == "full":
            runner.warm_up(on_progress)
        elif mode == "background":
            runner.warm_up_essentials()
            self._compiler = threading.Thread(
                target=self._warm_up_rest, args=(on_progress,), name="jaxserve-warm-up", daemon=True
            )
            self._compiler.start()

    def _warm_up_rest(self, on_progress: Progress | None) -> None:
        try:
            self.engine.runner.warm_up(on_progress)
        except Exception:
            # Serving goes on with the shapes that are ready.
            logger.exception("compiling the remaining step shapes failed")

    @property
    def is_warm(self) -> bool:
        """Whether every program has been compiled."""
        return self.engine.runner.programs.is_sealed

    @property
    def num_unfinished(self) -> int:
        """Completions under way."""
        return self.engine.num_unfinished

    @property
    def tasks(self) -> frozenset[str]:
        """What the model is used for: `generate`, `pooling`, or both."""
        runner = self.config.pooling.runner
        return frozenset({"generate", "pooling"} if runner == "auto" else {runner})

    @functools.cached_property
    def pooling(self) -> TextPooling:
        """Embeds and scores with the states of the served model.

        Raises:
            ConfigError: If the setting `pooler_config` asks for what a decoder cannot do.
        """
        how = read_pooling(self._path, default="last")
        how = how.with_overrides(self.config.pooling.pooler_config)
        pooler = DecoderPooler(
            self.thread,
            self.clock,
            how,
            model_config=self.model_config,
            max_model_len=self.max_model_len,
            max_num_seqs=self.engine.runner.spec.max_num_seqs,
        )
        return TextPooling(pooler, self.tokenizer)

    def graph_for(self, params: nnx.State) -> nnx.GraphDef[CausalLM]:
        """Return the structure for weights: the served ones, or plain ones where these are narrow.

        Args:
            params: Weights.
        """
        is_plain = not narrow_paths(flatten_params(params))
        return self._plain_graph if is_plain else self.graph

    @functools.cached_property
    def _plain_graph(self) -> nnx.GraphDef[CausalLM]:
        runner = self.engine.runner
        if not narrow_paths(runner.param_specs):
            return self.graph
        return quantized_model(self.graph, runner.described_params, None)[0]

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; see `EngineThread.drain`."""
        return self.thread.drain(timeout_s)

    @property
    def metrics(self) -> EngineMetrics:
        """Counters of the engine."""
        return self.engine.metrics

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self.engine.runner.spec.max_model_len

    def check_health(self) -> None:
        """Raise if the engine has stopped.

        Raises:
            EngineDeadError: With the reason.
        """
        if self.engine.dead is not None:
            raise EngineDeadError(f"the engine has stopped: {self.engine.dead}")

    def default_params(self) -> SamplingParams:
        """Return the parameters of a request that gives none: the model's own defaults."""
        return SamplingParams(**self.default_sampling)

    def make_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        output_token_ids: Sequence[int] = (),
        slo: SloFields | None = None,
        lora_request: LoRARequest | Adapter | None = None,
    ) -> Request:
        """Turn a prompt into a request.

        Args:
            prompt: Text, token ids, or a mapping.
            sampling: Parameters; the model's defaults if absent.
            request_id: Unique among unfinished requests; random if absent.
            priority: Lower is served first, under the `priority` policy.
            cache_salt: Prefixes are shared only within one salt.
            output_token_ids: Output of an interrupted run of this request, behind which the
                completion goes on.
            slo: How soon its tokens are wanted: an `Slo`, or a mapping with its fields.
            lora_request: Adapter to add to the weights; read now, if it has not been.

        Raises:
            RequestError: If the prompt is of no known form, or is text and there is no tokenizer,
                or an objective is impossible, or adapters are switched off.
            ConfigError: If the adapter is damaged, missing, or does not fit the model.
        """
        text: str | None = None
        if isinstance(prompt, Mapping):
            cache_salt = str(prompt.get("cache_salt") or cache_salt)
            output_token_ids = prompt.get("output_token_ids") or output_token_ids  # type: ignore[assignment]
            text = prompt.get("prompt")  # type: ignore[assignment]
            ids = prompt.get("prompt_token_ids")
            if ids is None and text is None:
                raise RequestError(
                    "a prompt mapping needs 'prompt' or 'prompt_token_ids', found "
                    f"{sorted(map(str, prompt))}.",
                    param="prompt",
                )
            prompt = ids if ids is not None else text  # type: ignore[assignment]
        if isinstance(prompt, str):
            text = prompt
            ids = self.encode(prompt)
        else:
            ids = self._check_ids(prompt)
        output = self._check_ids(output_token_ids, "output_token_ids") if output_token_ids else ()
        return Request(
            request_id=RequestId(request_id or new_request_id()),
            prompt_token_ids=tuple(ids),
            sampling=sampling if sampling is not None else self.default_params(),
            prompt=text,
            arrival=self.clock.now(),
            priority=priority,
            cache_salt=cache_salt,
            output_token_ids=tuple(output),
            slo=_as_slo(slo),
            adapter=self.get_adapter(lora_request),
        )

    def get_adapter(self, lora_request: LoRARequest | Adapter | None) -> Adapter | None:
        """Return an adapter with its weights, reading them if they are not in memory.

        Args:
            lora_request: Names it; one that has been got already stays as it is.

        Raises:
            RequestError: If adapters are switched off, or name and number are those of others.
            ConfigError: If it is damaged, missing, or does not fit the model.
        """
        if lora_request is None or isinstance(lora_request, LoraAdapter):
            return lora_request
        return self.adapters.get(cast(LoRARequest, lora_request))

    def _check_ids(self, tokens: object, param: str = "prompt") -> list[int]:
        try:
            # operator.index takes every kind of integer and nothing that would have to be rounded.
            ids = [operator.index(token) for token in tokens]  # type: ignore[attr-defined]
        except TypeError:
            form = "a list of token ids" if param != "prompt" else "a string or a list of token ids"
            raise RequestError(
                f"{param} must be {form}, got {type(tokens).__name__}.", param=param
            ) from None
        return ids

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, with the special tokens that the model puts around text.

        Raises:
            RequestError: If there is no tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer; give token ids, or pass tokenizer=.", param="prompt"
            )
        return self.tokenizer.encode(text)

    def begin_grammar(self, request: Request) -> PendingGrammar | None:
        """Begin to compile the grammar of a request; None if its text is free.

        Raises:
            RequestError: If the constraint is malformed, or none can be served here.
        """
        return self.engine.constraints.begin(request.sampling)

    def close(self) -> None:
        """Abort what is under way, stop the thread and free the cache; weights stay."""
        self.thread.close()
        if self.policy is not None:
            self.policy.close()
        self.engine.constraints.close()
        self.engine.runner.programs.stop()
        if self._compiler is not None:
            self._compiler.join()  # XLA must not be compiling while the process winds down
        self.engine.runner.close()


def close_when_forgotten(owner: object, close: Callable[[], None]) -> None:
    """Have an engine closed once nobody can use it any more, as a notebook that loads another does.

    Args:
        owner: Its face; the garbage collector decides when it is gone.
        close: Closes what is behind it; may be called twice, and holds no reference to `owner`.
    """
    # The collector may run on the engine's own thread, which cannot wait for itself to end.
    later = weakref.finalize(owner, lambda: threading.Thread(target=close, daemon=True).start())
    later.atexit = False


def _as_slo(slo: SloFields | None) -> Slo | None:
    if slo is None or isinstance(slo, Slo):
        return slo
    if not isinstance(slo, Mapping):
        raise RequestError(
            f"slo must be an Slo or a mapping with its fields, got {type(slo).__name__}.",
            param="slo",
        )
    return Slo.from_mapping(slo)


def _progress_bar() -> Progress:
    bar = tqdm(total=0, desc="Warming up", unit="program", file=sys.stderr)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show
