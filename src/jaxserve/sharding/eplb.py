"""Where experts lie, and which of them lie in several places, so that devices have equal work.

Some experts of a model are asked for much more than others. A few spare slots per device hold
further copies of those, and copies are packed so that devices expect equal loads. Host code on
integers and floats, without JAX: planned beside the steps, and carried out between two of them.

Source: the expert-parallel load balancer of DeepSeek-V3 (arXiv 2412.19437, section 3.4.1), whose
two stages (groups to servers, copies to devices) these are.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int64

from jaxserve.core.errors import ConfigError

_MIX = np.uint64(0x9E3779B97F4A7C15)
"""An odd number near 2**64 / golden ratio; multiplying with it spreads neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The devices among which experts are spread.

    Attributes:
        num_experts: Experts of a layer.
        num_devices: Devices; those of a server follow each other.
        num_slots: Experts that all devices together hold, copies included.
        num_servers: Servers, of equally many devices.
        num_groups: Groups of experts of which a token uses a few; 1 if routing knows none.

    Raises:
        ConfigError: If the numbers do not divide, or there are fewer slots than experts.
    """

    num_experts: int
    num_devices: int
    num_slots: int
    num_servers: int = 1
    num_groups: int = 1

    def __post_init__(self) -> None:
        """Check that everything divides."""
        for name in ("num_experts", "num_devices", "num_slots", "num_servers", "num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_slots < self.num_experts:
            raise ConfigError(
                f"{self.num_slots} slots cannot hold {self.num_experts} experts; add "
                f"{self.num_experts - self.num_slots} redundant experts or more."
            )
        for whole, part in (
            ("num_slots", "num_devices"),
            ("num_devices", "num_servers"),
            ("num_experts", "num_groups"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"{whole} must be a multiple of {part}, got {getattr(self, whole)} and "
                    f"{getattr(self, part)}."
                )
        if self.num_slots > self.num_experts * self.num_devices:
            raise ConfigError(
                f"{self.num_slots} slots are more than one of each of {self.num_experts} experts "
                f"on each of {self.num_devices} devices; take fewer redundant experts."
            )

    @property
    def slots_per_device(self) -> int:
        """Experts that a device holds."""
        return self.num_slots // self.num_devices

    @property
    def keeps_groups(self) -> bool:
        """Whether every group can lie on one server."""
        per_server = self.num_devices // self.num_servers
        has_room = self.num_slots <= self.num_experts * per_server
        return self.num_servers > 1 and self.num_groups % self.num_servers == 0 and has_room


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Which expert lies in which slot.

    Attributes:
        layout: The devices.
        expert: Expert of each slot; the slots of a device follow each other.
    """

    layout: Layout
    expert: Int64[np.ndarray, " slots"]

    @cached_property
    def copies(self) -> Int64[np.ndarray, " experts"]:
        """How many slots each expert has."""
        return np.bincount(self.expert, minlength=self.layout.num_experts)

    @cached_property
    def slots(self) -> Int64[np.ndarray, "experts most_copies"]:
        """Slots of each expert, in order; -1 behind the last."""
        table = np.full((self.layout.num_experts, int(self.copies.max())), -1)
        order = np.argsort(self.expert, kind="stable")
        start = np.cumsum(self.copies) - self.copies
        rank = np.arange(order.size) - start[self.expert[order]]
        table[self.expert[order], rank] = order
        return table

    def device_of(self, slot: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """Return the device of each slot."""
        return slot // self.layout.slots_per_device

    def server_of(self, slot: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """Return the server of each slot."""
        return slot // (self.layout.num_slots // self.layout.num_servers)

    def device_loads(
        self, loads: Float64[np.ndarray, " experts"]
    ) -> Float64[np.ndarray, " devices"]:
        """Return what each device has to do if copies share the work of their expert equally."""
        share = (loads / self.copies)[self.expert]
        return share.reshape(self.layout.num_devices, -1).sum(axis=1)

    def imbalance(self, loads: Float64[np.ndarray, " experts"]) -> float:
        """Return the largest load of a device over the mean; 1 is perfect."""
        per_device = self.device_loads(loads)
        mean = per_device.mean()
        return float(per_device.max() / mean) if mean > 0 else 1.0


def even_placement(layout: Layout) -> Placement:
    """Place experts in their order; spare slots hold the first ones again.

    What an engine begins with, before anything is known about loads.
    """
    return place(np.ones(layout.num_experts), layout)


def place(loads: Float64[np.ndarray, " experts"], layout: Layout) -> Placement:
    """Choose copies and places for loads that are expected.

    Args:
        loads: Tokens that ask for each expert, in any unit.
        layout: The devices.

    Returns:
        The placement. With groups that servers divide, each group lies on one server. No device has
        an expert twice, unless no slot is left elsewhere.

    Raises:
        ConfigError: If there is not one load per expert, or one is negative or no number.
    """
    loads = np.asarray(loads, np.float64)
    if loads.shape != (layout.num_experts,):
        raise ConfigError(f"expected {layout.num_experts} loads, got an array {loads.shape}.")
    if not (np.isfinite(loads).all() and (loads >= 0).all()):
        raise ConfigError("loads of experts must be finite and not negative.")
    parts = _experts_of_servers(loads, layout)
    devices = layout.num_devices // len(parts)
    placed: list[np.ndarray] = []
    for experts in parts:
        own = loads[experts]
        copies = count_copies(own, devices * layout.slots_per_device, most=devices)
        bins = _pack_copies(own / copies, copies, devices, layout.slots_per_device)
        placed += [experts[np.sort(np.array(held))] for held in bins]
    return Placement(layout=layout, expert=np.concatenate(placed).astype(np.int64))


def _experts_of_servers(loads: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """Return the experts of each server; all of them together where groups do not decide."""
    experts = np.arange(layout.num_experts)
    if not layout.keeps_groups:
        return [experts]
    groups = experts.reshape(layout.num_groups, -1)
    bins = pack(loads[groups].sum(axis=1), layout.num_servers)
    return [groups[np.sort(np.array(held))].reshape(-1) for held in bins]


def count_copies(
    loads: Float64[np.ndarray, " experts"], num_slots: int, *, most: int | None = None
) -> Int64[np.ndarray, " experts"]:
    """Share slots out among experts: each next copy goes to whom copies have most to do.

    That makes the largest load per copy as small as it can be.

    Args:
        loads: Tokens that ask for each expert.
        num_slots: Slots; at least one per expert.
        most: Most copies of one expert; None sets no bound.

    Returns:
        Copies of each expert, at least 1.

    Raises:
        ConfigError: If there are too few slots, or more than copies may fill.
    """
    count, bound = len(loads), num_slots if most is None else most
    if not count <= num_slots <= count * bound:
        raise ConfigError(
            f"expected {count} to {count * bound} slots for {count} experts, got {num_slots}."
        )
    copies = np.ones(count, np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(loads)] if bound > 1 else []
    heapq.heapify(heap)
    for _ in range(num_slots - count):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < bound:
            heapq.heappush(heap, (-float(loads[expert]) / copies[expert], expert))
    return copies


def pack(weights: Float64[np.ndarray, " items"], num_bins: int) -> list[list[int]]:
    """Spread items over bins of equal size: the heaviest first, each into the lightest open bin.

    Args:
        weights: Of the items; their number is a multiple of `num_bins`.
        num_bins: Bins.

    Returns:
        Items of each bin.
    """
    room = len(weights) // num_bins
    return _pack_copies(weights, np.ones(len(weights), np.int64), num_bins, room)


def _pack_copies(
    weights: np.ndarray, copies: np.ndarray, num_bins: int, room: int
) -> list[list[int]]:
    """Pack copies, whose weights are given, so that no bin has an item twice if that can be.

    Heaviest first, into the lightest open bin without the item. The number of copies of an item
    is at most `num_bins`.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    load = [0.0] * num_bins
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], -copies[i], i)):
        for _ in range(int(copies[item])):
            target = min(
                (place for place in range(num_bins) if len(bins[place]) < room),
                key=lambda place: (item in bins[place], load[place], len(bins[place]), place),
            )
            bins[target].append(item)
            load[target] += float(weights[item])
    return bins


def aligned(new: Placement, old: Placement) -> Placement:
    """Reorder a placement so that more experts stay where they are.

    Devices of a server are alike, and so are the slots of a device; neither changes the loads.

    Args:
        new: What is wanted.
        old: What there is, of the same layout.
    """
    layout = new.layout
    held = old.expert.reshape(layout.num_devices, -1)
    wanted = new.expert.reshape(layout.num_devices, -1)
    per_server = layout.num_devices // layout.num_servers
    made = np.empty_like(held)
    for first in range(0, layout.num_devices, per_server):
        free = set(range(first, first + per_server))
        pairs = sorted(
            (-len(set(wanted[source]) & set(held[target])), source, target)
            for source in free
            for target in free
        )
        done: set[int] = set()
        for _, source, target in pairs:
            if source not in done and target in free:
                done.add(source)
                free.remove(target)
                made[target] = _aligned_slots(wanted[source], held[target])
    return Placement(layout=layout, expert=made.reshape(-1))


def _aligned_slots(wanted: np.ndarray, held: np.ndarray) -> np.ndarray:
    rest = list(wanted)
    slots = np.full(len(held), -1)
    for slot, expert in enumerate(held):
        if expert in rest:
            rest.remove(expert)
            slots[slot] = expert
    slots[slots < 0] = rest
    return slots


def choose_slots(
    placement: Placement,
    experts: Int64[np.ndarray, "tokens top_k"],
    tokens: Int64[np.ndarray, " tokens"],
) -> Int64[np.ndarray, "tokens top_k"]:
    """Choose which copy of each expert a token goes to.

    Where it can, a token goes to a server that it visits anyway; among the copies that remain its
    number decides, so that a token's way depends on nothing else in the batch.

    Args:
        placement: Where experts lie.
        experts: Experts of each token.
        tokens: A number per token, such as a hash of its sequence and position.

    Returns:
        Slots.
    """
    slots, copies = placement.slots[experts], placement.copies[experts]
    chosen = np.where(copies == 1, slots[..., 0], -1)
    visited = np.zeros((len(experts), placement.layout.num_servers), bool)
    rows, columns = np.nonzero(chosen >= 0)
    visited[rows, placement.server_of(chosen[rows, columns])] = True
    mixed = np.asarray(tokens).astype(np.uint64) * _MIX >> np.uint64(33)
    for column in range(experts.shape[1]):
        (rows,) = np.nonzero(chosen[:, column] < 0)
        options = slots[rows, column]
        is_option = options >= 0
        server = placement.server_of(np.maximum(options, 0))
        is_near = is_option & np.take_along_axis(visited[rows], server, axis=1)
        is_open = np.where(is_near.any(axis=1, keepdims=True), is_near, is_option)
        picked = np.take_along_axis(options, _nth_true(is_open, mixed[rows])[:, None], axis=1)[:, 0]
        chosen[rows, column] = picked
        visited[rows, placement.server_of(picked)] = True
    return chosen


def _nth_true(
    flags: Bool[np.ndarray, "rows options"], number: np.ndarray
) -> Int64[np.ndarray, " rows"]:
    """Return the place of one of the true flags of each row: `number` modulo their count."""
    rank = np.cumsum(flags, axis=1) - 1
    count = np.maximum(rank[:, -1:] + 1, 1).astype(np.uint64)
    wanted = (number[:, None] % count).astype(np.int64)
    return np.argmax(flags & (rank == wanted), axis=1)


class LoadBalancer:
    """Watches loads of one layer's experts, and says when another placement pays.

    Args:
        layout: The devices.
        memory: Share of the past in the mean after each step; 0 knows the last step only.
        period: Steps between two looks.
        gain: By which share the largest load of a device must shrink for experts to move.

    Attributes:
        placement: Where experts are now.
        loads: Mean tokens per step and expert, recent steps counting more.

    Raises:
        ConfigError: If a setting is impossible.
    """

    def __init__(
        self, layout: Layout, *, memory: float = 0.9, period: int = 100, gain: float = 0.05
    ) -> None:
        """Begin with an even placement."""
        if not 0 <= memory < 1:
            raise ConfigError(f"memory must be at least 0 and less than 1, got {memory}.")
        if period < 1:
            raise ConfigError(f"period must be at least 1 step, got {period}.")
        if not gain >= 0:
            raise ConfigError(f"gain must not be negative, got {gain}.")
        self.placement = even_placement(layout)
        self._memory, self._period, self._gain = memory, period, gain
        self._sum = np.zeros(layout.num_experts)
        self._weight = 0.0
        self._num_steps = 0

    @property
    def loads(self) -> Float64[np.ndarray, " experts"]:
        """Mean tokens per step and expert; the weights of past steps add up to one."""
        return self._sum / self._weight if self._weight else self._sum

    def observe(self, counts: Sequence[int] | Int64[np.ndarray, " experts"]) -> Placement | None:
        """Take note of a step.

        Args:
            counts: Tokens that asked for each expert.

        Returns:
            Another placement, which is taken for the current one from now on; None to stay.
        """
        self._sum = self._memory * self._sum + (1 - self._memory) * np.asarray(counts, np.float64)
        self._weight = self._memory * self._weight + (1 - self._memory)
        self._num_steps += 1
        if self._num_steps % self._period:
            return None
        loads = self.loads
        wanted = place(loads, self.placement.layout)
        before, after = self.placement.imbalance(loads), wanted.imbalance(loads)
        if after >= before * (1 - self._gain):
            return None
        self.placement = aligned(wanted, self.placement)
        return self.placement
