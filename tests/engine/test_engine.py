"""The engine's promises: what ends a request, what frees its memory, what outlives a failure."""

import asyncio
import contextlib
import gc
import random
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.core.errors import CapacityError, ConfigError, EngineDeadError, RequestError
from jaxserve.core.event import FinishReason, SloOutcome
from jaxserve.core.request import SamplingParams, Slo
from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.engine.compiling import LateCompileError
from jaxserve.engine.llm import LLM
from jaxserve.engine.shapes import PackedStep, StepShape
from jaxserve.scheduling.fcfs import FcfsScheduler
from tests.cases import slow
from tests.tiny import Bench, pointers, tiny_module, write_tiny_model

SMALL = {
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 8,
    "num_gpu_blocks_override": 256,
}
PROMPT = [*range(40, 71)]
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def bench(module):
    made = Bench(module)
    yield made
    made.run()
    made.assert_idle()


@pytest.fixture(scope="module")
def talking(folder):
    """A bench with a tokenizer."""
    return Bench(folder)


@pytest.fixture(scope="module")
def llm(module):
    with LLM(module, **SMALL) as made:
        yield made


# Taking back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_cancelling_frees_pages_and_row_within_a_step(module, overlap, steps):
    bench = Bench(module, async_scheduling=overlap)
    name = bench.submit(PROMPT, LONG)
    for _ in range(steps):
        bench.engine.step()
    assert bench.engine.pool.num_held > 0
    bench.engine.cancel(name)
    bench.engine.step()
    bench.assert_idle()
    bench.run()
    last = bench.events[name][-1]
    assert last.finish_reason is FinishReason.ABORT
    assert [e for e in bench.events[name] if e.finish_reason is not None] == [last]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "end",
    [{"max_tokens": 4}, {"stop_token_ids": [7], "logit_bias": {7: 100.0}, "min_tokens": 3}],
    ids=["foreseen", "surprising"],
)
def test_gauges_fall_to_zero_with_the_last_completion(module, overlap, end):
    bench = Bench(module, async_scheduling=overlap)
    bench.submit(PROMPT, SamplingParams(ignore_eos=True, **end))
    bench.engine.step()
    assert bench.metrics.num_running == 1
    assert bench.metrics.kv_usage > 0
    bench.run()
    assert bench.metrics.num_running == 0
    assert bench.metrics.kv_usage == 0


def test_cancelling_a_request_that_waits_ends_it(bench):
    names = [bench.submit(PROMPT, LONG) for _ in range(6)]
    for _ in range(3):
        bench.engine.step()
    bench.engine.cancel(names[5])
    bench.engine.step()
    (event,) = bench.events[names[5]]
    assert event.finish_reason is FinishReason.ABORT
    assert event.token_ids == ()
    bench.engine.cancel("never heard of")
    bench.engine.cancel_all()


def test_cancelling_before_the_first_step_ends_it(bench):
    name = bench.submit(PROMPT, SamplingParams(max_tokens=400, n=3))
    bench.engine.cancel(name)
    bench.engine.step()
    assert {e.index for e in bench.events[name]} == {0, 1, 2}
    bench.assert_idle()


# Service-level objectives ------------------------------------------------------------------------


EASY = {"ttft_ms": 1e6, "tpot_ms": 1e5, "e2e_ms": 1e7, "tier": "easy"}


def test_objectives_are_judged_per_completion_and_counted_per_request(llm):
    sampling = SamplingParams(max_tokens=5, temperature=1, n=3, seed=1, ignore_eos=True)
    hard = Slo(ttft_ms=1e-6, tpot_ms=1e-6, tier="hard")
    easy, missed, free = llm.generate([PROMPT] * 3, sampling, slo=[EASY, hard, None])
    assert easy.slo == easy.metrics.slo
    assert easy.slo == SloOutcome(ttft=True, tpot=True, tpot_gap=True, tpot_mean=True, e2e=True)
    assert easy.slo.attained
    assert missed.slo.readings() == dict.fromkeys(("ttft", "tpot", "tpot_gap", "tpot_mean"), False)
    assert free.slo is None
    assert free.metrics.slo is None
    metrics = llm.metrics
    assert (metrics.slo_attained["easy", "request"], metrics.slo_missed["easy", "request"]) == (
        1,
        0,
    )
    assert (metrics.slo_attained["hard", "ttft"], metrics.slo_missed["hard", "ttft"]) == (0, 1)


