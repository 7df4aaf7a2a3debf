"""What happens to a running engine from outside: new weights, pauses, sleep.

Every change is made on the engine's thread between two steps, so that nobody ever sees half of
one, and none of them compiles anything. Methods return futures; the faces wait for them.
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Protocol, cast, get_args

import jax
import numpy as np

from jaxserve.core.control import SLEEP_TAGS, PauseMode, SleepTag, WeightUpdate
from jaxserve.core.errors import RequestError
from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import SleepState
from jaxserve.engine.weights import NewWeights

logger = logging.getLogger(__name__)

MAX_VERSION_LEN = 128
CONFLICT = 409
"""HTTP status of what is right in itself but not now."""


class Caller(Protocol):
    """Runs something between two steps, as `Engine.call` does."""

    def __call__[T](self, work: Callable[[], T], *, when_idle: bool = False) -> Future[T]:
        """Return the future of its result."""
        ...


class Lifecycle:
    """Pauses an engine, puts it to sleep, and changes its weights.

    Args:
        engine: The engine.
        call: How to reach its thread; by default the engine itself, for those who turn it by hand.

    Source: the modes of vLLM (`pause_generation`, `sleep`) and SGLang (`pause_generation` in_place
    and retract, `release_memory_occupation`).
    """

    def __init__(self, engine: Engine, call: Caller | None = None) -> None:
        """Start awake."""
        self._engine = engine
        self._call: Caller = call or engine.call
        self._pause: PauseMode | None = None
        self._asleep: set[SleepTag] = set()
        self._host_copy: list[np.ndarray] | None = None
        self._num_updates = 0

    # Weights -----------------------------------------------------------------------------------

    @property
    def weight_version(self) -> str:
        """Version of the weights."""
        return self._engine.weight_version

    @property
    def num_updates(self) -> int:
        """How often the weights have been changed."""
        return self._num_updates

    def update(
        self,
        weights: NewWeights,
        *,
        version: str | int | None = None,
        flush_cache: bool = True,
        recompute: bool = False,
        abort_all_requests: bool = False,
        start: float | None = None,
    ) -> Future[WeightUpdate]:
        """Serve other weights from the next step on.

        Args:
            weights: The weights.
            version: What to call them; None counts the updates.
            flush_cache: Whether to forget the prefix cache, which the old weights have computed.
            recompute: Whether running sequences lose their keys and values too and compute them
                anew; otherwise they go on with what the old weights have computed.
            abort_all_requests: Whether to end what runs and waits, at the moment of the change.
            start: When the update began, by `time.perf_counter`.

        Raises:
            RequestError: If the version is no good, or `recompute` meets a cache that is kept.
        """
        began = time.perf_counter() if start is None else start
        named = None if version is None else checked_version(version)
        if recompute and not flush_cache:
            raise RequestError(
                "recompute=True needs flush_cache=True; the kept cache would hand back what the "
                "old weights have computed.",
                param="recompute",
            )

        def swap() -> WeightUpdate:
            engine = self._engine
            is_whole = all(leaf is not None for leaf in weights.leaves)
            if not is_whole and not engine.runner.has_params:
                raise RequestError(
                    "a partial update needs weights to start from, but they are asleep; give all "
                    "of them, or call wake_up(['weights']) first.",
                    status=CONFLICT,
                )
            if abort_all_requests:
                engine.abort_all()
            engine.runner.set_params(weights.leaves)
            engine.adapters.restore()
            self._num_updates += 1
            self._host_copy = None
            self._asleep.discard("weights")
            engine.weight_version = str(self._num_updates) if named is None else named
            if flush_cache:
                engine.start_generation()
            if recompute:
                engine.preempt_all()
            seconds = time.perf_counter() - began
            engine.metrics.weights_updated(engine.weight_version, seconds)
            self._report_sleep()
            return WeightUpdate(
                version=engine.weight_version,
                seconds=seconds,
                num_shared=weights.num_shared,
                num_moved=weights.num_moved,
                num_cast=weights.num_cast,
            )

        return self._call(swap)

    def rename(self, version: str | int, *, abort_all_requests: bool = False) -> Future[None]:
        """Call the weights something else.

        Args:
            version: The new name.
            abort_all_requests: Whether to end what runs and waits, at the moment of the change.

        Raises:
            RequestError: If the version is no good.
        """
        named = checked_version(version)

        def work() -> None:
            if abort_all_requests:
                self._engine.abort_all()
            self._engine.weight_version = named
            self._engine.metrics.weights_renamed(named)

        return self._call(work)

    # Pausing -----------------------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        """Whether generation is paused."""
        return self._pause is not None

    def pause(self, mode: PauseMode = "abort", *, clear_cache: bool = True) -> Future[None]:
        """Pause generation.

        Args:
            mode: `abort` ends what runs and waits, `wait` lets it finish; both refuse new requests
                until `resume`. `keep` freezes everything as it is, and new requests queue up.
            clear_cache: Whether to empty the prefix cache then; `keep` keeps it in any case.

        Returns:
            Done once nothing runs any more.

        Raises:
            RequestError: If there is no such mode, or requests would have to finish while asleep.
        """
        self._begin_pause(mode)

        def finish() -> None:
            if self._pause == mode and mode != "keep" and clear_cache:
                self._engine.forget_now()

        return self._after_pause(mode, finish)

    def _begin_pause(self, mode: PauseMode) -> None:
        if mode not in get_args(PauseMode):
            raise RequestError(
                f"mode must be abort, wait or keep, got {str(mode)[:40]!r}.", param="mode"
            )
        if mode == "wait" and self._asleep - {"scheduling"}:
            raise RequestError(
                "requests cannot finish while the engine sleeps; wake it up, or use another mode.",
                status=CONFLICT,
                param="mode",
            )
        # From here on nothing new gets in front of what follows in the inbox.
        self._pause = mode
        self._engine.refusal = (
            None if mode == "keep" else "generation is paused; try again once it goes on."
        )

    def _after_pause[T](self, mode: PauseMode, finish: Callable[[], T]) -> Future[T]:
        engine = self._engine

        def begin() -> None:
            engine.is_frozen = mode == "keep"
            if mode == "abort":
                engine.abort_all()
            if mode != "wait":
                engine.run_idle_calls()  # whoever waits for the end of requests waits in vain

        def begin_and_finish() -> T:
            begin()
            return finish()

        if mode != "wait":
            return self._call(begin_and_finish)
        self._call(begin)
        return self._call(finish, when_idle=True)

    def resume(self) -> Future[None]:
        """Go on after `pause`; harmless when nothing is paused.

        Raises:
            RequestError: Through the future, while weights or cache are asleep.
        """

        def work() -> None:
            if self._asleep - {"scheduling"}:
                raise RequestError(
                    f"the engine sleeps ({', '.join(sorted(self._asleep))}); use wake_up().",
                    status=CONFLICT,
                )
            self._go_on()

        return self._call(work)

    def _go_on(self) -> None:
        self._asleep.discard("scheduling")
        self._pause = None
        self._engine.refusal = None
        self._engine.is_frozen = False
        self._engine.run_idle_calls()

    def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> Future[bool]:
        """Empty the prefix cache.

        Args:
            reset_running_requests: Whether running sequences are recomputed from nothing as well.

        Returns:
            True, once it is empty.
        """

        def work() -> bool:
            if reset_running_requests:
                self._engine.preempt_all()
            self._engine.forget_now()
            return True

        return self._call(work)

    # Sleeping ----------------------------------------------------------------------------------

    @property
    def is_sleeping(self) -> bool:
        """Whether some part is asleep."""
        return bool(self._asleep)

    @property
    def asleep(self) -> tuple[SleepTag, ...]:
        """The parts that are asleep."""
        return tuple(tag for tag in SLEEP_TAGS if tag in self._asleep)

    def sleep(self, level: int = 1, mode: PauseMode = "abort") -> Future[None]:
        """Pause, and give memory back.

        Args:
            level: 0 pauses only. 1 moves the weights to host memory and frees the cache. 2 frees
                both; weights must then come by `update`.
            mode: What becomes of requests; see `pause`. What `keep` keeps is recomputed later.

        Returns:
            Done once the memory is free, as far as nobody else holds the weights.

        Raises:
            RequestError: If there is no such level or mode.
        """
        if level not in (0, 1, 2):
            raise RequestError(f"level must be 0, 1 or 2, got {str(level)[:40]}.", param="level")
        self._begin_pause(mode)

        def finish() -> None:
            if self._pause != mode:
                raise RequestError(
                    "the engine was resumed or paused in another way before it could fall asleep.",
                    status=CONFLICT,
                )
            self._asleep.add("scheduling")
            if level:
                self._free(level)
            self._report_sleep()

        return self._after_pause(mode, finish)

    def _free(self, level: int) -> None:
        engine = self._engine
        if "kv_cache" not in self._asleep:
            engine.drop_cache()
            self._asleep.add("kv_cache")
        if engine.runner.has_params:
            leaves = engine.runner.release_params()
            # Waking must not depend on whether the step programs would take a host array.
            self._host_copy = cast(list[np.ndarray], jax.device_get(list(leaves)))
        if level > 1:
            self._host_copy = None
        engine.adapters.drop()  # what was read stays in host memory
        self._asleep.add("weights")

    def wake_up(self, tags: Iterable[str] | None = None) -> Future[bool]:
        """Undo `sleep`, wholly or in part; compiles nothing.

        Args:
            tags: Parts to wake: `weights`, `kv_cache`, `scheduling`; None is all.

        Returns:
            Whether all is awake.

        Raises:
            RequestError: If there is no such part; through the future, if scheduling would go on
                without weights or cache. Nothing is woken then.
        """
        wanted = set(SLEEP_TAGS if tags is None else tags)
        unknown = sorted(wanted - set(SLEEP_TAGS))
        if unknown:
            raise RequestError(
                f"tags must be among {', '.join(SLEEP_TAGS)}, got {str(unknown[0])[:40]!r}.",
                param="tags",
            )

        def work() -> bool:
            parts = self._asleep & wanted
            self._check_waking(parts)
            engine = self._engine
            if "weights" in parts and self._host_copy is not None:
                specs = engine.runner.param_specs.values()
                pairs = zip(self._host_copy, specs, strict=True)
                engine.runner.set_params([jax.device_put(a, s.sharding) for a, s in pairs])
                engine.adapters.restore()
                self._host_copy = None
            if "kv_cache" in parts:
                engine.runner.restore_cache()
            self._asleep -= parts - {"scheduling"}
            if "weights" in parts and not engine.runner.has_params:
                self._asleep.add("weights")  # discarded: awake as soon as an update brings them
            if "scheduling" in parts:
                self._go_on()
            self._report_sleep()
            return not self._asleep

        return self._call(work)

    def _check_waking(self, parts: set[SleepTag]) -> None:
        if "scheduling" not in parts:
            return
        if not self._engine.runner.has_params and self._host_copy is None:
            raise RequestError(
                "sleep(level=2) has discarded the weights; give them with update_params() before "
                "scheduling goes on.",
                status=CONFLICT,
                param="tags",
            )
        missing = sorted(self._asleep - parts)
        if missing:
            raise RequestError(
                f"scheduling cannot go on while {' and '.join(missing)} sleep; wake them too.",
                status=CONFLICT,
                param="tags",
            )

    def _report_sleep(self) -> None:
        state: SleepState = "awake"
        if "weights" in self._asleep:
            state = "discard_all" if self._host_copy is None else "weights_offloaded"
        self._engine.metrics.sleep_state = state


def checked_version(version: object) -> str:
    """Return a version of the weights as text.

    Raises:
        RequestError: If it is neither a number nor a text of 1 to 128 printable characters.
    """
    if isinstance(version, int) and not isinstance(version, bool):
        version = str(version)
    is_text = isinstance(version, str) and 0 < len(version) <= MAX_VERSION_LEN
    if not isinstance(version, str) or not is_text or not version.isprintable():
        # It becomes a label of a metric, so it must be text that can be written.
        raise RequestError(
            "a weight version must be an integer or a text of 1 to "
            f"{MAX_VERSION_LEN} printable characters, got {str(version)[:40]!r}.",
            param="weight_version",
        )
    return version
