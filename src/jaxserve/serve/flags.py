"""Flags, environment variables and configuration file, made from the settings' own records.

Nothing about a single flag is written here, except which words of other engines mean `--no-...`.
Command line beats environment beats file beats default.
"""

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Union

from jaxserve.core.config import EngineConfig, iter_options
from jaxserve.core.errors import ConfigError, MissingExtraError, did_you_mean
from jaxserve.core.units import parse_count
from jaxserve.serve.options import ServerConfig, Settings, iter_server_options, iter_settings

ENV_PREFIX = "JAXSERVE_"
EXIT_USAGE = 2

NEGATIONS = {
    "disable-radix-cache": "enable_prefix_caching",
    "disable-overlap-schedule": "async_scheduling",
}
"""Flags of other engines that switch one of ours off."""

GROUPS = {
    "listen": "where to listen",
    "tls": "encryption",
    "access": "access",
    "api": "answers",
    "log": "messages",
    "cluster": "replicas",
    "model": "model",
    "cache": "key-value cache",
    "scheduler": "scheduling",
    "runner": "execution",
    "parallel": "several devices and hosts",
    "structured": "structured outputs",
    "pooling": "embeddings and scores",
    "speculative": "speculative decoding",
    "lora": "adapters",
    "sparse": "sparse attention",
}

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_ABSENT = frozenset({"none", "null", "auto", "-1"})

