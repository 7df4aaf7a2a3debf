"""Which implementations of attention there are, and which of them can do what.

A backend is a module with two functions: `run`, and `supports`, which says in words why something
cannot be done. It knows nothing of the order of tokens, of sinks, or of what `out_mod` does:
`api.attention` sees to these, once for all.
"""

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
from jaxtyping import Array, Float

from jaxserve.core.errors import UnsupportedError, did_you_mean
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.state import AttentionState
from jaxserve.pallas_kernels.variant import AttentionVariant

logger = logging.getLogger(__name__)

ScaleKind = Literal["none", "tensor", "head", "page"]
"""What scales of keys or values are given for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a backend is asked whether it can do.

    Attributes:
        spec: The plan's.
        variant: What is different from plain attention.
        platform: "cpu", "gpu" or "tpu".
        capability: Compute capability of the GPU, like "9.0"; empty elsewhere.
        k_scale: Scales of keys.
        v_scale: Scales of values.
    """

    spec: PlanSpec
    variant: AttentionVariant
    platform: str
    capability: str = ""
    k_scale: ScaleKind = "none"
    v_scale: ScaleKind = "none"


class Backend(Protocol):
    """One implementation of attention: a module."""

    def supports(self, case: Case) -> str | None:
        """Return None, or why the case cannot be done: what was found and what would do."""
        ...

    def run(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        kv: PagedKV,
        plan: Plan,
        *,
        variant: AttentionVariant,
        extra: dict[str, Array],
        sm_scale: float,
    ) -> AttentionState:
        """Attend.

        Args:
            q: Queries, in the order of the plan.
            kv: Keys and values.
            plan: What to do.
            variant: What is different; `row_init` and `out_mod` are the caller's business.
            extra: What the variant's functions read, and `mask` for a packed mask.
            sm_scale: Multiplies products of queries and keys.

        Returns:
            Outputs `[tokens, q_heads, v_head_dim]` and their lse. Of padding tokens they are
            arbitrary, even NaN. Without softmax the lse is arbitrary.
        """
        ...


BACKENDS = ("mosaic", "triton", "xla", "reference")
"""By preference. Those whose module is absent are passed over."""
PORTABLE = ("xla", "reference")
"""Those that are no kernels."""


def load(name: str) -> Backend | None:
    """Import a backend; None if it is not there.

    Raises:
        UnsupportedError: If no backend has that name.
    """
    if name not in BACKENDS:
        raise UnsupportedError(
            f"unknown backend {name!r}.{did_you_mean(name, BACKENDS)} "
            f"Known: auto, {', '.join(BACKENDS)}."
        )
    try:
        module: Any = importlib.import_module(f"jaxserve.pallas_kernels.attention.{name}")
    except ModuleNotFoundError:
        return None
    return module


def refusal(name: str, case: Case) -> str | None:
    """Return why a backend cannot do a case here; None if it can."""
    backend = load(name)
    if backend is None:
        return "it is not installed"
    return backend.supports(case)


def choose(case: Case, wanted: str = "auto", *, fallback: bool = False) -> str:
    """Choose the backend for a case.

    Args:
        case: What is to be done.
        wanted: A name, or "auto" for the most preferred one that can do it.
        fallback: Whether another may stand in where the wanted one cannot do it.

    Returns:
        Its name. All of them compute the same. What takes another's place is logged, once: plain
        JAX on a GPU where a kernel would be faster, or what `fallback` let in.

    Raises:
        UnsupportedError: If the wanted one cannot do it, or none can.
    """
    if wanted != "auto":
        reason = refusal(wanted, case)
        if reason is None:
            return wanted
        if not fallback:
            able = [n for n in BACKENDS if n != wanted and refusal(n, case) is None]
            raise UnsupportedError(
                f"backend {wanted!r} cannot do this: {reason}. "
                f"Backends that can: {', '.join(able) or 'none'}; "
                "name one of them, or pass fallback=True."
            )
    reasons: list[str] = []
    for name in BACKENDS:
        reason = refusal(name, case)
        if reason is None:
            if wanted not in ("auto", name) or (case.platform == "gpu" and name in PORTABLE):
                _tell(f"attention runs on {name!r}. {'; '.join(reasons)}.")
            return name
        reasons.append(f"{name}: {reason}")
    raise UnsupportedError(f"no backend can do this. {'; '.join(reasons)}.")


@functools.lru_cache(maxsize=256)
def _tell(message: str) -> None:
    logger.warning("%s", message)


def tuned(name: str, spec: PlanSpec) -> PlanSpec:
    """Return a spec with the tiles, and the number of CTAs, that a backend works best with.

    Args:
        name: The backend; one without a function `tune` leaves the spec as it is.
        spec: What is to be computed.
    """
    tune = getattr(load(name), "tune", None)
    return spec if tune is None else tune(spec)


def present_device() -> tuple[str, str]:
    """Return the platform of the default device, and its compute capability if it is a GPU."""
    device = jax.devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return platform, str(getattr(device, "compute_capability", "")) if platform == "gpu" else ""
