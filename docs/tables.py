"""Tables of the reference pages, in Markdown, made from the program itself so that none goes stale.

Each function returns the text of one table (or of several, each under a title); `TABLES` names
them for the directive of `docs.generated`.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxserve.cli.main import USAGE
from jaxserve.cluster.metrics import FleetMetrics
from jaxserve.core import errors
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.core.request import SamplingParams
from jaxserve.core.units import format_bytes
from jaxserve.core.view import ReplicaStatus
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.models.hub import KNOWN_MODELS
from jaxserve.models.registry import FAMILIES
from jaxserve.serve import openai_api
from jaxserve.serve.app import create_app
from jaxserve.serve.errors import problem_of
from jaxserve.serve.flags import GROUPS, NEGATIONS, Flag, iter_flags
from jaxserve.serve.options import ServerConfig, iter_server_options
from jaxserve.serve.state import ServerState

ROOT = Path(__file__).resolve().parent.parent
NOTHING = "-"
CLOSED = 403


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; bars and line breaks inside cells are made harmless."""

    def line(cells: Sequence[str]) -> str:
        clean = (" ".join(cell.split()).replace("|", r"\|") for cell in cells)
        return f"| {' | '.join(clean)} |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)]) + "\n"


def titled(title: str, text: str) -> str:
    """Put a title over a table, without making it a section."""
    return f":::{{rubric}} {title}\n:::\n\n{text}"


def code(text: object) -> str:
    """Set text in a fixed-width font."""
    return f"`{text}`"


def first_line(documented: object) -> str:
    """Return the first line of something's docstring."""
    return (inspect.getdoc(documented) or "").split("\n")[0]


# Flags ------------------------------------------------------------------------------------------


def flags() -> str:
    """List every flag of the server, by group, with its further names, default and meaning."""
    groups: dict[str, list[Flag]] = {}
    for flag in iter_flags():
        if not flag.is_hidden:
            groups.setdefault(flag.group, []).append(flag)
    head = ("flag", "default", "meaning")
    parts = [
        titled(GROUPS[group], table(head, map(_flag_row, found))) for group, found in groups.items()
    ]
    return "\n".join(parts)


def _flag_row(flag: Flag) -> tuple[str, str, str]:
    names = list(flag.names)
    names += [f"--{word}" for word, target in NEGATIONS.items() if target == flag.name]
    if flag.kind == "bool":
        names[0] = "--[no-]" + flag.option.removeprefix("--")
    text = flag.text
    if flag.choices:
        text += f" One of {', '.join(map(code, flag.choices))}."
    return ", ".join(map(code, names)), _default(flag), escape(text)


def _default(flag: Flag) -> str:
    if flag.default in (None, (), ""):
        return NOTHING
    if flag.kind == "bool":
        return "on" if flag.default else "off"
    words = flag.default if isinstance(flag.default, tuple) else (flag.default,)
    return code(" ".join(map(str, words)))


