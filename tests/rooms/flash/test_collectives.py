"""The exchange on eight devices of a CPU: by every backend the same bits as by numpy's indexing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.flash import plan
from jaxserve.sharding.flash.collectives import flash_all_to_all
from jaxserve.sharding.flash.stages import num_permutes, permutations, plan_on_device, rank_of
from tests.rooms.flash.cases import COST, largest_sum, off_diagonal

CAPACITY = 6


def make_mesh(n, m):
    devices = jax.devices()[: n * m]
    if len(devices) < n * m:
        pytest.skip(f"needs {n * m} devices")
    return Mesh(np.array(devices).reshape(n, m), ("server", "gpu"))


@functools.cache
def compiled(n, m, backend, quantum=2, dtype="float32"):
    mesh = make_mesh(n, m)
    over = NamedSharding(mesh, PartitionSpec(("server", "gpu")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = (n * m, n * m, CAPACITY, 3)
    call = functools.partial(flash_all_to_all, mesh=mesh, backend=backend, quantum=quantum)
    return (
        jax.jit(call, in_shardings=(over, everywhere))
        .lower(
            jax.ShapeDtypeStruct(shape, dtype, sharding=over),
            jax.ShapeDtypeStruct(shape[:2], "int32", sharding=everywhere),
        )
        .compile()
    )


def place(n, m, x, counts):
    mesh = make_mesh(n, m)
    return (
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(("server", "gpu")))),
        jax.device_put(counts, NamedSharding(mesh, PartitionSpec())),
    )


def expected(x, counts):
    found = np.zeros_like(x)
    for g, h in np.ndindex(*counts.shape):
        rows = min(counts[g, h], CAPACITY)
        found[h, g, :rows] = x[g, h, :rows]
    return found


def bits(array):
    return np.asarray(array).view(np.uint32)


@pytest.mark.parametrize(
    ("n", "m", "backend"),
    [
        (4, 2, "dense"),
        (4, 2, "rotation"),
        (4, 2, "ppermute"),
        (2, 4, "rotation"),
        (2, 4, "ppermute"),
        (8, 1, "rotation"),
        (3, 2, "ppermute"),
        (1, 4, "rotation"),
    ],
)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["any", "sparse", "hot", "none", "full"]))
@settings(max_examples=12)
def test_rows_arrive_bit_by_bit(n, m, backend, seed, kind):
    rng, size = np.random.default_rng(seed), n * m
    counts = rng.integers(0, CAPACITY + 1, (size, size)).astype(np.int32)
    if kind == "sparse":
        counts *= rng.random((size, size)) < 0.2
    elif kind == "hot":
        counts[:, 1:] //= 4
    elif kind in ("none", "full"):
        counts[:] = CAPACITY if kind == "full" else 0
    x = rng.integers(0, 2**32, (size, size, CAPACITY, 3), np.uint32)
    x = np.where(np.isnan(x.view(np.float32)), np.float32(-0.0), x.view(np.float32))
    found = compiled(n, m, backend)(*place(n, m, x, counts))
    assert np.array_equal(bits(found.rows), bits(expected(x, counts)))
    assert np.array_equal(found.counts, counts.T)
    assert not found.overflow


def test_too_many_rows_are_told():
    counts = np.full((8, 8), 2, np.int32)
    counts[3, 6] = CAPACITY + 2
    x = np.random.default_rng(0).normal(size=(8, 8, CAPACITY, 3)).astype(np.float32)
    for backend in ("dense", "ppermute"):
        found = compiled(4, 2, backend)(*place(4, 2, x, counts))
        assert found.overflow
        assert found.counts[6, 3] == CAPACITY + 2
        assert np.array_equal(found.rows, expected(x, counts))


@pytest.mark.parametrize(
    ("n", "m", "backend"), [(4, 2, "rotation"), (4, 2, "ppermute"), (8, 1, "rotation")]
)
def test_what_is_compiled(n, m, backend):
    text = compiled(n, m, backend).as_text()
    permutes = re.findall(r" collective-permute(?:-start)?\(", text)
    assert len(permutes) == num_permutes(backend, n)
    assert not re.search(r" (ragged-)?all-to-all(-start)?\(", text)
    dense = compiled(n, m, "dense").as_text()
    assert re.search(r" all-to-all(-start)?\(", dense)
    assert not re.findall(r" collective-permute", dense)


@functools.cache
def planner(n):
    return jax.jit(plan_on_device).lower(jax.ShapeDtypeStruct((n, n), "int32")).compile()


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_plans_on_the_device_are_whole_and_as_good_as_those_of_the_host(n, seed):
    rng = np.random.default_rng(seed)
    counts = np.minimum(rng.pareto(0.8, (n, n)) * 20, 10**6).astype(np.int32)
    counts = off_diagonal(counts.astype(np.int64) * (rng.random((n, n)) < 0.8)).astype(np.int32)
    perms, rows = map(np.asarray, planner(n)(jnp.asarray(counts)))
    assert np.array_equal(permutations(n)[rank_of(perms)], perms)
    carried = np.zeros((n, n), np.int64)
    for perm, sent in zip(perms, rows, strict=True):
        np.add.at(carried, (np.arange(n), perm), sent)
    assert np.array_equal(carried, counts)
    durations = rows.max(axis=1)
    assert durations.sum() == largest_sum(counts.astype(np.int64))
    assert (np.diff((durations > 0).astype(int)) <= 0).all()  # empty stages are at the end
    host = plan(counts.astype(np.int64), COST, "bottleneck")
    assert durations[0] == (host.durations[0] if host.num_stages else 0)


def test_auto_sends_few_bytes_at_once_and_many_in_stages():
    x, counts = np.zeros((8, 8, CAPACITY, 3), np.float32), np.ones((8, 8), np.int32)
    mesh = make_mesh(4, 2)

    def text(x):
        return jax.jit(functools.partial(flash_all_to_all, mesh=mesh)).lower(x, counts).as_text()

    assert "stablehlo.all_to_all" in text(x)
    assert "stablehlo.all_to_all" not in text(np.zeros((8, 8, 64, 1024), np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "rotations"}, r"backend must be one of .*got 'rotations'.*'rotation'"),
        ({"quantum": 0}, "quantum must be at least 1 row, got 0; leave it out"),
        ({"counts": np.ones((4, 4), np.int32)}, r"got \(8, 8, 6, 3\) and \(4, 4\); add what is"),
        ({"x": np.zeros((8, 8))}, r"x must be \[8, 8, capacity, ...\] and counts \[8, 8\] on 4"),
    ],
)
def test_what_is_refused(change, message):
    arguments = {
        "x": np.zeros((8, 8, CAPACITY, 3), np.float32),
        "counts": np.ones((8, 8), np.int32),
        "mesh": make_mesh(4, 2),
    }
    arguments |= change
    x, counts = jnp.asarray(arguments.pop("x")), jnp.asarray(arguments.pop("counts"))
    with pytest.raises(ConfigError, match=message):
        flash_all_to_all(x, counts, **arguments)


def test_meshes_that_are_refused():
    x, counts = jnp.zeros((8, 8, CAPACITY, 3)), jnp.ones((8, 8), jnp.int32)
    other = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("gpu", "server"))
    with pytest.raises(ConfigError, match=r"must have axes .*, got .*; make it of these"):
        flash_all_to_all(x, counts, mesh=other)
    with pytest.raises(ConfigError, match="serves at most 5 servers, got 8; use 'rotation'"):
        flash_all_to_all(x, counts, mesh=make_mesh(8, 1), backend="ppermute")
