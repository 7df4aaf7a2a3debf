"""The proofs themselves: what is right passes, and what is wrong is reported."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels.testing import compile_for, gpu_target, interpret

ROWS, COLUMNS = 64, 64


def copy_and_add(x, *, waits=True):
    """Two warpgroups: one copies rows in, the other adds one and copies them out."""

    def body(x_ref, y_ref, tile, full):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _add():
            plgpu.barrier_wait(full)
            tile[...] = tile[...] + 1.0
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, y_ref)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _copy():
            plgpu.copy_gmem_to_smem(x_ref, tile, full)
            if waits:
                plgpu.barrier_wait(full)

    def body_without_wait(x_ref, y_ref, tile, full):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _add():
            tile[...] = tile[...] + 1.0
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, y_ref)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _copy():
            plgpu.copy_gmem_to_smem(x_ref, tile, full)
            plgpu.barrier_wait(full)

    return plgpu.kernel(
        body if waits else body_without_wait,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        num_threads=2,
        thread_name="warpgroup",
    )(x)


def multiply(y_ref, tile, weights, full, empty, mistake):
    """Multiply what comes into a slot, one matrix after the other."""
    for i in range(y_ref.shape[0]):
        weights[...] = jnp.full(weights.shape, i + 1, weights.dtype)
        if mistake != "not committed":
            plgpu.commit_smem()
        if mistake != "copy awaited late":
            plgpu.barrier_wait(full.at[i])

        def product(acc, i=i):
            plgpu.wgmma(acc, weights, tile)
            if mistake == "released early":
                plgpu.barrier_arrive(empty.at[i])
            return acc[...]

        y_ref[i] = pl.run_scoped(product, plgpu.ACC(y_ref.shape[1:], jnp.float32))
        if mistake == "copy awaited late":
            plgpu.barrier_wait(full.at[i])
        if mistake != "released early":
            plgpu.barrier_arrive(empty.at[i])


def fill(x_ref, tile, full, empty, mistake):
    """Copy matrices into the slot, one after the other."""
    count = x_ref.shape[0]
    is_late = mistake == "slot awaited late"
    for i in range(count):
        if i and not is_late:
            plgpu.barrier_wait(empty.at[i - 1])
        plgpu.copy_gmem_to_smem(x_ref.at[i], tile, full.at[i])
    for i in range(0 if is_late else count - 1, count):
        plgpu.barrier_wait(empty.at[i])


def products(x, mistake=None):
    """Two warpgroups: one copies matrices into one slot, the other multiplies what is there."""
    count, rows, columns = x.shape

    def body(x_ref, y_ref, tile, weights, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == 0)(lambda: multiply(y_ref, tile, weights, full, empty, mistake))
        pl.when(warpgroup == 1)(lambda: fill(x_ref, tile, full, empty, mistake))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        scratch_types=[
            plgpu.SMEM((rows, columns), x.dtype),
            plgpu.SMEM((rows, rows), x.dtype),
            plgpu.Barrier(num_barriers=count),
            plgpu.Barrier(num_barriers=count),
        ],
        num_threads=2,
        thread_name="warpgroup",
    )(x)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, COLUMNS)), jnp.float32)


@pytest.mark.mosaic
@pytest.mark.race
def test_a_kernel_with_barriers_runs_interpreted_without_races(x):
    got = interpret(copy_and_add, x)
    np.testing.assert_array_equal(got.value, x + 1.0)
    assert got.races_found is False


@pytest.mark.mosaic
@pytest.mark.race
def test_a_missing_wait_is_reported_as_a_race(x):
    assert interpret(functools.partial(copy_and_add, waits=False), x).races_found is True


@pytest.fixture
def matrices():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, ROWS, COLUMNS)), jnp.float16)


@pytest.mark.mosaic
@pytest.mark.race
def test_products_of_what_was_waited_for_do_not_race(matrices):
    got = interpret(products, matrices)
    sums = np.asarray(matrices, np.float64).sum(axis=1, keepdims=True)
    want = np.broadcast_to([[[1.0]], [[2.0]]] * sums, matrices.shape)
    np.testing.assert_allclose(got.value, want, atol=1e-3)
    assert got.races_found is False


@pytest.mark.mosaic
@pytest.mark.race
@pytest.mark.parametrize(
    "mistake", ["not committed", "copy awaited late", "slot awaited late", "released early"]
)
def test_operands_of_products_are_looked_at_for_races(matrices, mistake):
    assert interpret(functools.partial(products, mistake=mistake), matrices).races_found is True


@pytest.mark.mosaic
def test_an_interpreter_that_failed_can_be_used_again(x):
    def fails(x):
        def body(x_ref, y_ref):
            y_ref[0] = x_ref[jnp.int32(x.shape[0] + 5)]

        return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    with pytest.raises(Exception, match="ut-of-bounds"):
        interpret(fails, x[:, 0])
    np.testing.assert_array_equal(interpret(copy_and_add, x).value, x + 1.0)


@pytest.mark.mosaic
def test_races_are_not_looked_for_when_nobody_asks(x):
    assert interpret(copy_and_add, x, detect_races=False).races_found is None


def test_without_the_plugin_compiling_says_where_to_run():
    if importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("the plugin is here")
    with pytest.raises(UnsupportedError, match="make test-aot"):
        gpu_target('platform_name: "nonsense"')


@pytest.mark.aot
def test_compiling_reports_what_a_kernel_takes(h200, x):
    (kernel,) = compile_for(h200, copy_and_add, x)
    assert kernel.threads == 256
    assert 0 < kernel.registers < 128
    assert kernel.shared_memory >= ROWS * COLUMNS * 4
    assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
    assert kernel.ctas_per_multiprocessor >= 2


@pytest.mark.aot
def test_spills_are_reported(h200):
    """Eight products that are all alive at once need more registers than a thread has."""

    def hungry(a):
        def body(a_ref, y_ref, tile, ready):
            plgpu.copy_gmem_to_smem(a_ref, tile, ready)
            plgpu.barrier_wait(ready)

            def product(acc):
                plgpu.wgmma(acc, tile, tile.transpose((1, 0)))
                return acc[...]

            def squares(count, values):
                del count
                return tuple(
                    value * (i + 1.0) + other
                    for i, (value, other) in enumerate(zip(values, values[::-1], strict=True))
                )

            parts = [pl.run_scoped(product, plgpu.ACC((128, 128), jnp.float32)) for _ in range(4)]
            parts = lax.fori_loop(0, y_ref.shape[0], squares, tuple(parts))
            y_ref[...] = sum(parts)

        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((128, 128), jnp.float32),
            scratch_types=[plgpu.SMEM((128, 64), jnp.bfloat16), plgpu.Barrier()],
        )(a)

    (kernel,) = compile_for(h200, hungry, jax.ShapeDtypeStruct((128, 64), jnp.bfloat16))
    assert kernel.spill_stores > 0
    assert kernel.spill_loads > 0