def test_one_objective_may_be_shared_and_streamed(llm):
    sampling = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    outputs = llm.generate([PROMPT, PROMPT], sampling, slo={"e2e_ms": 1e7, "tier": "shared"})
    assert [output.slo for output in outputs] == [SloOutcome(e2e=True)] * 2
    *_, last = llm.stream(PROMPT, sampling, slo=Slo(ttft_ms=1e6, tier="shared"))
    assert last.metrics.slo == SloOutcome(ttft=True)
    assert llm.metrics.slo_attained["shared", "request"] == 3


def test_bad_objectives_are_refused_before_anything_runs(llm):
    before = llm.metrics.num_steps
    with pytest.raises(RequestError, match=r"slo.e2e_ms must be at least slo.ttft_ms=9, got 8"):
        llm.generate([PROMPT, PROMPT], slo=[None, {"ttft_ms": 9, "e2e_ms": 8}])
    with pytest.raises(RequestError, match="2 prompts need 2 slo, got 1"):
        llm.generate([PROMPT, PROMPT], slo=[EASY])
    with pytest.raises(RequestError, match=r"slo must be an Slo or a mapping .* got int"):
        llm.generate(PROMPT, slo=5)
    assert llm.metrics.num_steps == before


def test_aborted_and_refused_requests_have_missed_what_was_open(module):
    bench = Bench(module, max_num_queued_reqs=1)
    name = bench.submit(PROMPT, LONG, slo=Slo(ttft_ms=1e15, e2e_ms=1e15, tier="a"))
    with pytest.raises(CapacityError):
        bench.submit(PROMPT, LONG, slo=Slo(ttft_ms=1e15, tier="b"))
    for _ in range(5):
        bench.engine.step()
    assert bench.events[name][0].token_ids
    bench.engine.cancel(name)
    bench.run()
    assert bench.outputs[name].slo == SloOutcome(ttft=True, e2e=False)
    assert bench.metrics.slo_missed["a", "request"] == 1
    assert bench.metrics.slo_attained["a", "ttft"] == 1
    assert bench.metrics.slo_missed["b", "request"] == 1
    bench.assert_idle()


def test_policies_see_objectives_and_no_policy_of_today_minds_them(module):
    seen = []

    class Watching(FcfsScheduler):
        def plan(self, view):
            seen.extend((*view.running, *view.waiting))
            return super().plan(view)

    slo = Slo(tpot_ms=5, tier="watched", on_decline="reject")
    sampling = SamplingParams(max_tokens=6, temperature=0)
    bench = Bench(module, scheduler=Watching())
    name = bench.submit(PROMPT, sampling, slo=slo)
    bench.submit([*range(30)], sampling)
    bench.run()
    assert {view.slo for view in seen if view.seq_id == 1} == {slo}
    assert {view.slo for view in seen if view.seq_id == 2} == {None}
    assert any(view.first_token_time is not None for view in seen)
    expected = Bench(module).complete(PROMPT, max_tokens=6, temperature=0)
    assert bench.outputs[name].outputs[0].token_ids == expected.outputs[0].token_ids


# Refusing --------------------------------------------------------------------------------------


def test_a_second_request_of_the_same_id_fails_and_the_first_goes_on(bench):
    bench.submit(PROMPT, SamplingParams(max_tokens=3, temperature=0), request_id="twin")
    first = bench.events["twin"]
    bench.engine.step()
    bench.submit(PROMPT, SamplingParams(max_tokens=3, n=2), request_id="twin")
    bench.run()
    assert bench.errors("twin") == ["request id 'twin' is already in use."] * 2
    assert first[-1].finish_reason is FinishReason.LENGTH
    assert sum(len(e.token_ids) for e in first) == 3
    bench.submit(PROMPT, SamplingParams(max_tokens=1), request_id="twin")
    bench.run()
    assert not bench.errors("twin")


