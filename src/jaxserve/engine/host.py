"""What the synchronous and the asynchronous face share: a loaded engine on its thread."""

import contextlib
import functools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from tqdm.auto import tqdm

from jaxserve.attention.custom import CustomAttention
from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.control import WeightUpdate
from jaxserve.core.cost_file import CostFile
from jaxserve.core.errors import ConfigError, EngineDeadError
from jaxserve.core.protocols import Clock, Scheduler
from jaxserve.core.request import Request
from jaxserve.engine.abstract_host import AbstractHost
from jaxserve.engine.adapters import AdapterStore, make_reader
from jaxserve.engine.engine import Engine
from jaxserve.engine.hosts import join
from jaxserve.engine.leader import refused
from jaxserve.engine.lifecycle import Lifecycle
from jaxserve.engine.loop import EngineThread
from jaxserve.engine.measure import measure_engine
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.profiling import Profiler
from jaxserve.engine.setup import assemble
from jaxserve.engine.source import LoadedModel, ModelSource
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.engine.weights import Names, NewWeights, prepare_weights, read_weights
from jaxserve.grammar.compiler import PendingGrammar
from jaxserve.models.config import ModelConfig
from jaxserve.models.hub import resolve_model
from jaxserve.models.layers import CausalLM
from jaxserve.models.peft import LoraAdapter
from jaxserve.models.quantization import narrow_paths, quantized_model
from jaxserve.models.registry import flatten_params

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (programs compiled, programs in all) during warm-up."""

StepMeter = Callable[[Engine, Clock], CostFile]
"""Finds out how long the steps of an engine take that is warm and turned by nobody else."""


class EngineHost(AbstractHost):
    """A model, loaded and warm, with its engine running on a thread of its own.

    Args:
        source: Name, path, module, (configuration, parameters), or a model that has been loaded.
        tokenizer: Used instead of the model's own.
        config: Settings; or give them one by one.
        mesh: Devices.
        scheduler: Used instead of the configured policy.
        attention: How attention differs from the model's own; needs `attention_backend="pallas"`.
        progress: Whether to show progress bars on stderr.
        on_warm_up: Told about the progress of compilation.
        meter: Finds out how long steps take, before the first request. By default they are
            measured if the policy needs to know and no file tells.
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
        source: ModelSource | LoadedModel,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        mesh: jax.sharding.Mesh | None = None,
        scheduler: Scheduler | None = None,
        attention: CustomAttention | None = None,
        progress: bool = False,
        on_warm_up: Progress | None = None,
        meter: StepMeter | None = None,
        **settings: Any,  # noqa: ANN401  checked by EngineConfig
    ) -> None:
        """Load, warm up, start the thread."""
        if config is not None and settings:
            raise ConfigError(
                f"give settings either in `config` or one by one, got both ({', '.join(settings)})."
            )
        self.clock = WallClock()
        config = config or EngineConfig.from_settings(settings)
        hosts = join(config.parallel)
        if hosts is not None and not hosts.leads:
            raise ConfigError(
                f"process {hosts.rank} of {hosts.size} takes no requests; let it run "
                "`jaxserve serve` with the same flags, or `jaxserve.engine.follower.follow`."
            )
        made = assemble(
            source,
            config,
            clock=self.clock,
            tokenizer=tokenizer,
            mesh=mesh,
            scheduler=scheduler,
            attention=attention,
            progress=progress,
        )
        self._hosts = hosts
        self.has_custom_attention = attention is not None
        # Not kept whole: it holds the first weights, which an update lets go.
        self.engine = made.engine
        self.name = made.model.name
        self.path = made.model.path
        self.tokenizer = made.tokenizer
        self.model_config: ModelConfig = made.model.config
        self.graph = made.model.graph
        self.config = made.config
        self.default_sampling = made.default_sampling
        self._compiler: threading.Thread | None = None
        self.policy = made.policy
        on_progress = on_warm_up or (progress_bar() if progress else None)
        if meter is not None or (self.policy is not None and self.policy.needs_times):
            self._measure(meter or _measure_now, on_progress)
        else:
            self._warm_up(on_progress)
        self._thread = EngineThread(self.engine)
        if hosts is not None:
            hosts.on_loss(self._stop_engine)
        self._lifecycle = Lifecycle(self.engine, self._thread.call)
        options = self.config.lora
        self.adapters = AdapterStore(
            make_reader(self.engine.runner, self.name),
            max_cpu_loras=options.max_cpu_loras or options.max_loras,
        )
        self.profiler = Profiler()
        if self.config.pooling.pooler_config or self.config.pooling.runner == "pooling":
            _ = self.pooling  # so that a wrong setting is found now

    def _measure(self, meter: StepMeter, on_progress: Progress | None) -> None:
        """Compile every step shape, and have their times measured."""
        self.engine.runner.warm_up(on_progress)
        measured = meter(self.engine, self.clock)
        if self.policy is not None:
            self.policy.install(self.engine, measured)

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
    def thread(self) -> EngineThread:
        """The thread on which the engine runs."""
        return self._thread

    @property
    def lifecycle(self) -> Lifecycle:
        """Pauses, sleep and new weights."""
        return self._lifecycle

    @property
    def is_warm(self) -> bool:
        """Whether every program has been compiled."""
        return self.engine.runner.programs.is_sealed

    @property
    def num_unfinished(self) -> int:
        """Completions under way."""
        return self.engine.num_unfinished

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

    @property
    def max_num_seqs(self) -> int:
        """Most sequences running at once."""
        return self.engine.runner.spec.max_num_seqs

    @property
    def num_free_pages(self) -> int:
        """Pages of the key-value cache that nobody holds."""
        return self.engine.pool.num_free

    def prepare_weights(
        self, params: object, names: Names, *, partial: bool, donate: bool
    ) -> NewWeights:
        """Bring weights into the form in which they are served; see `Controls.update_params`."""
        self._check_alone()
        specs = self.engine.runner.param_specs
        return prepare_weights(params, specs, names=names, partial=partial, donate=donate)

    def update_from_disk(
        self,
        model_path: str | Path,
        *,
        version: str | int | None = None,
        flush_cache: bool = True,
        recompute: bool = False,
        abort_all_requests: bool = False,
    ) -> Future[WeightUpdate]:
        """Read a checkpoint, then serve it; see `Controls.update_weights_from_disk`."""
        start = time.perf_counter()
        weights = self.read_weights(model_path)
        return self.lifecycle.update(
            weights,
            version=version,
            flush_cache=flush_cache,
            recompute=recompute,
            abort_all_requests=abort_all_requests,
            start=start,
        )

    def read_weights(self, model_path: str | Path) -> NewWeights:
        """Read a checkpoint of the same model."""
        self._check_alone()
        specs = self.engine.runner.param_specs
        place = resolve_model(model_path)
        return prepare_weights(read_weights(place, self.model_config, specs), specs)

    def _check_alone(self) -> None:
        """Check that weights can be replaced: that no other process has a part of them."""
        if self._hosts is not None:
            raise refused("weights are replaced")

    def adapter_replaced(self, adapter: LoraAdapter) -> None:
        """Forget what an adapter of the same number has left on the device."""
        self.thread.call(lambda: self.engine.adapters.replaced(adapter)).result()

    def pin_adapter(self, adapter: LoraAdapter) -> None:
        """Bring an adapter onto the device and keep its slot; see `Controls.pin_lora`."""
        self.thread.call(lambda: self.engine.adapters.pin(adapter)).result()

    def unpin_adapter(self, lora_id: int) -> None:
        """Let the slot of a pinned adapter go; harmless if it was not pinned."""
        self.thread.call(lambda: self.engine.adapters.unpin(lora_id)).result()

    def check_health(self) -> None:
        """Raise if the engine has stopped.

        Raises:
            EngineDeadError: With the reason.
        """
        if self.engine.dead is not None:
            raise EngineDeadError(f"the engine has stopped: {self.engine.dead}")

    def begin_grammar(self, request: Request) -> PendingGrammar | None:
        """Begin to compile the grammar of a request; None if its text is free.

        Raises:
            RequestError: If the constraint is malformed, or none can be served here.
        """
        return self.engine.constraints.begin(request.sampling)

    def _stop_engine(self, reason: str) -> None:
        """End everything because a host is lost, even while its step will never come back."""
        reason = f"a host is lost: {reason}"
        with contextlib.suppress(TimeoutError, EngineDeadError):
            self._thread.call(lambda: self.engine.stop(reason)).result(timeout=2)
        if self.engine.dead is None:
            self.engine.stop(reason)

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


def _measure_now(engine: Engine, clock: Clock) -> CostFile:
    measured = measure_engine(engine, clock)
    logger.info(
        "measured %d steps; the cost model errs by %.1f %% in the mean",
        len(measured.samples.seconds), 100 * measured.report.mean_error,
    )  # fmt: skip
    return measured.file


def progress_bar() -> Progress:
    """Return what shows the progress of compilation on stderr."""
    bar = tqdm(total=0, desc="Warming up", unit="program", file=sys.stderr)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show
