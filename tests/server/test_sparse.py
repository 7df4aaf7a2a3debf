"""Requests that say which share of the attention mass they want, over HTTP."""

import re

import pytest

from jaxserve.engine.async_engine import AsyncLLM
from tests.server.conftest import asking

BODY = {"prompt": [*range(40, 240)], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
COUNTED = re.compile(r"^jaxserve:sparse_attention_(\w+)_total\S* (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def made(tiny_folder):
    made = AsyncLLM(
        tiny_folder,
        max_model_len=512,
        max_num_seqs=2,
        kv_cache_memory_bytes=32 << 20,
        warmup="lazy",
        sparse_attention="p=0.9,segment=64,cluster_size=8,min_context=64,window=16,dense_layers=1",
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def ask(made):
    return asking(made)


def counted(ask):
    return {name: float(value) for name, value in COUNTED.findall(ask("/metrics").text)}


def choice(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_a_share_below_one_leaves_tokens_unread(ask):
    before = counted(ask)
    choice(ask("/v1/completions", {**BODY, "attention_mass": 0.3}))
    after = counted(ask)
    read, there = (after[n] - before[n] for n in ("tokens_read", "tokens_in_context"))
    assert 0 < read < there


def test_everything_is_read_for_one_and_for_a_short_prompt(ask):
    whole = choice(ask("/v1/completions", {**BODY, "attention_mass": 1}))
    before = counted(ask)
    again = choice(ask("/v1/completions", {**BODY, "attention_mass": 1.0}))
    assert again["text"] == whole["text"]
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "attention_mass": 0.5}
    choice(ask("/v1/chat/completions", body))
    assert counted(ask) == before


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("mass", [0, -0.1, 1.01, "much", None, 1e308], ids=str)
def test_impossible_shares_are_refused(ask, path, mass):
    body = {**BODY, "messages": [{"role": "user", "content": "x"}], "attention_mass": mass}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    answer = ask(path, body)
    if mass is None:  # as if it had not been said
        choice(answer)
        return
    assert answer.status_code == 400
    assert "attention_mass" in answer.json()["error"]["message"]
