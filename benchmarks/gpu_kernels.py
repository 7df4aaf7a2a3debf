"""Kernels as a measured process; and, without a GPU, compiled for one.

    python -m benchmarks.gpu_kernels --compile mosaic|triton

As a process it answers `benchmarks.peers.protocol`: steps of attention (`benchmarks.gpu_cases`) on
every backend that serves them and by JAX's dense attention, and the other operations by their
cards. With `--compile` it compiles the same programs for Hopper and prints what they take.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_cases import (
    DIM,
    HEADS,
    LIST_STEPS,
    STEPS,
    TINY_LIST_STEPS,
    TINY_STEPS,
    ListStep,
    Step,
)
from benchmarks.peers import protocol
from benchmarks.record import ROOT, versions
from jaxserve.core.errors import JaxserveError
from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.attention.backends import Case, load, present_device, refusal
from jaxserve.pallas_kernels.attention.tuning import H200_MULTIPROCESSORS
from jaxserve.pallas_kernels.cards import card_of
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.token_attention import TokenLists, mosaic, token_attention
from jaxserve.pallas_kernels.token_attention.api import refusal as list_refusal
from jaxserve.pallas_kernels.variant import PLAIN

CHAIN = 10
"""Calls in one program, each fed with the outputs of the one before: launching costs nothing."""


def find(name: str) -> Step:
    """Return a step by its name."""
    return {**STEPS, **TINY_STEPS}[name]


def scales_of(step: Step) -> str:
    """Return the kind of scales that a step's cache has."""
    return "none" if step.kv_dtype == "bfloat16" else "head"


def why_not(step: Step, backend: str, platform: str, capability: str) -> str | None:
    """Return why a backend cannot serve a step; None if it can."""
    spec, kind = step.spec(backend), scales_of(step)
    case = Case(
        spec=spec,
        variant=spec.variant,
        platform=platform,
        capability=capability,
        k_scale=kind,
        v_scale=kind,
    )
    return refusal(backend, case)


def chained(call: Callable[..., jax.Array], calls: int = CHAIN) -> Callable[..., jax.Array]:
    """Return a program that calls again and again; outputs have the shape of queries."""

    def many(q: jax.Array, *rest: Any) -> jax.Array:  # noqa: ANN401
        return jax.lax.fori_loop(0, calls, lambda _, x: call(x, *rest).astype(x.dtype), q)

    return many


def seconds_of(
    program: Callable[..., Any], arguments: tuple[Any, ...], repeats: int
) -> list[float]:
    """Time a program, compiled and warm, so many times."""
    jax.block_until_ready(program(*arguments))
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        found.append(time.perf_counter() - started)
    return found


def inputs_of(step: Step) -> tuple[jax.Array, PagedKV]:
    """Draw queries and pages on the device."""
    q, kv, _ = step.shapes("xla")
    keys = jax.random.split(jax.random.key(0), 3)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, like: Any) -> jax.Array:  # noqa: ANN401
        return jax.random.normal(key, like.shape, jnp.bfloat16).astype(like.dtype)

    pools = [draw(key, kv.k) for key in keys[:2]]
    scale = None if kv.k_scale is None else jnp.ones(kv.k_scale.shape, jnp.float32)
    return draw(keys[2], q), PagedKV(k=pools[0], v=pools[1], k_scale=scale, v_scale=scale)


def dense(step: Step, kv: PagedKV) -> tuple[jax.Array, jax.Array]:
    """Gather the pages of equal requests: `[requests, keys, kv_heads, dim]` of keys and values."""
    rows = jnp.asarray(step.table().indices.reshape(len(step.q_len), -1))

    @jax.jit
    def gather(pool: jax.Array) -> jax.Array:
        taken = jnp.swapaxes(pool[rows], 2, 3)
        return taken.reshape(len(step.q_len), -1, HEADS[1], DIM)[:, : step.kv_len[0]]

    return gather(kv.k), gather(kv.v)


def dense_attention(step: Step, implementation: str | None) -> Callable[..., jax.Array]:
    """Return JAX's attention over dense keys, called with packed queries."""
    # Dense attention aligns causality with the first key, so it can do no chunks.
    is_causal = not step.is_decode

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        queries = q.reshape(len(step.q_len), -1, *q.shape[1:])
        out = jax.nn.dot_product_attention(
            queries, k, v, is_causal=is_causal, implementation=implementation
        )
        return out.reshape(q.shape)

    return call


def attend_lists(backend: Any, q: jax.Array, *rest: Any) -> jax.Array:  # noqa: ANN401
    """Return the outputs of attention to lists."""
    return token_attention(q, *rest, backend=backend).o


Programs = dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...]]]
"""Implementations by name: a function of queries and further arguments, and these."""


