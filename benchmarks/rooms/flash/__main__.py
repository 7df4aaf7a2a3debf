"""FLASH: how long plans take, how good they are in a model of links, and on real ones.

    python -m benchmarks.rooms.flash --plan     # planning times and stages, beside SciPy's
    python -m benchmarks.rooms.flash --model    # time over the lower bound, to 1,024 GPUs
    python -m benchmarks.rooms.flash --net      # processes over shaped links; needs root on Linux
    python -m benchmarks.rooms.flash --moe      # tokens/s served, experts on eight devices
    python -m benchmarks.rooms.flash --tables   # of what has been recorded
    python -m benchmarks.rooms.flash --plot     # a picture of it, for the docs

Times of planning are of whole calls of `plan` for matrices of servers, among them the choice of how
far to decompose. The model is that of `jaxserve.sharding.flash.simulate`. The network is of eight
processes in network namespaces, four servers of two GPUs; nothing of it outlives the command.
Without root or the tools, what needs it is skipped with a message.
"""

import argparse
from pathlib import Path

from benchmarks.record import Recorder
from benchmarks.rooms.flash import model, moe, net, planning, served


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.rooms.flash")
    parser.add_argument("--plan", action="store_true", help="times of planning")
    parser.add_argument("--model", action="store_true", help="modelled times")
    parser.add_argument("--net", action="store_true", help="times over shaped links")
    parser.add_argument("--moe", action="store_true", help="tokens/s of a tiny mixture of experts")
    parser.add_argument("--tables", action="store_true", help="only show what has been recorded")
    parser.add_argument("--plot", action="store_true", help="draw the model into docs/images")
    parser.add_argument("--min-servers", type=int, default=2, help="smallest n")
    parser.add_argument("--max-servers", type=int, default=128, help="largest n")
    parser.add_argument("--seeds", type=int, default=3, help="matrices of each kind, to n = 32")
    parser.add_argument("--mbit", type=float, default=20.0, help="rate of a GPU's link")
    parser.add_argument("--megabytes", type=float, default=1.5, help="per GPU, for --net")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved runs")
    parser.add_argument(
        "--transports", default="sockets,gloo", help="of --net: sockets, gloo, or both"
    )
    parser.add_argument(
        "--where", default=f"served,{','.join(moe.PLACES)}",
        help="of --moe: served, by engines over links; and forward passes in one process, or over "
        "links",
    )  # fmt: skip
    parser.add_argument("--ways", default="", help="of --moe, with ; between them; all if left out")
    parser.add_argument("--out", type=Path, default=None, help="folder of results")
    args = parser.parse_args()
    if not (args.plan or args.model or args.net or args.moe or args.tables or args.plot):
        parser.error("say what to do: --plan, --model, --net, --moe, --tables or --plot.")
    recorder = Recorder("flash", out=args.out)
    if args.plan:
        planning.measure(recorder, args.min_servers, args.max_servers)
    if args.model:
        model.measure(recorder, args.min_servers, args.max_servers, args.seeds)
    if args.model or args.plot:
        model.draw(recorder.path)
    if args.net:
        skipped = net.measure(
            recorder, mbit=args.mbit, megabytes=args.megabytes, repeats=args.repeats,
            transports=args.transports.split(","),
        )  # fmt: skip
        if skipped is not None:
            print(skipped)
    if args.moe:
        _measure_moe(parser, recorder, args)
    for is_asked_for, part in (
        (args.plan, planning), (args.model, model), (args.net, net), (args.moe, served),
        (args.moe, moe),
    ):  # fmt: skip
        if is_asked_for or args.tables:
            print(part.report(recorder.path))


def _measure_moe(
    parser: argparse.ArgumentParser, recorder: Recorder, args: argparse.Namespace
) -> None:
    """Measure what is asked for of a mixture of experts."""
    where = args.where.split(",")
    known = {"served": served.WAYS} | dict.fromkeys(moe.PLACES, moe.WAYS)
    if unknown := [place for place in where if place not in known]:
        parser.error(f"--where must be of {', '.join(known)}, got {', '.join(unknown)}.")
    ways = args.ways.split(";") if args.ways else None
    for place in where:
        if unknown := [way for way in ways or () if way not in known[place]]:
            parser.error(
                f"--ways must be of {'; '.join(known[place])} for {place}, got "
                f"{'; '.join(unknown)}."
            )
    reasons: list[str | None] = []
    if "served" in where:
        reasons.append(
            served.measure(
                recorder, mbit=args.mbit, repeats=args.repeats, ways=ways or list(served.WAYS)
            )
        )
    if passes := [place for place in where if place != "served"]:
        reasons.append(
            moe.measure(
                recorder, mbit=args.mbit, repeats=args.repeats, where=passes,
                ways=ways or list(moe.WAYS),
            )
        )  # fmt: skip
    for reason in filter(None, reasons):
        print(reason)


if __name__ == "__main__":
    main()
