"""Which attention an engine uses: what was asked for, or what is best on this machine."""

import dataclasses
import logging
from typing import cast

import jax

from jaxserve import cpu_kernels
from jaxserve.attention.metadata import KERNEL_BACKENDS, Backend
from jaxserve.core.config import AttentionBackend, EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine.kernel_check import find_fault
from jaxserve.engine.kernel_plans import KernelPlans
from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.attention.backends import present_device

logger = logging.getLogger(__name__)

PAGED_BACKENDS = ("pallas", *KERNEL_BACKENDS)
"""Settings that ask for paged kernels."""


def choose_kernels(
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    plans: KernelPlans | None,
    *,
    has_draft: bool,
    use_pages: bool,
) -> tuple[Backend, KernelPlans] | None:
    """Choose paged kernels: those that were asked for, and by "auto" those for a present GPU.

    Args:
        config: Settings.
        mesh: Where the model is.
        plans: What is planned with on one device, but for the backend; None if devices would need
            each other to attend.
        has_draft: Whether another model drafts.
        use_pages: Whether the cache is in pages.

    Returns:
        Their name and what is planned with; None if there are to be none.

    Raises:
        ConfigError: If those that were asked for cannot serve this model here.
    """
    wanted, (platform, capability) = config.runner.attention_backend, present_device()
    is_auto = wanted == "auto" and platform == "gpu" and use_pages
    if not is_auto and wanted not in PAGED_BACKENDS:
        return None
    reasons: dict[str, str] = {}
    general = _why_no_kernel(mesh, has_draft=has_draft)
    if plans is None or general is not None:
        reasons["every kernel"] = general or (
            f"a device needs heads of keys and values that others of {mesh.devices.size} have, or "
            "attention is your own"
        )
    else:
        # Plain JAX gains nothing from plans, so it is nobody's choice but of who asks for them.
        best: tuple[Backend, ...] = ("mosaic", "triton", *([] if is_auto else ["pallas-xla"]))
        for name in best if is_auto or wanted == "pallas" else (cast(Backend, wanted),):
            named = dataclasses.replace(plans, backend=KERNEL_BACKENDS[name])
            reason = named.refusal(platform, capability)
            if name == "triton" != wanted and triton_launch.is_interpreting():
                reason = "TRITON_INTERPRET is set, and the interpreter is for tests"
            if reason is None and platform == "gpu":
                reason = find_fault(named)
            if reason is None:
                return name, named
            reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if is_auto:
        logger.warning("attention runs on 'xla', without kernels. %s.", told)
        return None
    near = "'auto'" if "every kernel" in reasons else "'pallas', the best that there is here"
    raise ConfigError(f"attention_backend={wanted!r} cannot serve this. {told}; use {near}.")


def _why_no_kernel(mesh: jax.sharding.Mesh, *, has_draft: bool) -> str | None:
    devices, default = mesh.devices, jax.devices()[0].platform
    if devices.flat[0].platform != default:
        return (
            f"it works on the default device, of platform {default}, found one of platform "
            f"{devices.flat[0].platform}"
        )
    if has_draft:
        return "a model that drafts advances on the device, where nothing plans"
    return None


def check_custom(config: EngineConfig) -> None:
    """Check that attention of the caller's own meets what can serve it.

    Raises:
        ConfigError: If it does not.
    """
    wanted = config.runner.attention_backend
    if wanted not in PAGED_BACKENDS:
        known = ", ".join(map(repr, PAGED_BACKENDS))
        raise ConfigError(
            f"attention of your own needs an attention_backend among {known}, got {wanted!r}; use "
            "attention_backend='pallas'."
        )


def choose_backend(wanted: AttentionBackend, mesh: jax.sharding.Mesh) -> Backend:
    """Choose attention without paged kernels.

    Raises:
        ConfigError: If what was asked for cannot be had here.
    """
    is_one_cpu = mesh.devices.size == 1 and mesh.devices.flat[0].platform == "cpu"
    if wanted == "auto":
        return "llvm" if is_one_cpu and cpu_kernels.is_available() else "xla"
    if wanted != "llvm":
        return cast(Backend, wanted)
    if not is_one_cpu:
        raise ConfigError(
            f"attention_backend='llvm' works on one CPU device, found {mesh.devices.size} of "
            f"platform {mesh.devices.flat[0].platform}; use 'auto'."
        )
    if not cpu_kernels.is_available():
        raise ConfigError(
            "attention_backend='llvm' needs the package llvmlite and a jaxlib with the XLA FFI of "
            "major version 0; install llvmlite, or use 'xla'."
        )
    return "llvm"
