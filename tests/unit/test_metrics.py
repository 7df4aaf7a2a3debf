"""Metrics: numbers, names, buckets, and a page that Prometheus' own parser reads."""

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.core.event import FinishReason, RequestMetrics
from jaxserve.core.request import SamplingParams
from jaxserve.engine.metrics import EngineMetrics, Histogram, one_two_five_buckets


def fill(metrics: EngineMetrics) -> None:
    metrics.step(num_running=3, num_waiting=2, kv_usage=0.25, num_tokens=100)
    metrics.admitted(prompt_len=100, num_cached=32, queue_time=0.4)
    metrics.first_token(0.05)
    metrics.tokens(1, None)
    metrics.tokens(1, 0.02)
    metrics.preempted()
    metrics.compiled(1.5)
    metrics.rejected("max_num_queued_reqs")
    metrics.finished(
        reason=FinishReason.STOP,
        prompt_len=100,
        output_len=2,
        metrics=RequestMetrics(
            arrival_time=10.0,
            first_scheduled_time=10.4,
            first_token_time=10.5,
            last_token_time=11.5,
            finished_time=12.0,
            num_preemptions=1,
        ),
        sampling=SamplingParams(max_tokens=64, n=2),
    )


def samples(page: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} appears twice"
            found[key] = sample.value
    return found


def value(page: str, name: str, **labels: str) -> float:
    base = {"model_name": "tiny", "engine": "0"}
    return samples(page)[name, frozenset({**base, **labels}.items())]


def test_attributes_follow_the_verbs() -> None:
    metrics = EngineMetrics()
    fill(metrics)
    assert (metrics.num_running, metrics.num_waiting, metrics.kv_usage) == (3, 2, 0.25)
    assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.generation_tokens) == (100, 32, 2)
    assert (metrics.num_preemptions, metrics.num_compilations, metrics.num_steps) == (1, 1, 1)
    assert metrics.finished_by_reason["stop"] == 1
    assert metrics.tpot.total == pytest.approx(1.0)
    assert metrics.e2e_latency.total == pytest.approx(2.0)


def test_page_is_read_by_prometheus_own_parser() -> None:
    metrics = EngineMetrics(cache_config={"block_size": 16, "odd": 'a "quoted"\\ \n value'})
    fill(metrics)
    page = metrics.render("tiny")
    assert value(page, "jaxserve:num_requests_running") == 3
    assert value(page, "jaxserve:kv_cache_usage_perc") == 0.25
    assert value(page, "jaxserve:prefix_cache_hits_total") == 32
    assert value(page, "jaxserve:prompt_tokens_by_source_total", source="local_compute") == 68
    assert value(page, "jaxserve:request_success_total", finished_reason="stop") == 1
    assert value(page, "jaxserve:request_success_total", finished_reason="length") == 0
    assert value(page, "jaxserve:compile_seconds_total") == 1.5
    odd = {"block_size": "16", "odd": 'a "quoted"\\ \n value'}
    assert value(page, "jaxserve:cache_config_info", **odd) == 1
    rejected = (
        "jaxserve:admission_rejections_total",
        frozenset({("model_name", "tiny"), ("reason", "max_num_queued_reqs")}),
    )
    assert samples(page)[rejected] == 1


def test_histograms_are_cumulative_and_end_with_infinity() -> None:
    metrics = EngineMetrics()
    for gap in (0.01, 0.011, 0.03, 1000.0):
        metrics.tokens(1, gap)
    page = metrics.render("tiny")
    name = "jaxserve:inter_token_latency_seconds"
    assert value(page, f"{name}_bucket", le="0.01") == 1  # an upper bound belongs to its bucket
    assert value(page, f"{name}_bucket", le="0.025") == 2
    assert value(page, f"{name}_bucket", le="80.0") == 3
    assert value(page, f"{name}_bucket", le="+Inf") == 4
    assert value(page, f"{name}_count") == 4
    assert value(page, f"{name}_sum") == pytest.approx(1000.051)


def test_alias_repeats_every_family_under_the_other_prefix() -> None:
    metrics = EngineMetrics()
    fill(metrics)
    page = metrics.render("tiny", aliases=("vllm",))
    ours = {name for name, _ in samples(page) if name.startswith("jaxserve:")}
    theirs = {name for name, _ in samples(page) if name.startswith("vllm:")}
    assert {name.split(":")[1] for name in ours} == {name.split(":")[1] for name in theirs}
    assert value(page, "vllm:generation_tokens_total") == 2
    types = {f.name: f.type for f in text_string_to_metric_families(page)}
    assert types["vllm:iteration_tokens_total"] == "histogram"


def test_aborted_before_its_first_token_has_no_phase_times() -> None:
    metrics = EngineMetrics()
    metrics.finished(
        reason=FinishReason.ABORT,
        prompt_len=5,
        output_len=0,
        metrics=RequestMetrics(arrival_time=1.0, finished_time=1.5),
        sampling=SamplingParams(),
    )
    assert metrics.e2e_latency.count == 1
    assert metrics.prefill_time.count == 0
    assert metrics.finished_by_reason["abort"] == 1


def test_what_concerns_the_whole_request_is_counted_once() -> None:
    metrics = EngineMetrics()
    for index in range(4):
        metrics.finished(
            reason=FinishReason.LENGTH,
            prompt_len=5,
            output_len=8,
            metrics=RequestMetrics(arrival_time=1.0),
            sampling=SamplingParams(n=4),
            index=index,
        )
    assert metrics.request_n.count == 1
    assert metrics.request_generation_tokens.count == 4


def test_length_buckets_end_at_the_context_length() -> None:
    assert one_two_five_buckets(1)[-1] == 1
    assert one_two_five_buckets(2048)[-1] == 2000
    assert EngineMetrics(max_model_len=4096).request_prompt_tokens.bounds[-1] == 2000


def test_histogram_mean_of_nothing_is_zero() -> None:
    assert Histogram((1.0,)).mean == 0


def test_pages_stay_consistent_while_the_engine_thread_writes() -> None:
    metrics = EngineMetrics()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            metrics.tokens(1, 0.02)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            page = metrics.render("tiny")
            count = value(page, "jaxserve:inter_token_latency_seconds_count")
            assert count == value(page, "jaxserve:generation_tokens_total")
    finally:
        stop.set()
        thread.join()