def escape(text: str) -> str:
    """Keep plain help texts plain: no emphasis, no links, no tags; code stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_<>\[\]])", r"\\\1", part) for part in parts
    )


# Metrics ----------------------------------------------------------------------------------------

_LABEL = re.compile(r'(\w+)="')


def metrics() -> str:
    """List every metric of `/metrics` with its kind, its labels and its meaning.

    The last ones are those of a fleet alone.
    """
    page = metrics_page()
    rows: list[tuple[str, str, str, str]] = []
    kinds, texts, labels = _read_page(page)
    for name, kind in kinds.items():
        own = [x for x in labels.get(name, ()) if x not in ("engine", "model_name", "le")]
        rows.append((code(name), kind, ", ".join(map(code, own)) or NOTHING, escape(texts[name])))
    return table(("metric", "kind", "labels of its own", "meaning"), rows)


def metrics_page() -> str:
    """Return a page with every metric that there is, of a fleet that has everything."""
    made = EngineMetrics(
        cache_config={"block_size": 16},
        num_speculative_tokens=1,
        has_sparse=True,
        has_balance=True,
    )
    made.adapters(max_loras=1, running=(), waiting=(), now=0.0)
    status = ReplicaStatus(
        index=0, state="serving", tier=None, num_open=0, deaths=0, failure=None
    )  # fmt: skip
    fleet = FleetMetrics(engines=lambda: {0: made}, statuses=lambda: [status], max_model_len=1)
    return fleet.render("model")


def _read_page(page: str) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    """Return kind, text and labels of each metric of a Prometheus page."""
    kinds: dict[str, str] = {}
    texts: dict[str, str] = {}
    labels: dict[str, list[str]] = {}
    current = ""
    for line in page.splitlines():
        if line.startswith("# HELP "):
            _, _, current, texts_of_it = line.split(" ", 3)
            texts[current] = texts_of_it
        elif line.startswith("# TYPE "):
            kinds[current] = line.rsplit(" ", 1)[1]
        else:
            found = labels.setdefault(current, [])
            found += [label for label in _LABEL.findall(line) if label not in found]
    return kinds, texts, labels


# Endpoints --------------------------------------------------------------------------------------

Route = tuple[str, str]
"""Path and method."""


def endpoints() -> str:
    """List every path of the server, and which flag opens or closes it."""
    standard = _routes(_app({}))
    shut = _refusing(_app({}), standard)
    everything = dict(standard)
    opened: dict[Route, list[str]] = {}
    closed: dict[Route, list[str]] = {}
    for option, app in _switched_apps():
        routes = _routes(app)
        everything |= routes
        for route in (routes.keys() - standard.keys()) | (shut - _refusing(app, shut)):
            opened.setdefault(route, []).append(option)
        for route in standard.keys() - routes.keys():
            closed.setdefault(route, []).append(option)
    rows = [
        (code(method), code(path), escape(text), _openness((path, method), opened, closed))
        for (path, method), text in sorted(everything.items())
    ]
    return table(("method", "path", "what it does", "open"), rows)


def _refusing(app: FastAPI, routes: Iterable[Route]) -> set[Route]:
    """Ask each path, and return those that answer 403: they are there, but closed."""

    async def ask() -> set[Route]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://docs") as client:
            answers = {
                (path, method): await client.request(method, _any_of(path), timeout=10)
                for path, method in routes
            }
        return {route for route, answer in answers.items() if answer.status_code == CLOSED}

    return asyncio.run(ask())


def _any_of(path: str) -> str:
    """Put a word in the place of each variable of a path."""
    return re.sub(r"\{[^}]*\}", "word", path)


def _openness(
    route: Route, opened: Mapping[Route, list[str]], closed: Mapping[Route, list[str]]
) -> str:
    if route in opened:
        return "with " + " or ".join(map(code, opened[route]))
    if route in closed:
        return "unless " + " or ".join(map(code, closed[route]))
    return "always"


def _switched_apps() -> Iterator[tuple[str, FastAPI]]:
    """Yield the application with each switch of `_switches` by itself, and the switch."""
    for option, settings in _switches():
        with contextlib.suppress(ConfigError, TypeError):  # a switch that needs another one
            yield option, _app(settings)


def _switches() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the server's settings that may open or close paths, each switched by itself."""
    ours = {spec.name for _, spec in iter_server_options()}
    for flag in iter_flags():
        if flag.name not in ours:
            continue
        if flag.kind == "bool":
            yield (
                flag.option if not flag.default else f"--no-{flag.option[2:]}",
                {flag.name: not flag.default},
            )
        elif flag.kind == "list" and not flag.default:
            yield flag.option, {flag.name: ("word",)}


def _app(settings: Mapping[str, object]) -> FastAPI:
    return create_app(ServerState(ServerConfig.from_settings(settings), model="model"))


def _endpoints_of(app: FastAPI) -> Iterator[tuple[Route, Callable[..., object]]]:
    for route in iter_route_contexts(app.routes):
        if route.path is None or route.path == app.swagger_ui_oauth2_redirect_url:
            continue
        for method in sorted((route.methods or {"GET"}) - {"HEAD"}):
            yield (route.path, method), route.endpoint or route.original_route


def _routes(app: FastAPI) -> dict[Route, str]:
    """Return what each path and method does; the OpenAPI pages have no words of their own."""
    own = {
        app.openapi_url: "The OpenAPI description.",
        app.docs_url: "The same, to try out.",
        app.redoc_url: "The same, to read.",
    }
    return {
        route: own.get(route[0]) or first_line(endpoint) or NOTHING
        for route, endpoint in _endpoints_of(app)
    }


# Request fields ---------------------------------------------------------------------------------


def fields() -> str:
    """List the fields of every request body, under the paths that take it."""
    paths: dict[type[BaseModel], dict[str, None]] = {}
    for app in (_app({}), *(app for _, app in _switched_apps())):
        for (path, _), endpoint in _endpoints_of(app):
            for body in _bodies(endpoint):
                paths.setdefault(body, {})[path] = None
    parts: list[str] = []
    for body, places in paths.items():
        rows = [
            (code(name), code(_type_name(field.annotation)), _field_default(field))
            for name, field in body.model_fields.items()
        ]
        title = "POST " + ", ".join(map(code, places))
        parts.append(titled(title, table(("field", "type", "default"), rows)))
    return "\n".join(parts)