def _time(
    programs: Programs,
    refusals: dict[str, str],
    q: jax.Array,
    repeats: int,
    alike: Collection[str],
) -> dict[str, Any]:
    """Time implementations, and compare outputs of those that should be alike, by some rows.

    Args:
        programs: The implementations.
        refusals: Why others are left out; those that fail are added.
        q: Queries.
        repeats: Samples.
        alike: Whose outputs are compared with those of the first of them.
    """
    rows = jnp.linspace(0, q.shape[0] - 1, min(64, q.shape[0])).astype(int)
    outputs: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {}
    for label, (call, rest) in programs.items():
        try:
            if label in alike:
                outputs[label] = np.asarray(jax.jit(call)(q, *rest)[rows], np.float32)
            samples = seconds_of(jax.jit(chained(call)), (q, *rest), repeats)
            seconds[label] = [sample / CHAIN for sample in samples]
        except Exception as error:  # noqa: BLE001  the others must still run
            refusals[label] = f"{type(error).__name__}: {str(error)[:300]}"
    first = next(iter(outputs.values()), None)
    return {
        "seconds": seconds,
        "refusals": refusals,
        "difference": {n: float(np.abs(out - first).max()) for n, out in outputs.items()},
    }


class KernelWorker:
    """Times kernels, and compares their outputs among each other first."""

    def load(self, **settings: Any) -> dict[str, Any]:  # noqa: ANN401
        """Answer with versions and the device."""
        device = jax.devices()[0]
        return {
            "name": "kernels",
            "versions": versions(),
            "settings": {"device": device.device_kind, "chain": CHAIN, **settings},
        }

    def attention(self, name: str, repeats: int) -> dict[str, Any]:
        """Time one step on everything that can do it.

        Args:
            name: Of the step.
            repeats: Samples.

        Returns:
            `seconds` per call and `refusals`, by implementation, and the largest `difference` of
            each one's output from that of plain JAX, or of the first one.
        """
        step = find(name)
        q, kv = inputs_of(step)
        programs, refusals = self._programs(step, kv)
        found = _time(programs, refusals, q, repeats, programs)
        return {**found, "num_bytes": step.num_bytes, "num_flops": step.num_flops}

    def _programs(self, step: Step, kv: PagedKV) -> tuple[Programs, dict[str, str]]:
        programs: Programs = {}
        refusals: dict[str, str] = {}
        platform, capability = present_device()
        # Plain JAX is measured where it is small: a long prefill would take seconds.
        names = ["xla"] if (step.is_decode and not step.cascade) or platform == "cpu" else []
        for backend in [*names, "mosaic", "triton"]:
            reason = why_not(step, backend, platform, capability)
            if reason is not None:
                refusals[backend] = reason
                continue
            call = functools.partial(attention, backend=backend)
            programs[backend] = (call, (kv, jax.device_put(step.plan(backend))))
        if step.is_even and step.kv_dtype == "bfloat16" and step.q_len[0] in (1, step.kv_len[0]):
            keys = dense(step, kv)
            kinds = ("cudnn",) if platform == "gpu" else (None,)
            for kind in kinds:
                programs[f"dense jax ({kind or 'xla'})"] = (dense_attention(step, kind), keys)
        return programs, refusals

    def lists(self, name: str, repeats: int) -> dict[str, Any]:
        """Time one step over lists on every backend, beside attention to everything.

        Args:
            name: Of the step.
            repeats: Samples.

        Returns:
            As `attention`; implementations that read everything are called "dense ...", and their
            outputs, which are others, are not compared.
        """
        step = {**LIST_STEPS, **TINY_LIST_STEPS}[name]
        q, kv = inputs_of(step.dense)
        programs, refusals = self._list_programs(step, q, kv)
        alike = [label for label in programs if not label.startswith("dense")]
        return {
            **_time(programs, refusals, q, repeats, alike),
            "num_bytes": step.num_bytes,
            "num_flops": step.num_flops,
            "dense_bytes": step.dense.num_bytes,
            "dense_flops": step.dense.num_flops,
        }

    def _list_programs(
        self, step: ListStep, q: jax.Array, kv: PagedKV
    ) -> tuple[Programs, dict[str, str]]:
        programs: Programs = {}
        refusals: dict[str, str] = {}
        platform, capability = present_device()
        pages_of, pages, indptr, positions = map(jnp.asarray, step.arrays())
        arrays = (
            kv,
            pages_of,
            pages,
            jnp.full(step.requests, step.kv_len, jnp.int32),
            TokenLists(indptr=indptr, positions=positions),
        )
        for backend in ("mosaic", "triton") if platform == "gpu" else ("xla",):
            reason = None if backend == "xla" else list_refusal(backend, q, kv)
            if reason is None:
                programs[backend] = (functools.partial(attend_lists, backend), arrays)
            else:
                refusals[backend] = reason
            reason = why_not(step.dense, backend, platform, capability)
            if reason is None:
                call = functools.partial(attention, backend=backend)
                plan = jax.device_put(step.dense.plan(backend))
                programs[f"dense {backend}"] = (call, (kv, plan))
            else:
                refusals[f"dense {backend}"] = reason
        return programs, refusals

    def operation(self, name: str, dtype: str, repeats: int, *, tiny: bool) -> dict[str, Any]:
        """Time one of the other operations on every backend of its card.

        Args:
            name: Of the operation.
            dtype: Of its inputs.
            repeats: Samples.
            tiny: Whether to take the card's smallest sizes.
        """
        card = card_of(name)
        sizes = card.tiny() if tiny else card.usual()
        for axis in () if tiny else ("rows", "tokens"):
            if axis in sizes:
                sizes[axis] = card.axes[axis].sizes[-1]
        inputs: Any = card.make(sizes, dtype, 0)
        options = {n: v for n, v in inputs.items() if isinstance(v, bool | float)}
        arrays = {n: v for n, v in inputs.items() if n not in options}
        seconds: dict[str, list[float]] = {}
        refusals: dict[str, str] = {}
        for backend in card.backends:
            reason = card.supports(backend, sizes, dtype)
            if reason is not None:
                refusals[backend] = reason
                continue

            def call(arrays: Any, backend: str = backend) -> Any:  # noqa: ANN401
                return card.run(**arrays, **options, backend=backend)

            program = jax.jit(call)

            def burst(arrays: Any, program: Any = program) -> Any:  # noqa: ANN401
                return [program(arrays) for _ in range(CHAIN)][-1]

            samples = seconds_of(burst, (arrays,), repeats)
            seconds[backend] = [sample / CHAIN for sample in samples]
        return {
            "seconds": seconds,
            "refusals": refusals,
            "sizes": sizes,
            "num_bytes": card.num_bytes(sizes, dtype),
            "num_flops": card.num_flops(sizes),
        }


