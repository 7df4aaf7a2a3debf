"""The programs under benchmarks/: what they compute from timings, and how they speak to peers."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from benchmarks import child, client, embeddings, record, serving, structured
from benchmarks.child import Child, Load, PeerError
from benchmarks.clients import checks
from benchmarks.peers import protocol

REFERENCE = checks.Reference(
    text="hi there", finish_reason="stop", num_prompt=3, num_output=2,
    vectors=[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]],
)  # fmt: skip
ENTRIES = [["hi", -0.1, [-0.1, -3.0, -4.0]], [" there", -0.2, [-0.2, -2.5, -5.0]]]
GOOD_CALL = {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius"}'}
QUIET = Load(measured=2.0, idle=0.0, foreign=0.0)
BUSY = Load(measured=1.0, idle=0.0, foreign=0.9)

ECHO = """
from benchmarks.peers import protocol
class Worker:
    def double(self, value):
        print("noise on standard output")
        return {"value": 2 * value}
    def slow(self):
        import time
        time.sleep(60)
protocol.serve(Worker())
"""


def timing(start: float, *arrivals: float, num_output: int | None = None) -> client.Timing:
    return client.Timing(
        start=start, arrivals=list(arrivals), end=arrivals[-1], num_prompt=4,
        num_output=num_output or len(arrivals),
    )  # fmt: skip


def test_result_keys_are_those_of_the_field() -> None:
    keys = client.result_keys(
        [timing(0.0, 1.0, 1.5, 2.0), timing(0.0, 2.0, 3.0, 4.0)], model="m", max_concurrency=2
    )
    assert keys["completed"] == 2
    assert keys["duration"] == 4.0
    assert keys["total_input_tokens"] == 8
    assert keys["total_output_tokens"] == 6
    assert keys["output_throughput"] == 1.5
    assert keys["total_token_throughput"] == 3.5
    assert keys["mean_ttft_ms"] == 1500
    assert keys["mean_tpot_ms"] == 750  # (2 - 1) / 2 and (4 - 2) / 2
    assert keys["median_itl_ms"] == 750
    assert keys["max_concurrent_requests"] == 2
    for label in ("Successful requests:", "Mean TTFT (ms):", "P99 ITL (ms):"):
        assert label in client.report(keys)


def test_texts_to_embed_are_repeatable_and_of_mixed_lengths() -> None:
    texts = embeddings.mixed_texts(200, seed=1)
    assert texts == embeddings.mixed_texts(200, seed=1)
    lengths = sorted(len(text.split()) for text in texts)
    assert 3 <= lengths[0] < 15 < lengths[100] < 35 < lengths[-1] <= 200


def test_sides_that_did_not_do_the_same_work_are_found() -> None:
    ours = {"compilations": 0, "first": [0.0, 1.0], "tokens": 5}
    embeddings.check({"jaxserve": [ours], "transformers": [{"first": [0.0, 1.0], "tokens": 5}]})
    for wrong in (
        {"jaxserve": [ours | {"compilations": 1}]},
        {"jaxserve": [ours], "transformers": [{"first": [0.0, 0.9], "tokens": 5}]},
        {"jaxserve": [ours], "transformers": [{"first": [0.0, 1.0], "tokens": 6}]},
    ):
        with pytest.raises(AssertionError):
            embeddings.check(wrong)


def test_failed_requests_are_counted_and_named() -> None:
    broken = client.Timing(start=0.0, end=1.0, num_prompt=4, error="boom")
    keys = client.result_keys([timing(0.0, 1.0, 2.0), broken], model="m", max_concurrency=None)
    assert (keys["completed"], keys["failed"], keys["errors"]) == (1, 1, ["boom"])


def serve_once(answer: bytes) -> list[client.Timing]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def go() -> list[client.Timing]:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await client.run(f"http://127.0.0.1:{port}", "m", [[1, 2, 3]], 2)

    return asyncio.run(go())


def chunked(*pieces: str) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(p.encode()), p.encode()) for p in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def test_the_client_reads_events_that_are_cut_anywhere() -> None:
    event = "data: " + json.dumps({"choices": [{"text": "x"}]}) + "\n\n"
    usage = "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 2}}) + "\n\n"
    (seen,) = serve_once(chunked(event + event[:9], event[9:] + usage, "data: [DONE]\n\n"))
    assert seen.error is None
    assert len(seen.arrivals) == 2
    assert (seen.num_prompt, seen.num_output) == (3, 2)


def test_the_client_reports_a_refusal() -> None:
    (seen,) = serve_once(b"HTTP/1.1 503 Service Unavailable\r\n\r\nfull")
    assert seen.error is not None
    assert "503" in seen.error


def results_of(rates: dict[tuple[str, str], list[tuple[float, Load]]]) -> serving.Results:
    results = serving.Results()
    for key, samples in rates.items():
        results.samples[key] = [serving.Sample(rate, load) for rate, load in samples]
    return results


def test_required_ratios_are_judged_by_medians_of_undisturbed_samples() -> None:
    results = results_of({
        ("jaxserve", "prefill"): [(1500.0, QUIET), (1400.0, QUIET), (90.0, BUSY), (80.0, BUSY)],
        ("llama.cpp", "prefill"): [(1000.0, QUIET)],
        ("jaxserve", "decode8"): [(300.0, BUSY)],
        ("llama.cpp", "decode8"): [(400.0, QUIET)],
    })  # fmt: skip
    assert serving.ratios(results, "llama.cpp") == {"prefill": 1.45, "decode8": 0.75}
    assert serving.verdicts("float32", results) == {
        ("llama.cpp", "prefill"): True,
        ("llama.cpp", "decode8"): False,
    }
    assert serving.verdicts("bfloat16", results) == {}
    text = serving.format_table("float32", results)
    assert "pass" in text
    assert "FAIL?" in text
    assert "run again when quiet" in serving.describe_load(results)


def test_peers_are_left_out_without_their_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "oracle_python", lambda: None)
    assert serving.chosen_peers("transformers,llama.cpp") == []
    assert "make oracles" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="unknown peer vllm; known: transformers"):
        serving.chosen_peers("vllm")


def test_a_worker_answers_lines_and_reports_errors(tmp_path: Path) -> None:
    (tmp_path / "echo_worker.py").write_text(ECHO)
    worker = Child(sys.executable, "echo_worker", tmp_path / "log", {"PYTHONPATH": f"{tmp_path}:."})
    try:
        assert worker.ask("double", value=4) == {"value": 8}
        with pytest.raises(PeerError, match="TypeError"):
            worker.ask("double", value=None)
        with pytest.raises(PeerError, match="took longer than 0 s"):
            worker.ask("slow", timeout_s=0.2)
    finally:
        worker.close()
    assert "noise on standard output" in (tmp_path / "log").read_text()


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    worker = Child(sys.executable, "no_such_module", tmp_path / "log")
    with pytest.raises(PeerError, match="No module named no_such_module"):
        worker.ask("load")
    worker.close()


def test_decode_and_burst_results() -> None:
    assert protocol.decode_result([0.1, 0.1, 0.2], 8)["tokens_per_s"] == pytest.approx(60)
    burst = protocol.burst_result(10.0, 12.0, 16.0, count=2, steps=5)
    assert burst["ttft_s"] == [2.0, 2.0]
    assert burst["tpot_s"] == [1.0, 1.0]
    assert burst["tokens_per_s"] == pytest.approx(10 / 6)


def test_lines_hold_no_paths_and_no_host_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving.py", "--model", "/secret/place/model.gguf"])
    recorder = record.Recorder("trial", out=tmp_path)
    recorder.write("decode8", dtype="float32", **record.summary([3.0, 1.0, 2.0]))
    (line,) = recorder.path.read_text().splitlines()
    found = json.loads(line)
    assert "/secret" not in line
    assert "model.gguf" in found["command"]
    assert found["median"] == 2.0
    assert {"machine", "versions", "commit", "date"} <= set(found)


def test_prompts_are_the_same_for_everybody() -> None:
    one = child.random_prompts([1, 2], 3, 5, 40000)
    assert one == child.random_prompts([1, 2], 3, 5, 40000)
    assert [len(prompt) for prompt in one] == [5, 5, 5]
    assert all(1000 <= token < 40000 for prompt in one for token in prompt)


def test_descriptions_of_functions_become_bounded_schemas() -> None:
    described = {
        "type": "dict",
        "properties": {
            "n": {"type": "float", "description": "d", "default": 1},
            "t": {"type": "tuple", "items": {"type": "integer"}},
            "k": {"type": "string", "enum": ["a"]},
            "x": {"type": "any"},
        },
        "required": ["n", "gone"],
    }
    made = structured.plain_schema(described)
    bound = {"minimum": -(10**6), "maximum": 10**6}
    assert made == {
        "type": "object",
        "properties": {
            "n": {"type": "number", **bound},
            "t": {"type": "array", "items": {"type": "integer", **bound}, "maxItems": 4},
            "k": {"enum": ["a"]},
            "x": {"type": "string", "maxLength": 60},
        },
        "required": ["n"],
        "additionalProperties": False,
    }


def test_clients_that_are_right_pass() -> None:
    checks.check_stream({"pieces": ["hi", " there"], "finish_reason": "stop"}, REFERENCE)
    checks.check_logprobs({"text": "hi there", "entries": ENTRIES}, REFERENCE)
    checks.check_embeddings({"vectors": REFERENCE.vectors}, REFERENCE)
    checks.check_json({"text": '{"name": "Ann", "age": 40, "role": "author"}'})
    checks.check_calls({"calls": [GOOD_CALL]}, name="get_weather", city="Paris")


@pytest.mark.parametrize(
    ("check", "facts", "message"),
    [
        (checks.check_stream, {"pieces": ["hi"], "finish_reason": "stop"}, "joined deltas"),
        (checks.check_stream, {"pieces": ["hi", " there"], "finish_reason": None}, "finish_reason"),
        (checks.check_logprobs, {"text": "hi there", "entries": ENTRIES[:1]}, "1 entries for 2"),
        (
            checks.check_logprobs,
            {"text": "hi there", "entries": [["hi", 0.1, [0.1, -3, -4]], ENTRIES[1]]},
            "log-probability of 'hi' is 0.1",
        ),
        (
            checks.check_logprobs,
            {"text": "hi there", "entries": [["hi", -3, [-0.1, -3, -4]], ENTRIES[1]]},
            "greedy token",
        ),
        (checks.check_embeddings, {"vectors": [[1, 0], [0, 1], [0, 1]]}, "equal texts differ"),
        (checks.check_embeddings, {"vectors": [[1, 0, 0]] * 3}, "shape"),
        (checks.check_embeddings, {"vectors": [[1, 0]] * 3}, "different texts agree"),
    ],
)
def test_clients_that_are_wrong_fail(check, facts, message: str) -> None:
    with pytest.raises(checks.WrongAnswerError, match=message):
        check(facts, REFERENCE)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "no tool was called"),
        ([GOOD_CALL | {"arguments": "{"}], "is no JSON"),
        ([GOOD_CALL | {"name": "other"}], "does not satisfy"),
        ([GOOD_CALL | {"arguments": '{"city": "Paris", "unit": "kelvin"}'}], "does not satisfy"),
        ([{"name": "get_time", "arguments": '{"zone": "UTC"}'}], "instead of 'get_weather'"),
        ([GOOD_CALL | {"arguments": '{"city": "Rome", "unit": "celsius"}'}], "called with 'Rome'"),
    ],
)
def test_wrong_calls_fail(calls, message: str) -> None:
    with pytest.raises(checks.WrongAnswerError, match=message):
        checks.check_calls({"calls": calls}, name="get_weather", city="Paris")
