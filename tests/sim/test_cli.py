"""`jaxserve sim`: traces in, tables, Chrome traces and logs out."""

import gzip
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cli.main import main
from jaxserve.core.cost import PUBLISHED_COSTS
from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.sim.live import LiveDisplay
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.traces import SHIPPED, read_trace


def table(text):
    """Return the cells of a printed table by its first column."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[1:]]
    return {row[0]: dict(zip(rows[0][1:3], row[1:3], strict=True)) for row in rows[1:]}


def ask(capsys, *words):
    code = main(["sim", *words])
    found = capsys.readouterr()
    assert code == 0, found.err
    return found.out


def test_a_shipped_trace_is_served_under_several_policies(capsys):
    found = ask(capsys, "run", "--rate", "9", "--requests", "400", "--policy", "fcfs", "slo")
    kept = {policy: float(row["kept"].rstrip("%")) for policy, row in table(found).items()}
    assert kept["slo"] > kept["fcfs"] + 5
    assert "400 requests of azure-chat at 9.00/s" in found


def test_steps_and_requests_go_into_files(capsys, tmp_path):
    trace, log = tmp_path / "trace.json", tmp_path / "log.jsonl"
    ask(
        capsys, "run", "--policy", "slo", "--replicas", "2", "--router", "hand_off",
        "--requests", "60", "--rate", "8", "--chrome-trace", str(trace), "--log", str(log),
    )  # fmt: skip
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == list(range(60))
    assert {line["replica"] for line in lines} == {0, 1}
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {
        "replica 0", "replica 1",
    }  # fmt: skip
    spans = [event for event in events if event["ph"] == "b"]
    assert len({event["id"] for event in spans}) == 60


def test_capacities_rank_policies(capsys):
    found = ask(capsys, "capacity", "--requests", "250", "--policy", "fcfs", "slo")
    rates = {policy: float(row["requests/s"]) for policy, row in table(found).items()}
    assert 2 < rates["fcfs"] < rates["slo"] < 30


def test_refused_requests_are_counted(capsys):
    found = ask(
        capsys, "run", "--policy", "slo", "--rate", "30", "--requests", "200", "--on-decline",
        "reject", "--ttft-ms", "400",
    )  # fmt: skip
    refused = int(found.splitlines()[-1].split()[-2])
    kept = float(table(found)["slo"]["kept"].rstrip("%"))
    assert refused > 20
    assert kept == pytest.approx(100 - refused / 2, abs=0.06)  # whoever is taken is served in time


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "nope"], "unknown scheduling policy 'nope'"),
        (["--workload", "x.txt"], "a trace must be one of azure-chat, azure-code or a file"),
        (["--workload", "none.csv"], "none.csv cannot be read"),
        (["--cost-model", "9b"], "must be a file or one of"),
        (["--router", "hand_off"], "which slo alone can say"),
        (["--log", "/nowhere/log"], "/nowhere/log cannot be written"),
    ],
)
def test_a_bad_setting_gets_one_message(capsys, words, said):
    assert main(["sim", "run", *words]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "-1"], "--rate: must be above zero, got -1"),
        (["--requests", "0"], "--requests: must be a whole number above zero, got '0'"),
        (["--ttft-ms", "5", "--ttft-slowdown", "2"], "not allowed with"),
    ],
)
def test_a_bad_flag_ends_with_usage(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        main(["sim", "run", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_fleet_ranks_routers_and_writes_its_timeline(capsys, tmp_path):
    path = tmp_path / "timeline.csv"
    found = ask(
        capsys, "fleet", "--servers", "12", "--minutes", "0.3", "--tiers-ms", "30", "100",
        "--mix", "1", "3", "--router", "least_requests", "polyserve", "--timeline", str(path),
    )  # fmt: skip
    assert "90% of the optimum, 12 servers" in found
    kept = {router: float(row["all"].rstrip("%")) for router, row in table(found).items()}
    assert kept["polyserve"] > kept["least_requests"]
    head, *rows = path.read_text().splitlines()
    assert head.startswith("time,tier 30 ms,tier 100 ms,prompts")
    assert len(rows) > 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mix", "1"], "--mix has 1 weights for 4 tiers"),
        (["--prefill-servers", "4", "--servers", "4"], "prefill_servers must be zero or more"),
        (["--tiers-ms", "100", "50"], "tiers"),
        (["--rate", "0.001"], "no request comes in that time"),
        (["--kv-tokens", "100", "--rate", "5"], "needs"),
    ],
)
def test_a_bad_fleet_gets_one_message(capsys, words, said):
    assert main(["sim", "fleet", *words]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# Traces ----------------------------------------------------------------------------------------


def test_shipped_traces_have_the_statistics_of_their_sources():
    """Counts and rates as published for the whole hour, within what a part may differ."""
    found = {name: read_trace(name) for name in SHIPPED}
    assert len(found["azure-chat"].arrivals) == 2867
    assert found["azure-chat"].rate == pytest.approx(5.53, rel=0.2)
    assert sorted(found["azure-chat"].prompt_lens)[1433] == pytest.approx(1020, rel=0.1)
    assert found["azure-code"].rate == pytest.approx(2.57, rel=0.3)


COLUMNS = [
    ("arrival_s,prompt_tokens,output_tokens", 1.0),
    ("timestamp_s,client_id,input_tokens,output_tokens", 1.0),
    ("arrived_at,num_prefill_tokens,num_decode_tokens", 1.0),
]
REQUESTS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 9999), st.integers(0, 999)),
    min_size=2, max_size=20, unique_by=lambda one: one[0],
)  # fmt: skip


@given(REQUESTS, st.sampled_from([*COLUMNS, ("jsonl", 1e-3)]), st.booleans())
def test_public_formats_are_read_alike(tmp_path_factory, requests, form, is_zipped):
    columns, scale = form
    if columns == "jsonl":
        names = ("timestamp", "input_length", "output_length")
        text = "".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in requests)
    else:
        middle = "7," if "client_id" in columns else ""
        text = columns + "\n" + "".join(f"{t},{middle}{p},{o}\n" for t, p, o in requests)
    suffix = (".jsonl" if columns == "jsonl" else ".csv") + (".gz" if is_zipped else "")
    path = tmp_path_factory.mktemp("trace") / f"some{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if is_zipped else text.encode())
    found = read_trace(path)
    wanted = sorted(requests)
    first = wanted[0][0]
    assert found.arrivals == pytest.approx([(one[0] - first) * scale for one in wanted])
    assert list(found.prompt_lens) == [max(1, one[1]) for one in wanted]
    assert list(found.output_lens) == [max(1, one[2]) for one in wanted]


def test_dates_of_azure_are_read(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    found = read_trace(path)
    assert found.arrivals == pytest.approx((0, 4.314579), abs=1e-6)
    assert found.prompt_lens == (374, 396)


HEAD = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "line 2 of the trace bad.csv has the columns a, b; expected one of"),
        (HEAD + "1,2,3\n", "must hold at least 2 requests, got 1"),
        (HEAD + "1,2,3\n1,2,3\n", "arrive at one time"),
        (HEAD + "1,2,3\nnan,2,3\n", "line 3 of the trace bad.csv must hold a time and two counts"),
        (HEAD + "1,2,3\n2,2.5,3\n", "line 3 of the trace bad.csv must hold"),
        (HEAD + "1,2,3\n2,-2,3\n", "line 3 of the trace bad.csv must hold"),
        (HEAD + "1,2,3\n2,inf,3\n", "line 3 of the trace bad.csv must hold"),
        (HEAD + "1,2,3\n2,2\n", "line 3 of the trace bad.csv has not as many cells"),
    ],
)
def test_a_damaged_trace_names_its_line(tmp_path, text, said):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_trace(path)


@pytest.mark.parametrize("line", ["{", "[1]"])
def test_damaged_json_names_its_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"line 2 of the trace bad\.jsonl"):
        read_trace(path)


# On a terminal ---------------------------------------------------------------------------------


def test_a_run_is_followed_line_by_line(capsys, monkeypatch):
    monkeypatch.setattr("jaxserve.sim.live._EVERY_S", 0.0)
    cost = PUBLISHED_COSTS["7b-a100"]
    requests = read_trace("azure-chat").workload(ttft_slowdown=5, tpot_s=0.1).offer(8.0, 40, cost)
    replica = Replica(ReplicaSpec(num_pages=20_000), FcfsScheduler(), cost)
    with LiveDisplay("fcfs", 40, [replica], "tpot", is_shown=True) as display:
        done = simulate(requests, [replica], stop=display.note)
    assert len(done) == 40
    shown = capsys.readouterr().err
    assert "40/40" in shown
    assert re.search(r"at \d+ s, \d+x real time, \d+% kept, \d+ running, \d+ waiting", shown)


def test_nothing_is_shown_where_nobody_looks(capsys):
    ask(capsys, "run", "--policy", "fcfs", "--requests", "20")
    assert capsys.readouterr().err == ""
