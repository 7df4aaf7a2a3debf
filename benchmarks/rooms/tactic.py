"""Sparse attention to a target share of the mass: what is read, what is reached, what it costs.

    python -m benchmarks.rooms.tactic --mass --ablation --context 4096
    python -m benchmarks.rooms.tactic --perplexity --context 8192 --interpolate 4
    python -m benchmarks.rooms.tactic --needles --tasks --outputs
    python -m benchmarks.rooms.tactic --speed

Parts run alone or together; without any, masses, the ablation and perplexity are measured. Each is
made of cases, kept below `build/tactic` as they are done: with `--minutes` a run ends in time with
what it has, and the same command goes on where it ended.
"""

import argparse
import math
from pathlib import Path

from benchmarks.record import Recorder
from benchmarks.rooms.sparse import generation, long_texts, needles, plots, positions, speed

_PARTS = {
    "mass": "masses and tokens of every estimator and baseline",
    "ablation": "order of clusters, how tokens are counted, what stands in for the rest",
    "perplexity": "how likely given tokens are behind a prompt",
    "positions": "how well the model does at far positions, plain and interpolated",
    "needles": "whether planted needles are read, and found",
    "tasks": "synthetic tasks that the engine solves",
    "outputs": "lengths of long outputs that the engine draws",
    "speed": "times of steps",
    "plot": "draw what has been recorded into docs/images",
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_argument_group("parts")
    for name, text in _PARTS.items():
        parts.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument(
        "--data", type=Path, help="folder of public texts, instead of those made from what is here"
    )
    parser.add_argument("--texts", nargs="+", metavar="NAME", help="only these of them")
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after these")
    parser.add_argument("--fresh", action="store_true", help="forget cases that are done")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a text, or a prompt")
    parser.add_argument(
        "--interpolate", type=float, default=1.0, metavar="FACTOR",
        help="divide rotary frequencies by this, for contexts beyond the model's",
    )  # fmt: skip
    parser.add_argument("--segment-len", type=int, default=1024, help="tokens clustered together")
    parser.add_argument("--batch", type=int, help="rows at once; 4 to generate, 1 for times")
    quality_args = parser.add_argument_group("masses, ablation, perplexity and positions")
    quality_args.add_argument("--generated", type=int, default=128, help="tokens behind the prompt")
    quality_args.add_argument("--queries", type=int, default=4, help="of each layer and text")
    quality_args.add_argument("--first-layer", type=int, default=2, help="the first that is taken")
    quality_args.add_argument("--last-layer", type=int, help="the last that is taken")
    quality_args.add_argument("--every", type=int, default=5, help="take each so-many-th layer")
    quality_args.add_argument("--seeds", type=int, default=3, help="clusterings of each text")
    quality_args.add_argument(
        "--factors", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="for --positions"
    )
    quality_args.add_argument("--scored", type=int, default=128, help="tokens that are given")
    made = parser.add_argument_group("needles, tasks and outputs")
    made.add_argument("--samples", type=int, default=8, help="of each kind; seeds of each text")
    made.add_argument(
        "--estimators", nargs="+", default=["sampled"], choices=["sampled", "hyperbola", "centroid"]
    )
    made.add_argument("--output", type=int, default=512, help="most tokens of a long output")
    times = parser.add_argument_group("speed")
    times.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    times.add_argument("--layers", type=int, nargs="+", default=[6, 12, 18, 24])
    times.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    times.add_argument("--p", type=float, default=0.9)
    times.add_argument("--repeats", type=int, default=15)
    times.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data is not None and not args.data.is_dir():
        parser.error(f"{args.data.name} is not there; leave out --data, or name a folder of texts")
    if not any(getattr(args, name) for name in _PARTS):
        args.mass = args.ablation = args.perplexity = True
    args.batch = args.batch or (1 if args.speed else 4)
    return args


def main() -> None:
    """Measure the parts that the command line asks for."""
    args = parse_args()
    recorder = Recorder("tactic", out=args.out)
    if args.mass or args.ablation or args.perplexity:
        long_texts.report(recorder, args)
    for name, report in (
        ("positions", positions.report),
        ("needles", needles.report),
        ("tasks", generation.report_tasks),
        ("outputs", generation.report_outputs),
        ("speed", speed.report),
    ):
        if getattr(args, name):
            report(recorder, args)
    if args.plot:
        plots.draw(recorder.path)


if __name__ == "__main__":
    main()
