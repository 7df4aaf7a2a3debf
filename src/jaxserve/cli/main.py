"""`jaxserve serve | pull | convert | models | profile | shard | sim | doctor | version`."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from jaxserve import __version__
from jaxserve.core.errors import JaxserveError, did_you_mean
from jaxserve.core.units import format_bytes

EXIT_FAILED = 1
EXIT_USAGE = 2

USAGE = """\
usage: jaxserve COMMAND ...

commands:
  serve [MODEL] [flags]   serve a model over the OpenAI API (serve --help lists the flags)
  pull NAME               download a model
  convert SOURCE TARGET   write a model as safetensors or Orbax (convert --help lists the flags)
  models                  list the models on this machine
  profile [MODEL]         measure how long steps take here, for --cost-model
  shard explain MODEL     show how weights lie on several devices: --tp N --ep N
  sim run                 serve a recorded trace in the simulator, under several policies
  sim capacity            find the rate at which each of them keeps 90 % of the objectives
  sim fleet               place requests of several latency tiers on hundreds of servers
  sim replay LOG          run a policy again on what it saw (--decision-log), and compare
  doctor                  say which kernels this machine runs, and why
  version                 print versions
"""


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (--help lists all flags)\n")


def serve(argv: Sequence[str]) -> NoReturn:
    """Run the server, and end the process."""
    from jaxserve.serve import launch  # noqa: PLC0415  other commands do not need it

    launch.main(argv, prog="jaxserve serve")


def pull(argv: Sequence[str]) -> int:
    """Download a model and print where it is.

    Returns:
        The exit code.

    Raises:
        JaxserveError: If it cannot be had.
    """
    parser = _Parser(prog="jaxserve pull", description="Download a model.")
    parser.add_argument(
        "name", metavar="NAME", help="a name that `jaxserve models` lists, or org/name on the hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--quiet", action="store_true", help="show no progress; the path is printed all the same"
    )
    given = parser.parse_args(list(argv))
    from jaxserve.models.hub import resolve_model  # noqa: PLC0415  loads the hub's client

    _out(str(resolve_model(given.name, revision=given.revision, progress=not given.quiet)))
    return 0


def convert_parser() -> argparse.ArgumentParser:
    """Return the parser of `jaxserve convert`."""
    parser = _Parser(
        prog="jaxserve convert",
        description="Write a model into a new directory: safetensors as transformers writes them, "
        "or an Orbax checkpoint, with configuration and tokenizer beside it.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="name, Hugging Face directory, GGUF file or Orbax directory",
    )
    parser.add_argument("target", metavar="TARGET", help="the directory; it must not exist")
    parser.add_argument("--to", default="hf", choices=("hf", "orbax"), help="default: hf")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the weights; auto keeps the source's, float32 for quantised weights",
    )
    parser.add_argument(
        "--shard-size",
        default="5GB",
        metavar="SIZE",
        help="most bytes per safetensors file, such as 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PLACE",
        help="name or path of a tokenizer to put beside it, or none (default: the source's)",
    )
    parser.add_argument(
        "--load-format",
        default="auto",
        choices=("auto", "safetensors", "gguf", "orbax"),
        help="format of the source (default: found out)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the source on the hub")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def convert(argv: Sequence[str]) -> int:
    """Write a model into a directory of a common format and print where it is.

    Returns:
        The exit code.

    Raises:
        JaxserveError: If the source cannot be read or the target cannot be written.
    """
    given = convert_parser().parse_args(list(argv))
    from jaxserve.engine.export import export  # noqa: PLC0415  loads JAX

    written = export(
        given.source,
        given.target,
        to=given.to,
        dtype=given.dtype,
        shard_size=given.shard_size,
        tokenizer=given.tokenizer,
        load_format=given.load_format,
        revision=given.revision,
        progress=not given.quiet,
    )
    _out(str(written))
    return 0


def models(argv: Sequence[str]) -> int:
    """List the models on this machine.

    Returns:
        The exit code.
    """
    _Parser(prog="jaxserve models", description="List the models here.").parse_args(list(argv))
    from jaxserve.models.hub import list_models  # noqa: PLC0415

    found = list_models()
    width = max((len(entry.name) for entry in found), default=0)
    for entry in found:
        where = "not downloaded" if entry.path is None else entry.path
        _out(f"{entry.name:{width}}  {format_bytes(entry.num_bytes):>10}  {entry.source}  {where}")
    return 0


def profile(argv: Sequence[str]) -> int:
    """Measure how long steps take on this machine, and write a cost model.

    Returns:
        The exit code.

    Raises:
        JaxserveError: If the model cannot be had, or the file cannot be written.
    """
    from jaxserve.cli.profile import run  # noqa: PLC0415  loads JAX

    return run(argv, _out)


def shard(argv: Sequence[str]) -> int:
    """Show how the weights of a model lie on several devices.

    Returns:
        The exit code.

    Raises:
        JaxserveError: If the model cannot be had, or the devices do not divide it.
    """
    from jaxserve.cli.shard import run, shard_parser  # noqa: PLC0415  loads JAX

    parser = _Parser(prog="jaxserve shard", description="Weights on several devices.")
    return run(shard_parser(parser).parse_args(list(argv)), _out)


def sim(argv: Sequence[str]) -> int:
    """Run policies on a trace, find their capacities, or replay a decision log.

    Returns:
        The exit code: 1 if a replayed policy decides anything else than it did.

    Raises:
        JaxserveError: For a bad trace, cost model, log or setting.
    """
    from jaxserve.cli.sim import run, sim_parser  # noqa: PLC0415  other commands do not need it

    parser = sim_parser(_Parser(prog="jaxserve sim", description="Policies without an engine."))
    return run(parser.parse_args(list(argv)), _out)


def doctor(argv: Sequence[str]) -> int:
    """Say which backend serves which operation on this machine, and why.

    Returns:
        The exit code.
    """
    parser = _Parser(prog="jaxserve doctor", description="Which kernels this machine runs.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(list(argv))
    from jaxserve.cli.doctor import examine  # noqa: PLC0415  loads JAX

    found = examine()
    _out(found.as_json() if given.json else found.as_text())
    return 0


def version(argv: Sequence[str]) -> int:
    """Print versions of jaxserve and of what it stands on, without loading them.

    Returns:
        The exit code.
    """
    _Parser(prog="jaxserve version", description="Print versions.").parse_args(list(argv))
    _out(f"jaxserve {__version__}")
    _out(f"python {platform.python_version()}")
    for package in ("jax", "jaxlib", "flax", "fastapi", "uvicorn"):
        try:
            _out(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            _out(f"{package} is not installed")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "pull": pull,
    "convert": convert,
    "models": models,
    "profile": profile,
    "shard": shard,
    "sim": sim,
    "doctor": doctor,
    "version": version,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        Exit code: 0 for success, 1 for failure, 2 for wrong usage.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        _out(USAGE.rstrip())
        return 0
    name = "version" if words[0] in ("--version", "-V") else words[0]
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        sys.stderr.write(
            f"jaxserve: error: unknown command {name!r}.{hint} Commands: {', '.join(COMMANDS)}.\n"
        )
        return EXIT_USAGE
    try:
        return COMMANDS[name](words[1:])
    except JaxserveError as error:
        sys.stderr.write(f"jaxserve {name}: error: {error}\n")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
    except BrokenPipeError:
        return 0  # the reader of the output, such as head, has left
    return EXIT_FAILED