def test_a_full_queue_refuses_and_says_when_to_come_back(module):
    bench = Bench(module, max_num_queued_reqs=3)
    bench.submit(PROMPT, SamplingParams(max_tokens=2, n=2))
    with pytest.raises(CapacityError, match="2 completions are under way and at most 3") as caught:
        bench.submit(PROMPT, SamplingParams(n=2))
    assert caught.value.retry_after_s >= 1
    bench.submit(PROMPT, SamplingParams(max_tokens=2))
    bench.run()
    bench.assert_idle()
    bench.submit(PROMPT, SamplingParams(max_tokens=2, n=3))
    bench.run()


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 512, {}, "maximum context length is 512 tokens, but the prompt has 512"),
        ([1, 300], {}, r"token ids must be in \[0, 300\), got 300"),
        ([1, -1], {}, r"token ids must be in \[0, 300\), got -1"),
        ([1], {"stop_token_ids": [300]}, r"stop_token_ids must hold ids in \[0, 300\), got 300"),
        ([1], {"logit_bias": {-1: 1.0}}, r"logit_bias must hold ids in \[0, 300\), got -1"),
        ([1], {"allowed_token_ids": [5, 999]}, "allowed_token_ids must hold ids in"),
        ([1], {"logprobs": 21}, "logprobs must be at most 20, got 21"),
        ([1], {"prompt_logprobs": -1}, "prompt_logprobs must be at most 20, got -1"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer"),
        (
            [1],
            {"min_tokens": 1, "allowed_token_ids": [5, 299], "stop_token_ids": [5]},
            "allowed_token_ids holds stop tokens only, which min_tokens=1 forbids",
        ),
        ([1], {"min_tokens": 1, "stop_token_ids": range(40)}, "at most 32 stop tokens, got 41"),
    ],
)
def test_impossible_requests_are_refused_at_once(bench, prompt, settings, message):
    with pytest.raises(RequestError, match=message):
        bench.submit(prompt, SamplingParams(**settings))
    assert bench.engine.num_unfinished == 0


def test_the_longest_prompt_still_gives_a_token(bench):
    output = bench.complete([5] * 511, max_tokens=100, temperature=0)
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


def test_few_pages_bound_the_length_too(module):
    bench = Bench(module, num_gpu_blocks_override=4, block_size=8)
    with pytest.raises(RequestError, match="maximum context length is 32 tokens"):
        bench.submit([1] * 32)
    output = bench.complete([1] * 20, max_tokens=100, ignore_eos=True)
    assert len(output.outputs[0].token_ids) == 12
    bench.assert_idle()


def test_more_candidates_than_the_vocabulary_holds_are_simply_all(module):
    bench = Bench(module, max_logprobs=1000)
    output = bench.complete(PROMPT, max_tokens=2, logprobs=900, prompt_logprobs=900)
    assert [len(entry) for entry in output.outputs[0].logprobs] == [300, 300]
    assert len(output.prompt_logprobs[1]) == 300
    mass = sum(np.exp(lp.logprob) for lp in output.outputs[0].logprobs[0].values())
    assert mass == pytest.approx(1, abs=1e-4)


# Ending ----------------------------------------------------------------------------------------


def greedy(bench, **settings):
    settings = {"temperature": 0, "max_tokens": 24, "ignore_eos": True} | settings
    return bench.complete(PROMPT, **settings).outputs[0]


def test_a_stop_token_ends_the_completion_and_names_itself(bench):
    ids = greedy(bench).token_ids
    end = next(i for i in range(5, 24) if ids[i] not in ids[:i])
    one = greedy(bench, stop_token_ids=[ids[end]])
    assert one.token_ids == ids[: end + 1]
    assert (one.finish_reason, one.stop_reason) == ("stop", ids[end])


def test_the_end_of_sequence_token_ends_it_unless_ignored(module, bench):
    ids = greedy(bench).token_ids
    end = next(i for i in range(5, 24) if ids[i] not in ids[:i])
    ending = Bench(tiny_module(eos_token_id=ids[end]))
    one = greedy(ending, ignore_eos=False)
    assert one.token_ids == ids[: end + 1]
    assert (one.finish_reason, one.stop_reason) == ("stop", None)
    assert greedy(ending).token_ids == ids
    ending.assert_idle()


