"""The encoder's batches: shapes, packing, cancellation, failures, limits, no compilations."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import LLM, CapacityError, EngineDeadError, RequestError
from jaxserve.engine.compiling import LateCompileError
from jaxserve.engine.encoder_host import EncoderHost
from jaxserve.engine.encoder_runner import BatchShapes
from jaxserve.engine.pooling import PooledText
from tests.bert import BERT, golden, pooled, rows

CASE = golden("plain")
SMALL = {"max_num_batched_tokens": 96, "max_num_seqs": 4}


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(BERT / "plain", **SMALL) as made:
        yield made


def host_of(llm: LLM) -> EncoderHost:
    assert isinstance(llm._loaded, EncoderHost)
    return llm._loaded


def text(ids: list[int]) -> PooledText:
    return PooledText(token_ids=ids, num_first=len(ids))


class Gate:
    """Holds a runner's batches back until they may go, and remembers their sizes."""

    def __init__(self, host: EncoderHost, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.batches: list[tuple[list[int], object]] = []
        run = host.runner.run

        def held(texts, shape):
            self.entered.set()
            assert self.opened.wait(20)
            self.batches.append(([len(t.token_ids) for t in texts], shape))
            return run(texts, shape)

        monkeypatch.setattr(host.runner, "run", held)


# Shapes ---------------------------------------------------------------------------------------


@given(
    max_length=st.integers(1, 600),
    max_tokens=st.integers(1, 5000),
    max_rows=st.integers(1, 300),
    count=st.integers(1, 1000),
    one=st.booleans(),
)
def test_laws_of_shapes(
    max_length: int, max_tokens: int, max_rows: int, count: int, one: bool
) -> None:
    shapes = BatchShapes.build(
        max_length=max_length, max_tokens=max_tokens, max_rows=max_rows, one_per_length=one
    )
    assert shapes.lengths[-1] == max_length
    assert list(shapes.lengths) == sorted(set(shapes.lengths))
    known = {(shape.rows, shape.length) for shape in shapes.all_shapes()}
    for length in shapes.lengths:
        assert shapes.length_of(length) == length
        buckets = shapes.row_buckets(length)
        assert list(buckets) == sorted(set(buckets))
        assert buckets[-1] <= max_rows
        assert buckets[-1] == 1 or buckets[-1] * length <= max_tokens
        rows_ = shapes.rows_for(count, length)
        assert (rows_, length) in known
        if not one:
            assert min(count, rows_) * 2 > rows_
        assert not one or len(buckets) == 1


def test_shapes_of_minilm() -> None:
    shapes = BatchShapes.build(max_length=256, max_tokens=1024, max_rows=64)
    assert shapes.lengths == (16, 32, 48, 64, 96, 128, 192, 256)
    assert shapes.row_buckets(32) == (1, 4, 16, 32)
    assert [shapes.rows_for(n, 32) for n in (1, 2, 3, 5, 9, 16, 17, 40)] == [
        1, 1, 4, 4, 16, 16, 32, 32,
    ]  # fmt: skip


# Batches --------------------------------------------------------------------------------------


def test_texts_of_one_length_run_together(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of(llm)
    gate = Gate(host, monkeypatch)
    first = host.encoder.submit([text([5] * 20)])
    assert gate.entered.wait(20)
    lengths = [3, 30, 9, 17, 16, 31, 40, 2]
    others = [host.encoder.submit([text([6] * n)]) for n in lengths]
    assert host.num_unfinished == 9
    assert not host.drain(0.0)
    gate.opened.set()
    for future in (first, *others):
        assert len(future.result(20)) == 1
    assert host.drain(20)
    # The oldest chooses the length; its batch takes all of that length, and rows that would be
    # padding take shorter ones. Length 32 fits three times into 96 tokens.
    assert [sizes for sizes, _ in gate.batches] == [[20], [3, 9, 16, 2], [30, 17, 31], [40]]


def test_shorter_texts_take_rows_of_padding(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of(llm)
    gate = Gate(host, monkeypatch)
    first = host.encoder.submit([text([5])])
    assert gate.entered.wait(20)
    future = host.encoder.submit([text([6] * n) for n in (30, 31, 2)])
    gate.opened.set()
    first.result(20), future.result(20)
    assert [sizes for sizes, _ in gate.batches] == [[1], [30, 31, 2]]


def test_results_come_in_order_and_do_not_depend_on_batches(llm: LLM) -> None:
    random = np.random.default_rng(3)
    texts, expected = rows(CASE), pooled(CASE, "mean")
    order = random.permutation(np.repeat(np.arange(len(texts)), 9))
    outputs = llm.embed([texts[i] for i in order], use_tqdm=False)
    found = np.stack([output.outputs.vector for output in outputs])
    np.testing.assert_allclose(found, expected[order], rtol=0, atol=1e-5)
    assert [output.prompt_token_ids for output in outputs] == [texts[i] for i in order]


def test_batch_invariant_results_are_equal_to_the_last_bit() -> None:
    texts = rows(CASE)
    with LLM(BERT / "plain", batch_invariant=True, **SMALL) as llm:
        alone = [llm.embed(ids, use_tqdm=False)[0].outputs.vector for ids in texts]
        together = llm.embed(texts * 3, use_tqdm=False)
    for index, output in enumerate(together):
        np.testing.assert_array_equal(output.outputs.vector, alone[index % len(texts)])


def test_nothing_is_compiled_after_warm_up() -> None:
    settings = {"warmup": "full", "enforce_no_recompile": True}
    with LLM(BERT / "plain", **SMALL, **settings) as llm:
        host = host_of(llm)
        assert host.is_warm
        before = llm.metrics.num_compilations
        assert before == len(host.runner.programs) == len(host.runner.spec.shapes.all_shapes())
        for count in (1, 2, 5, 11):
            llm.embed(rows(CASE) * count, use_tqdm=False)
        assert llm.metrics.num_compilations == before
        host.runner.programs.clear()
        with pytest.raises(LateCompileError, match="would be compiled after warm-up"):
            host.runner.run([text([5])], host.runner.choose_shape(1, 16))


def test_during_warm_up_texts_run_in_shapes_that_are_ready() -> None:
    with LLM(BERT / "plain", warmup="background", **SMALL) as llm:
        host = host_of(llm)
        host.runner.programs.stop()
        assert host._compiler is not None
        host._compiler.join()
        ready = host.runner.programs._compiled
        host.runner.programs._compiled = dict(list(ready.items())[:1])
        found = [output.outputs.vector for output in llm.embed(rows(CASE), use_tqdm=False)]
        assert len(host.runner.programs) == 1
    np.testing.assert_allclose(found, pooled(CASE, "mean"), rtol=0, atol=1e-5)


# When something goes wrong --------------------------------------------------------------------


def test_a_cancelled_request_is_dropped(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of(llm)
    gate = Gate(host, monkeypatch)
    first = host.encoder.submit([text([5])])
    assert gate.entered.wait(20)
    dropped = host.encoder.submit([text([7] * 40)] * 5)
    kept = host.encoder.submit([text([6, 6])])
    assert dropped.cancel()
    gate.opened.set()
    first.result(20), kept.result(20)
    assert host.drain(20)
    assert [sizes for sizes, _ in gate.batches] == [[1], [2]]
    assert host.num_unfinished == 0


def test_a_failed_batch_ends_its_requests_only(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    host, run = host_of(llm), host_of(llm).runner.run

    def fail_once(texts, shape):
        monkeypatch.setattr(host.runner, "run", run)
        raise ValueError("out of luck")

    monkeypatch.setattr(host.runner, "run", fail_once)
    with pytest.raises(EngineDeadError, match="out of luck"):
        llm.embed([5, 6], use_tqdm=False)
    assert len(llm.embed([5, 6], use_tqdm=False)) == 1
    assert llm.metrics.finished_by_reason["error"] == 1
    host.check_health()


def test_an_encoder_that_fails_again_and_again_stops(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_of(llm)

    def fail(texts, shape):
        raise ValueError("broken")

    monkeypatch.setattr(host.runner, "run", fail)
    for _ in range(3):
        with pytest.raises(EngineDeadError):
            llm.embed([5], use_tqdm=False)
    host.encoder._thread.join(20)
    with pytest.raises(EngineDeadError, match="3 batches in a row failed"):
        host.check_health()
    with pytest.raises(EngineDeadError, match="has stopped"):
        llm.embed([5], use_tqdm=False)


def test_a_full_queue_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(BERT / "plain", max_num_queued_reqs=1, **SMALL) as llm:
        host = host_of(llm)
        gate = Gate(host, monkeypatch)
        first = host.encoder.submit([text([5])] * 7)
        with pytest.raises(CapacityError, match="1 requests are under way and at most 1"):
            llm.embed([5], use_tqdm=False)
        assert llm.metrics.rejections["max_num_queued_reqs"] == 1
        gate.opened.set()
        first.result(20)
        assert host.drain(20)
        assert llm.embed([5], use_tqdm=False)


def test_closing_ends_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(BERT / "plain", **SMALL)
    host = host_of(llm)
    gate = Gate(host, monkeypatch)
    started, waiting = (host.encoder.submit([text([5] * n)]) for n in (1, 40))
    assert gate.entered.wait(20)
    threading.Timer(0.01, gate.opened.set).start()
    llm.close()
    for future in (started, waiting):
        assert isinstance(future.exception(20), EngineDeadError)
    with pytest.raises(EngineDeadError, match="closed"):
        host.encoder.submit([text([5])])


# Requests -------------------------------------------------------------------------------------


def test_texts_are_tokenized_and_cut(llm: LLM) -> None:
    plain, cut = (
        llm.embed(prompts, use_tqdm=False, truncate_prompt_tokens=keep)[0]
        for prompts, keep in (("ab", None), ("abcdefgh", 4))
    )
    assert plain.prompt_token_ids[0] == cut.prompt_token_ids[0] == 2
    assert plain.prompt_token_ids[-1] == cut.prompt_token_ids[-1] == 3
    assert len(cut.prompt_token_ids) == 4
    (by_ids,) = llm.embed({"prompt_token_ids": list(range(5, 45))}, truncate_prompt_tokens=7)
    assert by_ids.prompt_token_ids == list(range(5, 12))
    assert llm.embed([], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ("", {}, "input must not hold an empty string: it has no embedding"),
        (["a", ""], {}, "empty string"),
        ([[]], {}, "text without tokens"),
        ([[5] * 49], {}, "maximum context length is 48 tokens, but a text of input has 49"),
        ("a" * 60, {}, "Shorten it, or set truncate_prompt_tokens to -1"),
        ([[64]], {}, r"token ids must be in \[0, 64\), got 64"),
        ([[-1]], {}, "got -1"),
        ([[1.5]], {}, "texts or lists of token ids, got list"),
        (["a", None], {}, "got NoneType"),
        ({"text": "a"}, {}, "got NoneType"),
        ("a", {"truncate_prompt_tokens": 0}, "from 1 to 48 for this model, or -1"),
        ("a", {"truncate_prompt_tokens": 49}, "got 49"),
        ("abc", {"truncate_prompt_tokens": 2}, "leaves nothing of it beside 2 special tokens"),
        ("\ud800", {}, "half of a surrogate pair"),
        ("a", {"dimensions": 12}, "dimensions must be 24 for this model or be left out, got 12"),
    ],
)
def test_bad_texts_are_refused(llm: LLM, prompts: object, settings: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.embed(prompts, use_tqdm=False, **settings)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("a", [], "data_2 must hold at least one text, got none"),
        ([], "a", "data_1 must hold at least one text"),
        (["a", "b"], ["c"], "one text, or as many as data_2; got 2 and 1"),
        ([5], ["c"], "data_1 must hold texts, got int"),
        ("a", "", "empty string"),
    ],
)
def test_bad_pairs_are_refused(llm: LLM, first: object, second: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.score(first, second, use_tqdm=False)


def test_scores_are_cosines(llm: LLM) -> None:
    left, right = ["a cat", "rain"], ["the cat", "sun"]
    a, b = (
        np.stack([o.outputs.vector for o in llm.embed(t, use_tqdm=False)]) for t in (left, right)
    )
    scores = [o.outputs.score for o in llm.score(left, right, use_tqdm=False)]
    assert scores == pytest.approx((a * b).sum(1).tolist(), abs=1e-5)
    scores = [o.outputs.score for o in llm.score(left[0], right, use_tqdm=False)]
    assert scores == pytest.approx((b @ a[0]).tolist(), abs=1e-5)


def test_an_encoder_does_not_generate(llm: LLM) -> None:
    messages = [{"role": "user", "content": "a"}]
    for ask in (
        lambda: llm.generate("a"),
        lambda: llm.chat(messages),
        lambda: list(llm.stream("a")),
        llm.get_default_sampling_params,
    ):
        with pytest.raises(RequestError, match="does not generate here"):
            ask()


def test_metrics_count_texts_and_padding(llm: LLM) -> None:
    llm.embed([[5] * 16, [5] * 10], use_tqdm=False)
    llm.embed([5] * 40, use_tqdm=False)
    metrics, page = llm.metrics, llm.metrics.render("tiny", aliases=["vllm"])
    assert metrics.prompt_tokens == 66
    assert metrics.finished_by_reason["stop"] == metrics.e2e_latency.count == 2
    for line in (
        'jaxserve:pooled_texts_total{engine="0",model_name="tiny"} 3.0',
        'vllm:request_success_total{engine="0",model_name="tiny",finished_reason="stop"} 2.0',
        'jaxserve:pooling_batch_texts_sum{engine="0",model_name="tiny"} 3.0',
    ):
        assert line in page
    assert metrics.num_padding_tokens >= 8
