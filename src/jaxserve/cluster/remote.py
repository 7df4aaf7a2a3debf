"""Replicas elsewhere: engines in actors of a Ray cluster, on this machine or on others.

An actor is a process with an engine and weights of its own. Requests go to it as they are; its
events come back in batches, through a call that is always under way and that brings news of the
engine as well. When that call fails the actor is dead, and whatever was with it is told so.
"""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jaxserve.cluster.assemble import assemble_fleet, replica_config
from jaxserve.cluster.host import Facts
from jaxserve.cluster.options import ClusterOptions
from jaxserve.cluster.replica import Replica
from jaxserve.cluster.times import slowest
from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.control import WeightUpdate
from jaxserve.core.cost_file import CostFile
from jaxserve.core.errors import (
    CapacityError,
    ConfigError,
    EngineDeadError,
    JaxserveError,
    MissingExtraError,
    UnsupportedError,
)
from jaxserve.core.event import FinishReason, RequestMetrics, TokenEvent
from jaxserve.core.request import Request
from jaxserve.engine.adapters import AdapterStore
from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.engine.engine import EngineReport
from jaxserve.engine.host import EngineHost
from jaxserve.engine.inbox import PAUSED_RETRY_S, Sink
from jaxserve.engine.measure import measure_engine
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.source import ModelSource
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.engine.traced import RunnerSpec
from jaxserve.models.config import ModelConfig
from jaxserve.models.hub import resolve_model

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""Seconds after which an actor without events tells how it is."""
_STORE = 256 << 20
"""Bytes for objects in a cluster that is started here; requests and events are small."""
THREADS = 16
"""Calls that an actor answers side by side; one of them always waits for events."""
_TIMES = (
    "arrival_time", "first_scheduled_time", "first_token_time", "last_token_time", "finished_time",
)  # fmt: skip


def import_ray() -> Any:  # noqa: ANN401  a module that need not be there
    """Return the package ray.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import ray  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  optional
    except ImportError:
        raise MissingExtraError(
            "replicas in Ray actors need the package ray; run: pip install 'jaxserve[ray]', or use "
            "--cluster local."
        ) from None
    return ray


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """What an actor tells about itself once it is ready.

    Attributes:
        name: What its model is called.
        spec: What its engine can run.
        model_config: The model's shape.
        config: Settings with every "auto" resolved.
        default_sampling: Sampling defaults of the model.
        eos_ids: Tokens that end a completion.
        cost_file: Times of its steps, if they were measured or given.
        report: How its engine stands.
    """

    name: str
    spec: RunnerSpec
    model_config: ModelConfig
    config: EngineConfig
    default_sampling: dict[str, Any]
    eos_ids: tuple[int, ...]
    cost_file: CostFile | None
    report: EngineReport


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What an actor has to tell.

    Attributes:
        events: Since it was last asked, in order.
        report: How its engine stands.
        metrics: Its counters.
        failure: Why its engine has stopped; None while it lives.
    """

    events: list[TokenEvent]
    report: EngineReport
    metrics: EngineMetrics
    failure: str | None


class ReplicaActor:
    """An engine in a process of its own; what Ray calls.

    Args:
        source: The model, by a name or a path that this machine can read.
        config: Settings of the engine.
        cost_file: Times of steps, if they are known.
        measure: Whether to measure them, if they are not.
    """

    def __init__(
        self,
        source: str,
        config: EngineConfig,
        cost_file: CostFile | None,
        measure: bool,  # noqa: FBT001  Ray passes it on
    ) -> None:
        """Load, warm up, and measure if need be."""
        self._clock = WallClock()
        self._events: list[TokenEvent] = []
        self._news = threading.Condition()
        self._cancelled: set[str] = set()
        self._file = cost_file

        def meter(engine: Any, clock: Any) -> CostFile:  # noqa: ANN401  see StepMeter
            if self._file is None:
                self._file = measure_engine(engine, clock).file
            return self._file

        needs_times = cost_file is not None or measure
        self._host = EngineHost(source, config=config, meter=meter if needs_times else None)

    def handshake(self) -> Handshake:
        """Tell what this is."""
        host = self._host
        return Handshake(
            name=host.name, spec=host.engine.runner.spec, model_config=host.model_config,
            config=host.config, default_sampling=host.default_sampling,
            eos_ids=host.engine.eos_token_ids, cost_file=self._file,
            report=host.engine.report(),
        )  # fmt: skip

    def now(self) -> float:
        """Return the time of this process's clock in seconds."""
        return self._clock.now()

    def submit(self, request: Request, age_s: float) -> None:
        """Take a request; a refusal becomes its last event.

        Args:
            request: What to do.
            age_s: Seconds since its arrival.
        """
        request = dataclasses.replace(request, arrival=self._clock.now() - age_s)
        try:
            self._host.thread.submit(request, self._take)
        except JaxserveError as error:
            for index in range(request.sampling.n):
                self._take(
                    TokenEvent(
                        request_id=request.request_id, index=index, error=str(error),
                        finish_reason=FinishReason.ERROR,
                        error_param=getattr(error, "param", None),
                    )
                )  # fmt: skip
        if request.request_id in self._cancelled:  # calls may overtake each other
            self._cancelled.discard(request.request_id)
            self._host.thread.cancel(request.request_id)

    def cancel(self, request_id: str, is_known: bool) -> None:  # noqa: FBT001  Ray passes it on
        """End a request.

        Args:
            request_id: Which.
            is_known: Whether something has come of it, so that it cannot be still on its way here.
        """
        if not is_known:
            self._cancelled.add(request_id)
        self._host.thread.cancel(request_id)

    def poll(self, timeout_s: float) -> News:
        """Wait for events, and tell them and how the engine stands."""
        with self._news:
            self._news.wait_for(lambda: bool(self._events), timeout_s)
            events, self._events = self._events, []
        return News(
            events=events,
            report=self._host.engine.report(),
            metrics=self._host.metrics,
            failure=self._host.engine.dead,
        )

    def control(self, verb: str, args: tuple[Any, ...], options: dict[str, Any]) -> object:
        """Pull a lever, and wait until that is done."""
        owner = self._host if hasattr(self._host, verb) else self._host.lifecycle
        found = getattr(owner, verb)(*args, **options)
        return found.result() if isinstance(found, Future) else found

    def close(self) -> None:
        """Free everything."""
        self._host.close()

    def _take(self, event: TokenEvent) -> None:
        with self._news:
            self._events.append(event)
            self._news.notify()


