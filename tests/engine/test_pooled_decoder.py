"""Embeddings from the decoder that serves generation at the same time."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, CapacityError, ConfigError, EngineDeadError, RequestError, SamplingParams
from jaxserve.core.event import FinishReason
from jaxserve.core.request import Request, RequestId
from jaxserve.engine.host import EngineHost
from jaxserve.engine.pooling import PooledText
from tests.tiny import Bench, tiny_module

SETTINGS = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "kv_cache_memory_bytes": 32 << 20,
}
MODULE = tiny_module()
RANDOM = np.random.default_rng(11)
PROMPTS = [RANDOM.integers(0, 299, n).tolist() for n in (1, 5, 16, 17, 33, 60, 128, 3, 9)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False)


def make(kind: str = "last", **settings: object) -> LLM:
    return LLM(MODULE, **(SETTINGS | {"pooler_config": {"pooling_type": kind}} | settings))


@pytest.fixture(scope="module", params=["last", "mean"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(kind: str) -> Iterator[LLM]:
    with make(kind) as made:
        yield made
        assert_idle(made)


@pytest.fixture(scope="module")
def expected(kind: str) -> np.ndarray:
    """What one forward pass without a cache gives."""
    vectors = []
    with make() as llm:
        for prompt in PROMPTS:
            output = llm.forward(jnp.asarray(prompt)[None], return_hidden=(-1,))
            states = np.asarray(output.hidden[-1][0], np.float64)
            vector = states[-1] if kind == "last" else states.mean(0)
            vectors.append(vector / np.linalg.norm(vector))
    return np.stack(vectors)


def vectors_of(outputs: list) -> np.ndarray:
    return np.stack([output.outputs.vector for output in outputs])


def host_of(llm: LLM) -> EngineHost:
    assert isinstance(llm._loaded, EngineHost)
    return llm._loaded


def assert_idle(llm: LLM) -> None:
    engine = host_of(llm).engine
    assert engine.num_unfinished == 0
    assert engine.pool.num_free == engine.pool.num_pages


def test_batched_and_chunked_states_agree(llm: LLM, expected: np.ndarray) -> None:
    # Twice: the second time prompts are in the prefix cache, as far as pooling can use it.
    for _ in range(2):
        found = vectors_of(llm.embed(PROMPTS, use_tqdm=False))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_one_text_alone_agrees(llm: LLM, expected: np.ndarray) -> None:
    for prompt, vector in zip(PROMPTS, expected, strict=True):
        found = vectors_of(llm.embed(prompt, use_tqdm=False))[0]
        np.testing.assert_allclose(found, vector, rtol=0, atol=1e-5)


def test_pages_agree(kind: str, expected: np.ndarray) -> None:
    with make(kind, kv_layout="pages") as llm:
        found = vectors_of(llm.embed(PROMPTS, use_tqdm=False))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_generation_goes_on_beside_it(llm: LLM, expected: np.ndarray) -> None:
    host = host_of(llm)
    alone = [o.outputs[0].token_ids for o in llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)]
    texts = [PooledText(token_ids=p, num_first=len(p)) for p in PROMPTS * 4]
    future = host.pooling.pooler.submit(texts)
    beside = [o.outputs[0].token_ids for o in llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)]
    assert beside == alone
    found = np.stack([host.pooling.finish(vector) for vector in future.result(60)])
    np.testing.assert_allclose(found, np.tile(expected, (4, 1)), rtol=0, atol=1e-5)


def test_preempted_texts_start_again(kind: str, expected: np.ndarray) -> None:
    bench = Bench(MODULE, max_num_seqs=3, max_num_batched_tokens=16, num_gpu_blocks_override=12)
    for number in (3, 4, 5):
        bench.submit(PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
        request = Request(
            request_id=RequestId(f"text{number}"),
            prompt_token_ids=tuple(PROMPTS[number]),
            arrival=-1.0 if number == 3 else 100.0,
            pooling=kind,
        )
        events: list = []
        bench.events[request.request_id] = events
        bench.engine.submit(request, events.append)
    bench.run()
    for number in (3, 4, 5):
        (event,) = bench.events[f"text{number}"]
        assert event.finish_reason is FinishReason.STOP
        assert event.token_ids == ()
        vector = event.pooled / np.linalg.norm(event.pooled)
        np.testing.assert_allclose(vector, expected[number], rtol=0, atol=1e-5)
    assert bench.metrics.num_preemptions > 0
    bench.assert_idle()


def test_nothing_is_compiled_after_warm_up() -> None:
    with make("mean", warmup="full", enforce_no_recompile=True) as llm:
        before = llm.metrics.num_compilations
        llm.embed(PROMPTS, use_tqdm=False)
        assert llm.metrics.num_compilations == before
        assert llm.metrics.generation_tokens == 0
        assert llm.metrics.finished_by_reason["stop"] == len(PROMPTS)


def test_only_a_few_texts_are_under_way_at_a_time() -> None:
    with make(max_num_queued_reqs=2) as llm:
        assert len(llm.embed(PROMPTS * 3, use_tqdm=False)) == 3 * len(PROMPTS)


def test_a_full_queue_refuses() -> None:
    with make(max_num_queued_reqs=1) as llm:
        stream = llm.stream([1, 2], SamplingParams(max_tokens=100, ignore_eos=True))
        next(stream)
        with pytest.raises(CapacityError, match="completions are under way"):
            llm.embed([5], use_tqdm=False)
        stream.close()
        host_of(llm).drain(20)
        assert_idle(llm)


def test_a_cancelled_call_frees_everything(llm: LLM) -> None:
    texts = [PooledText(token_ids=p, num_first=len(p)) for p in PROMPTS * 20]
    future = host_of(llm).pooling.pooler.submit(texts)
    assert future.cancel()
    assert host_of(llm).drain(20)
    assert_idle(llm)


def test_a_failed_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as llm:

        def fail(*_: object) -> None:
            raise ValueError("out of luck")

        with monkeypatch.context() as patch:
            patch.setattr(host_of(llm).engine.runner, "pool", fail)
            with pytest.raises(EngineDeadError, match="out of luck"):
                llm.embed([5, 6], use_tqdm=False)
        assert llm.embed([5, 6], use_tqdm=False)
        assert_idle(llm)


def test_scores_are_cosines_of_states() -> None:
    with make() as llm, pytest.raises(RequestError, match="has no tokenizer"):
        llm.score("a", "b")


def test_too_long_texts_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"maximum context length is 128 tokens.*has 129"):
        llm.embed([[1] * 129], use_tqdm=False)
    (cut,) = llm.embed([[1] * 129], use_tqdm=False, truncate_prompt_tokens=-1)
    assert len(cut.prompt_token_ids) == 128
    request = Request(request_id=RequestId("x"), prompt_token_ids=(1,) * 129, pooling="last")
    with pytest.raises(RequestError, match="context length is 128 tokens, but the text has 129"):
        host_of(llm).engine.submit(request, print)


def test_the_runner_says_what_a_decoder_does() -> None:
    with make(runner="generate") as llm:
        with pytest.raises(RequestError, match="does not embed or score here"):
            llm.embed([1])
        assert llm.generate([1], GREEDY, use_tqdm=False)
    with make(runner="pooling") as llm:
        with pytest.raises(RequestError, match="does not generate here"):
            llm.generate([1])
        assert llm.embed([1], use_tqdm=False)
        assert llm.host.is_warm is False


def test_a_decoder_has_no_cls_token() -> None:
    with pytest.raises(ConfigError, match="pooling 'cls', expected last or mean for a decoder"):
        make("cls")
