"""Settings of a fleet."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxserve.core.errors import ConfigError, did_you_mean
from jaxserve.core.setting import option

ClusterKind = Literal["local", "ray"]
RoutingPolicy = Literal["round_robin", "least_loaded", "prefix_aware", "polyserve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """How many engines serve the model, and who decides which of them a request goes to."""

    replicas: int = option(1, "Engines that serve the model side by side, behind one port.")
    cluster: ClusterKind = option(
        "local",
        "Where replicas run: local, each on a thread of this process with the same weights, or "
        "ray, each in an actor of a Ray cluster with weights of its own.",
    )
    routing_policy: RoutingPolicy = option(
        "least_loaded",
        "Which replica a request goes to: in turns (round_robin), with the fewest unfinished "
        "requests (least_loaded), where most of its prompt is cached (prefix_aware), or by latency "
        "tier (polyserve), which needs --cost-model or measures steps at the start.",
        "router",
    )
    polyserve_config: Mapping[str, Any] | None = option(
        None,
        "JSON object with settings of the router polyserve, such as tiers, a list of seconds per "
        "token.",
    )
    min_replicas: int | None = option(
        None,
        "Replicas that stay on when little is asked for; under polyserve others are started and "
        "turned off as needed. Default: all of them.",
    )
    max_replica_restarts: int = option(
        3, "How often a replica that has died is started again before it is given up."
    )
    max_request_moves: int = option(
        2, "How often a request goes on with another replica when its own has failed."
    )
    fleet_log: str | None = option(
        None,
        "File for what the router saw and decided, for `jaxserve sim replay`.",
    )
    ray_address: str | None = option(
        None, "Ray cluster to use, such as auto or ray://host:10001. Default: a new one here."
    )
    ray_actor_options: Mapping[str, Any] | None = option(
        None,
        "JSON object with options of a replica's actor, such as num_cpus, num_gpus or resources.",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        for name, low in (("replicas", 1), ("max_replica_restarts", 0), ("max_request_moves", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        for name, literal in (("cluster", ClusterKind), ("routing_policy", RoutingPolicy)):
            known, value = get_args(literal), getattr(self, name)
            if value not in known:
                hint = did_you_mean(str(value), known)
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}.{hint}")
        self._check_scaling()
        for name in ("ray_address", "ray_actor_options"):
            if getattr(self, name) is not None and self.cluster != "ray":
                raise ConfigError(f"{name} needs cluster ray, got {self.cluster}.")
        if self.fleet_log is not None and not self.is_fleet:
            raise ConfigError("fleet_log needs a fleet; give --replicas 2 or more.")

    def _check_scaling(self) -> None:
        least = self.min_replicas
        if least is not None and not 1 <= least <= self.replicas:
            raise ConfigError(
                f"min_replicas must be between 1 and replicas={self.replicas}, got {least}."
            )
        if least is not None and least < self.replicas and self.routing_policy != "polyserve":
            raise ConfigError(
                f"min_replicas below replicas needs routing_policy polyserve, whose scaler starts "
                f"the others, got {self.routing_policy}."
            )
        if self.polyserve_config is not None and self.routing_policy != "polyserve":
            raise ConfigError(
                f"polyserve_config needs routing_policy polyserve, got {self.routing_policy}."
            )

    @property
    def is_fleet(self) -> bool:
        """Whether a fleet serves, and not a single engine by itself."""
        return self.replicas > 1 or self.cluster != "local"

    @property
    def is_elastic(self) -> bool:
        """Whether replicas are started and turned off as needed."""
        return self.min_replicas is not None and self.min_replicas < self.replicas
