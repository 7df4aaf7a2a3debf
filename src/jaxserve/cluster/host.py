"""A fleet as faces see it: one decoder, whoever of its replicas serves."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.cluster.fleet import Fleet
from jaxserve.cluster.lifecycle import FleetLifecycle
from jaxserve.cluster.metrics import FleetMetrics
from jaxserve.cluster.replica import Replica
from jaxserve.core.config import EngineConfig
from jaxserve.core.control import WeightUpdate
from jaxserve.core.cost_file import CostFile
from jaxserve.core.errors import UnsupportedError
from jaxserve.core.protocols import Clock
from jaxserve.core.request import Request
from jaxserve.core.view import ReplicaStatus
from jaxserve.engine.abstract_host import AbstractHost
from jaxserve.engine.adapters import AdapterStore
from jaxserve.engine.constraints import Constraints
from jaxserve.engine.profiling import Profiler
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.engine.weights import Names, NewWeights
from jaxserve.grammar.compiler import PendingGrammar
from jaxserve.models.config import ModelConfig
from jaxserve.models.peft import LoraAdapter

DISK = "disk"
"""Names of weights that are a path, in calls of a `WeightPreparer`."""

WeightPreparer = Callable[..., NewWeights]
"""Brings weights into the form in which they are served, as `EngineHost.prepare_weights` does."""

DiskUpdate = Callable[[str, WeightUpdate], None]
"""Told the path of a checkpoint that every replica has read, and what that did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the model, whichever replica serves it.

    Attributes:
        name: What it is called.
        path: Where it came from; None for live parameters.
        tokenizer: Its tokenizer, if it has one.
        model_config: Its shape.
        config: Settings with every "auto" resolved.
        default_sampling: Its sampling defaults.
        max_model_len: Most tokens of prompt and output together.
        max_num_seqs: Most sequences running at once on a replica.
        cost_file: Times of steps; None if nobody needs to know them.
    """

    name: str
    path: Path | None
    tokenizer: Tokenizer | None
    model_config: ModelConfig
    config: EngineConfig
    default_sampling: dict[str, Any]
    max_model_len: int
    max_num_seqs: int
    cost_file: CostFile | None = None


class FleetHost(AbstractHost):
    """Several engines that serve one model.

    Args:
        fleet: The fleet.
        facts: What is known of the model.
        clock: Where times of arrival come from.
        constraints: Checks and compiles grammars for those who wait for them.
        adapters: Low-rank adapters that have been read.
        prepare: Brings new weights into form; None where replicas are in other processes.
        on_disk_update: Told about checkpoints that replicas have read by themselves.
        on_close: Called once everything has been closed.
    """

    def __init__(
        self,
        fleet: Fleet,
        facts: Facts,
        *,
        clock: Clock,
        constraints: Constraints,
        adapters: AdapterStore,
        prepare: WeightPreparer | None,
        on_disk_update: DiskUpdate | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep them."""
        self.fleet = fleet
        self.clock = clock
        self.name = facts.name
        self.path = facts.path
        self.tokenizer = facts.tokenizer
        self.model_config = facts.model_config
        self.config = facts.config
        self.default_sampling = facts.default_sampling
        self.adapters = adapters
        self.profiler = Profiler()
        self._facts = facts
        self._constraints = constraints
        self._prepare = prepare
        self._on_disk_update = on_disk_update
        self._on_close = on_close
        self._lifecycle = FleetLifecycle(fleet.roster, fleet.prefixes.forget)
        lifecycle = self._lifecycle
        fleet.roster.holds = lambda: lifecycle.is_paused or lifecycle.is_sleeping
        fleet.roster.on_start = self._pin_again

    @property
    def thread(self) -> Fleet:
        """What takes requests."""
        return self.fleet

    @property
    def lifecycle(self) -> FleetLifecycle:
        """Pauses, sleep and new weights."""
        return self._lifecycle

    @property
    def metrics(self) -> FleetMetrics:
        """Counters, added up over the replicas."""
        return self.fleet.metrics.gather()

    @property
    def num_unfinished(self) -> int:
        """Completions under way."""
        return self.fleet.num_unfinished

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._facts.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Most sequences running at once on a replica."""
        return self._facts.max_num_seqs

    @property
    def cost_file(self) -> CostFile | None:
        """Times of steps that the router goes by; None if it needs none."""
        return self._facts.cost_file

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody holds, of all replicas together."""
        return sum(
            slot.replica.report().view.num_free_pages
            for slot in self.fleet.roster.living
            if slot.replica is not None
        )

    def statuses(self) -> Sequence[ReplicaStatus]:
        """Tell how every replica stands."""
        return self.fleet.roster.statuses()

    def check_health(self) -> None:
        """Raise if no replica serves.

        Raises:
            CapacityError: If replicas are being started.
            EngineDeadError: If none is left.
        """
        self.fleet.check_health()

    def begin_grammar(self, request: Request) -> PendingGrammar | None:
        """Begin to compile the grammar of a request; None if its text is free.

        Raises:
            RequestError: If the constraint is malformed, or none can be served here.
        """
        return self._constraints.begin(request.sampling)

    def prepare_weights(
        self, params: object, names: Names, *, partial: bool, donate: bool
    ) -> NewWeights:
        """Bring weights into the form in which they are served; see `Controls.update_params`.

        Raises:
            UnsupportedError: Where replicas are in other processes.
        """
        if self._prepare is None:
            raise UnsupportedError(
                "replicas in other processes or with devices of their own cannot be given arrays; "
                "write the weights to a folder that all can read, and use "
                "update_weights_from_disk()."
            )
        return self._prepare(params, names, partial=partial, donate=donate)

    def update_from_disk(
        self,
        model_path: str | Path,
        *,
        version: str | int | None = None,
        flush_cache: bool = True,
        recompute: bool = False,
        abort_all_requests: bool = False,
    ) -> Future[WeightUpdate]:
        """Read a checkpoint, then serve it everywhere; see `Controls.update_weights_from_disk`."""
        how: dict[str, Any] = {
            "version": version, "flush_cache": flush_cache, "recompute": recompute,
            "abort_all_requests": abort_all_requests,
        }  # fmt: skip
        if self._prepare is None:
            return self._lifecycle.update_from_disk(
                str(model_path), note=self._on_disk_update, **how
            )
        weights = self._prepare(model_path, DISK, partial=False, donate=False)
        return self._lifecycle.update(weights, **how)

    def adapter_replaced(self, adapter: LoraAdapter) -> None:
        """Forget what an adapter of the same number has left on any device."""
        self._lifecycle.everywhere("adapter_replaced", adapter).result()

    def pin_adapter(self, adapter: LoraAdapter) -> None:
        """Bring an adapter onto every device and keep its slots; see `Controls.pin_lora`."""
        self._lifecycle.everywhere("pin_adapter", adapter).result()

    def _pin_again(self, replica: Replica) -> None:
        """Pin on a replica that has come up what is pinned on the others."""
        for adapter in self.adapters.pinned():
            replica.control("pin_adapter", adapter).result()

    def unpin_adapter(self, lora_id: int) -> None:
        """Let the slots of a pinned adapter go; harmless if it was not pinned."""
        self._lifecycle.everywhere("unpin_adapter", lora_id).result()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; tells whether that was so in time."""
        return self.fleet.wait_idle(timeout_s)

    def close(self) -> None:
        """Abort what is under way, and close every replica."""
        self.fleet.close()
        self._constraints.close()
        self._on_close()
