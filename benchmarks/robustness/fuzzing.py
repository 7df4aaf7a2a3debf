"""Cases made from the OpenAPI description by schemathesis, valid and invalid, on every route."""

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.child import quiet_environment
from benchmarks.environments import python_of
from benchmarks.robustness.verdict import Verdict
from benchmarks.server import Server, ask, metrics

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
    with tempfile.TemporaryDirectory(prefix="jaxserve-fuzz-") as folder:
        calls = Path(folder) / "calls.jsonl"
        command = [
            str(python_of("schemathesis").with_name("st")), "run", f"{server.url}/openapi.json",
            "--checks", ",".join(CHECKS), "--mode", "all", "--phases", "examples,coverage,fuzzing",
            "--max-examples", str(max_examples), "--seed", str(seed), "--workers", str(workers),
            "--continue-on-failure", "--no-shrink", "--generation-database", "none",
            "--request-timeout", str(timeout_s), "--no-color",
        ]  # fmt: skip
        environment = quiet_environment() | {
            "SCHEMATHESIS_HOOKS": "benchmarks.robustness.fuzz_hooks",
            "FUZZ_CALLS": str(calls),
            "FUZZ_MODEL": NAME,
            "PYTHONHASHSEED": "0",
        }
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        lines = calls.read_text().splitlines() if calls.exists() else []
    described = ask(f"{server.url}/openapi.json").json()
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
    _check_counts(verdict)
    _check_server(server, verdict)
    return verdict


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


def _check_counts(verdict: Verdict) -> None:
    facts = verdict.facts
    verdict.require(facts["cases"] >= MIN_CASES, f"{facts['cases']} cases, {MIN_CASES} are due")
    missed = facts["operations not reached"]
    verdict.require(not missed, f"not reached: {', '.join(missed)}")
    never = facts["operations"] - len(facts["answered 200 by operation"])
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
