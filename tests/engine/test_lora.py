"""Many adapters in one engine: slots, prefixes, preemption, live weights, sleep, bad input."""

import dataclasses
import logging

import numpy as np
import pytest
from flax import nnx

from jaxserve import LLM, ConfigError, LoRARequest, RequestError, SamplingParams, dequantize
from jaxserve.engine.adapters import AdapterStore, make_reader
from jaxserve.engine.lifecycle import Lifecycle
from jaxserve.engine.weights import prepare_weights
from jaxserve.models.quantization import quantized_model
from tests.adapters import adapter_of, lora, merged, write_adapter
from tests.bert import BERT
from tests.cases import slow
from tests.tiny import Bench, tiny_module

PROMPT = np.random.default_rng(3).integers(0, 299, 40).tolist()
COUNT = 12
GREEDY = SamplingParams(
    temperature=0.0, max_tokens=COUNT, ignore_eos=True, detokenize=False, logprobs=0
)


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module")
def requests(module):
    return {name: lora(module.config, name, i + 1) for i, name in enumerate("abc")}


class LoraBench(Bench):
    def __init__(self, source, requests=(), *, store=None, **settings):
        super().__init__(
            source, **({"enable_lora": True, "max_loras": 2, "max_lora_rank": 8} | settings)
        )
        self.store = AdapterStore(make_reader(self.engine.runner, "tiny"), max_cpu_loras=store or 8)
        self.requests = dict(requests)

    def ask(self, name, prompt=PROMPT, sampling=GREEDY, **fields):
        """Submit a prompt with an adapter by name; "" has none."""
        adapter = self.store.get(self.requests[name]) if name else None
        return self.submit(prompt, sampling, adapter=adapter, **fields)

    def say(self, name, **fields):
        asked = self.ask(name, **fields)
        self.run()
        return self.exact(asked)

    def exact(self, asked):
        one = self.outputs[asked].outputs[0]
        return one.token_ids, [
            entry[t].logprob for entry, t in zip(one.logprobs, one.token_ids, strict=True)
        ]


@pytest.fixture(scope="module")
def expected(module, requests):
    """What models with the adapters merged into their weights say."""
    found = {}
    for name in ("", *requests):
        bench = Bench(merged(module, requests[name]) if name else module)
        asked = bench.submit(PROMPT, GREEDY)
        bench.run()
        found[name] = LoraBench.exact(bench, asked)
    assert len({tuple(tokens) for tokens, _ in found.values()}) == 4
    return found


def assert_same(found, expected):
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)


@pytest.mark.parametrize(
    ("overlap", "layout"),
    [slow(True, "slots"), (True, "pages"), slow(False, "slots"), slow(False, "pages")],
)
def test_three_adapters_and_none_take_turns_on_one_slot(
    module, requests, expected, layout, overlap
):
    """With too few pages besides, so that sequences lose and regain pages and slots."""
    bench = LoraBench(
        module, requests, max_loras=1, kv_layout=layout, async_scheduling=overlap,
        block_size=4, num_gpu_blocks_override=22, lora_drain_wait_threshold=0.0,
    )  # fmt: skip
    names = ["", "a", "b", "c", "a", "", "b", "c"]
    asked = [bench.ask(name) for name in names]
    held, preempted = set(), set()
    while bench.engine.has_work:
        bench.engine.step()
        used = {s.adapter_key for s in bench.engine.placement.running} - {""}
        assert len(used) <= 1
        held |= used
        preempted |= {s.adapter_key for s in bench.engine._waiting.values() if s.num_preemptions}
    assert len(held) == 3
    assert preempted & held, "no sequence with an adapter was preempted"
    for name, one in zip(names, asked, strict=True):
        assert_same(bench.exact(one), expected[name])
    assert bench.engine.adapters.held == frozenset()
    bench.assert_idle()


def test_adapters_side_by_side_agree_with_merged_weights_and_compile_nothing(
    module, requests, expected
):
    bench = LoraBench(module, requests, max_loras=3, max_num_batched_tokens=32)
    bench.engine.runner.warm_up()
    compiled = bench.metrics.num_compilations
    asked = {name: bench.ask(name) for name in ("", "a", "b", "c")}
    bench.run()
    for name, one in asked.items():
        assert_same(bench.exact(one), expected[name])
    assert bench.metrics.num_compilations == compiled


