"""Adapters over HTTP: listed, chosen by the field model, loaded and unloaded at run time."""

import asyncio
import json

import httpx
import numpy as np
import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.serve.app import create_app
from jaxserve.serve.flags import parse
from jaxserve.serve.lora_routes import load_modules
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.state import ServerState
from tests.adapters import adapter_of, write_adapter
from tests.bert import BERT
from tests.server.conftest import asking

OPEN = {"allow_runtime_lora_updating": True}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ASK = {"prompt": "Hello", "temperature": 0, "ignore_eos": True, "max_tokens": 8}


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    from jaxserve.models.config import ModelConfig

    config = ModelConfig.from_hf(json.loads((tiny_folder / "config.json").read_text()))
    place = tmp_path_factory.mktemp("adapters")
    found = {
        name: str(write_adapter(place / name, *adapter_of(config, seed=seed, lora_alpha=8)))
        for seed, name in enumerate(("sql", "chat", "extra"))
    }
    found["large"] = str(write_adapter(place / "large", *adapter_of(config, seed=9, rank=9)))
    return found


@pytest.fixture(scope="module")
def engine(tiny_folder, folders):
    made = AsyncLLM(
        tiny_folder, max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64,
        kv_cache_memory_bytes=32 << 20, warmup="lazy",
        enable_lora=True, max_loras=2, max_lora_rank=8,
    )  # fmt: skip
    words = (f"sql={folders['sql']}", json.dumps({"name": "chat", "path": folders["chat"]}))
    load_modules(made, ServerConfig.from_settings({"lora_modules": words}).api)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ask(engine):
    return asking(engine)


@pytest.fixture
def admin(ask):
    return lambda path, body, **request: ask(path, body, settings=OPEN, **request)


def error(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


def text_of(ask, model, path="/v1/completions", **fields):
    response = ask(path, ASK | {"model": model} | fields)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    return response.json()["choices"][0].get("text") or response.json()["choices"][0]["message"]


def test_models_are_listed_with_their_parents(ask, folders):
    cards = {card["id"]: card for card in ask("/v1/models").json()["data"]}
    assert list(cards) == ["tiny", "alias", "sql", "chat"]
    assert cards["tiny"]["parent"] is None
    assert (cards["sql"]["parent"], cards["sql"]["root"]) == ("tiny", folders["sql"])
    # Each question here is put to a server of its own, which may be a second younger.
    again = ask("/v1/models/chat").json()
    assert again | {"created": 0} == cards["chat"] | {"created": 0}
    assert error(ask("/v1/models/nobody"), 404)["param"] == "model"


def test_the_model_field_chooses_the_adapter(ask):
    texts = {name: text_of(ask, name) for name in ("tiny", "sql", "chat")}
    assert len(set(texts.values())) == 3
    assert {name: text_of(ask, name) for name in texts} == texts  # also from the prefix cache
    messages = [{"role": "user", "content": "Hello"}]
    chats = {
        name: text_of(ask, name, "/v1/chat/completions", messages=messages, prompt=None)["content"]
        for name in texts
    }
    assert len(set(chats.values())) == 3
    told = error(ask("/v1/completions", ASK | {"model": "sqll"}), 404)
    assert (told["type"], told["param"]) == ("NotFoundError", "model")
    assert "'sql', 'chat'. Did you mean 'sql'?" in told["message"]


def test_streams_name_the_adapter(ask, events_of):
    response = ask("/v1/completions", ASK | {"model": "sql", "stream": True})
    assert {event["model"] for event in events_of(response.text)} == {"sql"}


def test_embeddings_and_scores_use_the_adapter(ask):
    def vector(model):
        body = {"model": model, "input": "Hello"}
        return np.asarray(ask("/v1/embeddings", body).json()["data"][0]["embedding"])

    assert np.abs(vector("sql") - vector("tiny")).max() > 0.01
    scores = [
        ask("/v1/score", {"model": m, "text_1": "a", "text_2": "b"}).json()["data"][0]["score"]
        for m in ("tiny", "sql")
    ]
    assert scores[0] != scores[1]
    assert ask("/tokenize", {"model": "sql", "prompt": "Hello"}).status_code == 200


def test_loading_and_unloading_while_serving(ask, admin, folders):
    body = {"lora_name": "extra", "lora_path": folders["extra"]}
    assert error(ask("/v1/completions", ASK | {"model": "extra"}), 404)
    assert admin(LOAD, body).text == "Success: LoRA adapter 'extra' added successfully."
    first = text_of(ask, "extra")
    told = error(admin(LOAD, body), 400)
    assert told["param"] == "lora_name"
    assert "has already been loaded. Set load_inplace" in told["message"]
    again = body | {"lora_path": folders["chat"], "load_inplace": True}
    assert admin(LOAD, again).status_code == 200
    assert text_of(ask, "extra") == text_of(ask, "chat") != first
    done = admin(UNLOAD, {"lora_name": "extra"})
    assert done.text == "Success: LoRA adapter 'extra' removed successfully."
    assert error(ask("/v1/completions", ASK | {"model": "extra"}), 404)["param"] == "model"
    told = error(admin(UNLOAD, {"lora_name": "extra"}), 404)
    assert (told["type"], told["param"]) == ("NotFoundError", "lora_name")


def test_clients_of_sglang_load_and_unload(admin, folders):
    body = {"lora_name": "extra", "lora_path": folders["extra"], "pinned": True}
    told = admin("/load_lora_adapter", body).json()
    assert told["success"]
    assert told["loaded_adapters"]["extra"] == folders["extra"]
    other = error(admin(LOAD, body | {"lora_name": "more"}), 409)
    assert "one of the 2 slots must stay free" in other["message"]
    told = admin("/unload_lora_adapter", {"lora_name": "extra"}).json()
    assert list(told["loaded_adapters"]) == ["sql", "chat"]


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"lora_path": "/nowhere/at/all"}, 404, "lora_path", "no such folder"),
        ({"lora_path": "large"}, 400, "lora_path", "--max-lora-rank 9"),
        ({"lora_name": "alias"}, 400, "lora_name", "the name of the model itself"),
        ({"lora_name": ""}, 400, "lora_name", "at least 1 character"),
        ({"lora_name": "x" * 300}, 400, "lora_name", "1 to 256 printable characters"),
        ({"lora_path": None}, 400, "lora_path", "lora_path"),
    ],
)
def test_what_cannot_be_loaded_is_refused_and_serving_goes_on(
    ask, admin, folders, change, status, param, words
):
    body = {"lora_name": "extra", "lora_path": folders["extra"]} | change
    if body["lora_path"] == "large":
        body["lora_path"] = folders["large"]
    told = error(admin(LOAD, body), status)
    assert told["param"] == param
    assert words in told["message"]
    assert len(ask("/v1/models").json()["data"]) == 4


