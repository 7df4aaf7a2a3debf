"""`jaxserve profile`: how long the steps of an engine take on this machine, as a file."""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.cost import StepLoad
from jaxserve.core.cost_buckets import BucketCost
from jaxserve.core.cost_file import write_cost
from jaxserve.engine.measure import QUICK, SHORT, Effort, Measured, measure_engine
from jaxserve.engine.setup import assemble
from jaxserve.models.hub import DEFAULT_MODEL
from jaxserve.serve.flags import parse

DEFAULT_OUTPUT = "cost_model.json"


def profile_parser(prog: str = "jaxserve profile") -> argparse.ArgumentParser:
    """Return the parser of what `jaxserve profile` takes besides the flags of the server."""
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Measure how long the steps of an engine take on this machine, and write a "
        "cost model for --cost-model.",
        epilog="MODEL and every flag of `jaxserve serve` that shapes the engine may follow; give "
        "those with which it will serve.",
    )
    parser.add_argument(
        "--output", "-o", default=DEFAULT_OUTPUT, metavar="FILE", help=f"[{DEFAULT_OUTPUT}]"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats and contexts, as a server does at start"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="steps per shape and context")
    return parser


def run(argv: Sequence[str], out: Callable[[str], None], *, prog: str = "jaxserve profile") -> int:
    """Measure, print how good the fit is, and write the file.

    Args:
        argv: Arguments, without the program's name.
        out: Prints a line.
        prog: Name of the program, for messages.

    Returns:
        The exit code.

    Raises:
        JaxserveError: If the model cannot be had, or the file cannot be written.
    """
    parser = profile_parser(prog)
    given, rest = parser.parse_known_args(list(argv))
    if given.repeats is not None and given.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {given.repeats}")
    settings = parse(rest, os.environ, prog=prog)
    effort = QUICK if given.quick else Effort()
    if given.repeats is not None:
        effort = replace(effort, repeats=given.repeats)
    measured = measure_model(settings.model or DEFAULT_MODEL, settings.engine, effort)
    for line in describe_fit(measured):
        out(line)
    path = Path(given.output)
    write_cost(path, measured.file)
    out(f"written to {path}; serve with --scheduling-policy slo --cost-model {path}")
    return 0


def measure_model(model: str, config: EngineConfig, effort: Effort) -> Measured:
    """Load a model and measure its engine.

    Args:
        model: Name or path.
        config: Settings; policy, cost model and log do not matter here.
        effort: How thoroughly to measure.
    """
    plain = replace(config.scheduler, scheduling_policy="fcfs", cost_model=None, decision_log=None)
    clock = WallClock()
    made = assemble(
        model,
        replace(config, scheduler=plain),
        clock=clock,
        progress=sys.stderr.isatty(),
    )
    engine = made.engine
    try:
        measured = measure_engine(engine, clock, effort)
    finally:
        engine.stop("it has been measured")
        engine.constraints.close()
        engine.runner.close()
    facts = {"model": made.model.name, "machine": _machine(), **measured.file.facts}
    return replace(measured, file=replace(measured.file, facts=facts))


def _machine() -> dict[str, object]:
    """Describe what computes, without naming the host."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_fit(measured: Measured) -> list[str]:
    """Say how good a fit is, in lines for a terminal."""
    report, file = measured.report, measured.file
    cost = file.cost
    step = cost.step_time(StepLoad(decodes=1, context=SHORT))
    chunk = cost.step_time(StepLoad().with_chunk(256))
    lines = [
        f"{len(measured.samples.seconds)} steps over {len(set(measured.samples.buckets))} shapes",
        f"one decode {1000 * step:.2f} ms, 256 prompt tokens {1000 * chunk:.1f} ms",
        f"R2 {report.r2:.4f}, mean error {report.mean_error:.1%}, its 99th percentile "
        f"{1000 * report.p99_error:.2f} ms; {report.under_predicted:.1%} took longer than "
        "predicted",
        f"margin {file.margin:.1%}: with it, 95 % of the steps took no longer",
    ]
    if isinstance(cost, BucketCost) and cost.enveloped:
        lines.append(f"raised to the times of smaller steps: {', '.join(cost.enveloped)}")
    return lines
