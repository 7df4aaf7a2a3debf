"""Logits on a GPU agree with transformers on a CPU, over forward passes, prefill and decode."""

import jax
import pytest

from jaxserve import LLM, SamplingParams
from tests.models.test_parity import GOLDEN, NAMES, check_engine, check_forward

pytestmark = pytest.mark.gpu


def test_weights_are_on_the_gpu():
    with LLM(GOLDEN / "llama_plain", max_model_len=64, max_num_seqs=2) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
        devices = {d.platform for leaf in jax.tree.leaves(llm.params) for d in leaf.devices()}
    assert devices == {"gpu"}


@pytest.mark.parametrize("name", NAMES)
def test_forward_agrees(name):
    check_forward(GOLDEN / name)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama_llama3_rope", {}),
        ("qwen2_plain", {"max_num_batched_tokens": 8}),
        ("qwen3_plain", {"kv_layout": "slots"}),
        ("qwen3_tied_bias", {"kv_layout": "pages", "attention_backend": "reference"}),
    ],
)
def test_prefill_and_decode_agree(name, settings):
    check_engine(GOLDEN / name, **settings)
