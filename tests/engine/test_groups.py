"""Groups of devices with tokens and a cache of their own: the same outputs as on one device."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import LLM
from jaxserve.core.cost_buckets import BucketCost
from jaxserve.core.request import SamplingParams
from jaxserve.core.structured import StructuredOutputsParams
from jaxserve.engine.measure import Effort, measure_engine
from jaxserve.engine.shapes import PackedStep
from tests.cases import slow
from tests.tiny import Bench, write_tiny_model

GOLDEN = Path(__file__).resolve().parents[1] / "oracles" / "golden" / "models"
EXPERTS = GOLDEN / "qwen3_moe_plain"
GROUPS = {"data_parallel_size": 4, "tensor_parallel_size": 2}
SHORT = {"load_format": "safetensors", "max_model_len": 128}
SPREAD = {**GROUPS, **SHORT, "enable_expert_parallel": True}
SERVERS = {"devices_per_server": 2}
WIDE = {"data_parallel_size": 8}
COUNT = 10
_RANDOM = np.random.default_rng(5)


def _prompt(length: int) -> list[int]:
    return _RANDOM.integers(0, 60, length).tolist()


def _params(**settings: object) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": COUNT, "ignore_eos": True, "logprobs": 2, "detokenize": False} | settings
    )


SHARED = _prompt(40)
CASES = [
    (_prompt(21), _params(temperature=0)),
    (_prompt(90), _params(temperature=0, max_tokens=3)),
    ([*SHARED, *_prompt(5)], _params(temperature=0, repetition_penalty=1.3, presence_penalty=0.4)),
    (_prompt(9), _params(temperature=0, logit_bias={7: 3.0, 8: -100, 9: 2.5})),
    (_prompt(33), _params(seed=11)),
    ([*SHARED, *_prompt(17)], _params(seed=-5, temperature=0.8, top_p=0.9, top_k=40)),
    (_prompt(1), _params(seed=2**62, allowed_token_ids=list(range(10, 40)))),
    (_prompt(30), _params(seed=3, n=3)),
    (_prompt(12), _params(temperature=0, stop_token_ids=list(range(30)), min_tokens=4)),
    (_prompt(26), _params(temperature=0, prompt_logprobs=2)),
    ([*SHARED, *_prompt(2)], _params(temperature=0)),
]


def run_all(bench: Bench) -> list[list[tuple[list[int], np.ndarray, list[float]]]]:
    """Complete all cases side by side; tokens, their log-probabilities, those of the prompt."""
    outputs = bench.generate([case[0] for case in CASES], [case[1] for case in CASES])
    bench.assert_idle()
    return [
        [
            (
                list(one.token_ids),
                np.array([
                    entry[token].logprob
                    for entry, token in zip(one.logprobs, one.token_ids, strict=True)
                ]),
                [
                    entry[token].logprob
                    for entry, token in zip(
                        (output.prompt_logprobs or [])[1:], output.prompt_token_ids[1:],
                        strict=False,
                    )
                ],
            )
            for one in output.outputs
        ]
        for output in outputs
    ]  # fmt: skip


def assert_same(found, wanted) -> None:
    for one, other in zip(found, wanted, strict=True):
        for (tokens, scores, of_prompt), (right, close, near) in zip(one, other, strict=True):
            assert tokens == right
            np.testing.assert_allclose(scores, close, rtol=0, atol=1e-4)
            np.testing.assert_allclose(of_prompt, near, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(folder):
    return run_all(Bench(folder))


@pytest.fixture(scope="module")
def experts_alone():
    return run_all(Bench(EXPERTS, **SHORT))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        slow({"async_scheduling": False, "max_num_batched_tokens": 16}),
        {"kv_layout": "pages", "max_num_seqs": 11},
        slow({"enable_prefix_caching": False, "tensor_parallel_size": 1}),
        {"attention_backend": "pallas-xla", "max_num_seqs": 8},
        slow({"batch_invariant": True}),
        slow({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}),
    ],
)
def test_groups_give_what_one_device_gives(folder, alone, settings) -> None:
    assert_same(run_all(Bench(folder, **GROUPS | settings)), alone)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        slow({"tensor_parallel_size": 1, "data_parallel_size": 8, "kv_layout": "pages"}),
        slow({"enable_expert_parallel": False, "max_num_seqs": 9}),
        slow({**SERVERS, "all_to_all_backend": "dense"}),
        slow({**SERVERS, "all_to_all_backend": "rotation", "all_to_all_dedup": False}),
        {
            **SERVERS, "all_to_all_backend": "flash", "enable_eplb": True,
            "eplb_step_interval": 3, "num_redundant_experts": 8,
        },
    ],
)  # fmt: skip
def test_experts_serve_the_tokens_of_all_groups(experts_alone, settings) -> None:
    assert_same(run_all(Bench(EXPERTS, **SPREAD | settings)), experts_alone)


def test_each_group_has_a_cache_and_rows_of_its_own(folder) -> None:
    bench = Bench(folder, **WIDE, max_num_seqs=10, num_gpu_blocks_override=64)
    runner, view = bench.engine.runner, bench.engine.report().view
    assert (view.num_pages, view.max_num_seqs) == (8 * 64, 10)
    for leaves, size in ((runner.pages, 64 + 1), (runner.slots, 2)):
        for leaf in jax.tree.leaves(leaves):
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {size}
            assert not leaf.sharding.is_fully_replicated
    assert {shard.data.shape[0] for shard in runner._rows.counts.addressable_shards} == {2}


def test_groups_have_nothing_to_tell_each_other(folder) -> None:
    """In a dense model on groups of one device, only drawn tokens are exchanged."""
    bench = Bench(folder, **WIDE, warmup="lazy")
    runner, shapes = bench.engine.runner, bench.engine.runner.spec.shapes
    for shape in (shapes.shape(rows=1, prefill=0), shapes.shape(rows=1, prefill=32)):
        step, draw = runner.prepare(shape)
        words = r"all-(gather|reduce|to-all)|collective-permute|reduce-scatter"
        assert not re.search(words, step.as_text())
        sent = {found[0] for found in re.findall(rf"({words})\(", draw.as_text())}
        assert sent <= {"all-gather"}


def test_requests_are_shared_out_and_prefixes_found(folder) -> None:
    bench = Bench(folder, **WIDE, max_num_seqs=16)
    engine, size = bench.engine, bench.engine.runner.spec.rows_per_group
    first = bench.complete(SHARED, max_tokens=2, ignore_eos=True, detokenize=False)
    assert first.num_cached_tokens == 0
    again = bench.complete(SHARED, max_tokens=2, ignore_eos=True, detokenize=False)
    assert again.num_cached_tokens == 32  # though seven groups know nothing
    for _ in range(16):
        bench.submit(SHARED, _params(max_tokens=30))
    busiest = 0
    while engine.has_work:
        engine.step()
        rows = [one.row // size for one in engine.placement.running]
        busiest = max(busiest, *np.bincount(rows, minlength=8), 0)
    assert busiest == 2  # as even as can be, though one group alone knew the prefix
    bench.assert_idle()


@pytest.mark.parametrize("layout", ["slots", slow("pages")])
def test_a_group_without_pages_is_helped(folder, layout: str) -> None:
    """Policies count the pages of all groups; in one of them they may run short."""
    settings = {
        "kv_layout": layout, "block_size": 8, "max_model_len": 96, "max_num_seqs": 12,
        "enable_prefix_caching": False,
    }  # fmt: skip
    prompts = [_prompt(length) for length in (40, 38, 8, 9, 35, 7, 30, 41, 6, 12)]
    params = [_params(temperature=0, max_tokens=44) for _ in prompts]
    wanted = Bench(folder, **settings).generate(prompts, params)
    bench = Bench(folder, **settings | GROUPS, num_gpu_blocks_override=12)
    found = bench.generate(prompts, params)
    assert bench.metrics.num_preemptions > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
    bench.assert_idle()


def test_prompts_are_pooled_in_all_groups(folder) -> None:
    prompts = [_prompt(length) for length in (5, 40, 3, 21, 30, 8, 17, 70, 2)]

    def embed(**settings: object) -> np.ndarray:
        sizes = {"max_model_len": 128, "max_num_batched_tokens": 32, "runner": "pooling"}
        with LLM(folder, **sizes, pooler_config={"pooling_type": "mean"}, **settings) as llm:
            outputs = llm.embed(prompts, use_tqdm=False)
        return np.stack([output.outputs.embedding for output in outputs])

    np.testing.assert_allclose(embed(**GROUPS), embed(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "more", [{}, slow({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}})]
)
def test_grammars_hold_in_all_groups(folder, more) -> None:
    """Masks are of places, which are counted through all groups."""
    patterns = ["[ab]{3}x", "(yes|no)!", "[0-9]{2,4}c", "zz+a"] * 3
    params = [
        SamplingParams(
            max_tokens=12, temperature=1.0, seed=number,
            structured_outputs=StructuredOutputsParams(regex=pattern),
        )
        for number, pattern in enumerate(patterns)
    ]  # fmt: skip
    prompts = [_prompt(4 + number) for number in range(len(patterns))]
    settings = {"max_num_seqs": 12}
    wanted = Bench(folder, **settings).generate(prompts, params)
    found = Bench(folder, **settings | GROUPS | more).generate(prompts, params)
    for one, other, pattern in zip(found, wanted, patterns, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert re.fullmatch(pattern, one.outputs[0].text) or pattern == "zz+a"


def test_times_are_measured_of_all_groups_together(folder) -> None:
    """A cost model counts the decodes of a step, whatever group they are in."""
    bench = Bench(folder, **WIDE, max_num_seqs=16, max_num_batched_tokens=32)
    effort = Effort(repeats=2, contexts=(), with_past=False)
    cost = measure_engine(bench.engine, bench.engine._clock, effort).file.cost
    assert isinstance(cost, BucketCost)
    assert {rows for rows, _, _ in cost.to_json()["decode"]} == {8, 16}
    bench.assert_idle()


def test_a_draft_model_repeats_attention(folder) -> None:
    """Its cache mirrors that of all groups, so these have one cache together."""
    drafts = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    bench = Bench(folder, **GROUPS, speculative_config=drafts, warmup="lazy")
    assert bench.engine.runner.spec.groups == 1


def test_a_packed_step_has_a_part_for_each_group(folder) -> None:
    bench = Bench(folder, **WIDE, warmup="lazy")
    shape = bench.engine.runner.spec.shapes.shape(rows=1, prefill=32)
    packed = PackedStep(shape, 8)
    assert packed.buffer.shape[0] == 8
    packed.parts[3]["banned"][0, :2] = 7, 9
    assert packed.banned(packed.place(3, 0))[:2].tolist() == [7, 9]
    packed.set_flag("any_mask")
    assert all(part["any_mask"] for part in packed.parts)
