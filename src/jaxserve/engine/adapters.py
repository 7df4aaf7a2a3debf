"""Low-rank adapters of a running engine: what has been read, and what lies on the device.

`AdapterStore` keeps adapters in host memory, for any thread; a request holds the adapter that it
was given, so that taking one out of the store disturbs nobody who uses it. `AdapterSlots` keeps the
few that fit onto the device, for the engine's thread alone.
"""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxserve.core.errors import CapacityError, RequestError
from jaxserve.core.lora import Adapter, LoRARequest
from jaxserve.core.request import Request
from jaxserve.core.units import format_bytes
from jaxserve.engine.runner import Runner
from jaxserve.models.peft import LoraAdapter, read_adapter

logger = logging.getLogger(__name__)

SWITCHED_OFF = (
    "adapters are switched off; start with --enable-lora, or enable_lora=True in the library."
)

Reader = Callable[[LoRARequest], LoraAdapter]
"""Reads and checks an adapter; takes a while."""


class AdapterStore:
    """The adapters that requests may use.

    Host memory holds the weights of the most recently used ones; others, if they came from a
    folder, are read again when they are asked for. Pinned adapters and those of unfinished requests
    stay in memory in any case.

    Args:
        read: Reads an adapter; None refuses them all.
        max_cpu_loras: Adapters whose weights are kept.
    """

    def __init__(self, read: Reader | None, *, max_cpu_loras: int) -> None:
        """Start empty."""
        self._read = read
        self._max_loaded = max_cpu_loras
        self._known: dict[int, LoRARequest] = {}
        self._loaded: OrderedDict[int, LoraAdapter] = OrderedDict()
        self._pinned: set[int] = set()
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # so that nothing is read twice

    @property
    def is_enabled(self) -> bool:
        """Whether there can be adapters."""
        return self._read is not None

    def requests(self) -> list[LoRARequest]:
        """List the known adapters, in the order in which they came."""
        return list(self._known.values())

    def named(self, name: str) -> LoRARequest | None:
        """Find a known adapter by its name."""
        return next((known for known in self.requests() if known.lora_name == name), None)

    def free_id(self) -> int:
        """Return a number that no known adapter has."""
        return 1 + max(self._known, default=0)

    def get(self, request: LoRARequest) -> LoraAdapter:
        """Return an adapter, reading it if its weights are not in memory.

        Raises:
            RequestError: If adapters are switched off, or name and number contradict those of
                another one.
            ConfigError: If it is damaged, missing, or does not fit the model.
        """
        if self._read is None:
            raise RequestError(SWITCHED_OFF, param="lora_request")
        if not isinstance(request, LoRARequest):
            raise RequestError(
                f"lora_request must be a LoRARequest, got {type(request).__name__}.",
                param="lora_request",
            )
        adapter = self._ready(request)
        if adapter is not None:
            return adapter
        with self._reading:
            adapter = self._ready(request)
            if adapter is None:
                adapter = self._read(request)
                with self._lock:
                    self._known[request.lora_int_id] = request
                    self._loaded[request.lora_int_id] = adapter
                    self._evict(request.lora_int_id)
            return adapter

    def _ready(self, request: LoRARequest) -> LoraAdapter | None:
        """Return an adapter whose weights are in memory."""
        with self._lock:
            self._check(request)
            adapter = self._loaded.get(request.lora_int_id)
            # The very request that was read comes again with every prompt that names it.
            if adapter is None or (request.load_inplace and request is not adapter.lora_request):
                return None
            self._loaded.move_to_end(request.lora_int_id)
            return adapter

    def add(self, request: LoRARequest) -> bool:
        """Take an adapter in, or with `load_inplace` put it in the place of an older one.

        Returns:
            Whether it was read; False if it was there already.

        Raises:
            RequestError: As `get`.
            ConfigError: As `get`; an older one stays as it was.
        """
        before = self._loaded.get(getattr(request, "lora_int_id", 0))
        return self.get(request) is not before

    def _check(self, request: LoRARequest) -> None:
        known = self._known.get(request.lora_int_id)
        if known is not None and known.lora_name != request.lora_name:
            raise RequestError(
                f"lora_int_id {request.lora_int_id} is that of adapter {known.lora_name!r}, got it "
                f"for {request.lora_name!r}; give each adapter a number of its own.",
                param="lora_int_id",
            )
        if known is not None and not request.load_inplace and not _is_same(known, request):
            raise RequestError(
                f"adapter {known.lora_name!r} was read from {known.lora_path or 'other arrays'!r}, "
                f"got {request.lora_path or 'new arrays'!r}; set load_inplace to put the new one "
                "in its place.",
                param="load_inplace",
            )
        twin = self.named(request.lora_name)
        if twin is not None and twin.lora_int_id != request.lora_int_id:
            raise RequestError(
                f"adapter {request.lora_name!r} has the lora_int_id {twin.lora_int_id}, got "
                f"{request.lora_int_id}; use that one, or another name.",
                param="lora_int_id",
            )

    def _evict(self, newest: int) -> None:
        for number in list(self._loaded):
            if len(self._loaded) <= self._max_loaded:
                return
            if number != newest and number not in self._pinned:
                del self._loaded[number]
                if not self._known[number].lora_path:
                    del self._known[number]  # nobody could read it again

    def pin(self, lora_int_id: int) -> bool:
        """Keep the weights of a known adapter in memory until it is removed.

        Returns:
            Whether it was not pinned before.
        """
        with self._lock:
            is_new = lora_int_id not in self._pinned
            self._pinned.add(lora_int_id)
            return is_new

    def unpin(self, lora_int_id: int) -> None:
        """Let the weights of an adapter go when others need their place."""
        with self._lock:
            self._pinned.discard(lora_int_id)

    def pinned(self) -> list[LoraAdapter]:
        """List the adapters that are pinned."""
        with self._lock:
            return [self._loaded[number] for number in sorted(self._pinned)]

    def remove(self, lora_int_id: int) -> LoRARequest | None:
        """Forget an adapter; requests that have it finish with it.

        Returns:
            What was forgotten; None if there was no such adapter.
        """
        with self._lock:
            self._pinned.discard(lora_int_id)
            self._loaded.pop(lora_int_id, None)
            return self._known.pop(lora_int_id, None)

    def known(self, lora_int_id: int) -> LoRARequest:
        """Return a known adapter.

        Raises:
            RequestError: With status 404, if there is none of this number.
        """
        found = self._known.get(lora_int_id)
        if found is None:
            raise RequestError(
                f"there is no adapter with the lora_int_id {str(lora_int_id)[:40]}; known: "
                f"{sorted(self._known)}.",
                status=404,
                param="lora_int_id",
            )
        return found


