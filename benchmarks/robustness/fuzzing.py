"""Cases made from the OpenAPI description by schemathesis, valid and invalid, on every route."""

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute

from benchmarks.child import quiet_environment
from benchmarks.environments import python_of
from benchmarks.robustness.verdict import Verdict
from benchmarks.server import Server, ask, metrics
from jaxserve.serve import admin, lora_routes

NAME = "served"
FLAGS = (
    "--max-model-len=128",  # most cases that are accepted run to the end of the context
    "--max-num-seqs=8",
    "--max-num-queued-reqs=64",
    "--tool-call-parser=hermes",
    f"--served-model-name={NAME}",
    "--warmup=lazy",
    "--disable-uvicorn-access-log",
)
CHECKS = (
    "only_deliberate_server_errors",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
)
"""Not among them: positive_data_acceptance. Bounds that hang on other fields, on the vocabulary or
on the context length cannot be said in a schema, so valid data may be refused with 400."""
MIN_CASES = 2000

ADMIN_KEY = "the-key-of-this-run"
ADMIN_FLAGS = (
    *FLAGS,
    "--enable-admin-api",
    f"--admin-api-key={ADMIN_KEY}",
    "--enable-lora",
    "--max-lora-rank=8",
)
MIN_ADMIN_CASES = 500
NEEDS_FILES = frozenset(
    {
        "POST /update_weights",
        "POST /update_weights_from_disk",
        "POST /load_lora_adapter",
        "POST /unload_lora_adapter",
        "POST /v1/load_lora_adapter",
        "POST /v1/unload_lora_adapter",
    }
)
"""Operations that take files of the server's; what is made up finds none."""


def fuzz(
    server: Server, *, max_examples: int, seed: int, workers: int, timeout_s: float
) -> Verdict:
    """Run schemathesis against a server and count what it did.

    Args:
        server: Started with `FLAGS`.
        max_examples: Random cases per operation and kind, besides those of the coverage phase.
        seed: Of the random cases.
        workers: Cases under way at once.
        timeout_s: Longest time of one request.
    """
    verdict = Verdict()
    described = ask(f"{server.url}/openapi.json").json()
    _run(
        server, verdict, described,
        max_examples=max_examples, seed=seed, workers=workers, timeout_s=timeout_s,
    )  # fmt: skip
    _check_counts(verdict, MIN_CASES)
    _check_server(server, verdict)
    return verdict


def fuzz_admin(server: Server, *, max_examples: int, seed: int, timeout_s: float) -> Verdict:
    """Run schemathesis against the routes that change a running server.

    One case at a time, because what pauses the server or puts it to sleep would stop the others;
    behind each such case the hooks wake the server up.

    Args:
        server: Started with `ADMIN_FLAGS`.
        max_examples: Random cases per operation and kind, besides those of the coverage phase.
        seed: Of the random cases.
        timeout_s: Longest time of one request.
    """
    verdict = Verdict()
    described = ask(f"{server.url}/openapi.json").json()
    routes = [*admin.router.routes, *lora_routes.router.routes]
    paths = {str(route.path) for route in routes if isinstance(route, APIRoute)}
    described["paths"] = {
        path: found for path, found in described["paths"].items() if path in paths
    }
    _run(
        server, verdict, described,
        max_examples=max_examples, seed=seed, workers=1, timeout_s=timeout_s,
        more=(
            "--include-path-regex", f"^({'|'.join(map(re.escape, sorted(described['paths'])))})$",
            "--header", f"Authorization: Bearer {ADMIN_KEY}",
        ),
        environment={"FUZZ_RECOVER": server.url, "FUZZ_KEY": ADMIN_KEY},
    )  # fmt: skip
    _check_counts(verdict, MIN_ADMIN_CASES, may_fail=NEEDS_FILES)
    _check_server(server, verdict)
    return verdict


def _run(
    server: Server,
    verdict: Verdict,
    described: dict[str, Any],
    *,
    max_examples: int,
    seed: int,
    workers: int,
    timeout_s: float,
    more: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run schemathesis and write down in a verdict what it did and found."""
    with tempfile.TemporaryDirectory(prefix="jaxserve-fuzz-") as folder:
        calls = Path(folder) / "calls.jsonl"
        command = [
            str(python_of("schemathesis").with_name("st")), "run", f"{server.url}/openapi.json",
            "--checks", ",".join(CHECKS), "--mode", "all", "--phases", "examples,coverage,fuzzing",
            "--max-examples", str(max_examples), "--seed", str(seed), "--workers", str(workers),
            "--continue-on-failure", "--no-shrink", "--generation-database", "none",
            "--request-timeout", str(timeout_s), "--no-color", *more,
        ]  # fmt: skip
        variables = quiet_environment() | {
            "SCHEMATHESIS_HOOKS": "benchmarks.robustness.fuzz_hooks",
            "FUZZ_CALLS": str(calls),
            "FUZZ_MODEL": NAME,
            "PYTHONHASHSEED": "0",
            **(environment or {}),
        }
        done = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        lines = calls.read_text().splitlines() if calls.exists() else []
    verdict.facts = _counted(lines, described)
    if os.environ.get("FUZZ_SHOW"):
        print(done.stdout)
    failures = re.findall(r"^- (.+)$", done.stdout.partition("= FAILURES =")[2], re.MULTILINE)
    verdict.facts["failures"] = dict(Counter(failures))
    verdict.require(
        not failures, f"failed checks: {dict(Counter(failures))}; FUZZ_SHOW=1 shows all"
    )
    tail = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
    verdict.require(failures or not done.returncode, f"schemathesis ended with an error: {tail}")


def _counted(lines: list[str], described: dict[str, Any]) -> dict[str, Any]:
    calls = [tuple(json.loads(line)) for line in lines]
    operations = {
        f"{method.upper()} {path}" for path, found in described["paths"].items() for method in found
    }
    statuses = Counter(status for _, _, status in calls)
    return {
        "cases": len(calls),
        "by kind": dict(Counter(mode for _, mode, _ in calls)),
        "by status": {str(status): count for status, count in sorted(statuses.items())},
        "operations": len(operations),
        "operations not reached": sorted(operations - {name for name, _, _ in calls}),
        "answered 200 by operation": dict(
            sorted(Counter(name for name, _, status in calls if status == 200).items())
        ),
    }


def _check_counts(verdict: Verdict, least: int, *, may_fail: frozenset[str] = frozenset()) -> None:
    facts = verdict.facts
    verdict.require(facts["cases"] >= least, f"{facts['cases']} cases, {least} are due")
    missed = facts["operations not reached"]
    verdict.require(not missed, f"not reached: {', '.join(missed)}")
    answered = facts["answered 200 by operation"].keys() | may_fail
    never = facts["operations"] - len(answered)
    verdict.require(not never, f"{never} operations never answered 200")
    other = [s for s in facts["by status"] if s >= "500" and s != "503"]
    verdict.require(not other, f"statuses {', '.join(other)}")


def _check_server(server: Server, verdict: Verdict) -> None:
    """See that nothing is left over and that the next client is served."""
    after = metrics(server.url)
    left = {name: after[name] for name in ("num_requests_running", "num_requests_waiting")}
    verdict.require(not any(left.values()), f"left over: {left}")
    reply = ask(f"{server.url}/v1/completions", {"prompt": "Once upon", "max_tokens": 4})
    verdict.require(reply.status == 200, f"afterwards a request got {reply.status}")