def test_batch_invariant_results_are_equal_bit_by_bit_whatever_the_slot(module, requests):
    settings = {"batch_invariant": True, "max_loras": 3}
    alone = {}
    for name in ("", *requests):
        alone[name] = LoraBench(module, requests, **settings).say(name)
    bench = LoraBench(module, requests, **settings)
    names = ["c", "a", "", "b"]  # other slots than alone
    asked = [bench.ask(name) for name in names]
    bench.run()
    assert {n: bench.exact(one) for n, one in zip(names, asked, strict=True)} == alone


@pytest.mark.parametrize("scheme", [slow("int8"), "fp8"])
def test_adapters_over_narrow_weights_agree_with_what_these_stand_for(module, requests, scheme):
    """The base is quantised, the adapter is not: nothing of it is rounded with the weights."""
    bench = LoraBench(module, requests, max_loras=3, quantization=scheme)
    graph, _ = quantized_model(bench.graph, bench.params, None)
    base = nnx.merge(graph, dequantize(bench.params))
    asked = {name: bench.ask(name) for name in ("", "a", "b", "c")}
    bench.run()
    for name, one in asked.items():
        plain = Bench(merged(base, requests[name]) if name else base)
        other = plain.submit(PROMPT, GREEDY)
        plain.run()
        assert_same(bench.exact(one), LoraBench.exact(plain, other))


def test_requests_without_adapter_are_as_exact_as_in_an_engine_without(module):
    plain = Bench(module)
    asked = plain.submit(PROMPT, GREEDY)
    plain.run()
    assert LoraBench(module).say("") == LoraBench.exact(plain, asked)


def test_without_adapters_the_steps_are_those_of_an_engine_that_knows_none(module):
    runner = Bench(module).engine.runner
    assert runner.spec.lora is None
    shape = runner.spec.shapes.all_shapes()[0]
    assert "lora_slot" not in shape.fields()
    with pytest.raises(RequestError, match="enable_lora=True"):
        AdapterStore(make_reader(runner, "tiny"), max_cpu_loras=1).get(
            LoRARequest("a", 1, "nowhere")
        )


@pytest.mark.parametrize("layout", ["slots", slow("pages")])
def test_adapters_never_share_a_prefix(module, requests, expected, layout):
    bench = LoraBench(module, requests, kv_layout=layout)
    for name in ("", "a", "b"):
        asked = bench.ask(name)
        bench.run()
        assert bench.outputs[asked].num_cached_tokens == 0
    for name in ("b", "", "a"):  # their own they find again
        asked = bench.ask(name)
        bench.run()
        assert bench.outputs[asked].num_cached_tokens == 32
        assert_same(bench.exact(asked), expected[name])


def test_new_content_under_one_name_is_another_adapter(module, requests, expected):
    bench = LoraBench(module, requests)
    first = bench.ask("a")
    for _ in range(4):
        bench.engine.step()
    other = lora(module.config, "a", 1, seed=2, load_inplace=True)  # the content of b
    assert bench.store.add(other)
    assert not bench.store.add(other)
    bench.requests["a"] = other
    second = bench.ask("a")
    bench.run()
    assert_same(bench.exact(first), expected["a"])  # it finishes with what it began with
    assert_same(bench.exact(second), expected["b"])
    assert bench.outputs[second].num_cached_tokens == 0
    assert bench.store.get(other).key != bench.store.get(requests["b"]).key


def test_an_unloaded_adapter_finishes_its_requests(module, requests, expected):
    bench = LoraBench(module, requests, max_loras=1)
    running, waiting = bench.ask("a"), bench.ask("b")
    for _ in range(3):
        bench.engine.step()
    assert bench.store.remove(1) is requests["a"]
    assert bench.store.remove(2) is requests["b"]
    assert bench.store.remove(2) is None
    bench.run()
    assert_same(bench.exact(running), expected["a"])
    assert_same(bench.exact(waiting), expected["b"])