class _Open:
    """A request that is with an actor."""

    def __init__(self, request: Request, sink: Sink) -> None:
        self.request = request
        self.sink = sink
        self.left = set(range(request.sampling.n))
        self.is_known = False


class RayReplica:
    """An engine in a Ray actor.

    Args:
        ray: The package.
        actor: Handle of the actor; ready.
        max_queued: Most completions that it takes; None is no limit.

    Attributes:
        handshake: What the actor has told about itself.
    """

    def __init__(self, ray: Any, actor: Any, *, max_queued: int | None) -> None:  # noqa: ANN401
        """Wait until the actor is ready, and begin to listen."""
        self._ray = ray
        self._actor = actor
        self._clock = WallClock()
        self._max_queued = max_queued
        self.handshake = cast(Handshake, ray.get(actor.handshake.remote()))
        before = self._clock.now()
        theirs: float = ray.get(actor.now.remote())
        self._offset = (before + self._clock.now()) / 2 - theirs
        self._failure: str | None = None
        self._refusal: str | None = None
        self._open: dict[str, _Open] = {}
        self._lock = threading.Lock()
        self._report = self._in_our_time(self.handshake.report)
        self._metrics = EngineMetrics(max_model_len=self.handshake.spec.max_model_len)
        self._is_closing = False
        self._calls = ThreadPoolExecutor(4, thread_name_prefix="jaxserve-ray")
        self._listener = threading.Thread(target=self._listen, name="jaxserve-ray", daemon=True)
        self._listener.start()

    @property
    def failure(self) -> str | None:
        """Why it has stopped; None while it lives."""
        return self._failure

    @property
    def metrics(self) -> EngineMetrics:
        """Its counters, as of the latest news."""
        return self._metrics

    def report(self) -> EngineReport:
        """Tell what it was doing when it was last heard of."""
        return self._report

    def submit(self, request: Request, sink: Sink) -> None:
        """Hand a request over; see `Inbox.submit`."""
        count = request.sampling.n
        with self._lock:
            if self._failure is not None or self._is_closing:
                raise EngineDeadError(f"the engine has stopped: {self._failure or 'closed'}")
            if self._refusal is not None:
                raise CapacityError(self._refusal, retry_after_s=PAUSED_RETRY_S)
            many = sum(len(one.left) for one in self._open.values())
            if self._max_queued is not None and many + count > self._max_queued:
                raise CapacityError(
                    f"{many} completions are under way and at most {self._max_queued} are "
                    f"accepted; {count} more were asked for. Try again later.",
                    retry_after_s=1.0,
                )
            self._open[request.request_id] = _Open(request, sink)
        self._actor.submit.remote(request, self._clock.now() - request.arrival)

    def cancel(self, request_id: str) -> None:
        """End a request."""
        with self._lock:
            found = self._open.get(request_id)
        if found is not None:
            self._actor.cancel.remote(request_id, found.is_known)

    def control(self, verb: str, *args: object, **options: object) -> "Future[Any]":
        """Pull one of its levers.

        Raises:
            EngineDeadError: If it has stopped.
        """
        if self._failure is not None:
            raise EngineDeadError(f"the engine has stopped: {self._failure}")
        before = self._refusal
        mode = args[1] if verb == "sleep" and len(args) > 1 else args[0] if args else "abort"
        if verb in ("pause", "sleep") and mode in ("abort", "wait"):
            self._refusal = "generation is paused; try again once it goes on."
        reference = self._actor.control.remote(verb, args, options)

        def wait() -> object:
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                self._refusal = before  # it was refused itself
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                raise EngineDeadError(f"the actor has died: {_first_line(error)}") from None
            if verb == "resume" or (verb == "wake_up" and answer):
                self._refusal = None
            return answer

        return self._calls.submit(wait)

    def close(self) -> None:
        """End the actor and its process."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        with contextlib.suppress(Exception):  # it may be dead
            self._ray.get(self._actor.close.remote(), timeout=30)
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)
        self._listener.join(timeout=30)
        self._calls.shutdown(wait=False)

    def _listen(self) -> None:
        while self._failure is None:
            try:
                news = cast(News, self._ray.get(self._actor.poll.remote(POLL_S)))
            except Exception as error:  # noqa: BLE001  whatever it is, nobody will hear more
                self._fail(f"its actor has died: {_first_line(error)}")
                return
            self._report = self._in_our_time(news.report)
            self._metrics = news.metrics
            if news.failure is not None:
                self._failure = news.failure  # known before its events are told
            for event in news.events:
                self._tell(event)
            if news.failure is not None:
                self._fail(news.failure)

    def _tell(self, event: TokenEvent) -> None:
        with self._lock:
            found = self._open.get(event.request_id)
            if found is None:
                return
            found.is_known = True
            if event.finish_reason is not None:
                found.left.discard(event.index)
                if not found.left:
                    del self._open[event.request_id]
        times = event.metrics
        if times is not None:
            event = dataclasses.replace(event, metrics=self._shifted(times))
        try:
            found.sink(event)
        except Exception:
            logger.exception("the receiver of request %s failed", event.request_id)

    def _fail(self, reason: str) -> None:
        """Tell everybody whose request was with the actor that it will come to nothing."""
        with self._lock:
            self._failure = reason
            opened, self._open = self._open, {}
        for name, one in opened.items():
            for index in sorted(one.left):
                event = TokenEvent(
                    request_id=name, index=index, finish_reason=FinishReason.ERROR, error=reason,
                    num_prompt_tokens=len(one.request.prompt_token_ids),
                )  # fmt: skip
                one.sink(event)

    def _shifted(self, times: RequestMetrics) -> RequestMetrics:
        """Bring times of the actor's clock to this process's."""
        moved = {
            name: value + self._offset
            for name in _TIMES
            if (value := getattr(times, name)) is not None
        }
        return dataclasses.replace(times, **moved)

    def _in_our_time(self, report: EngineReport) -> EngineReport:
        view = dataclasses.replace(report.view, now=report.view.now + self._offset)
        return dataclasses.replace(report, view=view)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:400]


class RayFactory:
    """Makes replicas in Ray actors.

    Args:
        ray: The package, with a cluster.
        source: The model.
        config: Settings of each engine.
        options: Settings of the fleet.
        known: Times of steps; None if they are not known.
        measure: Whether to measure them.
    """

    def __init__(
        self,
        ray: Any,  # noqa: ANN401
        source: str,
        config: EngineConfig,
        options: ClusterOptions,
        *,
        known: CostFile | None,
        measure: bool,
    ) -> None:
        """Make nothing yet."""
        self.file = known
        self._ray = ray
        self._source = source
        self._config = config
        self._options = options
        self._measure = measure
        self._update: tuple[str, str] | None = None

    def make_first(self, number: int) -> list[RayReplica]:
        """Start the first replicas, all at once, so that they are measured as they will serve."""
        self._warn_of_what_is_missing(number)
        actors = [self._actor() for _ in range(number)]
        made: list[RayReplica] = []
        try:
            made += [self._replica(actor) for actor in actors]
        except BaseException:
            for replica in made:
                replica.close()
            for actor in actors[len(made) :]:
                self._ray.kill(actor)
            raise
        files = [one.handshake.cost_file for one in made]
        found = [file for file in files if file is not None]
        if found:
            self.file = slowest(found)
        return made

    def make(self, index: int) -> Replica:
        """Start a replica with the weights that the others serve."""
        del index
        replica = self._replica(self._actor())
        if self._update is not None:
            path, version = self._update
            try:
                replica.control("update_from_disk", path, version=version).result()
            except BaseException:
                replica.close()
                raise
        return replica

    def updated(self, path: str, done: WeightUpdate) -> None:
        """Take note of the checkpoint that is served now, for replicas to come."""
        self._update = (path, done.version)

    def _wanted(self) -> dict[str, Any]:
        """Return the options of an actor."""
        given: Mapping[str, Any] = self._options.ray_actor_options or {}
        wanted: dict[str, Any] = {
            "num_cpus": 1, "max_concurrency": THREADS, "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
        }  # fmt: skip
        if self._ray.cluster_resources().get("GPU", 0) > 0:
            wanted["num_gpus"] = self._config.parallel.tensor_parallel_size
        return {**wanted, **given}

    def _warn_of_what_is_missing(self, number: int) -> None:
        """Say what actors will wait for, which Ray does without a word."""
        there, wanted = self._ray.cluster_resources(), self._wanted()
        for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            needed = number * wanted.get(key, 0)
            if needed > there.get(name, 0):
                logger.warning(
                    "%d replicas need %g %ss, and the cluster has %g; they wait until there are "
                    "more. Lower ray_actor_options.%s if that is not meant.",
                    number, needed, name, there.get(name, 0), key,
                )  # fmt: skip

    def _actor(self) -> Any:  # noqa: ANN401
        try:
            kind = self._ray.remote(**self._wanted())(ReplicaActor)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"ray_actor_options cannot be used: {_first_line(error)}.") from None
        return kind.remote(self._source, self._config, self.file, self._measure)

    def _replica(self, actor: Any) -> RayReplica:  # noqa: ANN401
        try:
            return RayReplica(
                self._ray, actor, max_queued=self._config.scheduler.max_num_queued_reqs
            )
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayActorError as error:
            cause = getattr(error, "cause", None) or getattr(error, "base_error", None)
            if isinstance(cause, JaxserveError):
                raise cause from None
            raise ConfigError(
                f"a replica's actor could not be started: {_last_line(error)}"
            ) from None


def open_ray_fleet(
    source: ModelSource,
    options: ClusterOptions,
    config: EngineConfig,
    *,
    tokenizer: Tokenizer | None,
    known: CostFile | None,
    needs_times: bool,
) -> AsyncLLM:
    """Start actors for one model, and return them behind one face.

    Args:
        source: A name, or a path that every machine of the cluster can read.
        options: Settings of the fleet.
        config: Settings of each engine.
        tokenizer: Used instead of the model's own.
        known: Times of steps; None if they are not known.
        needs_times: Whether the router wants to know them.

    Raises:
        ConfigError: If the source is no name or path, or actors cannot be started.
        UnsupportedError: If adapters are to be served.
        MissingExtraError: If Ray is not installed.
    """
    ray = import_ray()
    if not isinstance(source, str | Path):
        raise ConfigError(
            "replicas in other processes need a name or a path of the model, got live parameters; "
            "save them, or use cluster local."
        )
    if config.lora.enable_lora:
        raise UnsupportedError("adapters are served by replicas of this process only.")
    is_ours = not ray.is_initialized()
    if is_ours:
        own = {} if options.ray_address is not None else {"object_store_memory": _STORE}
        ray.init(
            address=options.ray_address, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", **own,
        )  # fmt: skip
    made: list[RayReplica] = []
    try:
        path = resolve_model(source, revision=config.model.revision)
        # A name is looked up, and downloaded if need be, where the actor is.
        wanted = str(Path(source).resolve()) if Path(source).exists() else str(source)
        factory = RayFactory(
            ray, wanted, replica_config(config), options, known=known,
            measure=needs_times and known is None,
        )  # fmt: skip
        made = factory.make_first(options.min_replicas or options.replicas)
        told = made[0].handshake
        if tokenizer is None:
            tokenizer = _tokenizer(path, config)
        facts = Facts(
            name=str(source), path=path, tokenizer=tokenizer, model_config=told.model_config,
            config=told.config, default_sampling=told.default_sampling,
            max_model_len=told.spec.max_model_len, max_num_seqs=told.spec.max_num_seqs,
            cost_file=factory.file,
        )  # fmt: skip
        llm, _ = assemble_fleet(
            options,
            facts,
            spec=told.spec,
            eos_ids=told.eos_ids,
            first=made,
            make=factory.make,
            adapters=AdapterStore(None, max_cpu_loras=1),
            on_disk_update=factory.updated,
            on_close=ray.shutdown if is_ours else (lambda: None),
        )
    except BaseException:
        for replica in made:
            replica.close()
        if is_ours:
            ray.shutdown()
        raise
    return llm


def _tokenizer(path: Path, config: EngineConfig) -> Tokenizer | None:
    if config.model.load_format == "dummy" and config.model.tokenizer is None:
        return None
    named = config.model.tokenizer
    place = path if named is None else resolve_model(named, revision=config.model.revision)
    return Tokenizer.from_path(place, chat_template=config.model.chat_template)