def test_many_clients_load_at_once(engine, admin, ask, folders):
    settings = {"served_model_name": ("tiny", "alias"), **OPEN}
    app = create_app(ServerState(ServerConfig.from_settings(settings), model="tiny", engine=engine))

    async def load_all():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            bodies = [
                {"lora_name": f"many{i % 3}", "lora_path": folders["extra"]} for i in range(6)
            ]
            sent = (client.post(f"http://test{LOAD}", json=body) for body in bodies)
            return [answer.status_code for answer in await asyncio.gather(*sent)]

    answers = asyncio.run(load_all())
    names = [card["id"] for card in ask("/v1/models").json()["data"][4:]]
    assert answers.count(200) == len(names) == 3
    for name in names:
        assert admin(UNLOAD, {"lora_name": name}).status_code == 200


@pytest.mark.parametrize("path", [LOAD, UNLOAD, "/load_lora_adapter", "/unload_lora_adapter"])
def test_the_routes_are_closed_by_default(ask, path):
    told = error(ask(path, {"lora_name": "x", "lora_path": "y"}), 403)
    assert "start the server with --allow-runtime-lora-updating" in told["message"]


@pytest.mark.parametrize(
    ("settings", "header", "status"),
    [
        ({}, None, 404),
        ({"api_key": ("user",)}, None, 401),
        ({"api_key": ("user",)}, "Bearer user", 404),
        ({"admin_api_key": "root", "api_key": ("user",)}, "Bearer user", 401),
        ({"admin_api_key": "root", "api_key": ("user",)}, "Bearer root", 404),
        ({"admin_api_key": "root"}, None, 401),
    ],
)
def test_the_routes_look_at_keys(ask, settings, header, status):
    headers = {} if header is None else {"Authorization": header}
    for opened in (OPEN, {"enable_admin_api": True}):
        got = ask(UNLOAD, {"lora_name": "x"}, settings=opened | settings, headers=headers)
        assert got.status_code == status