def _bodies(endpoint: Callable[..., object]) -> list[type[BaseModel]]:
    """Return the bodies that an endpoint takes."""
    hints = inspect.get_annotations(endpoint) if inspect.isfunction(endpoint) else {}
    return [
        kind for kind in hints.values() if inspect.isclass(kind) and issubclass(kind, BaseModel)
    ]


def _type_name(annotation: object) -> str:
    """Write a type without module names."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Literal:
        return " or ".join(f'"{word}"' for word in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (list, dict, tuple):
        inside = ", ".join(_type_name(argument) for argument in arguments)
        return f"{origin.__name__}[{inside}]"
    if arguments:
        return " or ".join(_type_name(argument) for argument in arguments)
    return getattr(annotation, "__name__", None) or str(annotation).removeprefix("typing.")


def _field_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    return NOTHING if default is None else code(json.dumps(default, default=str))


def refused_fields() -> str:
    """List the fields that are refused when they are in use, with what is said then."""
    rows = [(code(name), escape(hint)) for name, (_, hint) in openai_api.REFUSED.items()]
    return table(("field", "answer"), rows)


# Models -----------------------------------------------------------------------------------------


def families() -> str:
    """List the model families by `model_type`."""
    rows = [
        (code(name), code(FAMILIES[name].__name__), first_line(FAMILIES[name])) for name in FAMILIES
    ]
    return table(("family", "class", "models"), rows)


def known_models() -> str:
    """List the models that have a short name."""
    rows = [
        (
            code(known.name),
            code(Path(known.member).name),
            format_bytes(known.num_bytes),
            known.license or NOTHING,
        )
        for known in KNOWN_MODELS.values()
    ]
    return table(("name", "file", "size", "licence"), rows)


# Errors -----------------------------------------------------------------------------------------


def _error_classes() -> list[type[JaxserveError]]:
    found = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    return [kind for kind in found if issubclass(kind, JaxserveError)]


def error_classes() -> str:
    """List the error classes with what else they are and the HTTP status that they become."""
    rows: list[tuple[str, str, str, str]] = []
    for kind in _error_classes():
        bases = [base.__name__ for base in kind.__bases__ if base is not JaxserveError]
        status = problem_of(kind("")).status
        shown = (
            f"its `status`, {status} if none is given" if hasattr(kind(""), "status") else status
        )
        also = ", ".join(map(code, bases)) or NOTHING
        rows.append(
            (f"{{py:class}}`~jaxserve.{kind.__name__}`", also, str(shown), first_line(kind))
        )
    return table(("class", "is also", "HTTP status", "meaning"), rows)


def error_details() -> str:
    """Describe every error class in full."""
    directives = [f".. autoexception:: jaxserve.{kind.__name__}\n" for kind in _error_classes()]
    return "```{eval-rst}\n" + "\n".join(directives) + "```\n"


# Commands and settings --------------------------------------------------------------------------


def usage() -> str:
    """Show what `jaxserve --help` prints."""
    return f"```text\n{USAGE}```\n"


def make_targets() -> str:
    """List what `make` can do."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    rows = re.findall(r"^([a-z-]+):.*?## (.*)$", text, re.MULTILINE)
    return table(("command", "what it does"), [(code(f"make {a}"), escape(b)) for a, b in rows])


def sampling() -> str:
    """List the sampling parameters with their defaults; meanings stand in the Python reference."""
    rows: list[tuple[str, str, str]] = []
    meanings = _attribute_texts(SamplingParams)
    for field in dataclasses.fields(SamplingParams):
        is_plain = field.default not in (None, (), dataclasses.MISSING)
        default = code(field.default) if is_plain else NOTHING
        rows.append((code(field.name), default, escape(meanings[field.name])))
    return table(("parameter", "default", "meaning"), rows)


def _attribute_texts(kind: type) -> dict[str, str]:
    """Read the `Attributes:` part of a class's docstring."""
    part = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].split("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", part, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


TABLES: Mapping[str, Callable[[], str]] = {
    "endpoints": endpoints,
    "error-classes": error_details,
    "errors": error_classes,
    "families": families,
    "fields": fields,
    "flags": flags,
    "known-models": known_models,
    "make": make_targets,
    "metrics": metrics,
    "refused-fields": refused_fields,
    "sampling": sampling,
    "usage": usage,
}
"""Name of a table -> what writes it."""
