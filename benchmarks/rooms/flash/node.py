"""One GPU of `namespaces.Cluster` that sends by sockets: runs programs, and checks every byte.

A connection leads to each other GPU. Pieces are read by a thread per connection; those for another
GPU of the server are passed on at once. Messages between servers go out in the order of the
program, `in_flight` at a time: a message is over when its receiver says that it has it all. No
GPU waits for any other than by that.
"""

import json
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.rooms.flash.namespaces import address, settle

PORT: Final = 5201
_HEADER: Final = struct.Struct("!IB")  # piece, whether the receiver is to say that it has it


def _read(connection: socket.socket, view: memoryview) -> bool:
    """Fill a view; False at the end of the connection."""
    while len(view):
        got = connection.recv_into(view)
        if not got:
            return False
        view = view[got:]
    return True


def _bytes_of(source: int, final: int, count: int) -> bytes:
    return np.random.default_rng([source, final]).bytes(count)


class Run:
    """One program under way."""

    def __init__(self, gpu: int, job: dict[str, Any]) -> None:
        """Make the bytes that this GPU has, and room for those that it gets."""
        self.gpu = gpu
        self.pieces: list[tuple[list[int], int, int]] = [tuple(piece) for piece in job["pieces"]]
        own = job["programs"][gpu]
        self.inside, self.messages = own["inside"], own["messages"]
        self.in_flight, self.expected = own["in_flight"], own["expected"]
        sizes: dict[tuple[int, int], int] = {}
        for way, first, count in self.pieces:
            pair = way[0], way[-1]
            sizes[pair] = max(sizes.get(pair, 0), first + count)
        self.sizes = sizes
        self._own = {
            final: memoryview(_bytes_of(source, final, size))
            for (source, final), size in sizes.items() if source == gpu
        }  # fmt: skip
        self.got = {
            source: bytearray(size) for (source, final), size in sizes.items() if final == gpu
        }
        self.received, self.ended = 0, 0.0
        self.lock, self.done = threading.Lock(), threading.Event()
        self._passing: dict[int, memoryview] = {}
        self._here = {
            number: threading.Event()
            for message in self.messages for number in message
            if self.pieces[number][0][0] != gpu
        }  # fmt: skip

    def payload(self, number: int) -> memoryview:
        """Return a piece that this GPU has, or wait until it has come."""
        way, first, count = self.pieces[number]
        if way[0] == self.gpu:
            return self._own[way[-1]][first : first + count]
        if number in self._here:
            self._here[number].wait()
        with self.lock:
            return self._passing.pop(number)

    def room(self, number: int) -> memoryview:
        """Return where a piece that comes goes."""
        way, first, count = self.pieces[number]
        if way[-1] == self.gpu:
            return memoryview(self.got[way[0]])[first : first + count]
        return memoryview(bytearray(count))

    def keep(self, number: int, data: memoryview) -> int | None:
        """Take note of a piece that has come; returns the GPU to pass it on to at once, if any."""
        way = self.pieces[number][0]
        with self.lock:
            if way[-1] == self.gpu:
                self.received += len(data)
                if self.received == self.expected:
                    self.ended = time.monotonic()
                    self.done.set()
                return None
            self._passing[number] = data
        if number in self._here:
            self._here[number].set()
            return None
        return way[way.index(self.gpu) + 1]

    def is_right(self) -> bool:
        """Compare all that came with what was sent."""
        return all(
            bytes(data) == _bytes_of(source, self.gpu, len(data))
            for source, data in self.got.items()
        )


class Node:
    """The connections of one GPU."""

    def __init__(self, gpu: int, count: int, gpus: int) -> None:
        """Listen."""
        self.gpu, self.count = gpu, count
        self.siblings = {g for g in range(count) if g // gpus == gpu // gpus and g != gpu}
        self.run: Run | None = None
        self._out: dict[int, socket.socket] = {}
        self._locks = {other: threading.Lock() for other in range(count)}
        self._inside: dict[int, queue.Queue[tuple[Run, int]]] = {
            other: queue.Queue() for other in self.siblings
        }
        self._server = socket.create_server((address(gpu), PORT), backlog=count)

    def connect(self) -> None:
        """Connect to all others, and read what comes from them."""
        for other in range(self.count):
            if other != self.gpu:
                connection = socket.socket()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.connect((address(other), PORT))
                self._out[other] = connection
        for _ in range(self.count - 1):
            connection, _ = self._server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._receive, connection)
        for other in self.siblings:
            self._start(self._pass_on, other)

    @staticmethod
    def _start(call: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=call, args=arguments, daemon=True)
        thread.start()
        return thread

    def _receive(self, connection: socket.socket) -> None:
        header = bytearray(_HEADER.size)
        while _read(connection, memoryview(header)):
            number, is_last = _HEADER.unpack(header)
            run = self.run
            assert run is not None
            data = run.room(number)
            if not _read(connection, data):
                return
            if is_last:
                connection.sendall(b"!")
            following = run.keep(number, data)
            if following is not None:
                self._inside[following].put((run, number))

    def _pass_on(self, other: int) -> None:
        while True:
            run, number = self._inside[other].get()
            with self._locks[other]:
                self._send(run, other, number, is_last=False)

    def _send(self, run: Run, other: int, number: int, *, is_last: bool) -> None:
        data = run.payload(number)
        self._out[other].sendall(_HEADER.pack(number, is_last))
        self._out[other].sendall(data)

    def go(self, start: float) -> float:
        """Run the program from a time on; returns when the last byte was here."""
        run = self.run
        assert run is not None
        turns, lock = iter(run.messages), threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    message = next(turns, None)
                if message is None:
                    return
                way = run.pieces[message[0]][0]
                other = way[way.index(self.gpu) + 1]
                with self._locks[other]:
                    for number in message:
                        is_last = bool(run.in_flight) and number == message[-1]
                        self._send(run, other, number, is_last=is_last)
                    if run.in_flight:
                        self._out[other].recv(1)

        time.sleep(max(0.0, start - time.monotonic()))
        for number in run.inside:
            self._inside[run.pieces[number][0][1]].put((run, number))
        workers = [
            self._start(work) for _ in range(min(run.in_flight or 1 << 30, len(run.messages)))
        ]
        if not run.expected:
            run.ended = start
            run.done.set()
        run.done.wait()
        for worker in workers:
            worker.join()
        return run.ended


def main() -> None:
    """Answer commands until they end."""
    gpu, servers, gpus, mbit = int(sys.argv[1]), *map(int, sys.argv[2:4]), float(sys.argv[4])
    settle(gpu, gpus, mbit)
    node = Node(gpu, servers * gpus, gpus)
    print("ready", flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "connect":
            node.connect()
            print("connected", flush=True)
        elif word == "program":
            node.run = Run(gpu, json.loads(rest))
            print("prepared", flush=True)
        elif word == "go":
            print("done", node.go(float(rest)), flush=True)
        elif word == "check":
            print("checked", node.run is not None and node.run.is_right(), flush=True)


if __name__ == "__main__":
    main()