def test_no_stop_token_comes_before_min_tokens(bench):
    ids = greedy(bench).token_ids
    one = greedy(bench, stop_token_ids=[ids[0], ids[4]], min_tokens=10)
    assert not {ids[0], ids[4]} & set(one.token_ids[:10])
    assert len(one.token_ids) > 10 or one.finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_completion_and_cuts_the_text(talking, include):
    text = greedy(talking, skip_special_tokens=False).text
    start = next(i for i in range(4, len(text) - 2) if text[i : i + 3] not in text[: i + 2])
    stop = text[start : start + 3]
    one = greedy(
        talking, stop=["never comes", stop], include_stop_str_in_output=include,
        skip_special_tokens=False,
    )  # fmt: skip
    assert one.text == text[: start + 3 * include]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    talking.assert_idle()


def test_text_is_what_the_tokens_say(talking):
    tokenizer = talking.engine._tokenizer
    one = talking.complete(PROMPT, max_tokens=60, temperature=0, ignore_eos=True).outputs[0]
    assert one.text == tokenizer.decode(one.token_ids)
    silent = talking.complete(PROMPT, max_tokens=5, detokenize=False, temperature=0).outputs[0]
    assert silent.text == ""
    assert silent.token_ids == one.token_ids[:5]


def test_siblings_share_their_prompt_and_differ(bench):
    output = bench.complete(PROMPT, n=4, seed=1, max_tokens=8, ignore_eos=True)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 4
    assert output.num_cached_tokens == (len(PROMPT) - 1) // 8 * 8


def test_only_requests_of_one_salt_share_a_prefix(bench):
    base = "s" * 100
    for salt, cached in ((base, 0), (base + "a", 0), (base, 24), ("", 0), (base + "a", 24)):
        name = bench.submit(PROMPT, SamplingParams(max_tokens=1), cache_salt=salt)
        bench.run()
        assert bench.outputs[name].num_cached_tokens == cached


# Scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [16, 64])
def test_prompt_logprobs_are_what_the_pure_function_gives(module, llm, chunk):
    bench = Bench(module, max_num_batched_tokens=chunk)
    prompt = np.random.default_rng(1).integers(0, 300, 77).tolist()
    bench.submit(prompt[:9], LONG)  # a neighbour, so that chunks begin anywhere
    for _ in range(4):
        bench.engine.step()
    name = bench.submit(prompt, SamplingParams(prompt_logprobs=2, max_tokens=3, n=2, seed=1))
    bench.run()
    scores = bench.outputs[name].prompt_logprobs
    assert scores[0] is None
    got = [entry[token].logprob for entry, token in zip(scores[1:], prompt[1:], strict=True)]
    wanted = llm.logprobs(llm.params, jnp.asarray([prompt]))
    np.testing.assert_allclose(got, wanted[0, 1:], atol=1e-4)
    logits = np.asarray(llm.forward(jnp.asarray([prompt])).logits[0])
    for position, entry in enumerate(scores[1:]):
        top = np.argsort(-logits[position], kind="stable")[:2].tolist()
        assert list(entry)[-2:] == top or set(entry) == set(top)
        rank = 1 + int((logits[position] > logits[position, prompt[position + 1]]).sum())
        assert entry[prompt[position + 1]].rank == rank
    assert sum(e.prompt_logprobs is not None for e in bench.events[name]) == 1


def test_logprobs_can_be_compiled_and_differentiated(llm):
    tokens = jnp.asarray([PROMPT, [*PROMPT[:20], *[0] * 11]])
    mask = jnp.arange(31)[None] < jnp.asarray([31, 20])[:, None]
    plain = llm.logprobs(llm.params, tokens, mask)
    compiled = jax.jit(llm.logprobs)(llm.params, tokens, mask)
    np.testing.assert_allclose(plain, compiled, atol=1e-5)
    assert not plain[1, 20:].any()

    def loss(params):
        return -llm.logprobs(params, tokens, mask).mean()

    grads = jax.jit(jax.grad(loss))(llm.params)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    nudge = 1e-3
    moved = jax.tree.map(lambda p, g: p - nudge * g, llm.params, grads)
    slope = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(grads))
    assert loss(llm.params) - loss(moved) == pytest.approx(nudge * slope, rel=0.1)


