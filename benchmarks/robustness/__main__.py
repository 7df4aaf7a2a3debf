"""What clients can do to a running server, and what becomes of everybody else; a line per part.

python -m benchmarks.robustness
python -m benchmarks.robustness --only fuzz
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.environments import python_of
from benchmarks.record import Recorder
from benchmarks.robustness import crowds, fuzzing, grammars
from benchmarks.robustness.verdict import Verdict
from benchmarks.server import MODEL, running


def _fuzz(args: argparse.Namespace) -> Verdict:
    python_of("schemathesis")
    with running(*fuzzing.FLAGS, model=args.model) as server:
        return fuzzing.fuzz(
            server, max_examples=args.max_examples, seed=args.seed, workers=4, timeout_s=120
        )


def _fuzz_admin(args: argparse.Namespace) -> Verdict:
    python_of("schemathesis")
    with running(*fuzzing.ADMIN_FLAGS, model=args.model) as server:
        return fuzzing.fuzz_admin(
            server, max_examples=args.max_examples, seed=args.seed, timeout_s=120
        )


def _killed(args: argparse.Namespace) -> Verdict:
    with running(*crowds.FLAGS, model=args.model) as server:
        return asyncio.run(crowds.killed(server, num_clients=args.num_clients, seed=args.seed))


def _overload(args: argparse.Namespace) -> Verdict:
    limit = f"--max-num-queued-reqs={crowds.LIMIT}"
    with running(*crowds.FLAGS, limit, model=args.model) as server:
        return asyncio.run(crowds.overload(server))


def _drain(args: argparse.Namespace) -> Verdict:
    with running(*crowds.FLAGS, "--shutdown-timeout=120", model=args.model) as server:
        return asyncio.run(crowds.drain(server))


def _grammars(args: argparse.Namespace) -> Verdict:
    with running(*grammars.FLAGS, model=args.model) as server:
        return asyncio.run(grammars.beside(server, count=args.num_grammars, seed=args.seed))


PARTS: dict[str, Callable[[argparse.Namespace], Verdict]] = {
    "fuzz": _fuzz,
    "fuzz_admin": _fuzz_admin,
    "killed": _killed,
    "overload": _overload,
    "drain": _drain,
    "grammars": _grammars,
}


def main() -> None:
    """Run the parts; exit with 1 if one finds something wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default=MODEL, help="name or path")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-examples", type=int, default=30, help="fuzz: per operation and kind")
    parser.add_argument("--num-clients", type=int, default=200, help="killed: how many")
    parser.add_argument("--num-grammars", type=int, default=1000, help="grammars: how many")
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    args = parser.parse_args()
    recorder = Recorder("robustness", out=args.out)
    is_bad = False
    for name in args.only:
        start = time.perf_counter()
        verdict = PARTS[name](args)
        seconds = round(time.perf_counter() - start, 1)
        recorder.write(
            name, passed=not verdict.problems, problems=verdict.problems, seconds=seconds,
            **verdict.facts,
        )  # fmt: skip
        print(f"{name}: {'FAIL' if verdict.problems else 'pass'} ({seconds} s)")
        for key, value in verdict.facts.items():
            print(f"  {key}: {value}")
        for problem in verdict.problems:
            print(f"  WRONG: {problem}")
        is_bad |= bool(verdict.problems)
    raise SystemExit(1 if is_bad else 0)


if __name__ == "__main__":
    main()
