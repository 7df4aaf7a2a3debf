"""Settings of an engine that runs on several devices, or on several hosts."""

from dataclasses import dataclass
from typing import Literal

from jaxserve.core.errors import ConfigError
from jaxserve.core.setting import check_at_least, check_one_of, option

AllToAllBackend = Literal["auto", "allreduce", "dense", "rotation", "flash"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelOptions:
    """How one model is shared by several devices, and by several hosts."""

    tensor_parallel_size: int = option(
        1,
        "Devices that share each layer: heads, feed-forwards and vocabulary are split among them.",
        "tp", "tp-size",
    )  # fmt: skip
    data_parallel_size: int = option(
        1,
        "Groups of tensor-parallel-size devices that share the requests. The server starts one "
        "engine per group behind its router; with enable-expert-parallel, and in the library, one "
        "engine runs on all groups, each with sequences and a cache of its own.",
        "dp", "dp-size",
    )  # fmt: skip
    enable_dp_attention: bool = option(
        True,
        "In an engine on all groups, give each group sequences and a cache of its own. Without it "
        "attention and its cache are repeated in every group: less is sent, and less fits.",
        "dp-attention",
    )
    enable_expert_parallel: bool = option(
        False,
        "Share whole experts among all tensor-parallel-size x data-parallel-size devices. Without "
        "it each expert's matrices are split like other feed-forwards.",
        "ep",
    )
    all_to_all_backend: AllToAllBackend = option(
        "auto",
        "How tokens travel to experts and back with enable-expert-parallel. allreduce: all to all "
        "groups, and sums back. The others send tokens to the servers of their experts: dense in "
        "one exchange with room for the most that can be, rotation and flash only what there is, "
        "in rotations of the servers or in the stages of FLASH. auto: rotation where groups of "
        "several servers have tokens of their own, else allreduce.",
        "all2all-backend",
    )
    all_to_all_dedup: bool = option(
        True,
        "Send a token once to a server, and one sum of its results back, and not one row per "
        "expert.",
    )
    devices_per_server: int | None = option(
        None,
        "Devices that fast links join, for all-to-all-backend and enable-eplb; they must be on "
        "one host. Default: all that a host has.",
    )
    enable_eplb: bool = option(
        False,
        "Count how often each expert is asked for, and move experts between devices while serving "
        "so that devices have equal work.",
    )
    num_redundant_experts: int = option(
        0,
        "Places per layer for further copies of busy experts, over all devices; needs enable-eplb "
        "and must be a multiple of the devices.",
        "ep-num-redundant-experts",
    )
    eplb_step_interval: int = option(
        3000, "Steps after which it is looked whether other places of experts pay."
    )
    nnodes: int | None = option(
        None,
        "Processes that run one engine together, usually one per host. Under Slurm, in Kubernetes "
        "indexed jobs and under Open MPI JAX finds it out.",
        "num-hosts",
    )
    node_rank: int | None = option(
        None, "Which of these processes this one is; process 0 listens for requests.", "host-rank"
    )
    dist_init_addr: str | None = option(
        None,
        "Address HOST:PORT at which process 0 coordinates the others; auto lets JAX find it out. "
        "Default: this process is alone.",
        "coordinator-address",
    )
    host_timeout: int = option(
        30,
        "Seconds without a sign of life after which a host counts as lost, and all others end with "
        "an error.",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_at_least(self, 1, "tensor_parallel_size", "data_parallel_size", "nnodes")
        check_one_of(self, all_to_all_backend=AllToAllBackend)
        check_at_least(self, 1, "devices_per_server", "eplb_step_interval")
        check_at_least(self, 0, "node_rank", "num_redundant_experts")
        self._check_experts()
        check_at_least(self, 2, "host_timeout")
        self._check_hosts()

    def _check_experts(self) -> None:
        wanted = {
            f"all_to_all_backend={self.all_to_all_backend}": self.all_to_all_backend
            not in ("auto", "allreduce"),
            "enable_eplb": self.enable_eplb,
            f"devices_per_server={self.devices_per_server}": self.devices_per_server is not None,
        }
        odd = [name for name, is_on in wanted.items() if is_on]
        if odd and not self.enable_expert_parallel:
            raise ConfigError(
                f"{', '.join(odd)}: experts must lie on several devices as wholes for that; add "
                "enable_expert_parallel, or leave it out."
            )
        if self.num_redundant_experts and not self.enable_eplb:
            raise ConfigError(
                f"num_redundant_experts={self.num_redundant_experts} needs enable_eplb, which says "
                "of which experts there are copies; add it, or leave them out."
            )

    def _check_hosts(self) -> None:
        address, number, rank = self.dist_init_addr, self.nnodes, self.node_rank
        if address is None:
            if rank or (number or 1) > 1:
                raise ConfigError(
                    f"nnodes={number} and node_rank={rank} need dist_init_addr, the HOST:PORT at "
                    "which process 0 can be reached by all; give it, or auto."
                )
            return
        if address == "auto":
            return
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ConfigError(f"dist_init_addr must be HOST:PORT or auto, got {address!r}.")
        if number is None or rank is None:
            raise ConfigError(
                f"dist_init_addr={address} needs nnodes and node_rank as well, got nnodes={number} "
                f"and node_rank={rank}; give both, or dist_init_addr=auto where JAX finds them out."
            )
        if rank >= number:
            raise ConfigError(f"node_rank must be less than nnodes={number}, got {rank}.")

    @property
    def num_devices(self) -> int:
        """Devices of one engine that runs on all groups."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def is_multi_host(self) -> bool:
        """Whether several processes may run one engine together."""
        return self.dist_init_addr is not None
