"""One engine on several processes, each with two CPU devices, which exchange data over gloo."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxserve import LLM, SamplingParams
from jaxserve.core.errors import ConfigError
from jaxserve.core.parallel import ParallelOptions
from jaxserve.engine.message import Message
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("host_process.py")
PROMPTS = [[5, 9, 2, 77, 31, 8, 40, 41, 42, 43], [7, 7, 3]]
SAMPLING = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
SMALL = {
    "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16, "block_size": 8,
    "num_gpu_blocks_override": 32, "dtype": "float32",
}  # fmt: skip
TIMEOUT_S = 600


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Processes:
    """Processes that run one engine."""

    def __init__(
        self,
        folder: Path,
        size: int,
        plan: dict[str, Any],
        *,
        others: dict[str, Any] | None = None,
        **settings: object,
    ) -> None:
        port, shared = free_port(), SMALL | settings
        self.all = [
            subprocess.Popen(
                [
                    sys.executable, "-u", str(PROGRAM), str(folder), str(rank), str(size),
                    str(port), json.dumps(shared | (others or {} if rank else {})),
                    json.dumps(plan),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip
        self.messages: list[list[str]] = [[] for _ in self.all]
        self._readers = [
            threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(size)
        ]
        for reader in self._readers:
            reader.start()
        self._timer = threading.Timer(TIMEOUT_S, self.close)
        self._timer.start()

    def _read(self, index: int) -> None:
        for line in self.all[index].stderr:
            self.messages[index].append(line)

    def answer(self) -> dict[str, Any]:
        """Return what the first one says next."""
        for line in self.all[0].stdout:
            if line.startswith("{"):  # gloo prints there as well
                return json.loads(line)
        raise AssertionError("".join("".join(lines[-30:]) for lines in self.messages))

    def go_on(self) -> None:
        self.all[0].stdin.write("\n")
        self.all[0].stdin.flush()

    def close(self) -> None:
        self._timer.cancel()
        for process in self.all:
            if process.poll() is None:
                process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()
        for process in self.all:
            for pipe in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with LLM(folder, **SMALL) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(**SAMPLING), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture
def start(folder: Path) -> Iterator[Any]:
    begun: list[Processes] = []

    def begin(size: int, plan: dict[str, Any], **settings: object) -> Processes:
        begun.append(
            Processes(folder, size, {"prompts": PROMPTS, "sampling": SAMPLING} | plan, **settings)
        )
        return begun[-1]

    yield begin
    for processes in begun:
        processes.close()


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        pytest.param(2, {"tensor_parallel_size": 4}, marks=pytest.mark.slow),
        pytest.param(
            2, {"tensor_parallel_size": 2, "data_parallel_size": 2}, marks=pytest.mark.slow
        ),
        (4, {"tensor_parallel_size": 2, "data_parallel_size": 4}),
        pytest.param(
            4,
            {
                "tensor_parallel_size": 4, "data_parallel_size": 2, "warmup": "full",
                "kv_layout": "pages",
                "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
            },
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_several_processes_give_what_one_gives(start, expected, size, settings) -> None:
    processes = start(size, {"rounds": 2}, **settings)
    for cached in (0, 8):  # the second time from the prefix cache
        said = processes.answer()
        assert said["tokens"] == expected
        assert said["cached"][0] == cached
    for process in processes.all:
        assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_experts_move_in_all_processes() -> None:
    folder = ROOT / "tests" / "oracles" / "golden" / "models" / "qwen3_moe_plain"
    prompts = [[5, 9, 2, 17, 31, 8, 40, 41, 42, 43, 11, 12], [7, 7, 3]]
    settings = {"load_format": "safetensors", "enable_prefix_caching": False}
    with LLM(folder, **SMALL | settings) as llm:
        outputs = llm.generate(prompts, SamplingParams(**SAMPLING), use_tqdm=False)
    processes = Processes(
        folder, 2, {"prompts": prompts, "sampling": SAMPLING, "rounds": 3}, **settings,
        data_parallel_size=4, enable_expert_parallel=True, all_to_all_backend="flash",
        enable_eplb=True, num_redundant_experts=4, eplb_step_interval=2,
    )  # fmt: skip
    try:
        for _ in range(3):
            found = processes.answer()["tokens"]
            assert found == [list(output.outputs[0].token_ids) for output in outputs]
        for process in processes.all:
            assert process.wait(timeout=60) == 0
        # All processes have moved weights: one that had not would have made other tokens.
        assert any("slots hold other experts" in line for line in processes.messages[0])
    finally:
        processes.close()


def test_a_lost_process_ends_the_others_with_an_error_in_time(start, expected) -> None:
    processes = start(2, {"rounds": 2, "waits": True}, tensor_parallel_size=4, host_timeout=4)
    assert processes.answer()["tokens"] == expected
    processes.all[1].kill()
    processes.go_on()
    said = processes.answer()
    assert "process 1 of 2 gave no sign of life for 4 s" in said["error"]
    assert said["seconds"] < 4 + 10


@pytest.mark.slow
def test_processes_end_when_the_first_one_is_lost(start, expected) -> None:
    processes = start(2, {"rounds": 2, "waits": True}, tensor_parallel_size=4, host_timeout=4)
    assert processes.answer()["tokens"] == expected
    processes.all[0].kill()
    assert processes.all[1].wait(timeout=4 + 10) != 0


@pytest.mark.slow
def test_other_settings_are_named(folder) -> None:
    processes = Processes(
        folder, 2, {"prompts": PROMPTS, "sampling": SAMPLING, "rounds": 1},
        others={"max_num_seqs": 4}, tensor_parallel_size=4, host_timeout=4,
    )  # fmt: skip
    try:
        assert processes.all[1].wait(timeout=TIMEOUT_S) != 0
        assert "max_num_seqs 4 instead of 2" in "".join(processes.messages[1])
    finally:
        processes.close()


def ask(port: int, path: str, body: object | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  local
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_a_server_on_two_processes_answers_and_ends_when_one_is_lost(folder, tmp_path) -> None:
    port, meeting = free_port(), free_port()
    flags = [
        word
        for name, value in SMALL.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT / "src"),
    }  # fmt: skip
    logs = [(tmp_path / f"{rank}.log").open("w+") for rank in range(2)]
    servers = [
        subprocess.Popen(
            [
                sys.executable, "-u", "-m", "jaxserve", "serve", str(folder), *flags,
                "--tp", "4", "--port", str(port), "--nnodes", "2", "--node-rank", str(rank),
                "--dist-init-addr", f"127.0.0.1:{meeting}", "--host-timeout", "4",
                "--warmup", "lazy",
            ],
            stdout=logs[rank], stderr=subprocess.STDOUT, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        end = time.monotonic() + TIMEOUT_S
        status = 503
        while status != 200 and time.monotonic() < end:
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                status = ask(port, "/health")[0]
        status, said = ask(
            port, "/v1/completions", {"model": str(folder), "prompt": PROMPTS[0], "max_tokens": 4}
        )
        assert status == 200, said
        assert said["usage"]["completion_tokens"] == 4
        servers[1].kill()
        start = time.monotonic()
        assert servers[0].wait(timeout=60) == 1
        assert time.monotonic() - start < 4 + 10
        logs[0].seek(0)
        assert "process 1 of 2 gave no sign of life for 4 s" in logs[0].read()
    finally:
        for server, log in zip(servers, logs, strict=True):
            if server.poll() is None:
                server.kill()
            server.wait()
            log.close()


def test_announcements_arrive_in_order_and_a_loss_is_noticed_in_time() -> None:
    port, timeout = free_port(), 4
    processes = [
        subprocess.Popen(
            [
                sys.executable, str(PROGRAM.with_name("channel_process.py")),
                str(rank), str(port), str(timeout),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said, errors = processes[0].communicate(timeout=TIMEOUT_S)
        assert processes[1].communicate(timeout=60)[0] == "received\n"
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 3], errors
    reason, seconds, refused = said.splitlines()
    assert reason.startswith("process 1 of 2 gave no sign of life for 4 s")
    assert timeout - 2 < float(seconds) < timeout + 10
    assert refused == f"EngineDeadError: a host is lost: {reason}."


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
ARRAYS = hnp.arrays(
    st.sampled_from([np.bool_, np.int32, np.int64, np.uint32, np.float32]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


@given(
    values=st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
    arrays=st.dictionaries(st.text(max_size=5), ARRAYS, max_size=3),
)
def test_calls_arrive_as_they_were_sent(values, arrays) -> None:
    message = Message(name="run", values=values, arrays=arrays)
    found = Message.from_bytes(message.to_bytes())
    assert (found.name, found.values) == ("run", values)
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nnodes": 2}, "need dist_init_addr"),
        ({"dist_init_addr": "here"}, "must be HOST:PORT or auto, got 'here'"),
        ({"dist_init_addr": "a:1"}, "needs nnodes and node_rank as well"),
        ({"dist_init_addr": "a:1", "nnodes": 2, "node_rank": 2}, "less than nnodes=2, got 2"),
    ],
)
def test_processes_must_be_named_in_full(settings, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelOptions(**settings)
