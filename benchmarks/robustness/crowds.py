"""Many clients at once: killed in the middle, far too many, and a server told to stop."""

import asyncio
import json
import random
from typing import Any

from benchmarks.robustness.traffic import (
    CHAT,
    COMPLETIONS,
    Connection,
    Outcome,
    complete,
    wait_until,
)
from benchmarks.robustness.verdict import Verdict
from benchmarks.server import Server, ask, metrics

ROWS = 8
LIMIT = 16
"""Completions that the overloaded server accepts at once."""
FLAGS = (
    "--max-model-len=1024",
    f"--max-num-seqs={ROWS}",
    "--warmup=full",
    "--disable-uvicorn-access-log",
)
PROBE = {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
LONG = {"max_tokens": 900, "ignore_eos": True, "stream": True}
SETTLE_S = 30.0


# Clients killed in mid-stream --------------------------------------------------------------------


async def killed(server: Server, *, num_clients: int, seed: int) -> Verdict:
    """Kill every client after its first events, half of them with a reset.

    Args:
        server: Started with `FLAGS`.
        num_clients: How many, all at once.
        seed: Chooses what they ask and when they die.
    """
    verdict = Verdict()
    before = ask(f"{server.url}/v1/completions", PROBE).json()
    ended = metrics(server.url)["request_success_total"]
    rng = random.Random(seed)
    plans = [_plan(number, rng) for number in range(num_clients)]
    seen = await asyncio.gather(*(_die(server.url, *plan) for plan in plans))
    num_completions = sum(body.get("n", 1) for _, body, _ in plans)
    seconds = await wait_until(lambda: _is_idle(server.url), SETTLE_S)
    after = metrics(server.url)
    again = ask(f"{server.url}/v1/completions", PROBE)
    verdict.facts = {
        "clients": num_clients,
        "killed in mid-stream": sum(count > 0 for count in seen),
        "completions aborted": int(after["request_success_total"] - ended),
        "idle after seconds": round(seconds, 2),
        **_rest(server.url, after),
    }
    verdict.require(all(seen), f"{seen.count(0)} clients saw no event before they died")
    verdict.require(seconds < SETTLE_S, f"not idle {SETTLE_S:g} s after the last one died")
    _require_rest(verdict)
    ended_now = verdict.facts["completions aborted"]
    verdict.require(
        ended_now == num_completions, f"{ended_now} of {num_completions} completions ended"
    )
    verdict.require(again.status == 200, f"afterwards a request got {again.status}")
    same = (
        again.status == 200 and again.json()["choices"][0]["text"] == before["choices"][0]["text"]
    )
    verdict.require(same, "afterwards the same request got another text")
    return verdict


def _plan(number: int, rng: random.Random) -> tuple[str, dict[str, Any], int]:
    """Return path, body, and the number of events after which the client dies."""
    topic = f"Tell a long story about the number {number} and {rng.choice('abcdefgh')}."
    body: dict[str, Any] = {**LONG, "seed": number}
    kind = number % 4
    if kind == 3:
        body["structured_outputs"] = {"regex": "[a-z ]{800,900}"}
    if kind == 2:
        body["n"] = 2
    if kind == 1:
        return CHAT, body | {"messages": [{"role": "user", "content": topic}]}, rng.randint(2, 6)
    return COMPLETIONS, body | {"prompt": topic}, rng.randint(1, 6)


async def _die(url: str, path: str, body: dict[str, Any], num_events: int) -> int:
    """Read so many events with text and die; return how many there were."""
    connection = Connection(url, path, body)
    await connection.open()
    count = 0
    if connection.status == 200:
        async for data in connection.events():
            count += '"finish_reason":null' in data
            if count == num_events:
                break
    connection.kill(with_reset=body["seed"] % 2 == 0)
    return count


def _is_idle(url: str) -> bool:
    found = metrics(url)
    return not any(_rest(url, found).values())


def _rest(url: str, found: dict[str, float]) -> dict[str, float]:
    """Return what must be zero once nobody is being served."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {
        **{name: found[name] for name in names},
        "server_load": ask(f"{url}/load").json()["server_load"],
    }


def _require_rest(verdict: Verdict) -> None:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "server_load")
    left = {name: verdict.facts[name] for name in names if verdict.facts[name]}
    verdict.require(not left, f"left over: {left}")


# Far too many ------------------------------------------------------------------------------------


async def overload(
    server: Server, *, waves: int = 3, factor: int = 10, length: int = 24
) -> Verdict:
    """Send ten times of what is accepted, in waves; count everything on both sides.

    Args:
        server: Started with `FLAGS` and a limit of `LIMIT`.
        waves: How often.
        factor: Requests per accepted one.
        length: Tokens that each asks for.
    """
    verdict = Verdict()
    before = metrics(server.url)
    outcomes: list[Outcome] = []
    for wave in range(waves):
        numbers = range(wave * factor * LIMIT, (wave + 1) * factor * LIMIT)
        outcomes += await asyncio.gather(
            *(complete(server.url, _short(number, length)) for number in numbers)
        )
    await wait_until(lambda: _is_idle(server.url), SETTLE_S)
    after = metrics(server.url)
    whole = [o for o in outcomes if o.is_whole]
    refused = [o for o in outcomes if o.is_refused]
    waits = sorted(int(o.headers["retry-after"]) for o in refused)
    counted = {
        "finished by its metrics": after["request_success_total"] - before["request_success_total"],
        "refused by its metrics": after["admission_rejections_total"]
        - before["admission_rejections_total"],
    }
    verdict.facts = {
        "requests": len(outcomes),
        "accepted and finished": len(whole),
        "refused with 503 and Retry-After": len(refused),
        "anything else": len(outcomes) - len(whole) - len(refused),
        "Retry-After, least and most seconds": [waits[0], waits[-1]] if waits else [],
        **{name: int(value) for name, value in counted.items()},
        **_rest(server.url, after),
    }
    odd = [o for o in outcomes if not (o.is_whole or o.is_refused)]
    for outcome in odd[:3]:
        verdict.problems.append(f"status {outcome.status} {outcome.reasons}: {outcome.error[:200]}")
    verdict.require(len(whole) >= waves * LIMIT, f"only {len(whole)} were accepted")
    verdict.require(refused, "nothing was refused: this was no overload")
    short = [o.num_tokens for o in whole if o.num_tokens != length]
    verdict.require(not short, f"accepted requests got {short[:5]} tokens instead of {length}")
    ours = {"finished by its metrics": len(whole), "refused by its metrics": len(refused)}
    for name, value in ours.items():
        verdict.require(counted[name] == value, f"{name}: {counted[name]:g}, seen {value}")
    _require_rest(verdict)
    return verdict


def _short(number: int, length: int) -> dict[str, Any]:
    """Ask for so many tokens, every second time as a stream."""
    body: dict[str, Any] = {"prompt": f"Number {number} is", "max_tokens": length}
    body |= {"ignore_eos": True, "seed": number}
    if number % 2:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


# A server told to stop ---------------------------------------------------------------------------


async def drain(server: Server, *, num_requests: int = 3 * ROWS, length: int = 64) -> Verdict:
    """Send SIGTERM while requests run and wait; see that they finish and new ones are refused.

    Args:
        server: Started with `FLAGS` and time to drain.
        num_requests: How many; more than the server runs at once.
        length: Tokens that each asks for.
    """
    verdict = Verdict()
    tasks = [
        asyncio.create_task(complete(server.url, _short(number, length)))
        for number in range(num_requests)
    ]
    seconds = await wait_until(lambda: _is_loaded(server.url, num_requests), SETTLE_S)
    verdict.require(seconds < SETTLE_S, "the requests were not under way in time")
    busy = metrics(server.url)
    server.stop()
    late: list[Outcome] = []
    while not all(task.done() for task in tasks):
        late.append(await complete(server.url, _short(len(late), 1)))
        await asyncio.sleep(0.1)
    outcomes = [task.result() for task in tasks]
    status = await asyncio.to_thread(server.exit_status, SETTLE_S)
    gone = await complete(server.url, _short(0, 1))
    refused = [o for o in late if o.is_refused]
    closed = [o for o in late if o.status == 0]
    verdict.facts = {
        "requests under way": num_requests,
        "running at the signal": int(busy["num_requests_running"]),
        "waiting at the signal": int(busy["num_requests_waiting"]),
        "finished": sum(o.is_whole for o in outcomes),
        "new ones refused with 503 and Retry-After": len(refused),
        "new ones that found the port closed": len(closed),
        "exit status": status,
    }
    for outcome in [o for o in outcomes if not o.is_whole][:3]:
        verdict.problems.append(f"lost: {outcome.status} {outcome.reasons}: {outcome.error[:200]}")
    short = [o.num_tokens for o in outcomes if o.is_whole and o.num_tokens != length]
    verdict.require(not short, f"requests got {short[:5]} tokens instead of {length}")
    verdict.require(busy["num_requests_waiting"], "nobody waited at the signal")
    verdict.require(refused, "no new request was refused with 503 while it drained")
    odd = [o for o in late if not o.is_refused and o.status]
    verdict.require(not odd, f"new requests got {sorted({o.status for o in odd})}")
    verdict.require(status == 0, f"the exit status is {status}")
    verdict.require(gone.status == 0, "the port still answers")
    return verdict


def _is_loaded(url: str, count: int) -> bool:
    found = metrics(url)
    under_way = found["num_requests_running"] + found["num_requests_waiting"]
    return under_way == count and json.loads(ask(f"{url}/load").text)["server_load"] == count
