"""Which configuration of a kernel is taken: the measured one, else the first candidate."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import tuning as benchmark
from jaxserve.engine.kernel_plans import KernelPlans
from jaxserve.pallas_kernels.attention import mosaic, mosaic_decode, mosaic_prefill, tuning
from jaxserve.pallas_kernels.attention.backends import tuned
from jaxserve.pallas_kernels.paged import PageTable
from jaxserve.pallas_kernels.plan import PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.token_attention import mosaic as token_lists
from jaxserve.pallas_kernels.variant import PLAIN

KEY = next(key for key, each in mosaic_decode.tuning_table().items() if len(each) > 1)
CANDIDATES = mosaic_decode.tuning_table()[KEY]


def line(config, median, **changes):
    """Return a result line as the benchmark writes it."""
    return {
        "what": "candidate",
        "kernel": "decode",
        "key": tuning.name_of(KEY),
        "config": dataclasses.asdict(config),
        "is_guess": config == CANDIDATES[0],
        "difference": 0.0,
        "median": median,
        "machine": {"device": {"kind": "NVIDIA H200"}},
        "versions": {"jax": "0.11.2"},
        "date": "2026-01-01",
        "command": "python -m benchmarks.tuning",
    } | changes


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder of tables that kernels read."""
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path)
    tuning.measured.cache_clear()
    yield tmp_path
    tuning.measured.cache_clear()


def test_without_a_table_the_first_candidate_is_taken(tables):
    assert tuning.choose("decode", KEY, CANDIDATES, "nvidia-h200") == CANDIDATES[0]
    assert tuning.choose("decode", KEY, CANDIDATES, "") == CANDIDATES[0]


def test_what_was_measured_is_taken_on_that_device_alone(tables):
    lines = [line(CANDIDATES[0], 100.0), line(CANDIDATES[1], 80.0)]
    (path,) = benchmark.write_tables(lines, [tables])
    assert path.name == "nvidia-h200.json"
    assert json.loads(path.read_text())["entries"][0]["guess_us"] == 100.0
    assert tuning.choose("decode", KEY, CANDIDATES, "nvidia-h200") == CANDIDATES[1]
    assert tuning.choose("prefill", KEY, CANDIDATES, "nvidia-h200") == CANDIDATES[0]
    assert tuning.choose("decode", KEY, CANDIDATES, "nvidia-h100-pcie") == CANDIDATES[0]


@pytest.mark.parametrize(
    "other",
    [
        line(CANDIDATES[1], 99.0),
        line(CANDIDATES[1], 10.0, difference=0.5),
        {k: v for k, v in line(CANDIDATES[1], 0).items() if k != "median"} | {"error": "spills"},
    ],
    ids=["hardly faster", "computes something else", "fails"],
)
def test_the_guess_stays_unless_another_is_faster_and_right(tables, other):
    benchmark.write_tables([line(CANDIDATES[0], 100.0), other], [tables])
    assert tuning.choose("decode", KEY, CANDIDATES, "nvidia-h200") == CANDIDATES[0]


def test_a_newer_line_replaces_an_older_one(tables):
    lines = [line(CANDIDATES[0], 100.0), line(CANDIDATES[1], 80.0), line(CANDIDATES[1], 120.0)]
    benchmark.write_tables(lines, [tables])
    assert tuning.choose("decode", KEY, CANDIDATES, "nvidia-h200") == CANDIDATES[0]


def test_a_configuration_that_is_no_candidate_any_more_is_named(tables, caplog):
    gone = dataclasses.replace(CANDIDATES[0], stages=31)
    benchmark.write_tables([line(gone, 1.0)], [tables])
    assert tuning.choose("decode", KEY, CANDIDATES, "nvidia-h200") == CANDIDATES[0]
    assert "no candidate any more" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{"kernel": "decode"}]}', '{"a": 1}'])
def test_a_broken_table_is_refused_by_name(tables, text):
    (tables / "nvidia-h200.json").write_text(text)
    with pytest.raises(ValueError, match=r"nvidia-h200\.json is no table of tuning"):
        tuning.measured("nvidia-h200")