def test_adapters_stay_through_new_weights_and_sleep(module, requests, expected):
    bench = LoraBench(module, requests)
    lifecycle = Lifecycle(bench.engine)

    def wait(future):
        while not future.done():
            bench.engine.step()
        return future.result()

    assert_same(bench.say("a"), expected["a"])
    for level in (1, 2):
        runner = bench.engine.runner
        wait(lifecycle.sleep(level))
        assert runner._adapters == ()
        if level == 2:
            assert not wait(lifecycle.wake_up(["weights", "kv_cache"]))
            bench_weights(bench, lifecycle, nnx.state(module), wait)
        wait(lifecycle.wake_up())
        assert_same(bench.say("a"), expected["a"])
    other = tiny_module()
    for block in other.layers:
        block.mlp.up_proj.kernel[...] = block.mlp.up_proj.kernel[...] * -1
    bench_weights(bench, lifecycle, nnx.state(other), wait)
    fresh = Bench(merged(other, requests["a"]))
    asked = fresh.submit(PROMPT, GREEDY)
    fresh.run()
    assert_same(bench.say("a"), LoraBench.exact(fresh, asked))


def bench_weights(bench, lifecycle, state, wait):
    wait(lifecycle.update(prepare_weights(state, bench.engine.runner.param_specs)))


def test_a_failed_step_leaves_adapters_usable(module, requests, expected):
    bench = LoraBench(module, requests)
    run = bench.engine.runner.run

    def fail(packed):
        bench.engine.runner.run = run
        raise RuntimeError("broken")

    bench.engine.runner.run = fail
    asked = bench.ask("a")
    bench.run()
    assert "broken" in bench.errors(asked)[0]
    assert_same(bench.say("a"), expected["a"])
    bench.assert_idle()


def test_pinned_adapters_keep_their_slot_and_leave_one_to_others(module, requests, expected):
    bench = LoraBench(module, requests)
    slots = bench.engine.adapters
    slots.pin(bench.store.get(requests["a"]))
    with pytest.raises(RequestError, match="one of the 2 slots must stay free") as caught:
        slots.pin(bench.store.get(requests["b"]))
    assert caught.value.status == 409
    asked = {name: bench.ask(name) for name in ("b", "c", "a")}
    bench.run()
    for name, one in asked.items():
        assert_same(bench.exact(one), expected[name])
    assert slots.held == {bench.store.get(requests["a"]).key}
    slots.unpin(1)
    assert slots.held == frozenset()


def test_host_memory_keeps_the_latest_and_folders_are_read_again(module, tmp_path, caplog):
    bench = LoraBench(module, store=1, max_loras=1)
    for number in (1, 2):
        folder = write_adapter(tmp_path / str(number), *adapter_of(module.config, seed=number))
        bench.requests[str(number)] = LoRARequest(str(number), number, str(folder))
    bench.requests["arrays"] = lora(module.config, "arrays", 3)
    with caplog.at_level(logging.INFO, "jaxserve"):
        first = bench.say("1")
        for name in ("1", "2", "arrays"):
            bench.say(name)
        assert [known.lora_name for known in bench.store.requests()] == ["1", "2", "arrays"]
        assert_same(bench.say("1"), first)  # the second time partly from the prefix cache
    assert sum("read adapter" in line for line in caplog.messages) == 4
    # arrays cannot be read again by themselves, so they are forgotten whole
    assert [known.lora_name for known in bench.store.requests()] == ["1", "2"]


def test_host_memory_keeps_pinned_adapters(module, requests):
    store = LoraBench(module, requests, store=1).store
    for name in "abc":
        store.get(requests[name])
        if name == "a":
            store.pin(1)
    assert [known.lora_name for known in store.requests()] == ["a", "c"]
    store.remove(1)
    store.get(requests["a"])
    store.get(requests["b"])
    assert [known.lora_name for known in store.requests()] == ["b"]


def test_metrics_name_the_adapters_in_use(module, requests):
    bench = LoraBench(module, requests, max_loras=1)
    bench.ask("a")
    bench.ask("b")
    for _ in range(3):
        bench.engine.step()
    page = bench.metrics.render("tiny")
    labels = 'max_lora="1",running_lora_adapters="a",waiting_lora_adapters="b"'
    assert f'jaxserve:lora_requests_info{{engine="0",model_name="tiny",{labels}}}' in page
    bench.run()
    assert 'running_lora_adapters=""' in bench.metrics.render("tiny")
    assert "lora_requests_info" not in Bench(module).metrics.render("tiny")


