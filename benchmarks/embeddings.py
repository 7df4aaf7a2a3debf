"""Texts per second of all-MiniLM-L6-v2, against transformers on the same processor.

    python -m benchmarks.embeddings

Both sides get the same texts, of mixed lengths, and do everything from text to normalised vectors,
in turn. The peer does what `SentenceTransformer.encode` does (benchmarks/peers/embedding_peer.py).
Both must give the same vectors within 1e-4, and jaxserve must compile nothing while it is measured.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import Child, oracle_python
from benchmarks.record import Recorder, summary, table

MODEL = "all-minilm-l6-v2"
TEXT = (
    "the of and to in that was his he it with is for as had you not be her on at by which have or "
    "from this him but all she they were my are me one their so an said them we who would been "
    "will no when there if more out up into do any your what has man could other than our some "
    "very time upon about may its only now like little then can made should did us such great "
    "before must two these see know over much down after first good men own never most old shall "
    "day where those came come himself way work life without go make well through being long"
)
WORDS = TEXT.split()
TOLERANCE = 1e-4


def mixed_texts(count: int, *, seed: int) -> list[str]:
    """Draw texts whose lengths look like those of sentences and paragraphs.

    Args:
        count: How many.
        seed: Seed of the draw.

    Returns:
        Texts of 3 to 200 words; the median is 24.
    """
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(24), 0.8, count), 3, 200).astype(int)
    return [" ".join(random.choice(WORDS, length)) for length in lengths]


def measure(children: dict[str, Child], texts: list[str], rounds: int) -> dict[str, list[Any]]:
    """Let each side embed the texts in turn; answers by side, a first round not counted."""
    answers: dict[str, list[Any]] = {name: [] for name in children}
    for number in range(rounds + 1):
        for name, child in children.items():
            answer = child.ask("embed", texts=texts)
            if number:
                answers[name].append(answer)
    return answers


def check(answers: dict[str, list[Any]]) -> None:
    """Check that both sides did the same work."""
    compiled = sum(answer["compilations"] for answer in answers["jaxserve"])
    assert compiled == 0, f"{compiled} compilations while measuring"
    first = {name: np.asarray(found[0]["first"]) for name, found in answers.items()}
    for name, vector in first.items():
        worst = float(np.abs(vector - first["jaxserve"]).max())
        assert worst < TOLERANCE, f"{name}: vectors differ by {worst}"
        assert answers[name][0]["tokens"] == answers["jaxserve"][0]["tokens"], name


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=512, help="texts per call")
    parser.add_argument("--rounds", type=int, default=5, help="calls per side")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    args = parser.parse_args()
    from jaxserve.models.hub import resolve_model

    path = str(resolve_model(MODEL))
    recorder = Recorder("embeddings", out=args.out)
    python = oracle_python()
    with tempfile.TemporaryDirectory() as folder:
        both = {"TOKENIZERS_PARALLELISM": "1"}
        children = {
            "jaxserve": Child(
                sys.executable, "benchmarks.embedding_worker", Path(folder) / "jaxserve.log", both
            )
        }
        if python is not None:
            children["transformers"] = Child(
                python, "benchmarks.peers.embedding_peer", Path(folder) / "peer.log", both
            )
        else:
            print("no oracle environment (`make oracles`): jaxserve alone")
        try:
            facts = {name: child.ask("load", path=path) for name, child in children.items()}
            report(args, recorder, children, facts)
        finally:
            for child in children.values():
                child.close()


def report(
    args: argparse.Namespace,
    recorder: Recorder,
    children: dict[str, Child],
    facts: dict[str, Any],
) -> None:
    """Measure batches of texts and single texts, and write what came out."""
    rows: list[list[str]] = []
    for what, texts in (
        (f"{args.texts} texts", mixed_texts(args.texts, seed=1)),
        ("1 text of 24 words", [" ".join(WORDS[:24])]),
    ):
        answers = measure(children, texts, args.rounds if len(texts) > 1 else 20 * args.rounds)
        check(answers)
        rates = {
            name: summary([len(texts) / answer["seconds"] for answer in found])
            for name, found in answers.items()
        }
        peer = rates.get("transformers")
        ratio = rates["jaxserve"]["median"] / peer["median"] if peer else None
        tokens = answers["jaxserve"][0]["tokens"]
        recorder.write(
            what, texts=len(texts), tokens=tokens, texts_per_s=rates, ratio=ratio, sides=facts
        )
        rows += [
            [
                what if name == "jaxserve" else "",
                name,
                f"{rate['median']:.1f}",
                f"{rate['p10']:.1f} .. {rate['p90']:.1f}",
                f"{ratio:.2f}" if ratio and name == "jaxserve" else "",
            ]
            for name, rate in rates.items()
        ]
    print(table(["what", "side", "texts/s", "p10 .. p90", "ratio"], rows))
    print(f"written to {recorder.path.name}")


if __name__ == "__main__":
    main()
