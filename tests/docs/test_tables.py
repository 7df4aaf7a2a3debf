"""The tables of the reference pages hold what the program has, and nothing else."""

import re
import typing

import pytest
from prometheus_client.parser import text_string_to_metric_families

import jaxserve
from docs import tables
from jaxserve.core.request import SamplingParams
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.models.registry import FAMILIES
from jaxserve.serve import options
from jaxserve.serve.app import create_app
from jaxserve.serve.flags import iter_flags, make_parser
from jaxserve.serve.state import ServerState


def rows(text):
    """Return the cells of the body rows of every table in a text."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines]
    heads = {i - 1 for i, row in enumerate(cells) if set(row) == {"---"}}
    return [row for i, row in enumerate(cells) if i not in heads and set(row) != {"---"}]


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_is_whole(name):
    text = tables.TABLES[name]()
    assert text.endswith("\n")
    widths = {len(row) for row in rows(text)}
    assert len(widths) <= 1
    assert all(cell.strip() for row in rows(text) for cell in row)


def test_cells_cannot_break_a_table():
    assert tables.table(("a", "b"), [("x|y", "two\nlines")]) == (
        "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n"
    )


def test_plain_text_stays_plain_and_code_stays_code():
    assert tables.escape("any * of <x> [y] a_b `c_d *`") == r"any \* of \<x\> \[y\] a\_b `c_d *`"


def test_flags_are_those_of_the_command_line():
    listed = tables.flags()
    shown = re.findall(r"`(--?[a-z0-9\[\]-]+)`", "".join(row[0] for row in rows(listed)))
    shown = {name.replace("[no-]", "") for name in shown}
    known = {
        name
        for action in make_parser("x")._actions
        for name in action.option_strings
        if not name.startswith("--no-")
    }
    hidden = {name for flag in iter_flags() if flag.is_hidden for name in flag.names}
    # MODEL, --config and --help are described in the text.
    assert shown == known - hidden - {"-h", "--help", "--config", "--model", "--model-path"}
    assert len(rows(listed)) == sum(not flag.is_hidden for flag in iter_flags())


def test_defaults_of_flags_are_shown_as_they_are_written():
    shown = {row[0].split("`")[1]: row[1] for row in rows(tables.flags())}
    assert shown["--port"] == "`8000`"
    assert shown["--max-model-len"] == "-"
    assert shown["--[no-]enable-prefix-caching"] == "on"
    assert shown["--metrics-alias"] == "`vllm`"


def test_metrics_are_those_of_the_page():
    page = tables.metrics_page()
    alone = EngineMetrics(cache_config={"a": 1}, num_speculative_tokens=1, has_sparse=True)
    alone.adapters(max_loras=1, running=(), waiting=(), now=0.0)
    of_engine = set(re.findall(r"# HELP (\S+)", alone.render("m")))
    assert of_engine < set(re.findall(r"# HELP (\S+)", page))
    families = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(page)
    }
    listed = {row[0].strip("`"): row for row in rows(tables.metrics())}
    assert listed.keys() == families.keys()
    for name, (_, kind, labels, meaning) in listed.items():
        found = {label for sample in families[name].samples for label in sample.labels}
        assert set(re.findall(r"\w+", labels)) == found - {"engine", "model_name", "le"}
        assert kind == families[name].type
        assert meaning.replace("\\", "") == families[name].documentation


def test_endpoints_are_those_of_the_openapi_description_and_more():
    listed = {(row[1].strip("`"), row[0].strip("`")) for row in rows(tables.endpoints())}
    app = create_app(ServerState(options.ServerConfig(), model="m"))
    described = {
        (path, method.upper())
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    assert described <= {(path.replace(":path", ""), method) for path, method in listed}
    assert ("/v1/tokenize", "POST") in listed  # answers, though not described
    assert ("/openapi.json", "GET") in listed


def test_flags_that_open_and_close_paths_are_named():
    shown = {row[1].strip("`"): row[3] for row in rows(tables.endpoints())}
    assert shown["/docs"] == "unless `--disable-fastapi-docs`"
    assert shown["/v1/models"] == "always"
    assert shown["/update_weights"] == "with `--enable-admin-api`"


def test_request_fields_are_those_of_the_bodies():
    text = tables.fields()
    parts = dict(re.findall(r"rubric\} (POST .*)\n:::\n\n((?:\|.*\n)+)", text))
    chat = {row[0].strip("`"): row for row in rows(parts["POST `/v1/chat/completions`"])}
    assert chat["messages"][2] == "required"
    assert chat["temperature"] == ["`temperature`", "`float or null`", "-"]
    assert {"stream", "seed", "top_logprobs", "max_completion_tokens"} <= chat.keys()
    assert any({"`/tokenize`", "`/v1/tokenize`"} <= set(re.findall("`.*?`", p)) for p in parts)


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int | None, "int or null"),
        (list[dict[str, typing.Any]], "list[dict[str, Any]]"),
        (typing.Literal["a", "b"] | None, '"a" or "b" or null'),
        (typing.Annotated[float, "x"], "float"),
    ],
)
def test_types_are_written_without_modules(annotation, name):
    assert tables._type_name(annotation) == name


def test_families_are_those_of_the_registry():
    assert [row[0].strip("`") for row in rows(tables.families())] == list(FAMILIES)


def test_every_public_error_is_listed_with_its_status():
    listed = {
        re.search(r"jaxserve\.(\w+)", row[0])[1]: row[2] for row in rows(tables.error_classes())
    }
    public = {name for name in jaxserve.__all__ if name.endswith("Error")}
    assert listed.keys() == public
    assert listed["CapacityError"] == "503"
    assert listed["RequestError"].endswith("400 if none is given")
    assert all(f"jaxserve.{name}\n" in tables.error_details() for name in public)


def test_sampling_parameters_have_meanings():
    listed = {row[0].strip("`"): row for row in rows(tables.sampling())}
    assert listed.keys() == set(SamplingParams.__dataclass_fields__)
    assert listed["repetition_penalty"][2].endswith("1 is off.")  # a text of two lines


def test_make_targets_are_listed():
    assert {"`make serve`", "`make docs`", "`make notebooks`"} <= {
        row[0] for row in rows(tables.make_targets())
    }