Kind = Literal["bool", "int", "float", "str", "list", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One setting, as it stands on the command line.

    Attributes:
        name: Name of the setting, with underscores.
        group: Part of the configuration that holds it.
        kind: How its text is read.
        aliases: Further names, with dashes.
        text: Help text.
        default: Its default.
        choices: Words that are understood; empty where any is.
        is_optional: Whether None is a value, spelled none, auto or -1.
        is_count: Whether suffixes such as 4k are understood.
        is_hidden: Whether the help leaves it out.
    """

    name: str
    group: str
    kind: Kind
    aliases: tuple[str, ...] = ()
    text: str = ""
    default: object = None
    choices: tuple[str, ...] = ()
    is_optional: bool = False
    is_count: bool = False
    is_hidden: bool = False

    @property
    def option(self) -> str:
        """Its long form, such as `--max-model-len`."""
        return "--" + self.name.replace("_", "-")

    @property
    def names(self) -> list[str]:
        """Every form of it; aliases of one or two letters also with a single dash."""
        short = [f"-{alias}" for alias in self.aliases if len(alias) <= 2]
        return [self.option, *(f"--{alias}" for alias in self.aliases), *short]

    @property
    def env(self) -> str:
        """Its environment variable."""
        return ENV_PREFIX + self.name.upper()

    def read(self, value: object) -> object:
        """Turn text, or a value of a YAML file, into the setting's type.

        Raises:
            ConfigError: If it cannot be read.
        """
        if value is None and self.kind == "list":
            return ()
        has_absent = self.kind == "int" or bool(self.choices)
        if self.is_optional and (
            value is None or (has_absent and str(value).strip().lower() in _ABSENT)
        ):
            return None
        return _READERS[self.kind](self, value)


def _wrong(flag: Flag, expected: str, value: object) -> ConfigError:
    return ConfigError(f"{flag.option} must be {expected}, got {value!r}.")


def _read_bool(flag: Flag, value: object) -> bool:
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        raise _wrong(flag, "true or false", value)
    return word in _TRUE


def _read_int(flag: Flag, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _wrong(flag, "a whole number", value)
    if flag.is_count:
        try:
            return parse_count(value)
        except ConfigError:
            raise _wrong(flag, "a whole number such as 4096, 4k or 4K", value) from None
    try:
        return int(value)
    except ValueError:
        raise _wrong(flag, "a whole number", value) from None


def _read_float(flag: Flag, value: object) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except ValueError:
            pass
    raise _wrong(flag, "a number", value)


def _read_str(flag: Flag, value: object) -> str:
    word = str(value)
    if flag.choices and word not in flag.choices:
        hint = did_you_mean(word, flag.choices)
        raise ConfigError(
            f"{flag.option} must be one of {', '.join(flag.choices)}, got {word!r}.{hint}"
        )
    return word


def _read_list(flag: Flag, value: object) -> tuple[str, ...]:
    if isinstance(value, str):  # from the environment, or a single value in a file
        value = [value] if value.lstrip().startswith("[") else value.split(",")
    if not isinstance(value, Sequence):
        raise _wrong(flag, "a list", value)
    words = [str(word).strip() for word in typing.cast("Sequence[object]", value)]
    if len(words) == 1 and words[0].startswith("["):
        try:
            words = [str(word) for word in json.loads(words[0])]
        except (json.JSONDecodeError, TypeError):
            raise _wrong(flag, 'words, or a JSON list such as ["a", "b"]', words[0]) from None
    return () if words == ["none"] else tuple(word for word in words if word)


def _read_json(flag: Flag, value: object) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{flag.option} must be a JSON object: {error}.") from None
    if not isinstance(value, Mapping):
        raise _wrong(flag, "a JSON object", value)
    return typing.cast("Mapping[str, Any]", value)


_READERS: Mapping[Kind, Callable[[Flag, object], object]] = {
    "bool": _read_bool,
    "int": _read_int,
    "float": _read_float,
    "str": _read_str,
    "list": _read_list,
    "json": _read_json,
}


def _kind_of(annotation: object) -> tuple[Kind, tuple[str, ...], bool]:
    """Return how to read a value of this type, its choices, and whether None is one."""
    arguments = typing.get_args(annotation)
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is Union
    if is_union and type(None) in arguments:
        (inner,) = (arg for arg in arguments if arg is not type(None))
        kind, choices, _ = _kind_of(inner)
        return kind, choices, True
    if typing.get_origin(annotation) is Literal:
        return "str", tuple(map(str, arguments)), False
    if typing.get_origin(annotation) is tuple:
        return "list", (), False
    if typing.get_origin(annotation) is Mapping:
        return "json", (), False
    simple: dict[object, Kind] = {bool: "bool", int: "int", float: "float", str: "str"}
    return simple[annotation], (), False


def iter_flags() -> Iterator[Flag]:
    """Yield every flag, the server's first; the docs table is made from this."""
    for group, spec in iter_settings():
        kind, choices, is_optional = _kind_of(spec.type)
        yield Flag(
            name=spec.name,
            group=group,
            kind=kind,
            choices=choices,
            is_optional=is_optional,
            aliases=spec.metadata["aliases"],
            text=spec.metadata["help"],
            is_count=spec.metadata["count"],
            is_hidden=spec.metadata["hidden"],
            default=None if spec.default is dataclasses.MISSING else spec.default,
        )


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (--help lists all flags)\n")


def _parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Parse words with underscores for dashes; suggest a known flag for an unknown one."""
    words, dotted = _without_dotted(parser, [_with_dashes(token) for token in argv])
    found, rest = parser.parse_known_args(words)
    unknown = next((token for token in rest if token.startswith("-")), None)
    if unknown is not None:
        name = unknown.split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]  # noqa: SLF001  argparse offers no other list
        parser.error(f"unknown flag {name!r}.{did_you_mean(name, known)}")
    if rest:
        parser.error(f"unexpected argument {rest[0]!r}; one model can be named")
    values = vars(found)
    for name, keys in dotted.items():
        values[name] = _merged(parser, name, values.get(name), keys)
    return values


def _without_dotted(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Take `--flag.key value` and `--flag.key=value` out of the words, for flags that hold JSON."""
    flags = {name: flag.name for flag in iter_flags() if flag.kind == "json" for name in flag.names}
    words: list[str] = []
    dotted: dict[str, dict[str, Any]] = {}
    rest = iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        flag, dot, key = option.partition(".")
        if not dot or flag not in flags:
            words.append(word)
            continue
        if not equals:
            value = next(rest, None)
        if value is None:
            parser.error(f"{option} needs a value")
        place = dotted.setdefault(flags[flag], {})
        *parents, last = key.replace("-", "_").split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = _json_or_text(value)
    return words, dotted


def _json_or_text(value: str) -> object:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _merged(
    parser: argparse.ArgumentParser, name: str, text: object, keys: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Put single keys into the JSON object that the flag itself was given, if it was."""
    try:
        whole = _read_json(Flag(name=name, group="", kind="json"), "{}" if text is None else text)
    except ConfigError as error:
        parser.error(str(error))
    return {**whole, **keys}


def _with_dashes(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    name, dot, key = name.partition(".")
    return name.replace("_", "-") + dot + key + equals + value


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, `--config` and every flag to a parser."""
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help="name or path of the model (default: smollm2-135m-instruct)",
    )
    parser.add_argument(
        "--model", "--model-path", dest="model", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file whose keys are flag names; command line and environment win",
    )
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for flag in iter_flags():
        _add_flag(groups[flag.group], flag)
    for name, target in NEGATIONS.items():
        parser.add_argument(
            f"--{name}",
            dest=target,
            action="store_const",
            const=False,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    shared: dict[str, Any] = {"dest": flag.name, "default": argparse.SUPPRESS}
    shared["help"] = argparse.SUPPRESS if flag.is_hidden else _help(flag)
    if flag.kind == "bool":
        group.add_argument(*flag.names, action=argparse.BooleanOptionalAction, **shared)
    elif flag.kind == "list":
        group.add_argument(*flag.names, nargs="+", action="extend", metavar="WORD", **shared)
    else:
        metavar = "{" + ",".join(flag.choices) + "}" if flag.choices else flag.kind.upper()
        group.add_argument(*flag.names, metavar=metavar, **shared)


def _help(flag: Flag) -> str:
    text = flag.text.replace("%", "%%")
    if flag.default in (None, (), "") or "efault:" in text:
        return text
    shown = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
    if flag.kind == "bool":
        shown = "on" if flag.default else "off"
    return f"{text} [{shown}]"


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the server's command line."""
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        description="Serve a language model over the OpenAI API.",
        epilog="Every flag may be written with dashes or underscores, set as the environment "
        f"variable {ENV_PREFIX}<FLAG>, or listed in the file given to --config.",
    )
    add_flags(parser)
    return parser


def parse(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    prog: str = "jaxserve serve",
    warn: Callable[[str], None] | None = None,
) -> Settings:
    """Read the command line, the environment and the configuration file.

    Args:
        argv: Arguments, without the program's name.
        environ: Environment variables.
        prog: Name of the program, for messages.
        warn: Receives what was understood but looks like a mistake.

    Raises:
        SystemExit: With code 2 after printing one line, for unknown flags or bad values.
    """
    parser = make_parser(prog)
    given = _parse_args(parser, argv)
    try:
        return _settings(given, environ, warn or (lambda _: None))
    except (ConfigError, MissingExtraError) as error:
        parser.error(str(error))


def _settings(
    given: dict[str, Any], environ: Mapping[str, str], warn: Callable[[str], None]
) -> Settings:
    flags = {flag.name: flag for flag in iter_flags()}
    values = _from_environment(environ, flags, warn)
    config_file = given.pop("config", None) or values.pop("config", None)
    if config_file is not None:
        values = {**_from_file(Path(config_file), flags), **values}
    values |= given
    model = values.pop("model", None)
    made = {name: flags[name].read(value) for name, value in values.items()}
    ours = {spec.name for _, spec in iter_server_options()}
    theirs = {spec.name for _, spec in iter_options()}
    return Settings(
        model=None if model is None else str(model),
        server=ServerConfig.from_settings({k: v for k, v in made.items() if k in ours}),
        engine=EngineConfig.from_settings({k: v for k, v in made.items() if k in theirs}),
    )


def _from_environment(
    environ: Mapping[str, str], flags: Mapping[str, Flag], warn: Callable[[str], None]
) -> dict[str, Any]:
    known = {flag.env: flag.name for flag in flags.values()}
    known |= {ENV_PREFIX + "MODEL": "model", ENV_PREFIX + "CONFIG": "config"}
    others = {ENV_PREFIX + "CACHE_DIR"}
    values: dict[str, Any] = {}
    for variable, value in environ.items():
        if variable in known:
            if value:
                values[known[variable]] = value
        elif variable.startswith(ENV_PREFIX) and variable not in others:
            hint = did_you_mean(variable, known)
            if hint:  # a far-off name belongs to somebody else
                warn(f"environment variable {variable} is not used.{hint}")
    return values


def _from_file(path: Path, flags: Mapping[str, Flag]) -> dict[str, Any]:
    try:
        import yaml  # noqa: PLC0415  an optional package
    except ImportError:
        raise MissingExtraError(
            "--config needs the package pyyaml; run: pip install 'jaxserve[serve]'"
        ) from None
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"--config {str(path)!r} cannot be read: {reason}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {str(path)!r} is not valid YAML: {reason}.") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"--config {str(path)!r} must hold `flag: value` lines.")
    names = {name.lstrip("-"): flag.name for flag in flags.values() for name in flag.names}
    names |= {"model": "model", "model-path": "model"}
    values: dict[str, Any] = {}
    for key, value in typing.cast("Mapping[object, object]", content).items():
        name = str(key).replace("_", "-")
        if name in NEGATIONS:
            flag = Flag(name=name, group="", kind="bool")
            values[NEGATIONS[name]] = not flag.read(value)
        elif name in names:
            values[names[name]] = value
        elif name.startswith("no-") and name[3:] in names:
            target = flags[names[name[3:]]]
            values[target.name] = not target.read(value)
        else:
            hint = did_you_mean(name, [*names, *NEGATIONS])
            raise ConfigError(f"unknown flag {str(key)!r} in {path.name}.{hint}")
    return values
