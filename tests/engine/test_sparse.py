"""Sparse attention in the engine: what is read, what is shared, and what stays as it was."""

import random

import numpy as np
import pytest

from jaxserve import cpu_kernels
from jaxserve.core.errors import ConfigError, RequestError
from jaxserve.core.request import SamplingParams
from jaxserve.engine.llm import LLM
from jaxserve.scheduling.fcfs import FcfsScheduler
from tests.cases import slow
from tests.engine.sparse_reference import log_likelihoods
from tests.tiny import Bench, tiny_module, write_tiny_model

SEGMENT, WINDOW = 64, 16
SETTINGS = (
    f"p=0.9,segment={SEGMENT},min_context=100,dense_layers=0,window={WINDOW},cluster_size=4,"
    "max_share=1,measure_every=1"
)
GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "logprobs": 0}
NEARLY_ALL = 1 - 1e-5
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 250, length).tolist()


@pytest.fixture(scope="module")
def module():
    """A tiny model whose heads look at few tokens."""
    made = tiny_module()
    for layer in made.layers:
        kernel = layer.self_attn.q_proj.kernel
        kernel[...] = kernel[...] * 6
    return made


def sparse_bench(module, **settings):
    return Bench(module, **{"max_num_seqs": 2, "sparse_attention": SETTINGS} | settings)


@pytest.fixture(scope="module")
def shared(module):
    """A bench that many tests use; prompts of different tests differ."""
    return sparse_bench(module)


@pytest.fixture(scope="module")
def plain(module):
    return Bench(module, max_num_seqs=2)


def tokens(output):
    return list(output.outputs[0].token_ids)


def logprobs(output):
    return [v.logprob for entry in output.outputs[0].logprobs for v in entry.values()]


def built(bench):
    """Count the segments that are clustered from now on."""
    runner, calls = bench.engine.runner, []
    original = type(runner).cluster
    runner.cluster = lambda *args: (calls.append(args), original(runner, *args))[1]
    return calls


def figures(bench):
    made = bench.metrics
    return np.asarray(
        [made.sparse_tokens_read, made.sparse_tokens_there, made.sparse_heads,
         made.measured_heads, made.missed_heads, made.sparse_mass, made.measured_mass]
    )  # fmt: skip


# What is read --------------------------------------------------------------------------------


def test_all_of_the_mass_is_the_dense_engine(shared, plain):
    prompt = prompt_of(250, seed=1)
    before = figures(shared)
    found = shared.complete(prompt, **GREEDY, attention_mass=1.0)
    expected = plain.complete(prompt, **GREEDY)
    assert tokens(found) == tokens(expected)
    np.testing.assert_allclose(logprobs(found), logprobs(expected), atol=1e-5)
    assert (figures(shared) == before).all()
    assert not shared.engine.placement.segments.entries.num_cached


WAYS = [
    {"kv_layout": "slots"},
    slow({"kv_layout": "slots", "attention_backend": "xla"}),
    slow({"kv_layout": "pages"}),
    slow({"attention_backend": "pallas-reference"}),
    slow({"attention_backend": "pallas-xla"}),
]


def bench_for(module, shared, settings):
    return shared if settings == {"kv_layout": "slots"} else sparse_bench(module, **settings)


@pytest.mark.parametrize("settings", WAYS)
def test_a_share_of_the_mass_reads_fewer_tokens_and_keeps_its_promise(
    module, shared, plain, settings
):
    bench = bench_for(module, shared, settings)
    prompt, before = prompt_of(300, seed=2), figures(bench)
    found = bench.complete(prompt, **GREEDY)
    read, there, heads, measured, missed, estimated, mass = figures(bench) - before
    assert heads == 2 * 2 * 39  # layers, key-value heads, and decodes: the first token is prefill's
    assert measured == 2 * heads
    assert there == 2 * 2 * sum(300 + i for i in range(1, 40))
    assert 0.1 * there < read < 0.8 * there
    assert missed <= 0.05 * measured
    assert mass / measured > 0.88
    assert abs(estimated / heads - mass / measured) < 0.05
    bench.assert_idle()
    # Nearly all of the mass gives what all of it gives, and still leaves tokens unread.
    before, prompt = figures(bench), prompt_of(300, seed=27)
    found = bench.complete(prompt, **GREEDY, attention_mass=NEARLY_ALL)
    expected = plain.complete(prompt, **GREEDY)
    read, there, heads, *_ = figures(bench) - before
    assert heads == 2 * 2 * 39
    assert 0 < read < 0.95 * there
    assert tokens(found) == tokens(expected)
    np.testing.assert_allclose(logprobs(found), logprobs(expected), atol=0.01)


