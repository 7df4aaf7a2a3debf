"""Stages as data, and what carries rows by them: bit by bit as by numpy's indexing."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.flash import CostModel, plan
from jaxserve.sharding.flash.collectives import flash_all_to_all
from jaxserve.sharding.flash.errors import CountsError, MeshError, RowsError, TrafficError
from jaxserve.sharding.flash.links import calibrate
from jaxserve.sharding.flash.stages import Stages, follow, plan_on_device, rotate, stages_of
from jaxserve.sharding.flash.transport import (
    Wire,
    carry,
    check_hosts,
    make_mesh,
    settle,
    stages_for,
)

PLACES = 12
COST = CostModel(gpus=2)


def mesh_of(n, m):
    return Mesh(np.array(jax.devices()[: n * m]).reshape(n, m), ("server", "gpu"))


def some_counts(rng, n, most=PLACES):
    counts = rng.integers(0, most + 1, (n, n)) * (rng.random((n, n)) < 0.8)
    np.fill_diagonal(counts, 0)
    return counts.astype(np.int32)


def sent_by(stages, n):
    found = np.zeros((n, n), np.int64)
    for perm, rows in zip(*map(np.asarray, stages), strict=True):
        assert sorted(perm) == list(range(n))
        np.add.at(found, (np.arange(n), perm), rows)
    return found


@pytest.mark.parametrize("n", [2, 4, 7])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_plans_are_made_to_fit(n, seed):
    rng = np.random.default_rng(seed)
    counts, others = some_counts(rng, n), some_counts(rng, n, 30)
    exact = stages_of(plan(2 * counts.astype(np.int64), COST), 60)
    for planned in (exact, stages_of(plan(others.astype(np.int64), COST), 60)):
        found = jax.jit(follow)(planned, jnp.asarray(counts))
        assert np.array_equal(sent_by(found, n), counts)
        assert (np.asarray(found.rows)[:60] <= np.asarray(planned.rows)).all()
    # What fits needs no rotation behind it.
    assert not np.asarray(jax.jit(follow)(exact, jnp.asarray(counts)).rows)[60:].any()


@pytest.mark.parametrize("n", [2, 4, 7])
def test_the_way_back(n):
    counts = some_counts(np.random.default_rng(n), n)
    planned = plan_on_device(jnp.asarray(counts)) if n < 6 else None
    for stages in (rotate(jnp.asarray(counts)), planned):
        if stages is not None:
            assert np.array_equal(sent_by(stages, n), counts)
            assert np.array_equal(sent_by(stages.transposed(), n), counts.T)
            for there, back in zip(stages.transposed().transposed(), stages, strict=True):
                assert np.array_equal(there, back)


def test_schedules_are_cut_to_a_number_of_stages():
    counts = some_counts(np.random.default_rng(0), 4).astype(np.int64)
    whole, short = stages_of(plan(counts, COST)), stages_of(plan(counts, COST), 2)
    assert short.perms.shape == (2, 4)
    assert np.array_equal(short.rows, whole.rows[:2])
    assert np.array_equal(sent_by(follow(short, jnp.asarray(counts, jnp.int32)), 4), counts)


def carried(n, wire):
    """Compile an exchange on one rail: rows and counts, and stages if they are given."""
    mesh = mesh_of(n, 1)
    spec, everywhere = PartitionSpec("server"), PartitionSpec()

    def exchange(rows, counts, stages):
        got = carry(rows[0], wire, stages_for(wire, counts, stages))
        origin = jnp.arange(n)
        own = counts[:, lax.axis_index("server")]
        is_row = (jnp.arange(PLACES) < own[:, None]) & (origin != lax.axis_index("server"))[:, None]
        return jnp.where(is_row[:, :, None], got, 0)[None]

    return jax.jit(
        jax.shard_map(
            exchange, mesh=mesh, in_specs=(spec, everywhere, everywhere), out_specs=spec,
            check_vma=False,
        )
    )  # fmt: skip


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` as its documentation has it, of gathers, for CPUs."""
    me = lax.axis_index(axis_name)
    rows, starts, sizes, places = (
        lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    for i in range(len(rows)):
        index = jnp.arange(len(output)) - places[i, me]
        is_row = (index >= 0) & (index < sizes[i, me])
        new = rows[i][jnp.clip(starts[i, me] + index, 0, len(operand) - 1)]
        # A receiver that expects another number of rows than are sent would hang.
        new = jnp.where(recv_sizes[i] == sizes[i, me], new, -1)
        output = jnp.where(is_row[:, None], new, output)
    return output


@pytest.mark.parametrize(
    ("n", "backend", "in_flight", "planned"),
    [
        (4, "dense", 1, False),
        (4, "rotation", 3, False),
        (4, "ppermute", 2, False),
        (4, "ppermute", 1, True),
        (4, "ragged", 1, False),
        (6, "ragged", 1, False),
        (6, "ragged", 1, True),
    ],
)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_rows_of_a_rail_arrive(n, backend, in_flight, planned, seed):
    rng = np.random.default_rng(seed)
    counts = some_counts(rng, n)
    rows = rng.integers(1, 1 << 20, (n, n, PLACES, 3)).astype(np.int32)
    stages = stages_of(plan(some_counts(rng, n).astype(np.int64), COST), 16) if planned else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lax, "ragged_all_to_all", emulated)
        call = cached(n, backend, in_flight, planned)
        found = np.asarray(call(rows, counts, stages))
    wanted = np.zeros_like(found)
    for i, j in np.argwhere(counts):
        wanted[j, i, : counts[i, j]] = rows[i, j, : counts[i, j]]
    assert np.array_equal(found, wanted)


