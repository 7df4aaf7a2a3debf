"""Streams of events, disconnects and merging, without an engine."""

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from jaxserve.serve.sse import (
    ClientGoneError,
    EventStream,
    close_all,
    encode_json,
    frame,
    merge,
    text_framer,
    until_disconnect,
)


def test_json_is_compact_and_keeps_characters():
    assert encode_json({"a": [1, "日本"]}) == '{"a":[1,"日本"]}'.encode()


def test_lone_surrogates_do_not_break_an_error_message():
    assert encode_json("\ud800x") == b'"?x"'


def test_infinity_is_never_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_json(float("-inf"))


@pytest.mark.parametrize(
    "text", ["", "plain", 'quote " backslash \\', "line\nend\r\n\n", "日本 🎉"]
)
def test_prepared_events_equal_dumped_ones(text: str):
    template = {"id": "x", "choices": [{"delta": {"content": "\0"}, "index": 0}], "z": None}
    made = text_framer(template, "\0")(text)
    template["choices"] = [{"delta": {"content": text}, "index": 0}]
    assert made == frame(template)
    assert made.startswith(b"data: ")
    assert made.endswith(b"\n\n")
    assert made.count(b"\n") == 2
    assert json.loads(made[6:])["choices"][0]["delta"]["content"] == text


async def counting(items: list[int], closed: list[str], name: str) -> AsyncGenerator[int]:
    try:
        for item in items:
            await asyncio.sleep(0)
            yield item
    finally:
        closed.append(name)


def test_merge_keeps_the_order_of_each_source():
    async def run() -> list[tuple[int, int]]:
        sources = [counting([1, 2, 3], [], "a"), counting([4, 5], [], "b"), counting([], [], "c")]
        return [item async for item in merge(sources)]

    items = asyncio.run(run())
    assert [x for i, x in items if i == 0] == [1, 2, 3]
    assert [x for i, x in items if i == 1] == [4, 5]
    assert len(items) == 5


def test_merge_passes_on_the_error_of_a_source():
    async def broken() -> AsyncGenerator[int]:
        yield 1
        raise RuntimeError("out of luck")

    async def run() -> None:
        closed: list[str] = []
        sources = [broken(), counting(list(range(1000)), closed, "other")]
        with pytest.raises(RuntimeError, match="out of luck"):
            async for _ in merge(sources):
                pass
        await close_all(sources)
        assert closed == ["other"]

    asyncio.run(run())


def test_closing_a_merge_early_leaves_nothing_running():
    async def run() -> None:
        closed: list[str] = []
        sources = [counting(list(range(1000)), closed, name) for name in "ab"]
        merged = merge(sources)
        await anext(merged)
        await merged.aclose()
        await close_all(sources)
        assert sorted(closed) == ["a", "b"]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_work_is_cancelled_and_finished_when_the_client_goes():
    async def run() -> None:
        gone = asyncio.Event()
        ended: list[str] = []

        async def receive() -> dict[str, object]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            gone.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("cleaned up")

        with pytest.raises(ClientGoneError):
            await until_disconnect(receive, work())
        assert ended == ["cleaned up"]

    asyncio.run(run())


def test_work_that_fails_raises_its_own_error():
    async def receive() -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    async def work() -> None:
        raise ValueError("mine")

    async def run() -> None:
        with pytest.raises(ValueError, match="mine"):
            await until_disconnect(receive, work())

    asyncio.run(run())


def test_a_stream_closes_its_source_when_the_client_goes():
    async def run() -> None:
        closed: list[str] = []
        sent: list[dict[str, object]] = []
        gone = asyncio.Event()

        async def endless() -> AsyncGenerator[bytes]:
            try:
                while True:
                    await asyncio.sleep(0)
                    yield b"data: 1\n\n"
            finally:
                closed.append("source")

        async def receive() -> dict[str, object]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)
            if len(sent) == 5:
                gone.set()

        await EventStream(endless())({"type": "http"}, receive, send)
        assert closed == ["source"]
        headers = dict(sent[0]["headers"])
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert headers[b"x-accel-buffering"] == b"no"
        assert b"content-length" not in headers

    asyncio.run(run())