def test_an_engine_without_adapters_says_so(request, tmp_path, folders, tiny_folder):
    with_none = AsyncLLM(tiny_folder, max_model_len=64, max_num_seqs=1, warmup="lazy")
    try:
        body = {"lora_name": "x", "lora_path": folders["sql"]}
        told = error(asking(with_none)(LOAD, body, settings=OPEN), 400)
        assert "--enable-lora" in told["message"]
        assert len(asking(with_none)("/v1/models").json()["data"]) == 2
    finally:
        with_none.close()


# Flags -----------------------------------------------------------------------------------------


def test_flags_name_adapters_and_limits():
    argv = ["m", "--enable-lora", "--max-loras", "4", "--max-lora-rank", "64", "--max-cpu-loras",
            "9", "--lora-modules", "a=x", "b=y", "--allow-runtime-lora-updating"]  # fmt: skip
    made = parse(argv, {})
    assert made.server.api.lora_modules == ("a=x", "b=y")
    assert made.engine.lora.max_cpu_loras == 9
    assert made.server.access.opens_loras
    sglang = ["m", "--enable-lora", "--max-loras-per-batch", "2", "--lora-paths", "a=x"]
    assert parse(sglang, {}).engine.lora.max_loras == 2
    environ = {"JAXSERVE_ALLOW_RUNTIME_LORA_UPDATING": "true", "JAXSERVE_ENABLE_LORA": "1"}
    assert parse(["m"], environ).server.access.opens_loras


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora-modules", "a=x"], "lora_modules needs enable_lora"),
        (["--allow-runtime-lora-updating"], "allow_runtime_lora_updating needs enable_lora"),
        (["--enable-lora", "--lora-modules", "a"], "must hold NAME=PATH, got 'a'"),
        (["--enable-lora", "--lora-modules", '{"name": "a"}'], "lora_modules: expected an object"),
        (["--enable-lora", "--lora-modules", "a=x", "a=y"], "names 'a' twice"),
        (["--max-loras", "0"], "max_loras must be at least 1"),
        (["--max-loras", "3", "--max-cpu-loras", "2"], "max_cpu_loras must be at least max_loras"),
    ],
)
def test_contradicting_flags_are_refused(capsys, argv, words):
    with pytest.raises(SystemExit):
        parse(["m", *argv], {})
    assert words in capsys.readouterr().err


def test_an_adapter_that_cannot_be_loaded_stops_the_start(engine, folders):
    def load(*words, **settings):
        load_modules(engine, ServerConfig.from_settings({"lora_modules": words} | settings).api)

    with pytest.raises(ConfigError, match="no such folder"):
        load("gone=/nowhere/at/all")
    with pytest.raises(ConfigError, match="the name of the model itself"):
        load(f"tiny={folders['sql']}", served_model_name=("tiny",))


def test_an_encoder_takes_no_adapters():
    encoder = AsyncLLM(next(path for path in sorted(BERT.iterdir()) if path.is_dir()))
    try:
        load_modules(encoder, ServerConfig().api)
        with pytest.raises(ConfigError, match="an encoder takes no adapters; leave it out"):
            load_modules(encoder, ServerConfig.from_settings({"lora_modules": ("a=b",)}).api)
        body = {"lora_name": "a", "lora_path": "b"}
        told = error(asking(encoder)(LOAD, body, settings=OPEN), 400)
        assert "does not generate here" in told["message"]
    finally:
        encoder.close()


def test_a_decoder_that_only_embeds_takes_adapters(tiny_folder, folders):
    made = AsyncLLM(
        tiny_folder, max_model_len=64, max_num_seqs=2, kv_cache_memory_bytes=8 << 20,
        warmup="lazy", runner="pooling", enable_lora=True, max_lora_rank=8,
    )  # fmt: skip
    try:
        words = (f"sql={folders['sql']}",)
        load_modules(made, ServerConfig.from_settings({"lora_modules": words}).api)
        ask = asking(made)
        body = {"lora_name": "chat", "lora_path": folders["chat"]}
        assert ask(LOAD, body, settings=OPEN).status_code == 200
        found = {}
        for name in ("tiny", "sql", "chat"):
            reply = ask("/v1/embeddings", {"model": name, "input": "Hello"}).json()
            found[name] = np.asarray(reply["data"][0]["embedding"])
            assert reply["model"] == name
        gaps = [np.abs(found[a] - found[b]).max() for a, b in (("tiny", "sql"), ("sql", "chat"))]
        assert min(gaps) > 1e-3
        told = error(ask("/v1/completions", {"model": "sql", "prompt": "x"}), 400)
        assert "does not generate here" in told["message"]
    finally:
        made.close()
