"""Parts of the benchmark: its tasks, its texts, what it keeps, and what it counts."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.rooms.sparse import captures, decode, generation, mass, needles, tasks, texts
from benchmarks.rooms.sparse.cases import Cases
from benchmarks.rooms.sparse.intervals import interval, spread
from benchmarks.rooms.sparse.quality import at_tokens
from jaxserve.attention.tactic import reference
from jaxserve.attention.tactic.config import ClusterConfig, TacticConfig
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.config import ModelConfig
from tests.rooms.tactic.cases import GROUP, HEADS, SCALE, config, random_context
from tests.tiny import tiny_module, write_tiny_model


def count_words(text):
    return len(text.split())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token per byte."""
    return Tokenizer.from_path(write_tiny_model(tmp_path_factory.mktemp("tiny")))


# Tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("tokens", [300, 1500])
def test_a_task_fills_its_context_and_can_be_solved(name, tokens):
    one, again = (tasks.make_samples([name], tokens, 2, count_words) for _ in range(2))
    assert one == again
    assert one[0] != one[1]
    for sample in one:
        assert 0.9 * tokens < count_words(sample.prompt) <= tokens
        assert all(answer in sample.context for answer in sample.answers)
        assert all(answer not in sample.question for answer in sample.answers)
        assert sample.score(" and ".join(sample.answers).upper()) == 1
        assert sample.score(sample.answers[0]) == 1 / len(sample.answers)
        assert sample.score("nothing of that kind") == 0


def test_common_and_frequent_words_are_what_they_are_called():
    for name in ("common words", "frequent words"):
        (sample,) = tasks.make_samples([name], 800, 1, count_words)
        words = sample.context.rsplit("List:" if name == "common words" else "text:", 1)[1].split()
        found, number = np.unique([w for w in words if w.isalpha()], return_counts=True)
        best = found[np.argsort(-number, kind="stable")[:3]]
        assert set(best) == set(sample.answers)


def test_variables_follow_from_their_chain():
    (sample,) = tasks.make_samples(["variable tracking"], 600, 1, count_words)
    value = sample.question.split("value ")[1].split("?")[0]
    known = {value}
    for part in sample.context.split("VAR QQQC = VAR QQQB.")[1].split("VAR ")[1:]:
        name, _, source = part.split(".")[0].partition(" = ")
        if source:  # "VAR a = VAR b" was cut in front of b
            known |= {name} if source in known else set()
    assert sample.answers[0] in known


def test_a_task_that_cannot_be_short_enough_is_refused():
    with pytest.raises(ValueError, match="takes more than 10 tokens"):
        tasks.make_samples(["multi-key needle"], 10, 1, count_words)


def test_a_needle_is_found_among_tokens(tokenizer):
    for sample in tasks.make_samples(
        ["single needle", "multi-key needle"], 900, 3, lambda x: len(tokenizer.encode(x))
    ):
        trial = needles.make_trial(sample, tokenizer)
        ids = trial.ids.tolist()
        assert tokenizer.decode(ids[slice(*trial.needle)]).strip() == sample.needle
        assert tokenizer.decode(ids[trial.answer :]).strip() == sample.answers[0]
        assert tokenizer.decode(ids[: trial.prompt]) == sample.context
        assert 0 <= trial.depth <= 1


# Texts ---------------------------------------------------------------------------------------


def test_texts_come_from_what_is_installed(tokenizer):
    found = texts.documents(tokenizer, 3000)
    assert len(found) >= 5
    assert all(len(ids) == 3000 for ids in found.values())
    assert len({ids.tobytes() for ids in found.values()}) == len(found)
    assert texts.checksum(found) == texts.checksum(dict(found))
    assert texts.checksum(found) != texts.checksum(texts.documents(tokenizer, 2999))
    only = texts.documents(tokenizer, 3000, names=["code"])
    np.testing.assert_array_equal(only["code"], found["code"])


def test_a_text_that_is_too_short_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"'reference' has \d+ tokens, 90000000 were asked for"):
        texts.documents(tokenizer, 90_000_000, names=["reference"])


def test_collections_are_read_from_a_folder(tokenizer, tmp_path):
    (tmp_path / "rl" / "gsm8k").mkdir(parents=True)
    lines = [{"question": "How many?", "answer": "42 of them."}] * 20
    (tmp_path / "rl" / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = texts.documents(tokenizer, 100, tmp_path, names=["arithmetic"])
    assert tokenizer.decode(found["arithmetic"].tolist()).startswith("How many?\n42 of them.\n\n")
    with pytest.raises(FileNotFoundError):
        texts.documents(tokenizer, 100, tmp_path)


# Cases ---------------------------------------------------------------------------------------


def test_cases_are_taken_up_again(tmp_path):
    calls = []

    def make(value):
        return lambda: (calls.append(value), {"value": value})[1]

    first = Cases("part", {"context": 1}, folder=tmp_path)
    assert first.run("a", make(1)) == {"value": 1}
    assert first.run("a", make(2)) == {"value": 1}
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '["b", {"val')  # a run that was killed while it wrote
    again = Cases("part", {"context": 1}, folder=tmp_path, minutes=0)
    assert again.run("a", make(3)) == {"value": 1}
    assert again.run("b", make(4)) is None
    assert again.missing == 1
    other = Cases("part", {"context": 2}, folder=tmp_path)
    assert other.run("a", make(5)) == {"value": 5}
    fresh = Cases("part", {"context": 1}, folder=tmp_path, fresh=True)
    assert fresh.run("a", make(6)) == {"value": 6}
    assert calls == [1, 5, 6]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_intervals_are_those_of_students_t(values):
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=max(stats.sem(values), 1e-12)
    )
    assert interval(values) == pytest.approx((high - low) / 2, abs=1e-9)
    assert math.isnan(interval(values[:1]))


