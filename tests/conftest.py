"""Settings and fixtures of every test."""

import ctypes
import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports JAX. GPU runs set JAX_PLATFORMS themselves.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("TQDM_DISABLE", "1")
_DEVICES = "--xla_force_host_platform_device_count=8"  # to share a model among; one is used alone
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

MOST_MAPPINGS = 20_000
"""Mappings of memory that a process keeps from one file of tests to the next."""
# `sharding.flash` has loops for numba, which takes functions only as they were written.
_CHECKED = ("attention", "cache", "models", "sharding.mesh", "sharding.rules")
try:
    import beartype  # noqa: F401  the hook below needs it
    from jaxtyping import install_import_hook
except ImportError:  # a GPU machine may lack them; every other run has them
    pass
else:
    # Where arrays are. The faces check what users pass by themselves, and tests pass them nonsense.
    install_import_hook(
        [f"jaxserve.{name}" for name in _CHECKED],
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )

COUNTED = ("mosaic", "race", "aot", "interpreted", "compiled", "gpu")
"""Marks whose passed tests are counted at the end of a run."""

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a second run of the tests, in other surroundings, be a short one."""
    parser.addoption(
        "--first-cases", action="store_true", help="run one case of each parametrized test"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first case of each test that the marks have left."""
    if not config.getoption("--first-cases"):
        return
    seen: set[str] = set()
    others: list[pytest.Item] = []
    for item in items:
        name = item.nodeid.split("[")[0]
        others += [item] if name in seen else []
        seen.add(name)
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, with the reason."""
    if item.get_closest_marker("gpu") is not None:
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip("needs a GPU, and JAX_PLATFORMS=cuda where tests run")
    if item.get_closest_marker("browser") is not None and find_chromium() is None:
        pytest.skip(
            "needs Chromium: install it (apt-get install chromium), or name its program in CHROMIUM"
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count what passed of every kind of proof, so that it is seen when a kind is missing."""
    counts = dict.fromkeys(COUNTED, 0)
    for report in terminalreporter.stats.get("passed", ()):
        for name in counts:
            counts[name] += report.when == "call" and name in report.keywords
    told = [f"{count} {name}" for name, count in counts.items() if count]
    if told:
        terminalreporter.write_line(f"passed, by mark: {', '.join(told)}")


@pytest.fixture(scope="module", autouse=True)
def _gives_memory_back() -> Iterator[None]:
    """Collect what the engines of a module held, so that two workers fit into a small machine.

    Every compiled program takes dozens of mappings of memory, of which Linux lets a process have
    65,530; without any left LLVM crashes.
    """
    yield
    gc.collect()
    if sys.platform != "linux":
        return
    if "jax" in sys.modules and Path("/proc/self/maps").read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        from jaxserve.engine.compiling import forget_programs

        forget_programs()
        jax.clear_caches()
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def _optimizes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let LLVM try as hard as for users where a test has the mark `optimized`."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    import jax

    from jaxserve.engine.compiling import forget_programs

    forget_programs()
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    forget_programs()


def find_chromium() -> str | None:
    """Return the path of a Chromium that tests may start."""
    named = os.environ.get("CHROMIUM")
    if named:
        return named
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium; tests that use it carry the mark `browser`."""
    found = find_chromium()
    assert found is not None, "a test that needs a browser must carry the mark `browser`"
    return found


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of large public test data, where it lies beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the test data in {folder}")
    return folder


@pytest.fixture(scope="session")
def oracle_python() -> Path:
    """The Python of the environment that `make oracles` builds."""
    python = Path(os.environ.get("ORACLES", ROOT / ".venv-oracles")) / "bin" / "python"
    if not python.exists():
        pytest.skip("needs torch and transformers beside it; run `make oracles` first")
    return python


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The weights of the default model, fetched once."""
    from jaxserve.core.errors import JaxserveError
    from jaxserve.models.hub import DEFAULT_MODEL, resolve_model

    try:
        return resolve_model(DEFAULT_MODEL, progress=False)
    except JaxserveError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the default model cannot be had: {error}")