def _is_same(known: LoRARequest, request: LoRARequest) -> bool:
    same_path = known.lora_path == request.lora_path
    return same_path and known.lora_tensors is request.lora_tensors


class AdapterSlots:
    """Which adapter lies in which slot of the device; the least recently used one makes way.

    Args:
        runner: Holds the slots.
    """

    def __init__(self, runner: Runner) -> None:
        """Start empty."""
        self._runner = runner
        shape = runner.spec.lora
        self.max_loras = 0 if shape is None else shape.slots
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._pinned: dict[int, str] = {}
        self._is_dropped = False

    @property
    def held(self) -> frozenset[str]:
        """Keys of the adapters whose slots are not free to take."""
        return frozenset({*self._users, *self._pinned.values()}) if self.max_loras else frozenset()

    def acquire(self, adapter: Adapter | None) -> int:
        """Give a sequence the slot of its adapter, bringing it onto the device if need be.

        Returns:
            The slot, from 1 on; 0 without an adapter.

        Raises:
            CapacityError: If every slot is held by another adapter.
        """
        if adapter is None:
            return 0
        slot = self._place(adapter)
        self._users[adapter.key] += 1
        return slot

    def release(self, key: str) -> None:
        """Take one user off an adapter; it stays on the device until another one needs its slot."""
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]

    def _place(self, adapter: Adapter) -> int:
        slot = self._slot_of.get(adapter.key)
        if slot is None:
            slot = self._free_slot(adapter.key)
            self._runner.set_adapter(slot, cast(LoraAdapter, adapter).layers)
            self._slot_of[adapter.key] = slot
        self._slot_of.move_to_end(adapter.key)
        return slot

    def _free_slot(self, key: str) -> int:
        held = self.held
        if len(held | {key}) > self.max_loras:
            raise CapacityError(f"all {self.max_loras} slots for adapters are in use.")
        if len(self._slot_of) < self.max_loras:
            return min(set(range(1, self.max_loras + 1)) - set(self._slot_of.values()))
        oldest = next(old for old in self._slot_of if old not in held)
        return self._slot_of.pop(oldest)

    def replaced(self, adapter: LoraAdapter) -> None:
        """Let new content under an old number keep the old one's reservation."""
        if adapter.lora_request.lora_int_id in self._pinned:
            self._pinned[adapter.lora_request.lora_int_id] = adapter.key

    def pin(self, adapter: LoraAdapter) -> None:
        """Reserve a slot for an adapter, and bring it there unless the slots are asleep.

        Raises:
            RequestError: With status 409, if no slot would be left for others, or all are in use.
        """
        number = adapter.lora_request.lora_int_id
        pinned = {**self._pinned, number: adapter.key}
        if len(pinned) >= self.max_loras:
            raise RequestError(
                f"one of the {self.max_loras} slots must stay free for other adapters, and "
                f"{len(self._pinned)} are pinned already; start with a larger --max-loras.",
                status=409,
                param="lora_int_id",
            )
        if not self._is_dropped:
            try:
                self._place(adapter)
            except CapacityError as error:
                raise RequestError(f"{error} Try again later.", status=409) from error
        self._pinned = pinned

    def unpin(self, lora_int_id: int) -> None:
        """Let another adapter have the slot once nobody uses it."""
        self._pinned.pop(lora_int_id, None)

    def drop(self) -> None:
        """Free the memory of the slots; nobody may run."""
        self._slot_of.clear()
        self._runner.drop_adapters()
        self._is_dropped = True

    def restore(self) -> None:
        """Allocate the slots again, empty; adapters come back as they are used."""
        self._runner.restore_adapters()
        self._is_dropped = False

    def reset(self) -> None:
        """Start from empty slots, after a failed step left them undefined."""
        if self.max_loras:
            self.drop()
            self.restore()


