"""Do the field's Python clients work with the server? A table of pass and fail.

    python -m benchmarks.clients

One server with the default model; the official `openai` client, `instructor`, `litellm` and
`langchain-openai`, each in an environment of its own (`build/environments`, made the first time),
each doing chat, streaming, tool calls, JSON under a schema, log-probabilities and embeddings. The
content is verified: texts, counts and vectors equal those of plain HTTP requests, JSON satisfies
its schema, tools and arguments exist, log-probabilities are such.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.child import Child, PeerError
from benchmarks.clients import cases
from benchmarks.clients.checks import CHECKS, NOTES, Reference, WrongAnswerError, failures
from benchmarks.environments import python_of
from benchmarks.record import Recorder, table
from benchmarks.server import MODEL, ask, running

WORKERS = {
    "openai": "benchmarks.clients.openai_worker",
    "instructor": "benchmarks.clients.instructor_worker",
    "litellm": "benchmarks.clients.litellm_worker",
    "langchain-openai": "benchmarks.clients.langchain_worker",
}
NAME = "served"
"""What the model is called here; clients have opinions about names that they know."""
FLAGS = (
    "--max-model-len=1024",
    "--max-num-seqs=4",
    "--tool-call-parser=hermes",
    f"--served-model-name={NAME}",
    "--warmup=lazy",
)
TIMEOUT_S = 120.0


def reference_of(url: str) -> Reference:
    """Ask the server without any client.

    Raises:
        PeerError: If it refuses.
    """
    chat = {"model": NAME, "messages": cases.CHAT, "max_tokens": cases.CHAT_TOKENS}
    answer = _answer(f"{url}/v1/chat/completions", chat | {"temperature": 0})
    vectors = _answer(f"{url}/v1/embeddings", {"model": NAME, "input": cases.TEXTS})
    choice, usage = answer["choices"][0], answer["usage"]
    return Reference(
        text=choice["message"]["content"],
        finish_reason=choice["finish_reason"],
        num_prompt=usage["prompt_tokens"],
        num_output=usage["completion_tokens"],
        vectors=[item["embedding"] for item in vectors["data"]],
    )


def _answer(url: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = ask(url, body)
    if reply.status != 200:
        raise PeerError(f"{url} answered {reply.status}: {reply.text[:300]}")
    return reply.json()


def try_client(
    name: str, url: str, reference: Reference, log: Path
) -> tuple[dict[str, str], dict[str, Any]]:
    """Run every check with one client.

    Returns:
        What is wrong by check, empty where all is well; and what the client said of itself.
    """
    child = Child(python_of(name), WORKERS[name], log)
    try:
        about = child.ask("load", base_url=url, model=NAME, timeout_s=TIMEOUT_S)

        def call(op: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401
            return child.ask(op, timeout_s=TIMEOUT_S, **arguments)

        found: dict[str, str] = {}
        for check, run in CHECKS.items():
            try:
                run(call, reference)
                found[check] = ""
            except (WrongAnswerError, PeerError, KeyError) as error:
                found[check] = f"{type(error).__name__}: {error}"[:500]
        return found, about
    finally:
        child.close()


def main() -> None:
    """Try all clients; exit with 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=WORKERS, default=list(WORKERS))
    parser.add_argument("--model", default=MODEL, help="name or path")
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    args = parser.parse_args()
    for name in args.only:
        python_of(name)  # before anything else takes its time
    recorder = Recorder("clients", out=args.out)
    results: dict[str, dict[str, str]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="jaxserve-bench-") as logs,
        running(*FLAGS, model=args.model) as server,
    ):
        reference = reference_of(server.url)
        for name in args.only:
            start = time.perf_counter()
            found, about = try_client(name, server.url, reference, Path(logs) / f"{name}.log")
            results[name] = found
            recorder.write(
                name,
                client_versions=about["versions"],
                checks={check: "fail" if problem else "pass" for check, problem in found.items()},
                problems={check: problem for check, problem in found.items() if problem},
                notes=NOTES.get(name, {}),
                seconds=round(time.perf_counter() - start, 1),
            )
    report(results)
    raise SystemExit(1 if failures(results) else 0)


def report(results: dict[str, dict[str, str]]) -> None:
    """Print the table, what was done in other ways, and what failed."""
    marks: dict[tuple[str, str], int] = {}
    for name, notes in NOTES.items():
        if name in results:
            for check in notes:
                marks[name, check] = len(marks) + 1
    rows = []
    for check in CHECKS:
        cells = [check]
        for name, found in results.items():
            mark = marks.get((name, check))
            cells.append(("FAIL" if found[check] else "pass") + (f" [{mark}]" if mark else ""))
        rows.append(cells)
    print(table(["", *results], rows))
    for (name, check), mark in marks.items():
        print(f"[{mark}] {NOTES[name][check]}")
    passed = sum(not problem for found in results.values() for problem in found.values())
    print(f"{passed} of {sum(map(len, results.values()))} checks pass")
    for line in failures(results):
        print(f"WRONG: {line}")


if __name__ == "__main__":
    main()