@pytest.mark.parametrize("settings", WAYS)
def test_what_is_said_is_what_float64_says_of_the_same_choice(module, shared, settings):
    """Decodes at p = 0.9 against a model in float64 that chooses among the same clusters."""
    bench, count = bench_for(module, shared, settings), 30
    for seed in (28, 29):
        prompt = prompt_of(300, seed=seed)
        found = bench.complete(prompt, **GREEDY | {"max_tokens": count})
        # Segments are full at 64 tokens each; the fifth is, and has left the window, at 336.
        said = {
            p: log_likelihoods(
                module, prompt, tokens(found), p,
                config=bench.engine.runner.spec.sparse.config, segments=300 // SEGMENT,
            )
            for p in (0.9, 1.0)
        }  # fmt: skip
        np.testing.assert_allclose(logprobs(found), said[0.9], atol=0.005)
        assert np.abs(said[1.0] - said[0.9]).max() > 0.05  # attention to everything says otherwise


def test_short_contexts_are_read_whole(shared, plain):
    prompt, before = prompt_of(60, seed=3), figures(shared)
    short = GREEDY | {"max_tokens": 39}
    assert tokens(shared.complete(prompt, **short)) == tokens(plain.complete(prompt, **short))
    assert (figures(shared) == before).all()


def test_generated_tokens_join_the_index(shared):
    calls, prompt = built(shared), prompt_of(130, seed=4)
    shared.complete(prompt, **GREEDY | {"max_tokens": 60})
    assert [call[2] for call in calls] == [0, 1]  # the third would be full at 192 + 16 tokens
    shared.complete(prompt_of(150, seed=5), **GREEDY | {"max_tokens": 61})
    assert [call[2] for call in calls] == [0, 1, 0, 1, 2]


def test_rows_with_different_shares_do_not_disturb_each_other(shared):
    prompts = [prompt_of(240, seed=6), prompt_of(200, seed=7)]
    masses = [{"attention_mass": 0.8}, {"attention_mass": 1.0}]
    alone = [shared.complete(p, **GREEDY, **m) for p, m in zip(prompts, masses, strict=True)]
    shared.engine.pool.forget()
    both = shared.generate(prompts, [SamplingParams(**GREEDY, **m) for m in masses])
    for one, two in zip(alone, both, strict=True):
        assert tokens(one) == tokens(two)
        np.testing.assert_allclose(logprobs(one), logprobs(two), atol=1e-4)


# Sharing and forgetting ----------------------------------------------------------------------


def test_a_cached_prefix_brings_its_clusters(shared):
    prompt, calls = prompt_of(260, seed=8), built(shared)
    first = shared.complete(prompt, **GREEDY)
    num_built = len(calls)
    assert num_built >= 3
    again = shared.complete(prompt, **GREEDY)
    assert again.num_cached_tokens >= 248
    assert len(calls) == num_built
    assert tokens(again) == tokens(first)
    # Another tail: the segments that both have in common are found, later ones are built.
    shared.complete(prompt[:150] + prompt_of(110, seed=9), **GREEDY)
    assert [call[2] for call in calls[num_built:]] == [2, 3]


def test_siblings_share_entries(shared):
    prompt, calls = prompt_of(230, seed=10), built(shared)
    sampling = SamplingParams(n=2, temperature=0.7, seed=1, max_tokens=20, ignore_eos=True)
    name = shared.submit(prompt, sampling)
    most = 0
    while shared.engine.has_work:
        shared.engine.step()
        most = max(most, shared.engine.placement.segments.entries.num_held)
    assert len(shared.outputs[name].outputs) == 2
    assert [call[2] for call in calls] == [0, 1, 2]
    assert most == 3