def test_documents_and_seeds_have_intervals_of_their_own():
    results = {(text, seed): {"x": float(i)} for i, text in enumerate("abc") for seed in range(3)}
    found = spread(results, lambda one: one["x"])
    assert found["mean"] == 1
    assert found["documents"] == pytest.approx(interval([0, 1, 2]))
    assert found["seeds"] == 0


def test_equal_tokens_lie_between_settings():
    one = {"read": [0.1, 0.3, 0.2], "mass": [0.5, 0.9, 0.8]}
    assert at_tokens(one, "mass", 0.25) == pytest.approx(0.85)


# Decoding ------------------------------------------------------------------------------------

SPARSE = TacticConfig(
    min_context=0,
    dense_layers=0,
    window=16,
    clusters=ClusterConfig(cluster_size=16, segment_len=64),
)


@pytest.fixture(scope="module")
def model():
    return tiny_module()


def test_all_of_the_mass_is_the_model_itself(model):
    ids = np.random.default_rng(0).integers(0, 250, 300).astype(np.int32)
    hidden, layers = captures.run(model, ids)
    expected, greedy = captures.log_likelihood(model, hidden[199:], ids[199:])
    whole, half = decode.score(model, ids, layers, 200, [(SPARSE, 1.0), (SPARSE, 0.5)])
    assert whole.log_likelihood == pytest.approx(expected[1:].mean(), abs=1e-4)
    assert whole.read == 1
    assert not greedy.all()
    assert not whole.is_greedy
    assert half.read < 0.9
    (last,) = decode.score(model, ids, layers, 200, [(SPARSE, 1.0)], first=290)
    assert last.log_likelihood == pytest.approx(expected[-10:].mean(), abs=1e-4)


@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_prompts_are_attended_to_causally(tokens):
    rng = np.random.default_rng(tokens)
    q = rng.standard_normal((tokens, 4, 16), np.float32)
    k, v = rng.standard_normal((2, tokens, 2, 16), np.float32)
    expected = np.zeros(q.shape)
    for at in range(tokens):
        for head in range(4):
            own = k[: at + 1, head // 2].astype(np.float64) @ q[at, head] * 0.3
            weights = np.exp(own - own.max())
            expected[at, head] = weights @ v[: at + 1, head // 2] / weights.sum()
    arrays = [jnp.asarray(x) for x in (q, k, v)]
    np.testing.assert_allclose(captures.causal(*arrays, 0.3), expected, atol=1e-5)
    np.testing.assert_allclose(captures._attend_blocks(*arrays, 0.3), expected, atol=1e-5)


def test_a_greedy_continuation_is_recognised(model):
    ids = np.random.default_rng(1).integers(0, 250, 300).astype(np.int32)
    for last in (298, 299):  # each is the likeliest token behind those before it
        hidden, _ = captures.run(model, ids)
        ids[last] = int(jnp.argmax(model.logits(hidden[last - 1 : last])[0]))
    _, layers = captures.run(model, ids)
    (scored,) = decode.score(model, ids, layers, 200, [(SPARSE, 1.0)], first=298)
    assert scored.is_greedy
    (scored,) = decode.score(model, ids, layers, 200, [(SPARSE, 1.0)], first=290)
    assert not scored.is_greedy


def test_stretched_positions_are_those_of_a_shorter_context():
    plain = tiny_module().config
    assert captures.stretched(plain, 1.0) is plain
    longer = captures.stretched(plain, 4.0)
    assert isinstance(longer, ModelConfig)
    assert longer.max_position == 4 * plain.max_position
    own, stretched = (np.asarray(x.rope_frequencies()[0], np.float64) for x in (plain, longer))
    np.testing.assert_allclose(4 * stretched, own, rtol=1e-6)


@settings(max_examples=5)
@given(st.integers(0, 1000), st.integers(4, 690))
def test_what_a_needle_holds_and_whether_it_is_read(seed, first):
    context, own = random_context(seed), config()
    rows = len(context.length)
    keys, values = (x[0].swapaxes(0, 1) for x in (context.keys, context.values))
    q = context.q.swapaxes(0, 1)[:, :1].reshape(1, HEADS * GROUP, -1).repeat(rows, 0)
    layer = mass.make_layer(q, keys, values, [0, 1], SCALE, 1000, config=own)
    shares, read, whole = needles.needle_reading(
        layer, jnp.float32(0.8), jnp.int32(first), config=own, width=5
    )
    assert 0 < whole < 1
    for row, length in enumerate(np.asarray(layer.length)):
        for head in range(HEADS):
            for place in range(5):
                there = [
                    reference.mass(
                        q[row, head * GROUP + g], keys[:length, head],
                        (np.arange(length) == first + place), SCALE,
                    )
                    for g in range(GROUP)
                ]  # fmt: skip
                assert shares[row, head, place] == pytest.approx(max(there), abs=1e-5)
                # What holds more than the rest may lack is read.
                assert read[row, head, place] or max(there) < 0.22


# What is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([], [1], 0), ([5], [6], 0)],
)
def test_common_prefixes(one, two, expected):
    assert generation.common_prefix(one, two) == expected


def test_repetition_is_a_share_of_runs():
    assert generation.repetition([1, 2, 3, 4, 5, 6]) == 0
    assert generation.repetition([1, 2, 3, 4] * 3) == pytest.approx(5 / 9)
    assert generation.repetition([1, 2]) == 0
