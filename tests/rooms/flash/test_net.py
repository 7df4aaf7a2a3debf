"""Programs carry every byte once; processes over real links do, and leave nothing behind."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings

from benchmarks.rooms.flash.namespaces import Cluster, address, own_commands, why_not
from benchmarks.rooms.flash.programs import MOST, as_json, compile_programs
from jaxserve.sharding.flash import CostModel
from tests.rooms.flash.cases import gpu_counts

ROOT = Path(__file__).resolve().parents[3]
REASON = why_not()
needs_network = pytest.mark.skipif(REASON is not None, reason=f"--net {REASON}")


def between(traffic):
    traffic = traffic.copy()
    traffic[np.arange(len(traffic)), :, np.arange(len(traffic))] = 0
    return traffic


@pytest.mark.parametrize("algorithm", ["direct", "source rail", "balanced", "flash"])
@given(traffic=gpu_counts(most=3 * MOST))
@settings(max_examples=25)
def test_programs_carry_every_byte_once(algorithm, traffic):
    n, m = traffic.shape[:2]
    cost = CostModel(gpus=m, out_rate=1e6, up_rate=1e8)
    pieces, programs, schedule = compile_programs(traffic, algorithm, cost)
    wanted, flat = between(traffic), between(traffic).reshape(n * m, n * m)
    marks = {pair: np.zeros(count, int) for pair, count in np.ndenumerate(flat)}
    for piece in pieces:
        assert 0 < piece.count <= MOST
        marks[piece.way[0], piece.way[-1]][piece.first : piece.first + piece.count] += 1
        crossings = [(a, b) for a, b in itertools.pairwise(piece.way) if a // m != b // m]
        assert len(crossings) == 1
        if algorithm in ("balanced", "flash"):
            assert crossings[0][0] % m == crossings[0][1] % m  # on one rail
    assert all((mark == 1).all() for mark in marks.values())
    assert [program.expected for program in programs] == flat.sum(axis=0).tolist()
    sent = sorted(
        number for program in programs for message in program.messages for number in message
    )
    assert sent == list(range(len(pieces)))
    for gpu, program in enumerate(programs):
        for message in program.messages:
            assert len({pieces[k].way[pieces[k].way.index(gpu) + 1] for k in message}) == 1
        for number in program.inside:
            assert pieces[number].way[0] == gpu
            assert pieces[number].way[1] // m == gpu // m
    if algorithm in ("balanced", "flash"):
        rails = np.zeros((n, n, m), int)
        for gpu, program in enumerate(programs):
            for message in program.messages:
                for number in message:
                    following = pieces[number].way[pieces[number].way.index(gpu) + 1]
                    rails[gpu // m, following // m, gpu % m] += pieces[number].count
        assert np.array_equal(rails.sum(axis=2), wanted.sum(axis=(1, 3)))
        assert (np.ptp(rails, axis=2) <= 1).all()
    assert (schedule is None) == (algorithm != "flash")


def test_addresses_of_a_server_are_routed_inside():
    commands = own_commands(2, 2, 20.0)
    routes = [command for command in commands if command.startswith("ip route")]
    assert routes == [f"ip route add {address(3)}/32 via 10.88.0.4 dev near src {address(2)}"]


def test_without_tools_it_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert why_not() == ("needs Linux with iproute2 and util-linux; missing: ip, tc, nsenter")


@needs_network
def test_processes_exchange_every_byte_and_leave_nothing():
    traffic = np.random.default_rng(0).integers(0, 20_000, (2, 2, 2, 2))
    with Cluster(2, 2, 500.0, "benchmarks.rooms.flash.node") as cluster:
        cluster.tell(["connect"] * 4)
        cluster.hear("connected")
        own = namespaces([child.pid for child in psutil.Process().children(recursive=True)])
        assert len(own - namespaces([os.getpid()])) == 5  # four GPUs, and the switches
        for algorithm in ("direct", "source rail", "balanced", "flash"):
            pieces, programs, _ = compile_programs(traffic, algorithm, CostModel(gpus=2))
            cluster.tell([f"program {json.dumps(as_json(pieces, programs))}"] * 4)
            cluster.hear("prepared")
            start = time.monotonic()
            cluster.tell([f"go {start}"] * 4)
            assert all(float(end) >= start for end in cluster.hear("done"))
            cluster.tell(["check"] * 4)
            assert cluster.hear("checked") == ["True"] * 4
    assert not (own - namespaces([os.getpid()])) & namespaces(psutil.pids())


@needs_network
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_command_is_ended(sign):
    script = (
        "import time\nfrom benchmarks.rooms.flash.namespaces import Cluster\n"
        "with Cluster(2, 1, 100.0, 'benchmarks.rooms.flash.node'):\n"
        "    print('up', flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    children = psutil.Process(process.pid).children(recursive=True)
    of_children = namespaces([child.pid for child in children])
    assert len(of_children) == 3  # two GPUs, and the switches
    process.send_signal(sign)
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not of_children & namespaces(psutil.pids())


def namespaces(processes):
    """Return the network namespaces that processes are in."""
    found = set()
    for process in processes:
        try:
            found.add(str(Path(f"/proc/{process}/ns/net").readlink()))
        except OSError:  # it has ended meanwhile, or is a zombie
            continue
    return found