def test_an_entry_is_forgotten_with_its_page(shared):
    segments, pool = shared.engine.placement.segments, shared.engine.pool
    # 256 pages of 8 tokens: the first prompts are evicted by the last.
    for seed in range(40, 50):
        shared.complete(prompt_of(260, seed), **GREEDY | {"max_tokens": 2})
        known = segments.entries._page_of
        assert known
        assert all(pool.knows(digest) for digest in known)
        assert segments.entries.num_held == 0
    assert len(known) < 10 * 3
    shared.engine.forget_now()
    assert not segments.entries.num_cached
    assert segments.entries.num_free == segments.entries.num_pages
    shared.assert_idle()


@pytest.mark.slow
def test_without_a_prefix_cache_nothing_is_kept(module):
    bench = sparse_bench(module, enable_prefix_caching=False)
    calls = built(bench)
    outputs = [bench.complete(prompt_of(200, seed=17), **GREEDY) for _ in range(2)]
    assert tokens(outputs[0]) == tokens(outputs[1])
    assert [call[2] for call in calls] == [0, 1, 2, 0, 1, 2]
    assert not bench.engine.placement.segments.entries.num_cached


def test_new_weights_find_no_old_clusters(shared):
    prompt, calls = prompt_of(200, seed=18), built(shared)
    shared.complete(prompt, **GREEDY)
    num_built = len(calls)
    shared.engine.start_generation()
    assert not shared.engine.placement.segments.entries.num_cached
    shared.complete(prompt, **GREEDY)
    assert len(calls) == 2 * num_built


# Other ways through the engine ---------------------------------------------------------------


@pytest.mark.slow
def test_chunks_of_the_prompt_do_not_matter(module, shared):
    prompt = prompt_of(260, seed=19)
    whole = sparse_bench(module, max_num_batched_tokens=512).complete(prompt, **GREEDY)
    chunked = shared.complete(prompt, **GREEDY)
    assert tokens(chunked) == tokens(whole)


def test_preemption_and_resumption_lose_nothing(shared):
    prompts = [prompt_of(200, seed=20), prompt_of(190, seed=21)]
    sampling = [SamplingParams(**GREEDY, attention_mass=mass) for mass in (1.0, NEARLY_ALL)]
    expected = shared.generate(prompts, sampling)
    shared.engine.pool.forget()
    names = [shared.submit(p, s) for p, s in zip(prompts, sampling, strict=True)]
    for turn in range(400):
        if turn in (2, 9, 25, 40):  # amid prompts, and amid outputs
            shared.engine.preempt_all()
        shared.engine.step()
    assert not shared.engine.has_work
    found = [tokens(shared.outputs[name]) for name in names]
    assert found[0] == tokens(expected[0])
    # What is computed again attends as prompts do, to everything, so that the keys of these tokens
    # are not those of before: at a share that matters, no text need be the same.
    assert found[1] == tokens(expected[1])
    assert shared.engine.placement.segments.entries.num_held == 0


@pytest.mark.slow
def test_sequences_that_push_each_other_out_finish(module):
    # 63 pages of 8 tokens: both prompts fit, both completions do not.
    tight = sparse_bench(module, num_gpu_blocks_override=63)
    prompts = [prompt_of(200, seed=20), prompt_of(190, seed=21)]
    found = tight.generate(prompts, [SamplingParams(**GREEDY | {"max_tokens": 100})] * 2)
    assert tight.metrics.num_preemptions
    assert [len(tokens(one)) for one in found] == [100, 100]
    assert tight.engine.placement.segments.entries.num_held == 0
    tight.assert_idle()


def test_speculation_with_and_without_shares(module, plain):
    bench = sparse_bench(module, speculative_config=NGRAM)
    prompt = prompt_of(40, seed=25) * 5
    sampling = GREEDY | {"max_tokens": 60}
    whole = bench.complete(prompt, **sampling, attention_mass=1.0)
    assert tokens(whole) == tokens(plain.complete(prompt, **sampling))
    before = figures(bench)
    found = bench.complete(prompt, **sampling)
    read, there, _, measured, missed, *_ = figures(bench) - before
    assert len(tokens(found)) == 60
    assert bench.metrics.num_draft_tokens > bench.metrics.num_accepted_tokens > 0
    assert 0 < read < there
    assert missed <= 0.05 * measured
    bench.assert_idle()