def compile_mosaic() -> None:
    """Compile the Mosaic program of every step for Hopper; print what each takes."""
    from jaxserve.pallas_kernels.testing import compile_for, gpu_target

    target = gpu_target((ROOT / "tests" / "kernels" / "h200.txtpb").read_text())
    run = load("mosaic").run
    for name, step in STEPS.items():
        reason = why_not(step, "mosaic", "gpu", "9.0")
        if reason is not None:
            raise JaxserveError(f"{name}: {reason}")

        def call(q: Any, kv: Any, plan: Any) -> Any:  # noqa: ANN401
            return run(q, kv, plan, variant=plan.spec.variant, extra={}, sm_scale=DIM**-0.5).o

        (taken,) = compile_for(target, call, *step.shapes("mosaic"))
        spilled = taken.spill_stores + taken.spill_loads
        print(json.dumps({"step": name, "registers": taken.registers, "spill_bytes": spilled}))
    for name, step in LIST_STEPS.items():
        (taken,) = compile_for(target, attend_on_mosaic, *list_shapes(step))
        spilled = taken.spill_stores + taken.spill_loads
        print(json.dumps({"step": name, "registers": taken.registers, "spill_bytes": spilled}))


def list_shapes(step: ListStep) -> tuple[Any, ...]:
    """Return what stands for a step's arguments while its kernel is compiled."""
    q, kv, _ = step.dense.shapes("xla")
    pages_of, pages, indptr, positions = (
        jax.ShapeDtypeStruct(array.shape, array.dtype) for array in step.arrays()
    )
    length = jax.ShapeDtypeStruct((step.requests,), jnp.dtype("int32"))
    return q, kv, pages_of, pages, length, TokenLists(indptr=indptr, positions=positions)


def attend_on_mosaic(*arguments: Any) -> Any:  # noqa: ANN401
    """Return the outputs of the Mosaic kernel over lists, for an H200 that need not be there."""
    q, kv, pages_of, pages, _, lists = arguments
    return mosaic.token_attention(
        q,
        kv,
        pages_of,
        pages,
        lists,
        sm_scale=DIM**-0.5,
        variant=PLAIN,
        multiprocessors=H200_MULTIPROCESSORS,
    ).o


def compile_triton() -> None:
    """Compile the Triton launches of every step, and of every operation, for Hopper."""
    from jaxserve.pallas_kernels.triton_compile import compile_launch

    capability = 90
    for name, step in STEPS.items():
        with triton_launch.record_launches(capability) as launches:
            jax.eval_shape(functools.partial(attention, backend="triton"), *step.shapes("triton"))
            found = list(launches)
        for launch in found:
            taken = compile_launch(launch, capability)
            print(json.dumps({"step": name, "kernel": taken.name, "registers": taken.registers}))
    for name, step in LIST_STEPS.items():
        with triton_launch.record_launches(capability) as launches:
            jax.eval_shape(functools.partial(attend_lists, "triton"), *list_shapes(step))
            found = list(launches)
        for launch in found:
            taken = compile_launch(launch, capability)
            print(json.dumps({"step": name, "kernel": taken.name, "registers": taken.registers}))


def main() -> None:
    """Serve requests, or compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", choices=("mosaic", "triton"))
    args = parser.parse_args()
    if args.compile is None:
        protocol.serve(KernelWorker())
    elif args.compile == "mosaic":
        compile_mosaic()
    else:
        compile_triton()


if __name__ == "__main__":
    main()
