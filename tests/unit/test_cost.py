"""Cost models: times, inverses, bad tables, corrections and fits."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from jaxserve.core.cost import (
    PUBLISHED_COSTS,
    LinearCost,
    Plane,
    SafeCost,
    StepLoad,
    max_decodes,
    zero_load_time,
)  # fmt: skip
from jaxserve.core.cost_drift import LearnedCost
from jaxserve.core.cost_table import COLUMNS, TableCost
from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.cost_fit import fit_linear, judge_fit

BATCHES, LENGTHS, CHUNKS, PASTS = (0, 1, 8, 64), (128, 1024, 8192), (0, 64, 512), (0, 512, 4096)


def rows_of(time, batches=BATCHES, lengths=LENGTHS, chunks=CHUNKS, pasts=PASTS):
    found = {}
    for b, k, c, p in itertools.product(batches, lengths, chunks, pasts):
        if b or c:
            key = (b, k if b else 0, c, p if c else 0)
            found[key] = time(*key)
    return [(*key, seconds) for key, seconds in found.items()]


def bumpy(b, k, c, p):
    return 0.006 + 2e-5 * b + 1e-8 * b * k + 2e-5 * c + 1e-9 * c * (p + c / 2) + 1e-3 * (b > 4)


TABLE = TableCost(rows_of(bumpy))
MODELS = {
    **PUBLISHED_COSTS,
    "table": TABLE,
    "summed": TableCost(rows_of(bumpy), composition="summed"),
    "safe": SafeCost(PUBLISHED_COSTS["7b-a100"], margin=0.07, overhead=0.001),
    "safe table": SafeCost(TABLE),
}
LOADS = st.builds(
    lambda prefill, past, decodes, mean, draft: StepLoad(
        decodes=decodes, context=decodes * mean, drafts=decodes * draft, draft_steps=draft
    ).with_chunk(prefill, past) if prefill else StepLoad(
        decodes=decodes, context=decodes * mean, drafts=decodes * draft, draft_steps=draft
    ),
    st.integers(0, 5000), st.integers(0, 9000), st.integers(0, 300), st.integers(1, 9000),
    st.integers(0, 4),
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@given(load=LOADS, seconds=st.floats(0, 2), past=st.integers(0, 5000))
@settings(max_examples=40)
def test_prefill_within_is_the_inverse_of_step_time(name, load, seconds, past):
    model = MODELS[name]
    most = model.prefill_within(seconds, load, past)
    assert most == 0 or model.step_time(load.with_chunk(most, past)) <= seconds
    if most < 1 << 22:
        assert model.step_time(load.with_chunk(most + 1, past)) > seconds
        exact = model.step_time(load.with_chunk(most + 1, past))
        assert model.prefill_within(exact, load, past) >= most + 1


@pytest.mark.parametrize("name", MODELS)
@given(load=LOADS, more=st.integers(1, 500))
@settings(max_examples=40)
def test_more_work_never_takes_less_time(name, load, more):
    model = MODELS[name]
    time = model.step_time(load)
    assert math.isfinite(time)
    assert time >= 0
    assert model.step_time(load.with_chunk(more, 100)) >= time - 1e-12
    if load.decodes:
        mean = load.context // load.decodes
        grown = load._replace(decodes=load.decodes + more, context=load.context + more * mean)
        assert model.step_time(grown) >= time - 1e-12


@pytest.mark.parametrize("name", MODELS)
@given(decodes=st.integers(0, 200), mean=st.integers(1, 4000), count=st.integers(0, 30))
@settings(max_examples=30)
def test_times_of_many_decodes_are_those_of_one_after_the_other(name, decodes, mean, count):
    load = StepLoad(decodes=decodes, context=decodes * mean)
    one_by_one = [
        MODELS[name].step_time(load._replace(context=load.context + i * decodes))
        for i in range(count)
    ]
    assert list(MODELS[name].decode_times(load, count)) == one_by_one


@pytest.mark.parametrize("name", MODELS)
@given(seconds=st.floats(0, 0.3), mean=st.floats(1, 5000))
@settings(max_examples=20)
def test_max_decodes_is_the_largest_batch_in_time(name, seconds, mean):
    most = max_decodes(MODELS[name], seconds, mean, limit=600)
    for count, fits in ((most, True), (most + 1, False)):
        if 0 < count <= 600:
            load = StepLoad(decodes=count, context=round(count * mean))
            assert (MODELS[name].step_time(load) <= seconds) is fits


def test_published_planes_are_their_formulas():
    load = StepLoad(decodes=10, context=10_000, draft_steps=3, drafts=20).with_chunk(500, 100)
    five = PUBLISHED_COSTS["7b-a100"].step_time(load)
    assert five == pytest.approx(4.86e-5 * 530 + 1.69e-5 * 11 + 8e-8 * 10_100 + 1.4e-2, rel=1e-12)
    roofline = PUBLISHED_COSTS["opt-13b+125m-2xa100"]
    assert roofline.step_time(load) == pytest.approx(7.213e-5 * 530 + 3 * 3.341e-3 + 3.173e-2)
    assert zero_load_time(roofline, 1000) == pytest.approx(7.213e-2 + 3.173e-2)


@given(
    b=st.floats(0, 64), k=st.floats(128, 8192), c=st.integers(1, 512), p=st.integers(0, 4096),
)  # fmt: skip
def test_a_table_interpolates_as_scipy_does(b, k, c, p):
    b = round(b)
    full = np.array([
        [[[bumpy(*(b, k if b else 0, c, p if c else 0)) for p in PASTS] for c in CHUNKS]
         for k in LENGTHS] for b in BATCHES
    ])  # fmt: skip
    full[0, :, 0, :] = min(seconds for *_, seconds in rows_of(bumpy))
    oracle = RegularGridInterpolator((BATCHES, LENGTHS, CHUNKS, PASTS), full)
    context = round(b * k)
    load = StepLoad(decodes=b, context=context).with_chunk(c, p)
    mean = min(max(context / b, 128), 8192) if b else 128
    expected = oracle((b, mean, c, p)).item()
    floor = oracle((b, mean, 0, 0)).item() if b else 0.0
    assert TABLE.step_time(load) == pytest.approx(max(expected, floor), rel=1e-9)
    alone = StepLoad(decodes=b, context=context)
    if b:
        assert TABLE.step_time(alone) == pytest.approx(oracle((b, mean, 0, 0)).item(), rel=1e-9)


def test_past_its_edges_a_table_grows_in_a_straight_line():
    lengths = [TABLE.step_time(StepLoad(decodes=64, context=64 * k)) for k in (8192, 9192, 10192)]
    assert lengths[2] - lengths[1] == pytest.approx(lengths[1] - lengths[0])
    assert lengths[0] > 0
    chunks = [TABLE.step_time(StepLoad(prefill=c, pairs=c * c / 2)) for c in (600, 700, 800)]
    assert chunks[0] < chunks[1] < chunks[2]
    near = TABLE.step_time(StepLoad(decodes=8, context=8))
    assert near == TABLE.step_time(StepLoad(decodes=8, context=8 * 128)), "no measurement below"


def test_two_short_prompts_cost_less_than_a_long_one():
    two = StepLoad().with_chunk(256).with_chunk(256)
    assert TABLE.step_time(two) < TABLE.step_time(StepLoad().with_chunk(512))
    summed = MODELS["summed"]
    decodes = StepLoad(decodes=8, context=8192)
    together = summed.step_time(decodes.with_chunk(256))
    apart = summed.step_time(decodes) + summed.step_time(StepLoad().with_chunk(256))
    assert together == pytest.approx(apart)


@pytest.mark.parametrize("value", [math.nan, -0.004, 0.0, math.inf])
def test_cells_that_are_no_times_are_refused_by_name(value):
    rows = rows_of(bumpy)
    rows[3] = (*rows[3][:4], value)
    b, k, c, p = rows[3][:4]
    with pytest.raises(ConfigError, match=f"h100 has .{b} decodes of {k}, chunk {c} after {p}. ="):
        TableCost(rows, name="h100")


def test_a_table_with_holes_or_contradictions_is_refused():
    rows = rows_of(bumpy)
    with pytest.raises(
        ConfigError, match=r"has no value for .1 decodes of 128, chunk 64 after 512"
    ):
        TableCost([row for row in rows if row[:4] != (1, 128, 64, 512)])
    with pytest.raises(ConfigError, match="twice, as 1 and 2 ms"):
        TableCost([(1, 128, 0, 0, 0.001), (1, 128, 0, 0, 0.002)])
    with pytest.raises(ConfigError, match="is empty"):
        TableCost([])


def test_cells_smaller_than_cells_of_less_work_are_raised_and_named():
    rows = [
        (b, k, c, p, 0.001 if (b, k, c, p) == (8, 1024, 64, 512) else t)
        for b, k, c, p, t in rows_of(bumpy)
    ]
    table = TableCost(rows)
    assert table.enveloped == ("(8 decodes of 1024, chunk 64 after 512)",)
    assert TABLE.enveloped == ()
    load = StepLoad(decodes=8, context=8 * 1024).with_chunk(64, 512)
    assert table.step_time(load) >= table.step_time(StepLoad(decodes=8, context=8 * 1024))


def test_a_table_is_read_from_a_file(tmp_path):
    file = tmp_path / "t.csv"
    lines = [
        ",".join(COLUMNS),
        *(f"{b},{k},{c},{p},{s * 1000!r}" for b, k, c, p, s in rows_of(bumpy)),
    ]
    file.write_text("\n".join(lines))
    load = StepLoad(decodes=20, context=20_000).with_chunk(100, 7)
    assert TableCost.read(file).step_time(load) == pytest.approx(TABLE.step_time(load))
    file.write_text("\n".join([*lines, "1,2,x,4,5"]))
    with pytest.raises(ConfigError, match=f"line {len(lines) + 1} of t.csv must hold five numbers"):
        TableCost.read(file)
    file.write_text("a,b\n1,2")
    with pytest.raises(ConfigError, match="must have the columns decode_batch"):
        TableCost.read(file)


def test_the_h100_table_has_its_published_spots(shared_data):
    table = TableCost.read(
        shared_data / "traces" / "gpu_batch_latency" / "h100_sxm_llama3.1-8b_tp1.csv.gz"
    )
    spots = {
        StepLoad(decodes=1, context=1024): 6.0,
        StepLoad(decodes=64, context=64 * 1024): 8.6,
        StepLoad(decodes=256, context=256 * 1024): 13.8,
        StepLoad().with_chunk(2048): 43.5,
        StepLoad().with_chunk(8192): 199,
        StepLoad(decodes=64, context=64 * 1024).with_chunk(512): 15.5,
    }
    for load, ms in spots.items():
        assert table.step_time(load) * 1000 == pytest.approx(ms, rel=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (LinearCost, "needs a plane"),
        (lambda: LinearCost(Plane(context=1.0)), "needs a plane"),
        (lambda: Plane(base=-1.0), "a cost per base must be a number of seconds"),
        (lambda: Plane(token=math.nan), "a cost per token must be"),
        (lambda: SafeCost(TABLE, margin=-0.1), "margin and overhead must be zero or more"),
        (lambda: LearnedCost(TABLE, half_life=0), "half_life must be above zero"),
        (lambda: fit_linear([StepLoad()], [1.0]), "at least 5 steps, got 1"),
        (lambda: fit_linear([StepLoad()] * 5, [math.nan] * 5), "finite and above zero"),
    ],
)
def test_impossible_costs_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_correction_follows_the_machine_and_is_bounded():
    base = PUBLISHED_COSTS["7b-a100"]
    learned = LearnedCost(base)
    load = StepLoad(decodes=32, context=32_000)
    for step in range(400):
        learned.observe(load, 1.3 * base.step_time(load), now=step / 10)
    assert learned.step_time(load) == pytest.approx(1.3 * base.step_time(load))
    assert learned.drift().ratio == pytest.approx(1.3)
    assert learned.drift().is_alarming, "more than 1.25 for 40 seconds"
    other = load.with_chunk(4000)
    assert learned.step_time(other) == base.step_time(other), "another kind of step"
    for step in range(4000):
        learned.observe(load, 9 * base.step_time(load), now=40 + step)
    assert learned.step_time(load) == pytest.approx(1.5 * base.step_time(load))
    for step in range(4000):
        learned.observe(load, base.step_time(load), now=5000 + step)
    assert not learned.drift().is_alarming
    assert list(learned.drift().buckets) == ["decode, 16 tokens and more"]


def test_an_alarm_waits_for_half_a_minute():
    learned = LearnedCost(PUBLISHED_COSTS["7b-a100"])
    load = StepLoad(decodes=1, context=10)
    for now in (0.0, 29.0):
        learned.observe(load, 2 * PUBLISHED_COSTS["7b-a100"].step_time(load), now)
    assert not learned.drift().is_alarming
    learned.observe(load, 2 * PUBLISHED_COSTS["7b-a100"].step_time(load), 30.0)
    assert learned.drift().is_alarming


@given(seed=st.integers(0, 99), name=st.sampled_from(["7b-a100", "opt-6.7b+125m-a100"]))
@settings(max_examples=15)
def test_a_fit_finds_the_model_that_made_the_times(seed, name):
    rng = np.random.default_rng(seed)
    loads = [
        StepLoad(
            decodes=int(d), context=int(d * k), draft_steps=int(s), drafts=int(d * s)
        ).with_chunk(int(c), int(p))
        for d, k, s, c, p in zip(
            rng.integers(0, 257, 300), rng.integers(1, 9000, 300), rng.integers(0, 5, 300),
            rng.integers(1, 4000, 300), rng.integers(0, 4000, 300), strict=True,
        )
    ]  # fmt: skip
    truth = PUBLISHED_COSTS[name]
    times = [truth.step_time(load) for load in loads]
    fitted = fit_linear(loads, times, num_planes=len(truth.planes))
    report = judge_fit(fitted, loads, times)
    assert report.mean_error < 0.02
    assert report.r2 > 0.99
    noisy = [time * factor for time, factor in zip(times, rng.lognormal(0, 0.1, 300), strict=True)]
    fitted = fit_linear(loads, noisy)
    report = judge_fit(fitted, loads, noisy)
    assert 0.05 < report.mean_error < 0.2
    safe = judge_fit(SafeCost(fitted, margin=report.margin), loads, noisy)
    assert safe.under_predicted <= 0.05