@pytest.mark.slow
def test_a_model_that_drafts_may_stand_beside_it(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    config = {"model": str(folder), "num_speculative_tokens": 3}
    # A model that costs as much as the one it drafts for is asked only where drafts cost nothing.
    scheduler = FcfsScheduler(draft_cost=1e-9)
    bench = sparse_bench(folder, speculative_config=config, scheduler=scheduler)
    prompt = prompt_of(200, seed=26)
    whole = bench.complete(prompt, **GREEDY, attention_mass=1.0)
    assert tokens(whole) == tokens(Bench(folder, max_num_seqs=2).complete(prompt, **GREEDY))
    accepted = bench.metrics.num_accepted_tokens
    assert accepted == bench.metrics.num_draft_tokens >= 20  # it is the model itself
    before = figures(bench)
    assert len(tokens(bench.complete(prompt, **GREEDY))) == 40
    assert bench.metrics.num_accepted_tokens >= accepted + 20
    read, there, _, measured, missed, *_ = figures(bench) - before
    assert 0 < read < there
    assert missed <= 0.05 * measured
    bench.assert_idle()


def test_a_failed_step_leaves_an_empty_index(shared, monkeypatch):
    segments = shared.engine.placement.segments
    with monkeypatch.context() as patch:
        patch.setattr(shared.engine.runner, "run", None)
        name = shared.submit(prompt_of(120, seed=23), SamplingParams(**GREEDY))
        shared.engine.step()
    shared.run()
    assert shared.errors(name)
    assert shared.engine.placement.segments is not segments
    assert not shared.engine.placement.segments.entries.num_cached
    assert len(tokens(shared.complete(prompt_of(200, seed=24), **GREEDY))) == 40
    shared.engine.drop_cache()
    assert not shared.engine.placement.segments.entries.num_cached
    shared.engine.runner.restore_cache()
    assert len(tokens(shared.complete(prompt_of(200, seed=24), **GREEDY))) == 40
    shared.assert_idle()


def test_a_random_life_keeps_the_books(shared):
    """Requests come and go at random; after every step all entries are accounted for."""
    engine, chance = shared.engine, random.Random(5)
    segments = engine.placement.segments
    alive = []
    for turn in range(120):
        if turn < 90 and chance.random() < 0.2:
            start = prompt_of(chance.choice([64, 128]), seed=chance.choice([30, 31]))
            prompt = start + prompt_of(chance.randrange(10, 200), seed=turn)
            mass = chance.choice([None, 0.7, 1.0])
            sampling = SamplingParams(**GREEDY, attention_mass=mass)
            alive.append(shared.submit(prompt, sampling))
        if alive and chance.random() < 0.05:
            engine.cancel(alive.pop(chance.randrange(len(alive))))
        engine.step()
        if chance.random() < 0.05:
            engine.preempt_all()
        held = {}
        for sequence in engine.placement.running:
            assert len(sequence.segments) * SEGMENT + WINDOW <= max(sequence.num_computed, WINDOW)
            assert not sequence.segments or sequence.attention_mass < 1
            for entry in sequence.segments:
                held[entry] = held.get(entry, 0) + 1
        refs = {e: n for e, n in enumerate(segments.entries._refs) if n}
        assert held == refs
        free = [digest for e, digest in segments.entries._hash_of.items() if e not in held]
        assert all(engine.pool.knows(digest) for digest in free)
    shared.run()
    shared.assert_idle()


def test_decodes_by_kernels_have_a_shape_that_chooses_nothing(module, shared):
    """Others find out on the device, and need none."""
    shapes = sparse_bench(module, attention_backend="pallas-xla").engine.runner.spec.shapes
    table = shapes.all_shapes()
    assert {s.rows for s in table if not s.num_segments} == set(shapes.row_buckets)
    assert {s.rows for s in table if s.num_segments and not s.prefill} == set(shapes.row_buckets)
    assert all(s.num_segments for s in table if s.prefill)
    assert all(len(s.plans) == (2 if s.num_segments else 1) for s in table)
    assert all(s.num_segments for s in shared.engine.runner.spec.shapes.all_shapes())


@pytest.mark.slow
def test_kernels_choose_nothing_in_steps_that_read_everything(module, plain, monkeypatch):
    """As soon as one row leaves something unread, all rows take the other step."""
    bench = sparse_bench(module, attention_backend="pallas-xla")
    runner, shapes = bench.engine.runner, []
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda packed: (shapes.append(packed.shape), run(packed))[1])
    prompts = [prompt_of(150, seed=32), prompt_of(150, seed=33)]
    short = GREEDY | {"max_tokens": 5}

    def decodes(*masses):
        shapes.clear()
        ways = [SamplingParams(**short, attention_mass=mass) for mass in masses]
        outputs = bench.generate(prompts[: len(masses)], ways)
        return outputs, {bool(shape.num_segments) for shape in shapes if not shape.prefill}

    (whole,), kinds = decodes(1.0)
    assert kinds == {False}
    expected = plain.complete(prompts[0], **short)
    assert tokens(whole) == tokens(expected)
    np.testing.assert_allclose(logprobs(whole), logprobs(expected), atol=1e-5)
    before = figures(bench)
    assert decodes(0.9)[1] == {True}
    read, there, *_ = figures(bench) - before
    assert 0 < read < there
    (beside, _), kinds = decodes(1.0, 0.9)
    assert True in kinds
    assert tokens(beside) == tokens(expected)