def test_every_table_that_is_shipped_names_candidates():
    modules = benchmark.KERNELS
    for path in tuning.folder().iterdir():
        if not path.name.endswith(".json"):
            continue
        for (kernel, key), fields in tuning.read(path.read_text(), path.name).items():
            table = {tuning.name_of(k): each for k, each in modules[kernel].tuning_table().items()}
            assert fields in [dataclasses.asdict(config) for config in table[key]]


@pytest.mark.parametrize(
    ("kernel", "key"), [(kernel, key) for kernel, key, _ in benchmark.keys_in_order()], ids=str
)
def test_every_key_has_a_step_to_be_measured_on(kernel, key):
    problem = benchmark.problem_of(kernel, key, benchmark.SIZES[kernel])
    if isinstance(problem, benchmark.ListProblem):
        q, kv = jax.eval_shape(problem.arrays)
        assert q.shape[-1] == key.dim
        assert token_lists.why_not(q, kv, PLAIN) is None
        return
    assert benchmark.KERNELS[kernel].why_not(problem.spec, problem.variant) is None


@given(
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 16]),
    dim=st.sampled_from([64, 128, 256]),
    page_size=st.sampled_from(mosaic_decode.PAGE_SIZES),
    rows=st.integers(1, 32),
    tokens=st.integers(1, 300),
    window=st.sampled_from([None, 100]),
    split=st.sampled_from(["balanced", "fixed"]),
    levels=st.integers(0, 1),
)
def test_tuned_specs_are_served_wherever_a_kernel_can(
    group, dim, page_size, rows, tokens, window, split, levels
):
    base = PlanSpec(
        q_heads=2 * group,
        kv_heads=2,
        head_dim=dim,
        page_size=page_size,
        max_requests=rows,
        max_tokens=max(rows, tokens),
        max_pages=64,
        tile_kv=max(64, page_size),
        window=window,
        cascade_levels=levels,
        fixed_split_size=512 if split == "fixed" else None,
    )
    found = mosaic.tune(base)
    served = mosaic.uses_decode(found, PLAIN) or mosaic_prefill.why_not(found, PLAIN) is None
    only_decode = dim == 256 and (base.max_tokens > rows or levels or split == "fixed")
    assert served or only_decode
    assert found.num_ctas % tuning.multiprocessors() == 0
    if base.max_tokens == rows and not levels and split == "balanced":
        assert mosaic.uses_decode(found, PLAIN)
        assert found.tile_tokens == 1


def test_results_that_depend_on_nobody_come_from_tiles_of_one_size():
    plans = KernelPlans(
        backend="mosaic",
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        page_size=16,
        dtype="bfloat16",
        windows=(None,),
        max_model_len=4096,
        batch_invariant=True,
        shares=True,
    )
    steps = [(1, 1), (8, 8), (8, 512), (1, 2048)]
    specs = [
        plans.specs(rows=rows, tokens=tokens, has_drafts=False, shares=False)[0]
        for rows, tokens in steps
    ]
    tiles = {(spec.tile_q, spec.tile_kv, spec.fixed_split_size) for spec in specs}
    assert tiles == {(64, 128, 512)}


def test_a_plan_of_a_tuned_spec_covers_every_cta():
    base = PlanSpec(
        q_heads=32, kv_heads=8, head_dim=128, page_size=16, max_requests=64, max_tokens=64,
        max_pages=64 * 64, tile_kv=64,
    )  # fmt: skip
    spec = tuned("mosaic", base)
    table = PageTable(
        indptr=np.arange(0, 64 * 64 + 1, 64, dtype=np.int32),
        indices=np.arange(64 * 64, dtype=np.int32),
        kv_len=np.full(64, 1024, np.int32),
    )
    plan = make_plan(spec, np.ones(64, int), table)
    assert np.asarray(plan.work_indptr).shape == (spec.num_ctas + 1,)
    assert (np.diff(np.asarray(plan.work_indptr)) > 0).all()
