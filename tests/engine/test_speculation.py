"""Speculative decoding: the same tokens in fewer steps, and no trace of what was wrong."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.numpy
from scipy import stats

from jaxserve.core.errors import ConfigError
from jaxserve.core.event import FinishReason
from jaxserve.core.request import SamplingParams
from jaxserve.core.structured import StructuredOutputsParams
from jaxserve.engine import batcher
from jaxserve.engine.llm import LLM
from jaxserve.grammar.compiler import MAX_ROW_ITEMS
from jaxserve.scheduling.fcfs import FcfsScheduler
from tests import plain
from tests.cases import quick, slow
from tests.tiny import Bench, tiny_module, write_tiny_model

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 4,
}
PROMPTS = [[*range(40, 71)] * 2, [5, 6, 7] * 9, [*range(100, 130)], [9]]
KINDS = {
    "greedy": {"temperature": 0, "logprobs": 3},
    "warm": {"temperature": 1.0, "seed": 3, "logprobs": 0},
    "penalties": {
        "temperature": 0.8, "seed": 1, "repetition_penalty": 1.2, "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
    },
    "filters": {"temperature": 0.9, "seed": 5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "bias": {"temperature": 0.7, "seed": 2, "logit_bias": {7: 4.0, 9: -3.0}},
    "min_tokens": {"temperature": 0, "min_tokens": 9, "ignore_eos": False},
    "prompt": {"temperature": 0, "prompt_logprobs": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


class Prompter:
    """Drafts what it is told to, right up to a chosen place and wrong from there on."""

    def __init__(self, answers, *, wrong_every=0):
        self._answers = [list(answer) for answer in answers]
        self._wrong_every = wrong_every

    def __call__(self, tokens, count):
        for answer in self._answers:
            if answer[: len(tokens)] == list(tokens):
                drafts = answer[len(tokens) : len(tokens) + count]
                drafts += [1] * (count - len(drafts))
                every = self._wrong_every
                places = range(len(tokens), len(tokens) + count)
                return [
                    (d + 1) % 250 if every and i % every == 0 else d
                    for i, d in zip(places, drafts, strict=True)
                ]
        return []


def told(bench, prompter):
    """Let a bench draft what a prompter says; None gives it its own drafts back."""
    speculator = bench.engine._speculator
    vars(speculator).pop("_propose", None)
    if prompter is None:
        return bench

    def propose(state, sequence):
        state.proposal_len = len(sequence.token_ids)
        state.proposal = prompter(sequence.token_ids, speculator._num_tokens + 1)
        return state.proposal

    speculator._propose = propose
    return bench


def eager(source, **settings):
    """A bench that drafts whatever it may, at no cost."""
    scheduler = FcfsScheduler(draft_cost=1e-9)
    return Bench(source, speculative_config=NGRAM, scheduler=scheduler, **settings)


def figures(output):
    one = output.outputs[0]
    entries = [*(one.logprobs or []), *(e for e in output.prompt_logprobs or [] if e)]
    return (
        one.token_ids,
        one.text,
        one.finish_reason,
        one.stop_reason,
        [(token, value.rank) for entry in entries for token, value in entry.items()],
    ), [value.logprob for entry in entries for value in entry.values()]


def assert_same(found, expected):
    for one, two in zip(found, expected, strict=True):
        (facts, values), (known, golden) = figures(one), figures(two)
        assert facts == known
        np.testing.assert_allclose(values, golden, atol=1e-4)


# The same tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        slow({}),
        {"kv_layout": "pages", "async_scheduling": False},
        slow({"max_num_batched_tokens": 9, "num_gpu_blocks_override": 26}),
        {"attention_backend": "pallas"},
        slow(
            {
                "attention_backend": "pallas",
                "max_num_batched_tokens": 9,
                "num_gpu_blocks_override": 26,
            }
        ),
    ],
    ids=["slots", "pages", "tight", "pallas", "tight pallas"],
)
def test_tokens_are_those_of_plain_decoding(module, settings, expected):
    """Drafts right and wrong in turn, whoever else is in the batch, also when preempted."""
    prompts, params, outputs = expected
    answers = [[*p, *o.outputs[0].token_ids] for p, o in zip(prompts, outputs, strict=True)]
    bench = eager(module, **settings)
    metrics = bench.metrics
    for wrong_every in (0, 3):
        told(bench, Prompter(answers, wrong_every=wrong_every))
        assert_same(bench.generate(prompts, params), outputs)
        bench.assert_idle()
        assert metrics.num_accepted_tokens
        assert (metrics.num_accepted_tokens < metrics.num_draft_tokens) == bool(wrong_every)
    assert bool(metrics.num_preemptions) == ("num_gpu_blocks_override" in settings)


@pytest.fixture(scope="module")
def expected(module):
    """What plain decoding says."""
    params = [SamplingParams(max_tokens=30, **{"ignore_eos": True} | k) for k in KINDS.values()]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    return prompts, params, Bench(module).generate(prompts, params)


def test_tokens_agree_with_a_model_without_any_cache(module):
    bench = Bench(module, speculative_config=NGRAM)
    oracle = plain.DenseLoop(bench.graph, bench.params)
    for params in (
        SamplingParams(max_tokens=60, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0.5, seed=9, top_k=5, ignore_eos=True),
    ):
        output = bench.generate([PROMPTS[1]], [params])[0].outputs[0]
        assert output.token_ids == oracle.complete(PROMPTS[1], params)[0]
    assert bench.metrics.num_accepted_tokens > 10


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "pallas"])
def test_windows_and_soft_caps_see_drafts_as_they_see_tokens(backend):
    module = tiny_module(
        model_type="gemma2", sliding_window=16, query_pre_attn_scalar=8,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    params = [SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, logprobs=1)]
    expected = Bench(module, max_num_seqs=1).generate(PROMPTS[:1], params)
    answers = [[*PROMPTS[0], *expected[0].outputs[0].token_ids]]
    bench = eager(module, max_num_seqs=1, attention_backend=backend)
    drafted = told(bench, Prompter(answers, wrong_every=7))
    assert_same(drafted.generate(PROMPTS[:1], params), expected)
    assert drafted.metrics.num_accepted_tokens > 15


# The same distribution ---------------------------------------------------------------------------

VOCAB, DEPTH, DRAWS, LEVEL = 24, 3, 1500, 1e-4
START = [3, 4, 5, 3, 4]
DISTRIBUTIONS = {
    "warm": {"temperature": 1.3, "top_k": 5},
    "everything": {
        "temperature": 1.1, "top_k": 6, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2,
        "frequency_penalty": 0.4, "presence_penalty": 0.3, "logit_bias": {5: 1.0, 9: -1.0},
    },
}  # fmt: skip


def exact(bench, params):
    """Return the probability of every possible run of tokens, in float64."""
    oracle = plain.DenseLoop(bench.graph, bench.params, length=32)
    table = {(): 1.0}
    for _ in range(DEPTH):
        grown = {}
        for run, chance in table.items():
            raw = oracle.logits([*START, *run])[-1]
            scaled = plain.penalize(raw, params, START, run) / params.temperature
            stay = plain.kept(scaled, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
            values = np.exp(plain.log_softmax(np.where(stay, scaled, -np.inf)))
            grown |= {(*run, int(t)): chance * values[t] for t in np.flatnonzero(values)}
        table = grown
    return table


def chi_square(table, runs):
    """Return the p-value of some draws; cells that expect fewer than five are one cell."""
    seen = dict.fromkeys(table, 0)
    for run in runs:
        assert run in seen, f"{run} has no chance at all"
        seen[run] += 1
    rare = [run for run, chance in table.items() if chance * len(runs) < 5]
    cells = [([run]) for run in table if run not in set(rare)] + ([rare] if rare else [])
    expected = np.asarray([sum(table[r] for r in cell) for cell in cells])
    observed = np.asarray([sum(seen[r] for r in cell) for cell in cells])
    expected = expected / expected.sum()
    return stats.chisquare(observed, expected * len(runs)).pvalue, cells


def power(table, other, cells):
    """Chance that the test rejects draws of another distribution at its level."""
    p, q = (np.asarray([sum(t.get(r, 0) for r in cell) for cell in cells]) for t in (table, other))
    limit = stats.chi2.ppf(1 - LEVEL, len(cells) - 1)
    return 1 - stats.ncx2.cdf(limit, len(cells) - 1, DRAWS * float(((q - p) ** 2 / p).sum()))


def following(table, run):
    """Return the probability of each token behind a run."""
    chances = {}
    for longer, chance in table.items():
        if longer[: len(run)] == run:
            chances[longer[len(run)]] = chances.get(longer[len(run)], 0) + chance
    total = sum(chances.values())
    return {token: chance / total for token, chance in chances.items()}


def guess(table, run):
    """Draft the token whose chance is nearest to a half, so that many drafts are rejected."""
    chances = following(table, run)
    return min(chances, key=lambda token: abs(chances[token] - 0.5))


def draw_again(table):
    """The distribution of the mistake to draw from all tokens behind a rejected draft."""
    wrong = {}
    for run in table:
        chance = following(table, ())[run[0]]
        for place in range(1, DEPTH):
            chances, draft = following(table, run[:place]), guess(table, run[:place])
            hit = chances[draft]
            chance *= hit * (run[place] == draft) + (1 - hit) * chances[run[place]]
        wrong[run] = chance
    return wrong


def draws(module, params, table):
    """Draw with drafts behind every beginning, and return the runs."""
    drafts = {}
    for run in {longer[:1] for longer in table}:
        second = guess(table, run)
        drafts[run] = [second, guess(table, (*run, second))]

    def propose(tokens, count):
        return (drafts.get(tuple(tokens[len(START) :]), []) + [1] * count)[:count]

    bench = told(
        eager(module, max_num_seqs=16, max_num_batched_tokens=128, max_model_len=64), propose
    )
    asked = [params.replace(seed=s, max_tokens=DEPTH, ignore_eos=True) for s in range(DRAWS)]
    outputs = []
    for low in range(0, DRAWS, 16):  # who waits would displace the drafts of who runs
        outputs += bench.generate([START] * len(asked[low : low + 16]), asked[low : low + 16])
    metrics = bench.metrics
    assert metrics.num_drafts > 0.9 * DRAWS
    assert 0.2 < metrics.num_accepted_tokens / metrics.num_draft_tokens < 0.8
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def small():
    return tiny_module(vocab_size=VOCAB, eos_token_id=VOCAB - 1)


@pytest.mark.parametrize("kind", quick(DISTRIBUTIONS, "everything"))
def test_samples_follow_the_exact_distribution(small, kind):
    """Chi-square over runs of three tokens, 1,500 draws, level 1e-4.

    Its power against drawing anew from all tokens behind a rejected draft is above 0.99, as
    computed here from the two distributions.
    """
    params = SamplingParams(**DISTRIBUTIONS[kind])
    table = exact(Bench(small, max_model_len=64), params)
    p_value, cells = chi_square(table, draws(small, params, table))
    assert power(table, draw_again(table), cells) > 0.99
    assert p_value > LEVEL


def test_the_same_test_finds_a_wrong_rule(small, monkeypatch):
    """The control: places behind drafts reuse the random number of the first."""
    right = batcher._fill_place

    def reuse(fields, place, sequence, position):
        is_draft = place >= len(fields["sample_index"])
        right(fields, place, sequence, sequence.num_output if is_draft else position)

    monkeypatch.setattr(batcher, "_fill_place", reuse)
    params = SamplingParams(**DISTRIBUTIONS["warm"])
    table = exact(Bench(small, max_model_len=64), params)
    p_value, _ = chi_square(table, draws(small, params, table))
    assert p_value < LEVEL


# What ends a completion in the midst of an accepted run ------------------------------------------


@pytest.fixture(scope="module")
def pair(folder):
    return Bench(folder), eager(folder)


@pytest.mark.parametrize("cut", range(1, 9))
def test_ends_inside_an_accepted_run_are_ends(pair, cut):
    plainly, drafted = pair
    free = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logit_bias={258: -100.0})
    (whole,) = plainly.generate([PROMPTS[2]], [free])
    ids, text = whole.outputs[0].token_ids, whole.outputs[0].text
    told(drafted, Prompter([[*PROMPTS[2], *ids]]))
    enders = [
        {"max_tokens": cut},
        {"stop_token_ids": [ids[cut]]},
        {"stop_token_ids": [ids[cut]], "min_tokens": cut + 3},
        {"stop": [text[cut : cut + 2] or "?"], "include_stop_str_in_output": bool(cut % 2)},
    ]
    for ender in enders:
        params = [free.replace(logprobs=1, **ender)]
        before = drafted.metrics.num_accepted_tokens
        expected = plainly.generate([PROMPTS[2]], params)
        assert_same(drafted.generate([PROMPTS[2]], params), expected)
        counted = drafted.metrics.num_accepted_tokens - before
        assert counted <= len(expected[0].outputs[0].token_ids)
        drafted.assert_idle()


def test_grammars_hold_over_drafts(pair):
    """Drafts that the grammar forbids, allows, and after which only the end is allowed."""
    plainly, drafted = pair
    told(drafted, None)
    before = drafted.metrics.num_accepted_tokens
    schema = {
        "type": "array", "minItems": 3, "maxItems": 3,
        "items": {"type": "object", "properties": {"name": {"enum": ["anna", "anton"]}},
                  "required": ["name"], "additionalProperties": False},
    }  # fmt: skip
    params = [
        SamplingParams(
            max_tokens=200, temperature=t, seed=4,
            structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=True),
        )
        for t in (0.0, 1.0)
    ]  # fmt: skip
    expected = plainly.generate([PROMPTS[0]] * 2, params)
    assert_same(drafted.generate([PROMPTS[0]] * 2, params), expected)
    for output in expected:
        assert len(json.loads(output.outputs[0].text)) == 3
    assert drafted.metrics.num_accepted_tokens - before > 20
    answers = [[*PROMPTS[0], *o.outputs[0].token_ids] for o in expected]
    for every in (0, 4):
        told(drafted, Prompter(answers, wrong_every=every))
        assert_same(drafted.generate([PROMPTS[0]] * 2, params), expected)


def test_a_grammar_that_fails_behind_a_draft_ends_its_request_as_without_drafts(pair):
    """Nothing is drawn where no mask can be written, and the neighbour notices nothing."""
    plainly, drafted = pair
    wide = " | ".join(f'"x{i}"' for i in range(MAX_ROW_ITEMS + 1))
    grammar = StructuredOutputsParams(grammar=f"start: /[ab]/ /[ab]/ /[ab]/ wide\nwide: {wide}")
    bad = SamplingParams(max_tokens=40, temperature=0, structured_outputs=grammar)
    good = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)

    def run(bench):
        names = [bench.submit(PROMPTS[0], bad), bench.submit(PROMPTS[1], good)]
        bench.run(steps=10**9)
        bench.assert_idle()
        tokens = [token for event in bench.events[names[0]] for token in event.token_ids]
        return tokens, bench.errors(names[0]), bench.outputs[names[1]].outputs[0].token_ids

    expected = run(plainly)
    tokens, (error,), _ = expected
    assert tokens == [tokens[0]] * 2  # the third, which nothing can follow, may not be reported
    assert "cannot be followed beyond 3 output tokens" in error
    line = [*tokens, tokens[0]]
    for answer in ([*line, *b"x1"], line, tokens, [tokens[0], 7]):
        told(drafted, Prompter([[*PROMPTS[0], *answer]]))
        found, errors, others = run(drafted)
        assert (found[:2], errors, others) == (tokens, [error], expected[2])
        assert len(found) <= len(line)


# No trace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [slow("slots"), "pages"])
def test_rejected_drafts_hold_no_pages_and_name_no_prefix(module, layout):
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    plainly = Bench(module, kv_layout=layout)
    answer = plainly.generate([PROMPTS[2]], [params])[0].outputs[0].token_ids
    bench = told(eager(module, kv_layout=layout), Prompter([[*PROMPTS[2], *answer]], wrong_every=3))
    engine, size = bench.engine, bench.engine.pool.page_size
    name = bench.submit(PROMPTS[2], params)
    checked = 0
    while not bench.outputs[name].finished:
        engine.step()
        for sequence in engine._sequences.values():
            if engine._in_flight is None or not engine._in_flight.has_drafts:
                assert len(sequence.pages) == -(-sequence.num_computed // size)
                checked += 1
    assert checked
    assert engine.pool.num_cached == plainly.engine.pool.num_cached
    longer = [*PROMPTS[2], *answer, 8, 9]
    found = bench.generate([longer], [params])[0]
    expected = plainly.generate([longer], [params])[0]
    assert found.num_cached_tokens == expected.num_cached_tokens > len(PROMPTS[2])
    assert_same([found], [expected])


def test_cancelling_while_drafts_are_verified_frees_everything(module):
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    answer = Bench(module).generate([PROMPTS[2]], [params])[0].outputs[0].token_ids
    bench = told(eager(module), Prompter([[*PROMPTS[2], *answer]]))
    name = bench.submit(PROMPTS[2], params)
    for _ in range(6):
        bench.engine.step()
    assert bench.engine._in_flight.has_drafts
    bench.engine.cancel(name)
    bench.engine.step()
    bench.assert_idle()
    bench.run()
    assert bench.events[name][-1].finish_reason is FinishReason.ABORT
    got = bench.outputs[name].outputs[0].token_ids
    assert got == answer[: len(got)]


def test_resumed_completions_go_on_with_the_same_tokens(module):
    params = SamplingParams(max_tokens=40, temperature=0.6, seed=4, top_k=4, ignore_eos=True)
    whole = Bench(module).generate([PROMPTS[1]], [params])[0].outputs[0].token_ids
    bench = told(eager(module), Prompter([[*PROMPTS[1], *whole]], wrong_every=5))
    for cut in (1, 7, 20, 39):
        name = bench.submit(PROMPTS[1], params, output_token_ids=tuple(whole[:cut]))
        bench.run()
        assert bench.outputs[name].outputs[0].token_ids == whole[cut:]


def test_new_weights_between_steps_with_drafts(module):
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    with LLM(module, speculative_config=NGRAM, max_model_len=512, max_num_seqs=2) as llm:
        first = llm.generate([PROMPTS[1]], params, use_tqdm=False)[0]
        other = jax.tree.map(lambda x: x * 1.25, llm.params)
        update = llm.update_params(other, version="2")
        assert update is not None
        found = llm.generate([PROMPTS[1]], params, use_tqdm=False)[0]
        with LLM((llm.model_config, other), max_model_len=512, max_num_seqs=2) as fresh:
            expected = fresh.generate([PROMPTS[1]], params, use_tqdm=False)[0]
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    assert found.outputs[0].token_ids != first.outputs[0].token_ids
    assert found.outputs[0].spec_decode_metrics.num_accepted_tokens
    assert [span.version for span in found.outputs[0].weight_versions] == ["2"]


# The loop and its figures ------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(module):
    bench = Bench(
        module, speculative_config=NGRAM | {"num_speculative_tokens": 2}, max_num_seqs=2,
        max_num_batched_tokens=32, enforce_no_recompile=True, num_gpu_blocks_override=20,
    )  # fmt: skip
    bench.engine.runner.warm_up()
    params = [SamplingParams(max_tokens=40, ignore_eos=True, **k) for k in KINDS.values()
              if "ignore_eos" not in k]  # fmt: skip
    outputs = bench.generate([PROMPTS[1]] * len(params), params)
    assert all(len(output.outputs[0].token_ids) == 40 for output in outputs)
    assert bench.metrics.num_drafts


def test_steps_overlap_until_a_draft_is_wanted(module):
    """Text that never repeats itself keeps the loop as it is without speculation."""
    bench = told(eager(module), lambda _tokens, _count: [])
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    bench.submit(PROMPTS[2], params)
    ahead = []
    while bench.engine.has_work:
        bench.engine.step()
        ahead.append(bench.engine.is_busy)
    assert all(ahead[:-1])
    assert len(ahead) == 21
    assert bench.metrics.num_drafts == 0


def test_requests_whose_drafts_fail_stop_drafting_and_may_begin_again(module):
    params = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
    answer = Bench(module).generate([PROMPTS[2]], [params])[0].outputs[0].token_ids
    whole = [*PROMPTS[2], *answer]
    bad = Prompter([whole], wrong_every=1)

    def propose(tokens, count):  # wrong for 200 tokens, right for the rest
        return (bad if len(tokens) < 230 else Prompter([whole]))(tokens, count)

    bench = told(Bench(module, speculative_config=NGRAM), propose)
    name = bench.submit(PROMPTS[2], params)
    drafts = {}
    while not bench.outputs[name].finished:
        bench.engine.step()
        drafts[len(bench.outputs[name].outputs[0].token_ids)] = bench.metrics.num_draft_tokens
    assert bench.outputs[name].outputs[0].token_ids == answer
    late = [count for length, count in drafts.items() if 100 < length < 195]
    assert late[-1] == late[0], "still drafting what is never right"
    assert drafts[max(drafts)] > late[-1], "never began again"
    assert bench.metrics.num_accepted_tokens > 40


def test_figures_of_drafts_add_up(module):
    params = SamplingParams(max_tokens=21, temperature=0, ignore_eos=True)
    answer = Bench(module).generate([PROMPTS[2]], [params])[0].outputs[0].token_ids
    bench = told(eager(module), Prompter([[*PROMPTS[2], *answer]]))
    (output,) = bench.generate([PROMPTS[2]], [params])
    found, metrics = output.outputs[0].spec_decode_metrics, bench.metrics
    assert found == output.metrics.spec_decode
    assert found.num_drafts == metrics.num_drafts == 4
    assert found.num_draft_tokens == metrics.num_draft_tokens == 16
    assert found.acceptance_histogram == (0, 0, 0, 0, 4)
    assert found.mean_acceptance_length == 5
    assert found.draft_acceptance_rate == 1
    assert metrics.accepted_per_position == [4, 4, 4, 4]
    assert metrics.generation_tokens == 21
    page = metrics.render("m", aliases=["vllm"])
    for prefix in ("jaxserve", "vllm"):
        labels = '{engine="0",model_name="m"'
        assert f"{prefix}:spec_decode_num_drafts_total{labels}}} 4.0" in page
        assert f"{prefix}:spec_decode_num_draft_tokens_total{labels}}} 16.0" in page
        assert f"{prefix}:spec_decode_num_accepted_tokens_total{labels}}} 16.0" in page
        name = f"{prefix}:spec_decode_num_accepted_tokens_per_pos_total"
        assert f'{name}{labels},position="3"}} 4.0' in page
    assert "spec_decode" not in Bench(module).metrics.render("m")
    (quiet,) = Bench(module).generate([PROMPTS[2]], [params])
    assert quiet.outputs[0].spec_decode_metrics is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_invariant": True}, "batch_invariant needs steps of one shape"),
        ({"runner": "pooling"}, "runner='pooling' generates none"),
        ({"max_num_batched_tokens": 4}, "num_speculative_tokens=4 does not fit into a step"),
    ],
)
def test_what_cannot_go_together_is_refused(module, settings, message):
    with pytest.raises(ConfigError, match=message):
        Bench(module, speculative_config=NGRAM, **settings)


def test_a_policy_that_grants_too_much_is_taken_at_its_least(module):
    """Drafts for prefills, for tokens in flight, for the last token, and more than offered."""

    class Generous(FcfsScheduler):
        def plan(self, view):
            plan = super().plan(view)
            work = tuple(replace(item, num_draft=99) for item in plan.work)
            return replace(plan, work=work)

    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 20, 33)]
    expected = Bench(module).generate(PROMPTS[:3], params)
    bench = Bench(module, speculative_config=NGRAM, scheduler=Generous())
    assert_same(bench.generate(PROMPTS[:3], params), expected)
    bench.assert_idle()


# Draft models ----------------------------------------------------------------------------------


def drafting(folder, draft, count=3, **settings):
    config = {"model": str(draft), "num_speculative_tokens": count}
    scheduler = FcfsScheduler(draft_cost=1e-9)
    return Bench(folder, speculative_config=config, scheduler=scheduler, **settings)


@pytest.fixture(scope="module")
def doubtful(folder, tmp_path_factory):
    """A draft model that is often right: the model itself, disturbed."""
    place = tmp_path_factory.mktemp("draft") / "model"
    shutil.copytree(folder, place)
    weights = safetensors.numpy.load_file(place / "model.safetensors")
    random = np.random.default_rng(3)
    noisy = {
        name: value + 0.03 * random.standard_normal(value.shape).astype(np.float32)
        for name, value in weights.items()
    }
    safetensors.numpy.save_file(noisy, place / "model.safetensors")
    return place


@pytest.mark.parametrize(
    "settings",
    [
        {},
        slow({"kv_layout": "pages", "async_scheduling": False}),
        slow({"max_num_batched_tokens": 9, "num_gpu_blocks_override": 16}),
    ],
    ids=["slots", "pages", "tight"],
)
def test_the_model_itself_drafts_without_a_mistake(folder, settings):
    """Chunked, from the prefix cache, preempted, moved: the draft model has seen the same."""
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (30, 9, 24, 40)]
    expected = Bench(folder).generate(PROMPTS, params)
    bench = drafting(folder, folder, max_num_seqs=2, **settings)
    for _ in range(2):
        assert_same(bench.generate(PROMPTS, params), expected)
        bench.assert_idle()
    metrics = bench.metrics
    assert metrics.num_draft_tokens > 50
    assert metrics.num_accepted_tokens == metrics.num_draft_tokens
    assert bool(metrics.num_preemptions) == ("num_gpu_blocks_override" in settings)


def test_another_model_drafts_some_mistakes_and_changes_nothing(folder, doubtful):
    params = [SamplingParams(max_tokens=40, **{"ignore_eos": True} | k) for k in KINDS.values()]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    expected = Bench(folder).generate(prompts, params)
    bench = drafting(folder, doubtful, max_num_seqs=2)
    assert_same(bench.generate(prompts, params), expected)
    metrics = bench.metrics
    assert 0.1 < metrics.num_accepted_tokens / metrics.num_draft_tokens < 0.95


def test_drafts_are_what_the_draft_model_would_say(folder, doubtful):
    """After every rejection as well, by an oracle without a cache."""
    bench = drafting(folder, doubtful)
    draft = Bench(doubtful)
    oracle = plain.DenseLoop(draft.graph, draft.params, length=128)
    runner, seen = bench.engine.runner, []
    inner = runner.draft

    def watched(rows, positions, pages, count):
        found = inner(rows, positions, pages, count)
        (sequence,) = bench.engine._sequences.values()
        seen.append((list(sequence.token_ids), found[0].tolist()))
        return found

    runner.draft = watched
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=3, top_k=4, ignore_eos=True)
    bench.generate([PROMPTS[2]], [params])
    assert 0 < bench.metrics.num_accepted_tokens < bench.metrics.num_draft_tokens
    for tokens, drafts in seen:
        for token in drafts:
            assert token == int(np.argmax(oracle.logits(tokens)[-1]))
            tokens.append(token)


@pytest.mark.slow
def test_draft_models_compile_nothing_late(folder, doubtful):
    bench = drafting(
        folder, doubtful, 2, max_num_seqs=2, max_num_batched_tokens=32, enforce_no_recompile=True,
        num_gpu_blocks_override=20,
    )  # fmt: skip
    bench.engine.runner.warm_up()
    params = [SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)] * 4
    assert all(o.finished for o in bench.generate([PROMPTS[1]] * 4, params))
    assert bench.metrics.num_drafts


def test_sleeping_and_waking_keep_both_caches(folder):
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    settings = {
        "speculative_config": {"model": str(folder), "num_speculative_tokens": 3},
        "scheduler": FcfsScheduler(draft_cost=1e-9),
        "max_model_len": 256,
        "max_num_seqs": 1,
    }
    with LLM(folder, **settings) as llm:
        first = llm.generate([PROMPTS[2]], params, use_tqdm=False)[0]
        llm.sleep(1)
        llm.wake_up()
        again = llm.generate([PROMPTS[2]], params, use_tqdm=False)[0]
    assert first.outputs[0].token_ids == again.outputs[0].token_ids
    assert again.outputs[0].spec_decode_metrics.draft_acceptance_rate == 1


def test_draft_models_of_another_vocabulary_are_refused(folder, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    with pytest.raises(ConfigError, match="draft model has 100 positions, but max_model_len is"):
        drafting(folder, place)
    text = (place / "tokenizer.json").read_text()
    (place / "config.json").write_text(json.dumps(config))
    (place / "tokenizer.json").write_text(
        text.replace('"a":', '"tmp":').replace('"b":', '"a":').replace('"tmp":', '"b":')
    )
    with pytest.raises(ConfigError, match=r"the draft model's token \d+ is b'.', the model's is"):
        drafting(folder, place)
    with pytest.raises(ConfigError, match="a vocabulary of 259 tokens, the model one of 300"):
        drafting(tiny_module(), folder)