def test_warm_up_compiles_what_clusters(shared):
    runner = shared.engine.runner
    assert runner._cluster_program in runner._all_programs()
    assert "cluster" in runner.programs


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up(module):
    bench = sparse_bench(
        module, max_num_seqs=1, max_num_batched_tokens=32, enforce_no_recompile=True
    )
    bench.engine.runner.warm_up()
    count = bench.metrics.num_compilations
    for mass in (0.9, 0.5, 1.0):
        output = bench.complete(prompt_of(150, seed=25), **GREEDY, attention_mass=mass)
        assert len(tokens(output)) == 40
    assert bench.metrics.num_compilations == count


def test_the_engine_without_it_is_as_it_was(plain):
    runner = plain.engine.runner
    assert runner.spec.sparse is None
    assert runner.spec.shapes.num_segments == 0
    assert not any("segment" in name for name in runner.spec.shapes.all_shapes()[0].fields())
    assert runner._clusters == ()
    assert plain.engine.placement.segments is None


# What cannot be ------------------------------------------------------------------------------


def test_a_share_needs_an_index(plain):
    name = plain.submit([1, 2, 3], SamplingParams(max_tokens=1, attention_mass=1.0))
    plain.run()
    assert not plain.errors(name)
    with pytest.raises(RequestError, match=r"--sparse-attention p=0\.9") as caught:
        plain.submit([1, 2, 3], SamplingParams(max_tokens=1, attention_mass=0.9))
    assert caught.value.param == "attention_mass"


@pytest.mark.parametrize("mass", [0, 1.01, -1, float("nan"), True, "0.5"])
def test_shares_out_of_range_are_refused(mass):
    with pytest.raises(RequestError, match=r"attention_mass must be in \(0, 1\]") as caught:
        SamplingParams(attention_mass=mass)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_backend": "reference"}, "works with attention_backend xla or llvm or pallas"),
        ({"batch_invariant": True}, "batch_invariant cannot be kept"),
        ({"block_size": 24}, r"multiple of block_size \(24\), got 64; use 72"),
        ({"sparse_attention": "p=0.9,segment=64,dense_layers=2"}, "finds no layer"),
        ({"sparse_attention": "p=1.5"}, "p must be above 0 and at most 1, got 1.5"),
        ({"sparse_attention": "mass=0.5"}, "has no key 'mass'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(module, changes, message):
    with pytest.raises(ConfigError, match=message):
        sparse_bench(module, **changes)


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.skipif(not cpu_kernels.is_available(), reason="takes too long without llvmlite")
def test_the_promise_on_a_real_model(default_model, shared_data):
    """At p = 0.9 the model reads fewer tokens, and 95 % of heads hold what was promised."""
    from benchmarks.rooms.sparse import texts

    settings = "p=0.9,min_context=1024,segment=512,max_share=1,measure_every=1"
    with LLM(
        str(default_model), sparse_attention=settings, max_model_len=2048, max_num_seqs=1
    ) as llm:
        names = ("articles", "functions")
        for ids in texts.documents(llm.get_tokenizer(), 1800, shared_data, names).values():
            output = llm.generate(
                {"prompt_token_ids": ids.tolist()},
                SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
            )
            assert len(output[0].outputs[0].token_ids) == 24
        made = llm.metrics
    assert made.measured_heads == 2 * 23 * 28 * 9
    assert made.missed_heads <= 0.05 * made.measured_heads
    assert made.sparse_tokens_read < 0.6 * made.sparse_tokens_there