def make_reader(runner: Runner, model_name: str) -> Reader | None:
    """Return what reads adapters for an engine; None if it has no slots for them.

    Args:
        runner: Holds the slots.
        model_name: What the model is called; an adapter of another one is warned about.
    """
    spec = runner.spec
    if spec.lora is None:
        return None
    rank, dtype = spec.lora.rank, np.dtype(jnp.dtype(spec.dtype))

    def read(request: LoRARequest) -> LoraAdapter:
        adapter = read_adapter(request, spec.config, dtype=dtype, max_rank=rank)
        base = adapter.base_model
        if base and _plain_name(base) != _plain_name(model_name):
            logger.warning(
                "adapter %r says that it was trained on %r, and %r is being served",
                request.lora_name, base, model_name,
            )  # fmt: skip
        logger.info(
            "read adapter %r: rank %d, %s",
            request.lora_name, adapter.rank, format_bytes(adapter.num_bytes),
        )  # fmt: skip
        return adapter

    return read


def _plain_name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower()


def check_adapter(request: Request, max_loras: int) -> None:
    """Refuse an adapter that this engine cannot serve.

    Raises:
        RequestError: If it has no slots, or the adapter was not read by this engine's store.
    """
    if request.adapter is None:
        return
    if not max_loras:
        raise RequestError(SWITCHED_OFF, param="lora_request")
    if not isinstance(request.adapter, LoraAdapter):
        raise RequestError("the adapter of a request must come from get_adapter().")
