"""The levers of a fleet: each is pulled at every replica that lives."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from jaxserve.cluster.roster import Roster, Slot
from jaxserve.core.control import SLEEP_TAGS, PauseMode, SleepTag, WeightUpdate
from jaxserve.core.errors import EngineDeadError
from jaxserve.engine.engine import FIRST_VERSION
from jaxserve.engine.weights import NewWeights


class FleetLifecycle:
    """Pauses a fleet, puts it to sleep, and changes its weights.

    Each replica changes between two of its own steps, so that for a moment some serve the old
    weights and others the new ones; every token tells its version. A replica that dies meanwhile is
    left out, and comes back with what the others serve. If a replica refuses, that is the answer;
    the others may have done it, and asking again is harmless.

    Args:
        roster: The replicas.
        forget: Called when prefix caches are emptied.
    """

    def __init__(self, roster: Roster, forget: Callable[[], None]) -> None:
        """Start awake."""
        self._roster = roster
        self._forget = forget
        self._pause: PauseMode | None = None
        self._asleep: set[SleepTag] = set()
        self._version = FIRST_VERSION
        self._num_updates = 0

    @property
    def weight_version(self) -> str:
        """Version of the weights."""
        return self._version

    @property
    def num_updates(self) -> int:
        """How often the weights have been changed."""
        return self._num_updates

    @property
    def is_paused(self) -> bool:
        """Whether generation is paused."""
        return self._pause is not None

    @property
    def is_sleeping(self) -> bool:
        """Whether some part is asleep."""
        return bool(self._asleep)

    @property
    def asleep(self) -> tuple[SleepTag, ...]:
        """The parts that are asleep."""
        return tuple(tag for tag in SLEEP_TAGS if tag in self._asleep)

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
        """Serve other weights from the next step on; see `Lifecycle.update`."""
        named = str(self._num_updates + 1) if version is None else version
        done = self.everywhere(
            "update", weights, version=named, flush_cache=flush_cache, recompute=recompute,
            abort_all_requests=abort_all_requests, start=start,
        )  # fmt: skip
        return _after(done, lambda answers: self._updated(answers, flush_cache=flush_cache))

    def update_from_disk(
        self,
        model_path: str,
        *,
        note: Callable[[str, WeightUpdate], None] | None = None,
        **options: object,
    ) -> Future[WeightUpdate]:
        """Have every replica read a checkpoint of the same model, then serve it.

        Args:
            model_path: A path that every replica can read, or a name.
            note: Told once that is done.
            **options: As for `update`.
        """
        if options.get("version") is None:
            options["version"] = str(self._num_updates + 1)
        done = self.everywhere("update_from_disk", model_path, **options)
        flush = bool(options.get("flush_cache", True))

        def then(answers: Sequence[Any]) -> WeightUpdate:
            update = self._updated(answers, flush_cache=flush)
            if note is not None:
                note(model_path, update)
            return update

        return _after(done, then)

    def _updated(self, answers: Sequence[Any], *, flush_cache: bool) -> WeightUpdate:
        first: WeightUpdate = max(answers, key=lambda answer: answer.seconds)
        self._num_updates += 1
        self._version = first.version
        self._asleep.discard("weights")
        if flush_cache:
            self._forget()
        return first

    def rename(self, version: str | int, *, abort_all_requests: bool = False) -> Future[None]:
        """Call the weights something else; see `Lifecycle.rename`."""

        def note(_: Sequence[Any]) -> None:
            self._version = str(version)

        return _after(
            self.everywhere("rename", version, abort_all_requests=abort_all_requests), note
        )

    def pause(self, mode: PauseMode = "abort", *, clear_cache: bool = True) -> Future[None]:
        """Pause generation; see `Lifecycle.pause`."""
        done = self.everywhere("pause", mode, clear_cache=clear_cache)
        self._pause = mode
        return _after(done, lambda _: None)

    def resume(self) -> Future[None]:
        """Go on after `pause`; harmless when nothing is paused."""

        def note(_: Sequence[Any]) -> None:
            self._pause = None
            self._asleep.discard("scheduling")

        return _after(self.everywhere("resume"), note)

    def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> Future[bool]:
        """Empty the prefix caches."""
        done = self.everywhere("reset_prefix_cache", reset_running_requests=reset_running_requests)
        self._forget()
        return _after(done, all)

    def sleep(self, level: int = 1, mode: PauseMode = "abort") -> Future[None]:
        """Pause, and give memory back; see `Lifecycle.sleep`."""
        done = self.everywhere("sleep", level, mode)
        self._pause = mode

        def note(_: Sequence[Any]) -> None:
            self._asleep |= {"scheduling"}
            if level:
                self._asleep |= {"weights", "kv_cache"}
                self._forget()

        return _after(done, note)

    def wake_up(self, tags: Iterable[str] | None = None) -> Future[bool]:
        """Undo `sleep`, wholly or in part; see `Lifecycle.wake_up`."""
        wanted = None if tags is None else list(tags)
        done = self.everywhere("wake_up", wanted)

        def note(answers: Sequence[Any]) -> bool:
            is_awake = all(answers)
            self._asleep.difference_update(SLEEP_TAGS if wanted is None else wanted)
            if is_awake:
                self._asleep.clear()
            if "scheduling" not in self._asleep:
                self._pause = None
            return is_awake

        return _after(done, note)

    def everywhere(self, verb: str, *args: object, **options: object) -> "Future[list[Any]]":
        """Pull a lever at every replica that lives.

        Returns:
            Their answers, once all are there; those of replicas that have died are left out.

        Raises:
            EngineDeadError: If none lives.
        """
        living = self._roster.living
        if not living:
            raise EngineDeadError("no replica lives; try again once one is up.")
        calls = [
            (slot, slot.replica.control(verb, *args, **options))
            for slot in living
            if slot.replica is not None
        ]
        self._roster.changed_everywhere()
        return _gathered(calls)


def _gathered(calls: "Sequence[tuple[Slot, Future[Any]]]") -> "Future[list[Any]]":
    whole: Future[list[Any]] = Future()
    whole.set_running_or_notify_cancel()
    left = len(calls)
    lock = threading.Lock()

    def note(_: "Future[Any]") -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        answers: list[Any] = []
        problem: BaseException | None = None
        for _slot, call in calls:
            error = call.exception()
            if error is None:
                answers.append(call.result())
            elif not isinstance(error, EngineDeadError):
                problem = problem or error
        if problem is not None:
            whole.set_exception(problem)
        elif not answers:
            whole.set_exception(EngineDeadError("every replica died before it could answer."))
        else:
            whole.set_result(answers)

    for _slot, call in calls:
        call.add_done_callback(note)
    return whole


def _after[T](done: "Future[list[Any]]", then: Callable[[Sequence[Any]], T]) -> "Future[T]":
    """Return a future of what is made of answers."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def note(whole: "Future[list[Any]]") -> None:
        error = whole.exception()
        if error is not None:
            result.set_exception(error)
            return
        try:
            result.set_result(then(whole.result()))
        except Exception as problem:  # noqa: BLE001  raised again by whoever waits
            result.set_exception(problem)

    done.add_done_callback(note)
    return result