def test_forward_shows_and_replaces_inner_states(llm):
    tokens = jnp.asarray([PROMPT])
    plain = llm.forward(tokens, return_hidden=(0, 1, "layers.1", -1))
    assert set(plain.hidden) == {0, 1, "layers.1", -1}
    assert plain.logits.shape == (1, len(PROMPT), 300)
    again = llm.forward(
        tokens, hooks={"layers.0": lambda _x: plain.hidden[1]}, return_hidden=("layers.0",)
    )
    np.testing.assert_array_equal(again.logits, plain.logits)
    np.testing.assert_array_equal(again.hidden["layers.0"], plain.hidden[1])
    silenced = llm.forward(tokens, hooks={"norm": jnp.zeros_like})
    assert not silenced.logits.any()
    assert not jnp.allclose(
        llm.forward(tokens, hooks={"embed_tokens": lambda x: 2 * x}).logits, plain.logits
    )
    with pytest.raises(RequestError, match=r"unknown state 'layer.0'.*Did you mean"):
        llm.forward(tokens, return_hidden=("layer.0",))
    with pytest.raises(RequestError, match="unknown state 4"):
        llm.forward(tokens, return_hidden=(4,))


# Live parameters -------------------------------------------------------------------------------


def test_a_live_module_is_served_where_it_lies(module):
    state = nnx.state(module)
    bench = Bench(module)
    assert sorted(pointers(bench.engine.runner.params)) == sorted(pointers(state))
    bench.complete(PROMPT, max_tokens=2)
    assert sorted(pointers(nnx.state(module))) == sorted(pointers(state))


@pytest.mark.parametrize("form", ["state", "nested", "flat"])
def test_live_parameters_are_served_where_they_lie(module, form):
    state = nnx.state(module)
    pure = nnx.to_pure_dict(state)
    flat = {".".join(map(str, k)): v.get_value() for k, v in nnx.to_flat_state(state)}
    params = {"state": state, "nested": pure, "flat": flat}[form]
    bench = Bench((module.config, params))
    assert sorted(pointers(bench.engine.runner.params)) == sorted(pointers(state))
    assert greedy(bench).token_ids == greedy(Bench(module)).token_ids


def test_parameters_that_do_not_fit_are_named(module):
    flat = {".".join(map(str, k)): v.get_value() for k, v in nnx.to_flat_state(nnx.state(module))}
    with pytest.raises(ConfigError, match=r"missing \['norm.scale'\]"):
        Bench((module.config, {k: v for k, v in flat.items() if k != "norm.scale"}))
    with pytest.raises(ConfigError, match=r"norm.scale has shape \(7,\), expected \(32,\)"):
        Bench((module.config, flat | {"norm.scale": jnp.ones(7)}))


def test_an_engine_that_nobody_has_any_more_gives_its_memory_back(module):
    llm = LLM(module, **SMALL)
    llm.generate([PROMPT], SamplingParams(max_tokens=4), use_tqdm=False)
    thread = llm.host.thread._thread
    buffer = jax.tree.leaves(llm.host.engine.runner.slots or llm.host.engine.runner.pages)[0]
    del llm
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    deadline = time.monotonic() + 30
    while not buffer.is_deleted():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_closing_leaves_live_parameters_alone(module):
    llm = LLM(module, **SMALL)
    llm.generate(PROMPT, SamplingParams(max_tokens=2), use_tqdm=False)
    llm.close()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(module)))
    with pytest.raises(EngineDeadError):
        llm.generate(PROMPT, use_tqdm=False)


