"""The Mosaic kernel over lists of tokens on the device, at sizes of real models, in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxserve.pallas_kernels.attention.tuning import multiprocessors
from jaxserve.pallas_kernels.token_attention import api, mosaic, token_attention
from jaxserve.pallas_kernels.variant import PLAIN
from tests.kernels.list_cases import Lists, problem

pytestmark = pytest.mark.gpu

KV_LEN = [9000, 300, 4097, 70]
LISTED = [[9000, 1, 0, 64], [300, 299, 3, 0], [4000, 65, 63, 1000], [0, 0, 0, 70]]


def real(**changes):
    return Lists(**{"kv_len": KV_LEN, "listed": LISTED, "dim": 128, "dtype": "bfloat16", **changes})


CASES = {
    "usual": real(),
    "float16": real(dtype="float16"),
    "pages of 8": real(page_size=8),
    "pages of 128": real(page_size=128),
    "no group": real(group=1),
    "group of 5": real(group=5),
    "group of 8": real(group=8),
    "dim 64": real(dim=64),
    "dim 256": real(dim=256),
    "one long list": Lists(
        kv_len=[32768], listed=[[32768]], dim=128, dtype="bfloat16", page_size=64
    ),
    "all empty": real(listed=[[0] * 4] * 4),
    "one request of 64": real(kv_len=[50] * 64, listed=[[9, 50, 0, 1]] * 64),
}


@pytest.fixture(params=CASES)
def given(request):
    """A step that the kernel serves on this device."""
    made = problem(CASES[request.param])
    reason = api.refusal("mosaic", made.q, made.cache)
    if reason is not None and "needs a GPU of compute capability" in reason:
        pytest.skip(reason)
    assert reason is None
    return made


def test_lists_agree_with_float64(given):
    length = np.asarray(given.step.kv_len, np.int32)
    call = jax.jit(
        lambda q, cache, pages_of, pages, lists: token_attention(
            q, cache, pages_of, pages, length, lists, backend="mosaic"
        )
    )
    rest = given.cache, given.pages_of, given.pages, given.lists
    state = call(given.q, *rest)
    given.outcome(state).check()
    again = call(given.q, *rest)
    np.testing.assert_array_equal(np.asarray(state.o, np.float32), np.asarray(again.o, np.float32))


@pytest.mark.parametrize("ctas", [1, 2])
def test_every_configuration_agrees_with_float64(ctas):
    made = problem(CASES["usual"])
    reason = api.refusal("mosaic", made.q, made.cache)
    if reason is not None:
        pytest.skip(reason)
    for dim in mosaic.HEAD_DIMS:
        made = problem(dataclasses.replace(CASES["usual"], dim=dim))
        for config in mosaic.tuning_table()[mosaic.TuningKey(dim)]:
            if config.ctas != ctas:
                continue
            state = mosaic.token_attention(
                made.q, made.cache, made.pages_of, made.pages, made.lists,
                sm_scale=dim**-0.5, variant=PLAIN, config=config,
                multiprocessors=multiprocessors(),
            )  # fmt: skip
            made.outcome(state).check()