@functools.cache
def cached(n, backend, in_flight, planned):
    return carried(n, Wire(backend=backend, quantum=5, in_flight=in_flight))


def test_ragged_exchanges_are_lowered_for_gpus_and_refused_on_cpus():
    rows, counts = np.zeros((6, 6, PLACES, 3), np.float32), np.zeros((6, 6), np.int32)
    call = carried(6, Wire(backend="ragged"))
    unstable = jax.export.DisabledSafetyCheck.custom_call("ragged_all_to_all")
    lower = jax.export.export(call, platforms=["cuda"], disabled_checks=[unstable])
    text = lower(rows, counts, None).mlir_module()
    assert text.count("@ragged_all_to_all(") == 1  # one for all stages
    assert "collective_permute" not in text
    with pytest.raises(ConfigError, match="CPUs are none; use 'rotation'\\."):
        settle(Wire(backend="ragged"), mesh_of(6, 1), 0, None)
    with pytest.raises(ConfigError, match="use 'rotation', or 'ppermute'"):
        settle(Wire(backend="ragged"), mesh_of(4, 2), 0, None)


def test_stages_of_others_need_a_backend_that_follows_them():
    stages = Stages(jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(ConfigError, match="has stages of its own, and was given others; use"):
        settle(Wire(backend="rotation"), mesh_of(8, 1), 0, stages)
    with pytest.raises(ConfigError, match="backend='ragged' needs devices"):  # what auto takes
        settle(Wire(), mesh_of(8, 1), 0, stages)
    assert settle(Wire(), mesh_of(4, 2), 0, stages).backend == "ppermute"


def exchanged(counts, **options):
    mesh = mesh_of(4, 2)
    x = np.random.default_rng(0).normal(size=(8, 8, 6, 3)).astype(np.float32)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("server", "gpu"))))
    stages = options.pop("stages", None)
    call = functools.partial(flash_all_to_all, mesh=mesh, **options)
    if isinstance(counts, np.ndarray):  # looked at before anything is compiled
        jax.eval_shape(lambda: call(x, counts))
    return x, jax.jit(lambda x, counts: call(x, counts, stages=stages))(x, counts)


def test_a_plan_of_the_host_carries_an_all_to_all():
    counts = np.random.default_rng(1).integers(0, 7, (8, 8)).astype(np.int32)
    stages = stages_of(plan(counts.reshape(4, 2, 4, 2).astype(np.int64), COST))
    x, found = exchanged(counts, stages=stages, quantum=2, in_flight=2)
    for g, h in np.ndindex(8, 8):
        assert np.array_equal(found.rows[h, g, : counts[g, h]], x[g, h, : counts[g, h]])
        assert not np.asarray(found.rows[h, g, counts[g, h] :]).any()
    assert found.check() is found