# The library's face ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(module):
    settings = {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_memory_bytes": 32 << 20}
    with LLM(module, enable_lora=True, max_loras=2, max_lora_rank=8, **settings) as made:
        yield made


def ids(llm, **fields):
    return [
        o.outputs[0].token_ids for o in llm.generate([PROMPT] * 2, GREEDY, use_tqdm=False, **fields)
    ]


def test_the_library_takes_one_adapter_or_one_per_prompt(llm, requests, expected):
    a, b = requests["a"], requests["b"]
    assert ids(llm, lora_request=[a, None]) == [expected["a"][0], expected[""][0]]
    assert ids(llm, lora_request=b) == [expected["b"][0]] * 2
    assert ids(llm) == [expected[""][0]] * 2
    streamed = llm.stream(PROMPT, GREEDY, lora_request=a)
    assert [t for event in streamed for t in event.token_ids] == expected["a"][0]
    with pytest.raises(RequestError, match="2 prompts need 2 lora_request, got 1"):
        ids(llm, lora_request=[a])


def test_adapters_are_added_listed_pinned_and_removed(llm, requests):
    assert llm.add_lora(requests["c"])
    assert not llm.add_lora(requests["c"])
    assert 3 in llm.list_loras()
    assert llm.pin_lora(3)
    assert llm.remove_lora(3)
    assert not llm.remove_lora(3)
    assert 3 not in llm.list_loras()
    with pytest.raises(RequestError, match="no adapter with the lora_int_id 3") as caught:
        llm.pin_lora(3)
    assert caught.value.status == 404
    assert llm.host.engine.adapters.held == frozenset()


def test_a_decoder_that_only_embeds_takes_adapters(module, requests):
    settings = {"max_model_len": 128, "max_num_seqs": 2, "kv_cache_memory_bytes": 16 << 20}
    with LLM(module, runner="pooling", enable_lora=True, max_lora_rank=8, **settings) as llm:
        (found,) = llm.embed([PROMPT], lora_request=requests["a"], use_tqdm=False)
        (plain,) = llm.embed([PROMPT], use_tqdm=False)
    with LLM(merged(module, requests["a"]), runner="pooling", **settings) as other:
        (wanted,) = other.embed([PROMPT], use_tqdm=False)
    np.testing.assert_allclose(found.outputs.vector, wanted.outputs.vector, atol=1e-4)
    assert np.abs(found.outputs.vector - plain.outputs.vector).max() > 1e-3
    off = LLM(module, runner="pooling", **settings)
    with off, pytest.raises(RequestError, match="enable_lora=True"):
        off.embed([PROMPT], lora_request=requests["a"], use_tqdm=False)


def test_embeddings_use_the_adapter(llm, module, requests):
    found = llm.embed([PROMPT, PROMPT[:7]], lora_request=requests["a"], use_tqdm=False)
    with LLM(merged(module, requests["a"]), max_model_len=128, max_num_seqs=2) as other:
        wanted = other.embed([PROMPT, PROMPT[:7]], use_tqdm=False)
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.outputs.vector, two.outputs.vector, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_int_id": 9}, "adapter 'a' has the lora_int_id 1, got 9"),
        ({"lora_name": "z"}, "lora_int_id 1 is that of adapter 'a', got it for 'z'"),
        ({"lora_tensors": {}}, "set load_inplace"),
    ],
)
def test_names_and_numbers_must_not_contradict_each_other(llm, requests, change, message):
    llm.add_lora(requests["a"])
    wrong = dataclasses.replace(requests["a"], **change)
    with pytest.raises(RequestError, match=message):
        ids(llm, lora_request=wrong)
    with pytest.raises(RequestError, match=message):
        llm.add_lora(wrong)


def test_a_bad_adapter_is_an_error_of_the_call_and_everything_goes_on(llm, requests, expected):
    with pytest.raises(ConfigError, match="no such folder"):
        ids(llm, lora_request=LoRARequest("gone", 7, "/nowhere/at/all"))
    with pytest.raises(RequestError, match="must be a LoRARequest"):
        ids(llm, lora_request=5)
    assert 7 not in llm.list_loras()
    assert ids(llm, lora_request=requests["a"]) == [expected["a"][0]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 1, "x"), "lora_name must be"),
        (("a", 0, "x"), "lora_int_id must be a whole number from 1"),
        (("a", True, "x"), "lora_int_id must be a whole number from 1"),
        (("a", 1), "needs either lora_path or lora_tensors, got neither"),
    ],
)
def test_impossible_lora_requests_are_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        LoRARequest(*arguments)


def test_encoders_refuse_adapters():
    folder = next(path for path in sorted(BERT.iterdir()) if path.is_dir())
    with pytest.raises(ConfigError, match="encoders serve no adapters"):
        LLM(folder, enable_lora=True)
