"""A running engine changed from outside: other weights, pauses, sleep, and what outlives them."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.core.errors import CapacityError, ConfigError, EngineDeadError, RequestError
from jaxserve.core.event import FinishReason, WeightSpan
from jaxserve.core.request import SamplingParams
from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.engine.lifecycle import Lifecycle
from jaxserve.engine.llm import LLM
from jaxserve.engine.weights import prepare_weights
from jaxserve.models.loading import hf_name
from jaxserve.models.registry import fill, flatten_params
from tests.tiny import Bench, pointers, tiny_module, write_tiny_model

SMALL = {
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 8,
    "num_gpu_blocks_override": 256,
}
PROMPT = [*range(40, 71)]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module")
def others(module):
    """Other weights for the same model: the layers' outputs count more."""
    arrays = flatten_params(nnx.state(module))
    return {
        path: array * 3 if path.endswith("o_proj.kernel") else jnp.array(array)
        for path, array in arrays.items()
    }


class Held(Bench):
    """An engine turned by hand, with its levers."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.lifecycle = Lifecycle(self.engine)
        self.specs = self.engine.runner.param_specs

    def update(self, params, **options):
        return self.wait(self.lifecycle.update(prepare_weights(params, self.specs), **options))

    def wait(self, future, *, steps=5000):
        for _ in range(steps):
            if future.done():
                return future.result()
            self.engine.step()
        raise AssertionError(f"it was not done after {steps} steps")

    def tokens(self, name):
        return [t for event in self.events[name] for t in event.token_ids]

    def turn(self, name, count):
        """Turn the engine until a request has so many tokens."""
        for _ in range(2000):
            if len(self.tokens(name)) >= count:
                return
            self.engine.step()
        raise AssertionError("too few tokens")


@pytest.fixture(params=[True, False], ids=["overlap", "plain"])
def held(module, request):
    made = Held(module, async_scheduling=request.param)
    yield made
    if made.lifecycle.is_paused:
        made.wait(made.lifecycle.resume())
    made.run()
    made.assert_idle()


def fresh_tokens(module, params, prompt=PROMPT, sampling=GREEDY):
    """Return what an engine says that was loaded with these weights."""
    bench = Bench((module.config, params))
    return bench.generate([prompt], [sampling])[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def old_tokens(module):
    return fresh_tokens(module, nnx.state(module))


@pytest.fixture(scope="module")
def new_tokens(module, others, old_tokens):
    made = fresh_tokens(module, others)
    assert made != old_tokens
    return made


# Weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["slots", "pages"])
def test_changed_weights_give_the_tokens_of_a_freshly_loaded_engine(
    module, others, old_tokens, new_tokens, layout
):
    held = Held(module, kv_layout=layout)
    assert (
        held.complete(PROMPT, max_tokens=24, temperature=0, ignore_eos=True).outputs[0].token_ids
        == old_tokens
    )
    compiled = held.metrics.num_compilations
    done = held.update(others)
    after = held.generate([PROMPT], [GREEDY])[0]
    assert after.outputs[0].token_ids == new_tokens
    assert after.num_cached_tokens == 0
    assert held.metrics.num_compilations == compiled
    assert (done.version, done.num_moved, done.num_cast) == ("1", 0, 0)
    # and from the prefix cache that the new weights have filled
    again = held.generate([PROMPT], [GREEDY])[0]
    assert again.num_cached_tokens > 0
    assert again.outputs[0].token_ids == new_tokens
    held.update(nnx.state(module))
    assert held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids == old_tokens
    held.assert_idle()


def test_matching_arrays_are_served_where_they_are(held, others):
    done = held.update(others)
    assert done.num_shared == len(others)
    assert set(pointers(held.engine.runner.params)) == set(pointers(others))


def test_an_update_compiles_nothing_at_all(module, others):
    held = Held(module)
    held.complete(PROMPT, max_tokens=4)
    held.update(others)
    held.complete(PROMPT, max_tokens=4)
    heard, listening = [], True

    def listen(name, _seconds, **_facts):
        if listening and name == "/jax/core/compile/backend_compile_duration":
            heard.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    held.update(others)
    held.complete(PROMPT, max_tokens=4)
    for level in (1, 2):
        held.wait(held.lifecycle.sleep(level))
        if level == 2:
            held.update(others)
        assert held.wait(held.lifecycle.wake_up())
        held.complete(PROMPT, max_tokens=4)
    listening = False
    assert heard == []


def test_running_requests_go_on_with_their_keys_and_mark_every_token(held, others, old_tokens):
    name = held.submit(PROMPT, GREEDY)
    held.turn(name, 8)
    held.update(others, version="step-7")
    held.run()
    output = held.outputs[name].outputs[0]
    before = output.weight_versions[0].end
    assert 8 <= before <= 10
    assert output.token_ids[:before] == old_tokens[:before]
    assert output.token_ids != old_tokens
    assert len(output.token_ids) == 24
    assert output.weight_versions == [WeightSpan("0", 0, before), WeightSpan("step-7", before, 24)]
    assert held.metrics.num_preemptions == 0
    versions = [e.weight_version for e in held.events[name] if e.token_ids]
    assert versions == ["0"] * before + ["step-7"] * (24 - before)
    # what the old weights have computed is found by nobody
    assert held.generate([PROMPT], [GREEDY])[0].num_cached_tokens == 0


def test_recomputed_requests_go_on_as_if_resumed_under_the_new_weights(held, module, others):
    name = held.submit(PROMPT, GREEDY)
    held.turn(name, 8)
    held.update(others, recompute=True)
    held.run()
    before = held.tokens(name)[: held.outputs[name].outputs[0].weight_versions[0].end]
    assert held.metrics.num_preemptions == 1
    expected = fresh_tokens(
        module, others, PROMPT + before, GREEDY.replace(max_tokens=24 - len(before))
    )
    assert held.tokens(name) == before + expected


def test_a_kept_cache_is_still_found(held, others):
    held.generate([PROMPT], [GREEDY])
    held.update(others, flush_cache=False)
    assert held.generate([PROMPT], [GREEDY])[0].num_cached_tokens > 0
    with pytest.raises(RequestError, match="recompute=True needs flush_cache=True"):
        held.update(others, flush_cache=False, recompute=True)


def test_waiting_requests_and_siblings_survive_an_update(held, others):
    wide = SamplingParams(n=4, max_tokens=8, seed=3, ignore_eos=True)
    names = [held.submit(PROMPT, wide) for _ in range(3)]
    for _ in range(3):
        held.engine.step()
    held.update(others)
    held.run()
    for name in names:
        assert all(len(o.token_ids) == 8 for o in held.outputs[name].outputs)


@pytest.mark.parametrize("form", ["module", "state", "nested", "flat", "numpy", "hf"])
def test_every_form_of_weights_is_understood(held, module, others, new_tokens, form):
    if form == "module":
        params = tiny_module()
        nnx.update(params, fill(nnx.state(params), others))
    elif form == "state":
        params = fill(nnx.state(module), others)
    elif form == "nested":
        params = {}
        for path, array in others.items():
            place = params
            *parents, last = path.split(".")
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = array
    elif form == "flat":
        params = others
    elif form == "numpy":
        params = {path: np.asarray(array) for path, array in others.items()}
    else:
        params = {
            hf_name(path): np.asarray(array).T if path.endswith(".kernel") else np.asarray(array)
            for path, array in others.items()
        } | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    names = "hf" if form == "hf" else "jaxserve"
    weights = prepare_weights(params, held.specs, names=names)
    held.wait(held.lifecycle.update(weights))
    assert held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids == new_tokens


def test_everything_that_does_not_fit_is_named_and_nothing_is_changed(held, others, old_tokens):
    bad = dict(others)
    del bad["norm.scale"], bad["layers.1.mlp.up_proj.kernel"]
    bad["layers.2.mlp.up_proj.kernel"] = bad["norm.weight"] = jnp.ones(3)
    bad["lm_head.kernel"] = others["lm_head.kernel"].T
    bad["layers.0.mlp.up_proj.kernel"] = "nothing"
    bad["layers.0.mlp.gate_proj.kernel"] = others["layers.0.mlp.gate_proj.kernel"] * 1j
    deleted = jnp.array(others["layers.0.mlp.down_proj.kernel"])
    deleted.delete()
    bad["layers.0.mlp.down_proj.kernel"] = deleted
    with pytest.raises(ConfigError) as caught:
        held.update(bad)
    message = str(caught.value)
    assert "missing: layers.1.mlp.up_proj.kernel, norm.scale;" in message
    assert "unknown: layers.2.mlp.up_proj.kernel, norm.weight;" in message
    assert "lm_head.kernel (300, 32) instead of (32, 300)" in message
    assert "layers.0.mlp.up_proj.kernel (str)" in message
    assert "layers.0.mlp.gate_proj.kernel (complex64)" in message
    assert "layers.0.mlp.down_proj.kernel (deleted)" in message
    assert "nothing was changed" in message
    with pytest.raises(ConfigError, match="got list"):
        held.update([1, 2])
    with pytest.raises(ConfigError, match="names must be jaxserve or hf, got 'torch'"):
        prepare_weights(others, held.specs, names="torch")
    assert held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids == old_tokens
    assert held.lifecycle.weight_version == "0"


def test_a_partial_update_keeps_the_rest(held, others, new_tokens):
    some = {path: array for path, array in others.items() if path.endswith("o_proj.kernel")}
    with pytest.raises(ConfigError, match="missing"):
        prepare_weights(some, held.specs)
    with pytest.raises(ConfigError, match="missing: all of them"):
        prepare_weights({}, held.specs, partial=True)
    held.wait(held.lifecycle.update(prepare_weights(some, held.specs, partial=True)))
    assert held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids == new_tokens


def test_another_dtype_is_cast_and_a_donated_array_is_freed(held, others):
    wide = {path: array.astype(jnp.bfloat16) for path, array in others.items()}
    weights = prepare_weights(wide, held.specs, donate=True)
    assert weights.num_cast == len(others)
    assert all(array.is_deleted() for array in wide.values())
    assert {leaf.dtype for leaf in weights.leaves} == {jnp.dtype("float32")}
    same = {path: jnp.array(array) for path, array in others.items()}
    weights = prepare_weights(same, held.specs, donate=True)
    assert weights.num_shared == len(others)
    assert not any(array.is_deleted() for array in same.values())


def test_host_arrays_stay_their_owners(held, others, new_tokens):
    owned = {path: np.array(array) for path, array in others.items()}
    held.update(owned)
    for array in owned.values():
        array[...] = 0
    assert held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids == new_tokens


def test_versions_count_or_are_given(held, others):
    assert held.lifecycle.weight_version == "0"
    assert held.update(others).version == "1"
    assert held.update(others, version=17).version == "17"
    assert held.update(others).version == "3"
    held.wait(held.lifecycle.rename("mine"))
    assert held.lifecycle.weight_version == "mine"
    page = held.metrics.render("tiny")
    assert 'jaxserve:weight_version{engine="0",model_name="tiny",weight_version="mine"} 3.0' in page
    assert (
        "jaxserve:rl_weight_update_operation_duration_seconds_count"
        '{engine="0",model_name="tiny",operation="update_weights"} 3.0' in page
    )
    for bad in ("", "x" * 129, 1.5, True, "a\nb", "\ud800"):
        with pytest.raises(RequestError, match="weight version"):
            held.update(others, version=bad)


def test_old_weights_are_let_go(module):
    config = module.config
    first = {path: jnp.array(a) for path, a in flatten_params(nnx.state(module)).items()}
    second = {path: jnp.array(a) for path, a in first.items()}
    with LLM((config, first), **SMALL) as llm:
        before = {id(a) for a in jax.live_arrays()}
        ours = {id(a) for a in first.values()}
        assert ours <= before
        llm.update_params(second)
        del first
        assert not ours & {id(a) for a in jax.live_arrays()}
        llm.generate(PROMPT, GREEDY, use_tqdm=False)


def test_two_devices_are_updated_in_their_own_layout(tmp_path, others):
    folder = write_tiny_model(tmp_path)
    held = Held(folder, tensor_parallel_size=2)
    plain = Held(folder)
    params = {
        path: jnp.asarray(a) * (1.5 if path.endswith("o_proj.kernel") else 1)
        for path, a in flatten_params(plain.engine.runner.params).items()
    }
    done = held.update(params)
    assert done.num_moved == len(params)
    plain.update(params)
    for one, two in zip(
        held.generate([PROMPT] * 2, [GREEDY] * 2),
        plain.generate([PROMPT] * 2, [GREEDY] * 2),
        strict=True,
    ):
        assert one.outputs[0].token_ids == two.outputs[0].token_ids


# Pausing ---------------------------------------------------------------------------------------


def test_abort_ends_what_runs_and_refuses_what_comes(held):
    names = [held.submit(PROMPT, LONG) for _ in range(6)]
    held.turn(names[0], 3)
    future = held.lifecycle.pause("abort")
    with pytest.raises(CapacityError, match="paused") as caught:
        held.submit(PROMPT, LONG)
    assert caught.value.retry_after_s
    held.wait(future)
    assert held.lifecycle.is_paused
    for name in names:
        assert held.events[name][-1].finish_reason is FinishReason.ABORT
    held.assert_idle()
    assert held.engine.pool.num_cached == 0
    assert held.metrics.rejections["paused"] == 1
    held.wait(held.lifecycle.resume())
    assert not held.lifecycle.is_paused
    assert len(held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids) == 24


def test_the_cache_can_be_kept_over_a_pause(held):
    held.generate([PROMPT], [GREEDY])
    held.wait(held.lifecycle.pause("abort", clear_cache=False))
    held.wait(held.lifecycle.resume())
    assert held.generate([PROMPT], [GREEDY])[0].num_cached_tokens > 0
    held.wait(held.lifecycle.pause("wait"))
    held.wait(held.lifecycle.resume())
    assert held.generate([PROMPT], [GREEDY])[0].num_cached_tokens == 0


def test_wait_lets_requests_finish_and_refuses_new_ones(held, old_tokens):
    name = held.submit(PROMPT, GREEDY)
    held.turn(name, 2)
    future = held.lifecycle.pause("wait")
    held.engine.step()
    assert not future.done()
    with pytest.raises(CapacityError, match="paused"):
        held.submit(PROMPT, GREEDY)
    held.wait(future)
    assert held.outputs[name].outputs[0].token_ids == old_tokens
    assert held.engine.pool.num_cached == 0


def test_keep_freezes_everything_and_goes_on_where_it_was(held, old_tokens):
    name = held.submit(PROMPT, GREEDY)
    held.turn(name, 5)
    held.wait(held.lifecycle.pause("keep"))
    count = len(held.tokens(name))
    later = held.submit(PROMPT, GREEDY)
    for _ in range(5):
        held.engine.step()
    assert not held.engine.has_work
    assert len(held.tokens(name)) == count
    assert held.events[later] == []
    assert held.engine.pool.num_held > 0
    held.wait(held.lifecycle.resume())
    held.run()
    assert held.tokens(name) == held.tokens(later) == old_tokens
    assert held.metrics.num_preemptions == 0


def test_a_frozen_request_can_be_aborted(held):
    name = held.submit(PROMPT, LONG)
    held.turn(name, 2)
    held.wait(held.lifecycle.pause("keep"))
    held.engine.cancel(name)
    held.engine.step()
    assert held.events[name][-1].finish_reason is FinishReason.ABORT
    held.assert_idle()


def test_a_pause_can_be_overruled(held, old_tokens):
    name = held.submit(PROMPT, GREEDY)
    held.turn(name, 2)
    waiting = held.lifecycle.pause("wait")
    held.engine.step()
    held.wait(held.lifecycle.resume())
    assert waiting.done()
    sleeping = held.lifecycle.sleep(1, "wait")
    held.engine.step()
    held.wait(held.lifecycle.pause("keep"))
    with pytest.raises(RequestError, match="before it could fall asleep"):
        sleeping.result()
    assert not held.lifecycle.is_sleeping
    waiting = held.lifecycle.pause("wait")  # thaws what was frozen
    held.wait(waiting)
    assert held.tokens(name) == old_tokens
    with pytest.raises(RequestError, match="mode must be abort, wait or keep, got 'stop'"):
        held.lifecycle.pause("stop")


# Sleeping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["slots", "pages"])
@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_sleep_frees_the_memory_and_waking_goes_on(module, old_tokens, mode, layout):
    held = Held(module, kv_layout=layout, max_num_seqs=1, max_num_batched_tokens=32)
    held.engine.runner.warm_up()
    name = held.submit(PROMPT, GREEDY)
    held.turn(name, 5)
    held.wait(held.lifecycle.sleep(1, mode))
    assert held.lifecycle.asleep == ("weights", "kv_cache", "scheduling")
    assert held.engine.runner.cache_bytes() == 0
    assert not held.engine.runner.has_params
    assert held.metrics.sleep_state == "weights_offloaded"
    with pytest.raises(RequestError, match="not on the device"):
        _ = held.engine.runner.params
    with pytest.raises(RequestError, match=r"sleeps \(kv_cache, scheduling, weights\)"):
        held.wait(held.lifecycle.resume())
    compiled = held.metrics.num_compilations
    assert held.wait(held.lifecycle.wake_up())
    assert not held.lifecycle.is_sleeping
    assert not held.lifecycle.is_paused
    assert held.metrics.sleep_state == "awake"
    held.run()
    if mode == "abort":
        assert held.events[name][-1].finish_reason is FinishReason.ABORT
    else:
        assert held.tokens(name) == old_tokens
    assert held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids == old_tokens
    assert held.metrics.num_compilations == compiled
    held.assert_idle()


def test_discarded_weights_must_come_by_an_update(held, others, new_tokens):
    held.wait(held.lifecycle.sleep(2))
    assert held.metrics.sleep_state == "discard_all"
    with pytest.raises(RequestError, match=r"discarded the weights; give them with update_params"):
        held.wait(held.lifecycle.wake_up())
    assert held.engine.runner.cache_bytes() == 0
    assert held.wait(held.lifecycle.wake_up(["weights"])) is False
    some = prepare_weights({"norm.scale": others["norm.scale"]}, held.specs, partial=True)
    with pytest.raises(RequestError, match="partial update needs weights"):
        held.wait(held.lifecycle.update(some))
    held.update(others)
    assert held.lifecycle.asleep == ("kv_cache", "scheduling")
    assert held.wait(held.lifecycle.wake_up())
    assert held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids == new_tokens


def test_parts_wake_one_by_one(held, old_tokens):
    held.wait(held.lifecycle.sleep(1))
    with pytest.raises(RequestError, match="while kv_cache and weights sleep"):
        held.wait(held.lifecycle.wake_up(["scheduling"]))
    assert held.wait(held.lifecycle.wake_up(["weights"])) is False
    assert held.engine.runner.has_params
    assert held.wait(held.lifecycle.wake_up(["kv_cache"])) is False
    assert held.lifecycle.asleep == ("scheduling",)
    with pytest.raises(CapacityError):
        held.submit(PROMPT, GREEDY)
    assert held.wait(held.lifecycle.wake_up(["scheduling"]))
    assert held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids == old_tokens
    with pytest.raises(RequestError, match="tags must be among weights, kv_cache, scheduling"):
        held.lifecycle.wake_up(["all"])
    with pytest.raises(RequestError, match="level must be 0, 1 or 2, got 3"):
        held.lifecycle.sleep(3)


def test_level_zero_only_pauses(held):
    name = held.submit(PROMPT, LONG)
    held.turn(name, 2)
    held.wait(held.lifecycle.sleep(0, "keep"))
    assert held.lifecycle.asleep == ("scheduling",)
    assert held.engine.runner.cache_bytes() > 0
    assert held.wait(held.lifecycle.wake_up())
    held.engine.cancel(name)


def test_waiting_for_the_end_is_refused_while_asleep(held):
    name = held.submit(PROMPT, LONG)
    held.turn(name, 2)
    held.wait(held.lifecycle.sleep(1, "keep"))
    with pytest.raises(RequestError, match="cannot finish while the engine sleeps"):
        held.lifecycle.pause("wait")
    held.wait(held.lifecycle.pause("abort"))
    assert held.events[name][-1].finish_reason is FinishReason.ABORT
    assert held.wait(held.lifecycle.wake_up())


def test_a_reset_of_running_requests_recomputes_them(held, old_tokens):
    name = held.submit(PROMPT, GREEDY)
    held.turn(name, 5)
    assert held.wait(held.lifecycle.reset_prefix_cache(reset_running_requests=True))
    held.run()
    assert held.tokens(name) == old_tokens
    assert held.metrics.num_preemptions == 1


def test_a_call_outlives_a_failing_step_and_fails_after_the_end(held, monkeypatch):
    name = held.submit(PROMPT, LONG)
    held.turn(name, 2)

    def fail(*_args):
        raise RuntimeError("the device is gone")

    future = held.lifecycle.reset_prefix_cache()
    monkeypatch.setattr(held.engine, "_commit", fail)
    held.engine.step()
    monkeypatch.undo()
    assert held.events[name][-1].finish_reason is FinishReason.ERROR
    assert held.wait(future)
    broken = held.engine.call(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        held.wait(broken)
    assert len(held.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids) == 24


def test_a_stopped_engine_keeps_nobody_waiting(module):
    held = Held(module)
    name = held.submit(PROMPT, LONG)
    held.turn(name, 2)
    waiting = held.lifecycle.pause("wait")
    held.engine.step()
    held.engine.stop("enough")
    assert waiting.result(timeout=0) is None
    with pytest.raises(EngineDeadError, match="enough"):
        held.lifecycle.resume()


# Faces -----------------------------------------------------------------------------------------


def test_the_library_changes_weights_and_sleeps(module, others, old_tokens, new_tokens):
    with LLM(module, **SMALL) as llm:
        assert llm.get_weight_version() == "0"
        assert llm.update_params(others, version=5).version == "5"
        (output,) = llm.generate(PROMPT, GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == new_tokens
        assert output.outputs[0].weight_versions == [WeightSpan("5", 0, 24)]
        llm.sleep(2)
        assert llm.is_sleeping()
        assert llm.is_paused()
        with pytest.raises(CapacityError):
            llm.generate(PROMPT, GREEDY, use_tqdm=False)
        llm.update_params(module)
        assert llm.wake_up()
        (output,) = llm.generate(PROMPT, GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == old_tokens
        llm.pause_generation("wait")
        llm.resume_generation()
        assert llm.reset_prefix_cache()
        llm.update_weight_version("x")
        assert llm.get_weight_version() == "x"
        assert llm.host.thread.drain(1)


def test_a_checkpoint_is_read_and_must_be_of_the_same_model(tmp_path):
    folder = write_tiny_model(tmp_path / "one")
    other = write_tiny_model(tmp_path / "two")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace("10000.0", "5000.0"))
    with LLM(folder, **SMALL) as llm:
        before = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        llm.update_params({"norm.scale": jnp.zeros(32)}, partial=True)
        assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids != before
        done = llm.update_weights_from_disk(folder, version="disk")
        assert done.version == "disk"
        assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == before
        with pytest.raises(ConfigError, match=r"rope_theta 5000\.0 instead of 10000\.0"):
            llm.update_weights_from_disk(other)
        with pytest.raises(ConfigError):
            llm.update_weights_from_disk(tmp_path / "nowhere")
        assert llm.get_weight_version() == "disk"


def test_the_asynchronous_face_changes_weights_in_the_middle_of_a_request(module, others):
    made = AsyncLLM(module, warmup="lazy", **SMALL)

    async def run():
        spans = []
        async for output in made.generate(PROMPT, LONG.replace(max_tokens=100)):
            if not spans:
                await made.update_params(others, version="mid")
            spans = output.outputs[0].weight_versions
        assert [span.version for span in spans] == ["0", "mid"]
        assert spans[-1].end == 100
        await made.pause_generation("keep")
        task = asyncio.create_task(anext(made.generate(PROMPT, GREEDY)))
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        assert made.is_paused()
        await made.resume_generation()
        await task
        await made.sleep()
        assert made.is_sleeping()
        assert await made.wake_up(["weights"]) is False
        assert await made.wake_up()
        assert await made.reset_prefix_cache()
        await made.update_weight_version(2)
        assert made.get_weight_version() == "2"

    try:
        asyncio.run(run())
    finally:
        made.close()
