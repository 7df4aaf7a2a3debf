"""Replicas in this process: engines on threads of their own that share weights and programs."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from jaxserve.cluster.replica import Replica
from jaxserve.cluster.times import slowest
from jaxserve.core.config import EngineConfig
from jaxserve.core.cost_file import CostFile
from jaxserve.core.errors import EngineDeadError, RequestError
from jaxserve.core.protocols import Clock
from jaxserve.core.request import Request
from jaxserve.engine.engine import FIRST_VERSION, Engine, EngineReport
from jaxserve.engine.host import EngineHost, Progress, StepMeter
from jaxserve.engine.inbox import Sink
from jaxserve.engine.measure import measure_engine
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.parallel import mesh_of
from jaxserve.engine.source import LoadedModel
from jaxserve.engine.tokenizer import Tokenizer


class LocalReplica:
    """An engine of this process.

    Args:
        host: The engine on its thread.
    """

    def __init__(self, host: EngineHost) -> None:
        """Keep it."""
        self.host = host
        self._closing = threading.Lock()
        self._is_closed = False

    @property
    def failure(self) -> str | None:
        """Why it has stopped; None while it lives."""
        return self.host.engine.dead

    @property
    def metrics(self) -> EngineMetrics:
        """Its counters."""
        return self.host.metrics

    def report(self) -> EngineReport:
        """Tell what it is doing."""
        return self.host.engine.report()

    def submit(self, request: Request, sink: Sink) -> None:
        """Hand a request over; see `Inbox.submit`."""
        self.host.thread.submit(request, sink)

    def cancel(self, request_id: str) -> None:
        """End a request."""
        self.host.thread.cancel(request_id)

    def control(self, verb: str, *args: object, **options: object) -> "Future[Any]":
        """Pull one of its levers."""
        owner = self.host if hasattr(self.host, verb) else self.host.lifecycle
        found = getattr(owner, verb)(*args, **options)
        if isinstance(found, Future):
            return found
        done: Future[Any] = Future()
        done.set_result(found)
        return done

    def close(self) -> None:
        """Abort what is under way, and free the cache; weights stay with the others."""
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                self.host.close()


class LocalFactory:
    """Makes replicas of this process.

    Args:
        model: The model, in memory once.
        config: Settings of each engine.
        tokenizer: Shared by all.
        count: Replicas at most; they share the device's memory.
        file: Times of steps; None leaves it to the policy to measure.
        spreads: Whether each replica has devices of its own, the next ones, and its own copy of the
            weights there; otherwise all share those of the model.

    Attributes:
        file: Times of steps, once they are known.
        living: Returns the replicas that live, whose weights a new one takes.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        *,
        tokenizer: Tokenizer | None,
        count: int,
        file: CostFile | None = None,
        spreads: bool = False,
    ) -> None:
        """Make nothing yet."""
        self.file = file
        self._spreads = spreads
        # Weights are not kept here: sleep and updates must be able to let them go.
        self._model = dataclasses.replace(model, state=nnx.State({}))
        self._kept: tuple[nnx.State, str] | None = (model.state, FIRST_VERSION)
        self._config = config
        self._tokenizer = tokenizer
        self._count = count
        self.living: Callable[[], list[LocalReplica]] = list

    def make(self, index: int) -> LocalReplica:
        """Start a replica with the weights that the others serve."""
        state, version = self._current()
        known = self.file
        meter: StepMeter | None = None if known is None else (lambda *_: known)
        host = EngineHost(
            self._placed(dataclasses.replace(self._model, state=state), index),
            tokenizer=self._tokenizer, config=self._config_of(index), meter=meter,
        )  # fmt: skip
        if version != FIRST_VERSION:
            host.lifecycle.rename(version).result()
        self._kept = None  # the new one has them
        return LocalReplica(host)

    def make_first(
        self, number: int, *, measure: bool, on_warm_up: Progress | None
    ) -> list[LocalReplica]:
        """Start the first replicas.

        Args:
            number: How many.
            measure: Whether to measure steps: of all replicas at once, since they share the
                machine when they serve.
            on_warm_up: Told about the progress of compilation, which only the first one needs.
        """
        model = dataclasses.replace(self._model, state=self._current()[0])
        if measure:
            made = self._measure_together(model, number, on_warm_up)
        else:
            made = self._start_in_turn(model, number, on_warm_up)
        self._kept = None
        return made

    def _start_in_turn(
        self, model: LoadedModel, number: int, on_warm_up: Progress | None
    ) -> list[LocalReplica]:
        known = self.file
        meter: StepMeter | None = None if known is None else (lambda *_: known)
        made: list[LocalReplica] = []
        try:
            for index in range(number):
                host = EngineHost(
                    self._placed(model, index), tokenizer=self._tokenizer,
                    config=self._config_of(index), meter=meter,
                    on_warm_up=on_warm_up if index == 0 else None,
                )  # fmt: skip
                made.append(LocalReplica(host))
        except BaseException:
            for replica in made:
                replica.close()
            raise
        return made

    def _measure_together(
        self, model: LoadedModel, number: int, on_warm_up: Progress | None
    ) -> list[LocalReplica]:
        barrier = threading.Barrier(number)
        is_warm = threading.Event()
        files: dict[int, CostFile] = {}
        made: dict[int, LocalReplica] = {}
        problems: list[BaseException] = []

        def start(index: int) -> None:
            def meter(engine: Engine, clock: Clock) -> CostFile:
                is_warm.set()
                barrier.wait()
                files[index] = measure_engine(engine, clock).file
                barrier.wait()  # nobody's last steps are measured alone
                # One model of time for all: the slowest says what can be promised.
                return slowest(files.values())

            try:
                host = EngineHost(
                    self._placed(model, index), tokenizer=self._tokenizer,
                    config=self._config_of(index), meter=meter,
                    on_warm_up=on_warm_up if index == 0 else None,
                )  # fmt: skip
                made[index] = LocalReplica(host)
            except BaseException as error:  # noqa: BLE001  raised again by whoever waits
                problems.append(error)
                is_warm.set()
                barrier.abort()

        threads = [threading.Thread(target=start, args=(i,), daemon=True) for i in range(number)]
        threads[0].start()
        is_warm.wait()  # the others find its programs
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        if problems:
            for replica in made.values():
                replica.close()
            raise next(
                (p for p in problems if not isinstance(p, threading.BrokenBarrierError)),
                problems[0],
            )
        self.file = slowest(files.values())
        return [made[i] for i in range(number)]

    def _placed(self, model: LoadedModel, index: int) -> LoadedModel:
        """Return a model on the devices of one replica."""
        if not self._spreads:
            return model
        mesh = mesh_of(self._config.parallel, model.config, replica=index)
        if jax.tree.leaves(model.state)[0].sharding.mesh == mesh:
            return dataclasses.replace(model, mesh=mesh)

        def move(array: jax.Array) -> jax.Array:
            spec = array.sharding.spec  # type: ignore[attr-defined]  loaded onto a mesh
            return jax.device_put(array, NamedSharding(mesh, spec))

        return dataclasses.replace(model, mesh=mesh, state=jax.tree.map(move, model.state))

    def _current(self) -> tuple[nnx.State, str]:
        """Return the weights that are served now, and their version."""
        for replica in self.living():
            with contextlib.suppress(RequestError):  # raised while they are asleep
                engine = replica.host.engine
                return engine.runner.params, engine.weight_version
        if self._kept is None:
            raise EngineDeadError("no replica lives whose weights a new one could take.")
        return self._kept

    def bury(self, replica: Replica) -> None:
        """Keep the weights of a replica that has died, if no other one has them."""
        if isinstance(replica, LocalReplica) and not self.living():
            engine = replica.host.engine
            with contextlib.suppress(RequestError):
                self._kept = engine.runner.params, engine.weight_version

    def _config_of(self, index: int) -> EngineConfig:
        """Return settings in which a replica takes its share of what memory is left."""
        cache = self._config.cache
        if self._spreads:
            return self._config
        if cache.kv_cache_memory_bytes is not None or cache.num_gpu_blocks_override is not None:
            return self._config
        stats = jax.local_devices()[0].memory_stats() or {}
        limit, used = stats.get("bytes_limit", 0), stats.get("bytes_in_use", 0)
        if not limit:
            return self._config  # a CPU, where the cache takes memory only as it is written to
        left = max(1, self._count - index)
        share = used / limit
        mine = share + max(0.0, cache.gpu_memory_utilization - share) / left
        cache = dataclasses.replace(cache, gpu_memory_utilization=min(mine, 0.99))
        return dataclasses.replace(self._config, cache=cache)