# Failing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "layout"),
    [(True, "slots"), slow(True, "pages"), slow(False, "slots"), (False, "pages")],
)
def test_a_failing_step_ends_what_is_under_way_and_nothing_else(module, layout, overlap):
    bench = Bench(module, kv_layout=layout, async_scheduling=overlap)
    wanted = greedy(bench).token_ids
    names = [bench.submit(PROMPT, LONG) for _ in range(6)]
    for _ in range(5):
        bench.engine.step()
    for leaf in jax.tree.leaves((bench.engine.runner.slots, bench.engine.runner.pages)):
        leaf.delete()
    late = bench.submit(PROMPT, SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    bench.run()
    failed = [name for name in names if bench.errors(name)]
    assert failed == names
    assert "deleted" in bench.errors(names[0])[0]
    assert not bench.outputs[late].outputs[0].token_ids or not bench.errors(late)
    bench.assert_idle()
    assert bench.engine.dead is None
    assert greedy(bench).token_ids == wanted
    bench.assert_idle()


class _Stubborn(FcfsScheduler):
    """Fails as often as it is told to; may be asked to do something first."""

    def __init__(self):
        super().__init__()
        self.num_failures = 0
        self.before_failure = lambda: None

    def plan(self, view):
        if self.num_failures and (view.waiting or view.running):
            self.num_failures -= 1
            self.before_failure()
            raise RuntimeError("no plan today")
        return super().plan(view)


def test_an_engine_that_fails_again_and_again_stops_and_leaves_nobody_waiting(module):
    scheduler = _Stubborn()
    bench = Bench(module, scheduler=scheduler)
    scheduler.num_failures = 3
    late = []
    for attempt in range(3):
        name = bench.submit(PROMPT, LONG)
        if attempt == 2:  # one that arrives in the very moment in which the engine stops
            scheduler.before_failure = lambda: late.append(bench.submit(PROMPT, LONG))
        bench.engine.step()
        assert bench.errors(name) == ["RuntimeError: no plan today"]
    assert "3 steps in a row failed" in bench.engine.dead
    assert len(bench.errors(late[0])) == 1
    with pytest.raises(EngineDeadError, match="3 steps in a row failed"):
        bench.submit(PROMPT)
    assert bench.engine.num_unfinished == 0


def test_a_loop_that_ends_leaves_nobody_waiting(module, monkeypatch):
    with LLM(module, **SMALL) as llm:

        def end() -> None:
            raise SystemExit("out of the blue")

        monkeypatch.setattr(llm.host.engine, "step", end)
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="loop has ended: SystemExit: out of the bl"):
                llm.generate([PROMPT], SamplingParams(max_tokens=2), use_tqdm=False)
        assert llm.host.engine.num_unfinished == 0


def test_failures_with_success_between_them_do_not_stop_the_engine(module):
    scheduler = _Stubborn()
    bench = Bench(module, scheduler=scheduler)
    for _ in range(5):
        scheduler.num_failures = 1
        bench.submit(PROMPT, LONG)
        bench.engine.step()
        assert len(greedy(bench).token_ids) == 24
    assert bench.engine.dead is None


