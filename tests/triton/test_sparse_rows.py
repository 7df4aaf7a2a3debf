"""Decode rows that leave something unread, through the kernel over lists of tokens."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxserve.attention.tactic.config import ClusterConfig, TacticConfig
from jaxserve.attention.tactic.rows import attend_rows, no_clusters, plan_rows
from tests.rooms.tactic.test_rows import step
from tests.tiny import Bench, tiny_module
from tests.triton.checks import compile_all, lower_for_cuda, shape

ROWS, KV_HEADS, GROUP, DIM, PAGE, SEGMENTS = 8, 8, 4, 128, 16, 16
CONFIG = TacticConfig(min_context=0, clusters=ClusterConfig(segment_len=1024))


@pytest.mark.interpreted
@pytest.mark.parametrize("p", [[0.9, 0.8, 0.9], [0.9, 1.0, 0.6]])
def test_lists_read_what_tiles_read(p):
    """Shares mixed in one batch, a row that reads everything among them."""
    length = np.asarray([256, 130, 200], np.int32)
    _, first = step(3, length, p, layout="pages", backend="xla")
    _, found = step(3, length, p, layout="pages", backend="triton")
    sparse = np.asarray(p) < 1
    np.testing.assert_allclose(found[0][sparse], first[0][sparse], atol=1e-4)
    np.testing.assert_allclose(found[1], first[1], atol=64)  # a cluster more or less
    np.testing.assert_allclose(found[2], first[2], rtol=0.02)


@pytest.mark.interpreted
@pytest.mark.slow
def test_an_engine_writes_the_same_tokens():
    settings = {
        "max_num_seqs": 2,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "sparse_attention": "p=0.9,segment=64,min_context=100,dense_layers=1,window=16,"
        "cluster_size=4,max_share=1",
    }
    prompt = np.random.default_rng(2).integers(0, 250, 150).tolist()
    greedy = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    found = []
    for backend in ("xla", "triton"):
        bench = Bench(tiny_module(), attention_backend=backend, kv_layout="pages", **settings)
        output = bench.complete(prompt, **greedy)
        found.append((tuple(output.outputs[0].token_ids), bench.metrics.sparse_tokens_read))
    assert found[0] == found[1]
    assert found[0][1] > 0


def rows(q, keys, values, table, p, length, num_segments, entries, layer):
    sparse = plan_rows(p, length, num_segments, entries, (layer,), config=CONFIG)
    return attend_rows(
        q, keys, values, table, sparse, lambda: None, scale=DIM**-0.5, backend="triton"
    )


def abstract(page=PAGE):
    pool = shape(1 << 12, KV_HEADS, page, DIM, dtype="bfloat16")
    make = partial(no_clusters, 1 + ROWS * SEGMENTS, KV_HEADS, DIM, config=CONFIG)
    return (
        shape(ROWS, KV_HEADS * GROUP, DIM, dtype="bfloat16"),
        pool,
        pool,
        shape(ROWS, SEGMENTS * 1024 // page, dtype="int32"),
        shape(ROWS, dtype="float32"),
        shape(ROWS, dtype="int32"),
        shape(ROWS, dtype="int32"),
        shape(ROWS, SEGMENTS, dtype="int32"),
        jax.eval_shape(make),
    )


@pytest.mark.compiled
@pytest.mark.parametrize("page", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_rows_compile_for_every_device(page):
    compile_all(rows, *abstract(page))


@pytest.mark.compiled
def test_rows_are_one_program(monkeypatch):
    """What is always read and what was chosen: two kernels each, and nothing asks the host."""
    text = lower_for_cuda(monkeypatch, rows, *abstract())
    assert text.count("triton_kernel_call") == 4
    assert "callback" not in text