@pytest.mark.parametrize("backend", ["ppermute", "dense"])
def test_devices_that_disagree_are_told_so_in_debug_mode(backend):
    mesh = mesh_of(4, 2)
    everywhere = NamedSharding(mesh, PartitionSpec())
    counts = np.full((8, 8), 2, np.int32)
    copies = [counts.copy() for _ in range(8)]
    agreed = jax.make_array_from_single_device_arrays(
        (8, 8),
        everywhere,
        [jax.device_put(c, d) for c, d in zip(copies, mesh.devices.flat, strict=True)],
    )
    _, found = exchanged(agreed, backend=backend, debug=True)
    assert found.check().agreed
    copies[5][0, 6] = 4  # one device would take more turns than the others, and wait
    other = jax.make_array_from_single_device_arrays(
        (8, 8),
        everywhere,
        [jax.device_put(c, d) for c, d in zip(copies, mesh.devices.flat, strict=True)],
    )
    _, found = exchanged(other, backend=backend, debug=True)
    assert not found.agreed
    with pytest.raises(CountsError, match=r"devices disagree on the counts, .*Gather counts from"):
        found.check()


def test_numbers_that_are_no_counts():
    counts = np.full((8, 8), 2, np.int32)
    counts[3, 4] = -1
    with pytest.raises(TrafficError, match=r"must be 0 or more, got -1 at \(3, 4\); count what"):
        exchanged(counts)
    _, found = exchanged(jnp.asarray(counts), debug=True)
    with pytest.raises(CountsError, match="or counts are negative"):
        found.check()
    with pytest.raises(TrafficError, match="counts must be whole numbers, got dtype float32"):
        exchanged(counts.astype(np.float32))
    with pytest.raises(TrafficError, match=r"counts \[8, 8\] on 4 servers of 2 GPUs, got"):
        exchanged(counts[:, :4])
    with pytest.raises(TrafficError, match="traffic must be square"):
        plan(np.ones((3, 4), np.int64), COST)
    with pytest.raises(TrafficError, match=r"must be 0 or more, got -3 from 1 to 0"):
        plan(np.array([[0, 1], [-3, 0]]), COST)


def test_missing_rows_are_an_error_for_who_asks():
    counts = np.full((8, 8), 2, np.int32)
    counts[1, 2] = 9
    _, found = exchanged(counts)
    with pytest.raises(RowsError, match="9 rows of one pair of GPUs exceed the capacity of 6"):
        found.check()


def test_servers_that_span_hosts_are_refused():
    def device(host, **more):
        return SimpleNamespace(process_index=host, **more)

    rows = np.array([[device(0), device(0)], [device(1), device(1)]])
    check_hosts(rows)
    with pytest.raises(MeshError, match=r"got hosts \[0, 1\] for server 0; order devices by host"):
        check_hosts(rows.T)
    # A process for each GPU: what fast links join is known by slices.
    check_hosts(np.array([[device(0, slice_index=0), device(1, slice_index=0)]]))
    other = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("server", "rank"))
    with pytest.raises(MeshError, match="must have axes"):
        flash_all_to_all(jnp.zeros((2, 2, 1, 1)), jnp.zeros((2, 2), int), mesh=other)


def test_meshes_of_servers():
    mesh = make_mesh(2, devices=jax.devices()[::-1])
    assert mesh.axis_names == ("server", "gpu")
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert mesh.devices.shape == (4, 2)
    assert make_mesh().devices.shape == (1, 8)  # one host
    with pytest.raises(MeshError, match=r"a multiple of gpus=3 devices, got \{0: 8\} by host"):
        make_mesh(3)


@pytest.mark.parametrize(("n", "m"), [(4, 2), (1, 2), (2, 1)])
def test_links_at_hand_are_measured(n, m):
    found = calibrate(mesh_of(n, m), sizes=(1 << 12, 1 << 22), repeats=3)
    assert found.gpus == m
    assert 1e6 < found.out_rate < 1e13
    assert 1e6 < found.up_rate < 1e13
    assert 0 <= found.out_latency < 1
    if n == 1 or m == 1:
        assert (found.up_rate, found.up_latency) == (found.out_rate, found.out_latency)
        assert found.incast == 0


def test_links_that_cannot_be_measured():
    with pytest.raises(ConfigError, match="links are between devices, got 1 device"):
        calibrate(mesh_of(1, 1))
    with pytest.raises(ConfigError, match="repeats must be at least 1, got 0"):
        calibrate(mesh_of(4, 2), repeats=0)
    with pytest.raises(ConfigError, match="messages of at least two sizes, got 1"):
        calibrate(mesh_of(2, 1), sizes=(1 << 12,), repeats=1)
