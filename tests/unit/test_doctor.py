"""`jaxserve doctor`: what it says, and that it is true."""

import json
import subprocess
import sys

import pytest

from jaxserve.cli.doctor import Findings, ask
from jaxserve.cli.main import main
from jaxserve.pallas_kernels import backends as small_backends
from jaxserve.pallas_kernels.attention import backends
from jaxserve.pallas_kernels.cards import PLACES, iter_cards

DTYPES = ("bfloat16", "float16", "float32")


def test_it_tells_people_what_serves_what(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("jaxserve ")
    assert "device: 8 x CPU" in lines
    start = lines.index(
        "attention: Softmax attention, or a variant of it, from packed tokens to paged keys and "
        "values."
    )
    told = [line.split(maxsplit=1) for line in lines[start + 1 : start + 5]]
    assert [name for name, _ in told] == list(backends.BACKENDS)
    said = dict(told)
    assert said["mosaic"] == ("does not serve: it needs a GPU of compute capability 9.0, found cpu")
    assert said["triton"].startswith("does not serve: ")
    assert said["xla"] == "serves bfloat16*, float16*, float32*"
    assert said["reference"] == "serves bfloat16, float16, float32"
    assert lines[-1] == "* is what `auto` takes."


def test_it_tells_programs_the_same(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "devices", "summaries", "answers"}
    assert set(found["summaries"]) == set(PLACES)
    for operation in found["summaries"]:
        answers = [a for a in found["answers"] if a["operation"] == operation]
        assert len(answers) >= 2
        taken = [dtype for a in answers for dtype in a["chosen"]]
        assert len(taken) == len(set(taken)), f"two backends are auto's choice for {operation}"
        for answer in answers:
            assert not set(answer["dtypes"]) & set(answer["reasons"])
            assert set(answer["chosen"]) <= set(answer["dtypes"])
            assert all(answer["reasons"].values())
    (xla,) = [a for a in found["answers"] if (a["operation"], a["backend"]) == ("attention", "xla")]
    assert xla["chosen"] == list(DTYPES)


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "jaxserve", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["devices"]


def test_what_cannot_run_is_told_by_dtype():
    (card,) = [card for card in iter_cards() if card.name == "attention"]
    answers = ask(card)
    text = Findings(
        versions={}, devices=[], summaries={card.name: card.summary}, answers=answers
    ).as_text()
    assert text.count("does not serve") == 2


@pytest.mark.slow
def test_the_choice_of_auto_is_that_of_the_operations(monkeypatch: pytest.MonkeyPatch):
    """A card that lets auto take Triton belongs to an operation that prefers it."""
    prefers: list[bool] = []

    def choose(backend: str, *, prefers_triton: bool) -> str:
        prefers.append(prefers_triton)
        return "xla"

    monkeypatch.setattr(small_backends, "choose", choose)
    for card in iter_cards():
        if card.name == "attention":  # chooses among more
            continue
        prefers.clear()
        card.run(**card.make(card.tiny(), next(iter(card.tolerances)), 0))
        assert prefers, card.name
        is_first = "xla" not in card.backends[: card.backends.index("triton")]
        assert set(prefers) == {is_first}, card.name
