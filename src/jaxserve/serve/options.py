"""Settings of the server itself; those of the engine live in `core.config`.

The command line, the environment variables, the configuration file and the docs table are all made
from these records and the engine's, through `iter_settings`.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxserve.cluster.options import ClusterOptions
from jaxserve.core.config import ContentFormat, EngineConfig, iter_options
from jaxserve.core.errors import ConfigError, did_you_mean
from jaxserve.core.setting import option
from jaxserve.parsers.registry import reasoning_parser, tool_parser

LogLevel = Literal["critical", "error", "warning", "info", "debug", "trace"]
LOG_LEVELS: tuple[str, ...] = typing.get_args(LogLevel)
MAX_PORT = 65535


def _at_least(config: object, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"{name} must be at least {low}, got {value}.")


def _is_log_level(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value not in LOG_LEVELS:
            hint = did_you_mean(str(value), LOG_LEVELS)
            raise ConfigError(
                f"{name} must be one of {', '.join(LOG_LEVELS)}, got {value!r}.{hint}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenOptions:
    """Where the server listens, and how it stops."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    uds: str | None = option(None, "Unix socket to listen on, instead of host and port.")
    root_path: str = option(
        "", "Path under which a proxy publishes the server.", "fastapi-root-path"
    )
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests get to finish after SIGTERM; 0 aborts them."
    )
    timeout_keep_alive: int = option(5, "Seconds after which an idle connection is closed.")
    max_request_body_bytes: int = option(
        32 * 2**20, "Largest request body; more is refused with 413.", count=True
    )

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(self, 0, "port", "shutdown_timeout", "timeout_keep_alive")
        _at_least(self, 1, "max_request_body_bytes")
        if self.port > MAX_PORT:
            raise ConfigError(f"port must be at most {MAX_PORT}, got {self.port}.")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(
                f"root_path must begin with a slash, got {self.root_path!r}; "
                f"use {'/' + self.root_path!r}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """Encryption of the connection."""

    ssl_keyfile: str | None = option(None, "Private key of the server's certificate.")
    ssl_certfile: str | None = option(None, "The server's certificate.")
    ssl_keyfile_password: str | None = option(None, "Password of the private key.")
    ssl_ca_certs: str | None = option(None, "Certificates of those who may sign clients'.")
    ssl_cert_reqs: int = option(0, "Whether clients must show a certificate: 0 no, 1 may, 2 must.")
    ssl_ciphers: str | None = option(None, "OpenSSL's list of allowed ciphers.")

    def __post_init__(self) -> None:
        """Check the values."""
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile go together; give both or none.")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"ssl_cert_reqs must be 0, 1 or 2, got {self.ssl_cert_reqs}.")
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name} must be a file, but there is none at {path!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessOptions:
    """Who may use the server."""

    api_key: tuple[str, ...] = option(
        (),
        "Keys of which a request to /v1 must show one as `Authorization: Bearer KEY`; other paths "
        "stay open.",
    )
    allowed_origins: tuple[str, ...] = option(
        (), "Web origins that may call the server from a browser; * is any."
    )
    allowed_methods: tuple[str, ...] = option(("*",), "Methods that those origins may use.")
    allowed_headers: tuple[str, ...] = option(("*",), "Headers that those origins may send.")
    allow_credentials: bool = option(False, "Whether those origins may send cookies.")
    enable_admin_api: bool = option(
        False,
        "Open the routes that change the running server: weights, pauses, sleep, caches, profiles.",
    )
    allow_runtime_lora_updating: bool = option(
        False,
        "Open the routes that load and unload adapters, and no others; --enable-admin-api opens "
        "them too. Whoever may use them makes the server read folders.",
    )
    admin_api_key: str | None = option(
        None, "Key that all these routes ask for; without it, any key of --api-key."
    )
    profiler_dir: str | None = option(
        None, "Folder for the traces of /start_profile. Default: a new one for temporary files."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        if self.admin_api_key is not None and not self.opens_loras:
            raise ConfigError(
                "admin_api_key needs enable_admin_api or allow_runtime_lora_updating; the routes "
                "are closed."
            )
        if self.admin_api_key == "":
            raise ConfigError("admin_api_key must not be empty; leave the flag out.")
        if any(not key for key in self.api_key):
            raise ConfigError("api_key must not be empty; leave the flag out to need no key.")

    @property
    def opens_loras(self) -> bool:
        """Whether adapters may be loaded and unloaded over HTTP."""
        return self.enable_admin_api or self.allow_runtime_lora_updating


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """An adapter to load at the start.

    Attributes:
        name: Under which it is served.
        path: Its folder, or a name on the hub.
        base_model_name: Parent to show in listings; None is the model itself.
    """

    name: str
    path: str
    base_model_name: str | None = None


def lora_module(word: str) -> LoraModule:
    """Read one value of `lora_modules`.

    Raises:
        ConfigError: If it is neither NAME=PATH nor a JSON object with name and path.

    >>> lora_module("sql=adapters/sql").path
    'adapters/sql'
    """
    if word.lstrip().startswith("{"):
        try:
            found = json.loads(word)
            return LoraModule(**{str(key): str(value) for key, value in found.items()})
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"lora_modules: expected an object with name, path and perhaps base_model_name, "
                f"got {word[:80]!r}: {error}."
            ) from None
    name, equals, path = word.partition("=")
    if not equals or not name or not path:
        raise ConfigError(f"lora_modules must hold NAME=PATH, got {word[:80]!r}.")
    return LoraModule(name=name, path=path)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiOptions:
    """What the endpoints answer."""

    served_model_name: tuple[str, ...] = option(
        (),
        "Names by which clients ask for the model; the first one is echoed. Default: the model "
        "as given.",
    )
    lora_modules: tuple[str, ...] = option(
        (),
        "Adapters to load at the start, each as NAME=PATH or as a JSON object with name, path and "
        "perhaps base_model_name; requests choose one by its name as their model.",
        "lora-paths",
    )
    response_role: str = option("assistant", "Role of the generated chat message.")
    trust_request_chat_template: bool = option(
        False, "Accept a chat template from the request; it is a program that the server runs."
    )
    default_chat_template_kwargs: Mapping[str, Any] | None = option(
        None, "JSON object of arguments for the chat template; those of a request win."
    )
    chat_template_content_format: ContentFormat = option(
        "auto",
        "How message content reaches the chat template: string, openai (a list of parts), or auto, "
        "which looks at the template.",
    )
    enable_auto_tool_choice: bool = option(
        False, "Accepted for compatibility: the tool call parser alone lets the model call tools."
    )
    tool_call_parser: str | None = option(
        None,
        "Form of the model's tool calls: hermes (qwen), llama3_json (llama3), mistral, pythonic, "
        "qwen3_coder (qwen3_xml), deepseek_v3, deepseek_v31, openai (gpt-oss). Requests with tools "
        "need it.",
    )
    reasoning_parser: str | None = option(
        None,
        "Form of the model's reasoning, which is then reported apart from the answer: deepseek_r1, "
        "qwen3, qwen3_thinking, glm45, mistral, openai_gptoss (gpt-oss) and others.",
    )
    return_tokens_as_token_ids: bool = option(
        False, "Write tokens in log-probabilities as token_id:N."
    )
    enable_force_include_usage: bool = option(
        False,
        "Send usage with every stream, as if asked for.",
        "stream-response-default-include-usage",
    )
    metrics_alias: tuple[str, ...] = option(
        ("vllm",), "Further prefixes under which /metrics repeats everything; none for none."
    )
    disable_fastapi_docs: bool = option(False, "Do not serve /docs, /redoc and /openapi.json.")
    disable_page: bool = option(False, "Do not serve the chat page at / and what belongs to it.")

    def __post_init__(self) -> None:
        """Check the values."""
        modules = [lora_module(word) for word in self.lora_modules]
        twice = [m.name for i, m in enumerate(modules) if m.name in {n.name for n in modules[:i]}]
        if twice:
            raise ConfigError(f"lora_modules names {twice[0]!r} twice; give each its own name.")
        tool_parser(self.tool_call_parser)
        reasoning_parser(self.reasoning_parser)
        known = typing.get_args(ContentFormat)
        if self.chat_template_content_format not in known:
            raise ConfigError(
                f"chat_template_content_format must be one of {', '.join(known)}, got "
                f"{self.chat_template_content_format!r}."
            )
        if self.enable_auto_tool_choice and tool_parser(self.tool_call_parser) is None:
            raise ConfigError("enable_auto_tool_choice needs tool_call_parser; give both.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """What is printed."""

    log_level: LogLevel = option("info", "Least severe message to print.")
    uvicorn_log_level: LogLevel = option(
        "info", "The same for the HTTP server below.", "log-level-http"
    )
    disable_uvicorn_access_log: bool = option(False, "Do not print a line per request.")
    enable_log_requests: bool = option(False, "Print prompt and parameters of every request.")
    max_log_len: int | None = option(None, "Most characters of a prompt to print.")

    def __post_init__(self) -> None:
        """Check the values."""
        _is_log_level(self, "log_level", "uvicorn_log_level")
        _at_least(self, 0, "max_log_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything the server needs to know besides the engine."""

    listen: ListenOptions = field(default_factory=ListenOptions)
    tls: TlsOptions = field(default_factory=TlsOptions)
    access: AccessOptions = field(default_factory=AccessOptions)
    api: ApiOptions = field(default_factory=ApiOptions)
    log: LogOptions = field(default_factory=LogOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> "ServerConfig":
        """Build a configuration from flat names.

        Raises:
            ConfigError: For an unknown name (the nearest known one is suggested) or a bad value.

        >>> ServerConfig.from_settings({"port": 9000}).listen.port
        9000
        """
        homes = {spec.name: part for part, spec in iter_server_options()}
        parts: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            if name not in homes:
                raise ConfigError(f"unknown setting {name!r}.{did_you_mean(name, homes)}")
            parts.setdefault(homes[name], {})[name] = value
        return cls(
            listen=ListenOptions(**parts.get("listen", {})),
            tls=TlsOptions(**parts.get("tls", {})),
            access=AccessOptions(**parts.get("access", {})),
            api=ApiOptions(**parts.get("api", {})),
            log=LogOptions(**parts.get("log", {})),
            cluster=ClusterOptions(**parts.get("cluster", {})),
        )

    @property
    def scheme(self) -> str:
        """`http` or `https`."""
        return "https" if self.tls.ssl_certfile else "http"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Outcome of reading flags, environment and file.

    Attributes:
        model: Name or path of the model; None is the default model.
        engine: Settings of the engine.
        server: Settings of the server.
    """

    model: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        """Check what concerns both parts."""
        for name, is_used in (
            ("lora_modules", bool(self.server.api.lora_modules)),
            ("allow_runtime_lora_updating", self.server.access.allow_runtime_lora_updating),
        ):
            if is_used and not self.engine.lora.enable_lora:
                raise ConfigError(f"{name} needs enable_lora; give both or none.")
        if self.server.cluster.is_fleet and self.engine.scheduler.decision_log is not None:
            raise ConfigError(
                "decision_log is of a single engine, and there are several; use fleet_log."
            )
        if self.server.cluster.cluster == "ray" and self.engine.lora.enable_lora:
            raise ConfigError(
                "enable_lora needs cluster local: adapters are read in this process, and Ray's "
                "actors are others. Leave one of the two out."
            )


def iter_server_options() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every setting of the server with the name of the part that holds it."""
    for part in dataclasses.fields(ServerConfig):
        for spec in dataclasses.fields(typing.cast("Any", part.type)):
            yield part.name, spec


def iter_settings() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every setting, the server's first, with the name of the part that holds it."""
    yield from iter_server_options()
    yield from iter_options()
