"""What a fleet's router and scaler saw and decided, line by line, to be run again elsewhere.

The first line says which router it was. Each further line is a call: a view with the plan that
answered it, or something that the policy was told. That is all that their state depends on.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxserve.core.cost import CostModel
from jaxserve.core.cost_file import cost_from_json, cost_to_json
from jaxserve.core.plan import Route, RoutePlan, ScaleAction, ScalePlan
from jaxserve.core.request import Slo
from jaxserve.core.view import FleetView, ReplicaRole, ReplicaView, SequenceView
from jaxserve.scheduling.log_file import MOST_BYTES, LogFile, read_head, read_lines
from jaxserve.scheduling.routing import RouterSettings

FORMAT = "jaxserve fleet log"
VERSION = 1

Call = Literal["route", "home", "scale", "ended", "refused", "drift"]
"""What a router was asked (a place, a place for somebody who must not wait), what the scaler was
asked; or what they were told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetLogHead:
    """Which router decided.

    Attributes:
        router: Its name.
        settings: Its settings.
        cost: Its cost model; None if it had none.
    """

    router: str
    settings: RouterSettings
    cost: CostModel | None


class FleetLogWriter(LogFile):
    """Writes a fleet's decisions; from any thread.

    Args:
        path: The file; replaced if it is there.
        head: Which router decides.
        most_bytes: Longest log.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(self, path: Path, head: FleetLogHead, *, most_bytes: int = MOST_BYTES) -> None:
        """Open the file and write its first line."""
        super().__init__(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "router": head.router,
                "settings": head.settings.to_json(),
                "cost": None if head.cost is None else cost_to_json(head.cost),
            },
            kind="fleet log",
            most_bytes=most_bytes,
        )

    def routed(self, sequence: SequenceView, fleet: FleetView, plan: RoutePlan) -> None:
        """Write what a request was answered."""
        self.write({"call": "route", "seq": _sequence(sequence), "fleet": _fleet(fleet),
                     "plan": _route_plan(plan)})  # fmt: skip

    def sent_home(self, fleet: FleetView, waits: RoutePlan, plan: RoutePlan) -> None:
        """Write where a request went that must not wait."""
        self.write({"call": "home", "fleet": _fleet(fleet), "waits": _route_plan(waits),
                     "plan": _route_plan(plan)})  # fmt: skip

    def scaled(self, fleet: FleetView, plan: ScalePlan) -> None:
        """Write what the scaler answered."""
        actions = [_action(one) for one in plan.actions]
        self.write({"call": "scale", "fleet": _fleet(fleet), "plan": actions})

    def ended(self, sequence: SequenceView) -> None:
        """Write that a request has ended."""
        self.write({"call": "ended", "seq": _sequence(sequence)})

    def refused(self, tier: float) -> None:
        """Write that a request found no room in its tier."""
        self.write({"call": "refused", "tier": tier})

    def drifted(self, ratio: float) -> None:
        """Write how long steps took, over what the cost model says."""
        self.write({"call": "drift", "ratio": ratio})


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetCall:
    """One line of a log.

    Attributes:
        line: Its number, from 1.
        call: What happened.
        sequence: The request, if it is about one.
        fleet: What was seen.
        waits: The plan that let a request wait, where it then was placed all the same.
        route: What the router answered.
        scale: What the scaler answered.
        tier: Tier in which there was no room.
        ratio: How long steps took, over what the cost model says.
    """

    line: int
    call: Call
    sequence: SequenceView | None = None
    fleet: FleetView | None = None
    waits: RoutePlan | None = None
    route: RoutePlan | None = None
    scale: ScalePlan | None = None
    tier: float = 0.0
    ratio: float = 1.0


def is_fleet_log(path: Path) -> bool:
    """Tell whether a file begins as a fleet's log does."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(len(FORMAT) + 20).startswith(f'{{"format":"{FORMAT}"')
    except (OSError, UnicodeDecodeError):
        return False


class FleetLogReader:
    """Reads a fleet's log.

    Args:
        path: The file.

    Attributes:
        head: Which router decided.

    Raises:
        ConfigError: If it cannot be read, or is no fleet's log.
    """

    def __init__(self, path: Path) -> None:
        """Read the first line."""
        self._path = path
        head = read_head(
            path,
            name=FORMAT,
            version=VERSION,
            otherwise="is no fleet's log; `jaxserve serve --replicas 2 --fleet-log "
            f"{path.name}` writes one.",
        )
        cost = head["cost"]
        self.head = FleetLogHead(
            router=head["router"],
            settings=RouterSettings.from_json(head["settings"]),
            cost=None if cost is None else cost_from_json(cost, path.name),
        )

    def __iter__(self) -> Iterator[FleetCall]:
        """Yield what happened, in order.

        Raises:
            ConfigError: If a line is damaged; the last one may have been cut short.
        """
        return read_lines(self._path, _read)


def _read(number: int, line: Mapping[str, Any]) -> FleetCall:
    call: Call = line["call"]
    plan = line.get("plan")
    is_scale = call == "scale"
    return FleetCall(
        line=number,
        call=call,
        sequence=_read_sequence(line["seq"]) if "seq" in line else None,
        fleet=_read_fleet(line["fleet"]) if "fleet" in line else None,
        waits=_read_route_plan(line["waits"]) if "waits" in line else None,
        route=None if plan is None or is_scale else _read_route_plan(plan),
        scale=ScalePlan(actions=tuple(map(_read_action, plan))) if is_scale and plan is not None
        else None,
        tier=line.get("tier", 0.0), ratio=line.get("ratio", 1.0),
    )  # fmt: skip


_SEQUENCE = tuple(spec.name for spec in dataclasses.fields(SequenceView))
_SIZES = (
    "now", "num_free_pages", "num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens",
    "max_loras",
)  # fmt: skip
_SLO = tuple(spec.name for spec in dataclasses.fields(Slo))


def _sequence(one: SequenceView) -> list[Any]:
    values = [getattr(one, name) for name in _SEQUENCE]
    at = _SEQUENCE.index("slo")
    values[at] = None if one.slo is None else [getattr(one.slo, name) for name in _SLO]
    return values


def _read_sequence(values: list[Any]) -> SequenceView:
    fields = dict(zip(_SEQUENCE, values, strict=True))
    if fields["slo"] is not None:
        fields["slo"] = Slo(**dict(zip(_SLO, fields["slo"], strict=True)))
    return SequenceView(**fields)


def _fleet(fleet: FleetView) -> dict[str, Any]:
    made: dict[str, Any] = {
        "now": fleet.now,
        "replicas": [
            [
                [getattr(one, name) for name in _SIZES],
                [_sequence(s) for s in one.running],
                [_sequence(s) for s in one.waiting],
            ]
            for one in fleet.replicas
        ],
        "roles": [[role.state, role.tier, role.stage] for role in fleet.roles],
    }
    if fleet.cached:
        made["cached"] = fleet.cached
    return made


def _read_fleet(made: Mapping[str, Any]) -> FleetView:
    return FleetView(
        now=made["now"],
        replicas=tuple(
            ReplicaView(
                **dict(zip(_SIZES, sizes, strict=True)),
                running=tuple(map(_read_sequence, running)),
                waiting=tuple(map(_read_sequence, waiting)),
            )
            for sizes, running, waiting in made["replicas"]
        ),
        roles=tuple(
            ReplicaRole(state=state, tier=tier, stage=stage) for state, tier, stage in made["roles"]
        ),
        cached=tuple(made.get("cached", ())),
    )


def _action(one: ScaleAction) -> list[Any]:
    return [one.replica, one.state, one.tier, one.reason]


def _read_action(row: list[Any]) -> ScaleAction:
    replica, state, tier, reason = row
    return ScaleAction(replica=replica, state=state, tier=tier, reason=reason)


def _route_plan(plan: RoutePlan) -> dict[str, Any]:
    route = plan.route
    made: dict[str, Any] = {
        "route": None if route is None else [route.replica, route.is_promised, route.reason]
    }
    if plan.actions:
        made["actions"] = [_action(one) for one in plan.actions]
    if plan.reason is not None:
        made["reason"] = plan.reason
    return made


def _read_route_plan(made: Mapping[str, Any]) -> RoutePlan:
    route = None
    if made["route"] is not None:
        replica, is_promised, reason = made["route"]
        route = Route(replica=replica, is_promised=is_promised, reason=reason)
    return RoutePlan(
        route=route,
        actions=tuple(map(_read_action, made.get("actions", ()))),
        reason=made.get("reason"),
    )