def test_a_receiver_that_fails_harms_nobody_else(bench):
    bad = bench.submit(PROMPT, SamplingParams(max_tokens=4), request_id="bad")
    bench.outputs[bad].outputs.clear()  # its sink raises IndexError from now on
    good = bench.submit(PROMPT, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    bench.run()
    assert len(bench.outputs[good].outputs[0].token_ids) == 4


# Faces -----------------------------------------------------------------------------------------


def wait_until(condition):
    for _ in range(20_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not happen in time")


def assert_idle(host):
    wait_until(lambda: not host.engine.has_work)
    assert host.engine.pool.num_free == host.engine.pool.num_pages
    assert host.engine.num_unfinished == 0


def test_an_interrupt_from_the_keyboard_leaves_a_usable_engine(llm, monkeypatch):
    start = llm.metrics.generation_tokens
    main = threading.main_thread().ident
    step = llm.host.engine.step
    monkeypatch.setattr(llm.host.engine, "step", lambda: (time.sleep(0.01), step()))

    def press():
        wait_until(lambda: llm.metrics.generation_tokens > start + 3)
        signal.pthread_kill(main, signal.SIGINT)

    # Whoever was started in the background of a script ignores the keyboard.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT] * 8, LONG, use_tqdm=False)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert_idle(llm.host)
    assert llm.metrics.generation_tokens < start + 8 * 400
    (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3


def test_prompts_come_back_in_their_order(llm):
    prompts = [[5, i, 9] for i in range(20)]
    params = [SamplingParams(max_tokens=1 + i % 5, ignore_eos=True) for i in range(20)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1 + i % 5 for i in range(20)]
    assert llm.generate([], use_tqdm=False) == []
    with pytest.raises(RequestError, match="20 prompts need 20 sampling_params, got 19"):
        llm.generate(prompts, params[1:], use_tqdm=False)


def test_one_bad_prompt_stops_the_whole_call_and_frees_everything(llm):
    with pytest.raises(RequestError, match="token ids must be in"):
        llm.generate([PROMPT, [999]], LONG, use_tqdm=False)
    assert_idle(llm.host)


def test_leaving_a_stream_early_ends_the_request(llm):
    start = llm.metrics.generation_tokens
    for event in llm.stream(PROMPT, LONG):
        assert event.token_ids
        break
    gc.collect()
    assert_idle(llm.host)
    assert llm.metrics.generation_tokens < start + 400
    events = list(llm.stream(PROMPT, SamplingParams(max_tokens=5, n=2, seed=1, ignore_eos=True)))
    assert sum(len(e.token_ids) for e in events) == 10


def test_the_library_works_inside_a_running_event_loop(llm):
    async def notebook():
        return llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)

    assert len(asyncio.run(notebook())[0].outputs[0].token_ids) == 3


@pytest.fixture(scope="module")
def async_llm(module):
    made = AsyncLLM(module, warmup="lazy", **SMALL)
    yield made
    made.close()


def test_asynchronous_generation_grows_and_ends(async_llm):
    async def run(index):
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, n=1)
        lengths = []
        async for output in async_llm.generate([7, index], params):
            lengths.append(len(output.outputs[0].token_ids))
        assert output.finished
        assert lengths == sorted(lengths)
        return lengths[-1]

    async def all_of_them():
        return await asyncio.gather(*(run(i) for i in range(10)))

    assert asyncio.run(all_of_them()) == [6] * 10
    assert asyncio.run(all_of_them()) == [6] * 10  # another loop
    assert_idle(async_llm.host)


@pytest.mark.parametrize("face", ["generate", "events"])
def test_closing_an_asynchronous_generator_ends_the_request_at_once(async_llm, face):
    async def run():
        if face == "generate":
            stream = async_llm.generate(PROMPT, LONG)
        else:
            stream = async_llm.events(async_llm.make_request(PROMPT, LONG))
        start = async_llm.metrics.generation_tokens
        await anext(stream)
        await stream.aclose()
        # The loop does not run while this waits: nothing is left for it to do.
        assert_idle(async_llm.host)
        assert async_llm.metrics.generation_tokens < start + 400

    asyncio.run(run())


def test_asynchronous_requests_can_be_aborted_by_id(async_llm):
    async def run():
        results = []
        async for output in async_llm.generate(PROMPT, LONG, "mine"):
            results.append(output)
            if len(results) == 1:
                await async_llm.abort(["mine", "other"])
        assert results[-1].outputs[0].finish_reason == "abort"
        assert await async_llm.drain(10)

    asyncio.run(run())
    assert_idle(async_llm.host)


def test_asynchronous_refusals_come_before_the_first_event(async_llm):
    async def run():
        with pytest.raises(RequestError, match="empty"):
            await anext(async_llm.generate([]))

    asyncio.run(run())
    async_llm.check_health()


def test_closing_ends_what_is_under_way(module):
    made = AsyncLLM(module, warmup="lazy", **SMALL)

    async def run():
        reasons = []

        async def one():
            async for output in made.generate(PROMPT, LONG):
                last = output
            reasons.append(last.outputs[0].finish_reason)

        tasks = [asyncio.create_task(one()) for _ in range(6)]
        await asyncio.to_thread(wait_until, lambda: made.metrics.generation_tokens > 0)
        await asyncio.to_thread(made.close)
        with contextlib.suppress(EngineDeadError):
            await asyncio.gather(*tasks)
        with pytest.raises(EngineDeadError):
            await anext(made.generate(PROMPT))
        return reasons

    assert set(asyncio.run(run())) <= {"abort"}


# Compiling -------------------------------------------------------------------------------------


def _mixture(seed):
    draw = random.Random(seed)
    for _ in range(30):
        low = draw.randrange(200)
        prompt = [low + i for i in range(draw.choice([1, 7, 8, 9, 31, 32, 33, 60]))]
        greedy_one = draw.random() < 0.4
        settings = {
            "max_tokens": draw.randint(1, 40),
            "temperature": 0 if greedy_one else 0.9,
            "n": 1 if greedy_one else draw.choice([1, 1, 3]),
            "logprobs": draw.choice([None, 0, 3]),
            "prompt_logprobs": draw.choice([None, None, 1]),
            "top_k": draw.choice([0, 5]),
            "top_p": draw.choice([1.0, 0.8]),
            "repetition_penalty": draw.choice([1.0, 1.2]),
            "logit_bias": draw.choice([None, {3: 5.0}]),
            "min_tokens": draw.choice([0, 1]),
            "seed": draw.choice([None, 7]),
        }
        yield prompt, SamplingParams(**settings), draw.randrange(4), draw.random() < 0.2


@pytest.mark.parametrize("layout", ["slots", slow("pages")])
def test_nothing_is_compiled_after_warm_up_and_nothing_is_emitted_twice(module, layout):
    bench = Bench(
        module, kv_layout=layout, max_num_seqs=3, max_num_batched_tokens=32,
        num_gpu_blocks_override=14, enforce_no_recompile=True,
    )  # fmt: skip
    bench.engine.runner.warm_up()
    assert bench.engine.runner.programs.is_sealed
    bench.complete(PROMPT)
    before = bench.metrics.num_compilations
    compiled = []
    listening = True

    def listen(name, _seconds, **_facts):
        if listening and name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    asked = {}
    for prompt, params, pause, is_cancelled in _mixture(5):
        name = bench.submit(prompt, params)
        asked[name] = params
        for _ in range(pause):
            bench.engine.step()
        if is_cancelled:
            bench.engine.cancel(name)
    bench.run()
    listening = False
    assert not compiled
    assert bench.metrics.num_compilations == before
    assert bench.metrics.num_preemptions > 0
    for name, params in asked.items():
        for index in range(params.n):
            events = [e for e in bench.events[name] if e.index == index]
            assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [
                True
            ], "an event came after the last one"
            assert events[-1].finish_reason is not FinishReason.ERROR, events[-1].error
            tokens = [t for e in events for t in e.token_ids]
            assert len(tokens) <= params.max_tokens
            if events[-1].finish_reason is FinishReason.LENGTH:
                assert len(tokens) == params.max_tokens
            if params.logprobs is not None:
                assert sum(len(e.logprobs or ()) for e in events) == len(tokens)
    bench.assert_idle()


def test_a_late_compilation_can_be_forbidden(module):
    bench = Bench(module, enforce_no_recompile=True, max_num_seqs=1, max_num_batched_tokens=32)
    runner = bench.engine.runner
    runner.warm_up()
    known = runner.spec.shapes.shape(rows=1, prefill=0)
    odd = StepShape(rows=1, prefill=3, q_block=3, pages_per_row=known.pages_per_row)
    with pytest.raises(LateCompileError, match=r"prefill=3.*after warm-up"):
        runner.run(PackedStep(odd))


def test_serving_goes_on_while_shapes_are_compiled_in_the_background(module):
    with LLM(module, warmup="background", **SMALL) as llm:
        outputs = llm.generate([PROMPT] * 6, SamplingParams(max_tokens=8, ignore_eos=True))
        assert all(len(o.outputs[0].token_ids) == 8 for o in outputs)
        wait_until(lambda: llm.host.is_warm)
        known = len(llm.host.engine.runner._all_programs())
        assert len(llm.host.engine.runner.programs) == known


# Many devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["slots", slow("pages")])
def test_two_devices_give_what_one_gives(folder, layout):
    params = SamplingParams(
        max_tokens=5, seed=4, logprobs=2, prompt_logprobs=1, ignore_eos=True, top_p=0.9,
        repetition_penalty=1.1,
    )  # fmt: skip
    results = []
    for size in (1, 2):
        bench = Bench(folder, tensor_parallel_size=size, kv_layout=layout)
        outputs = []
        for _ in range(2):  # the second time from the prefix cache
            outputs += bench.generate([PROMPT, PROMPT[:9]], [params, params.replace(n=2)])
        results.append(outputs)
        bench.assert_idle()
        used = {d for leaf in jax.tree.leaves(bench.engine.runner.params) for d in leaf.devices()}
        assert len(used) == size
    for one, two in zip(*results, strict=True):
        for left, right in zip(one.outputs, two.outputs, strict=True):
            assert left.token_ids == right.token_ids
            assert left.text == right.text
            scores = [
                [lp.logprob for entry in side.logprobs for lp in entry.values()]
                for side in (left, right)
            ]
            np.testing.assert_allclose(*scores, atol=1e-4)
        scores = [
            [lp.logprob for entry in side.prompt_logprobs[1:] for lp in entry.values()]
            for side in (one, two)
        ]
        np.testing.assert_allclose(*scores, atol=1e-4)
