"""The scripts behind the Makefile, on machines that tests make up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path):
    """A PATH with nothing on it, and a way to put commands there and run scripts."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, folder):
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.environment = {"PATH": str(self.bin), "HOME": str(folder)}
        for tool in ("sh", "dirname", "grep", "sed", "tail", "rm"):
            for place in ("/usr/bin", "/bin"):
                if Path(place, tool).exists():
                    (self.bin / tool).symlink_to(Path(place, tool))
                    break

    def command(self, name, text):
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def python(self, name):
        (self.bin / name).symlink_to(sys.executable)

    def run(self, script, *arguments, **environment):
        return subprocess.run(
            [ROOT / "scripts" / script, *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )


def test_a_python_that_only_pretends_to_run_is_passed_over(machine):
    machine.command("python3.12", "echo 'python3.12: not found in this folder' >&2; exit 127")
    machine.python("python3")
    run = machine.run("find-python")
    assert run.returncode == 0
    assert Path(run.stdout.strip()).name == "python3"


def test_the_named_python_is_taken_or_refused_but_never_replaced(machine):
    machine.python("python3")
    machine.command("old", "exit 1")
    assert machine.run("find-python", PYTHON=sys.executable).stdout.strip() == sys.executable
    refused = machine.run("find-python", PYTHON="old")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "PYTHON=old does not run, is older than 3.12, or fails" in refused.stderr


def test_the_probe_decides(machine):
    machine.python("python3")
    assert machine.run("find-python", "import sys").returncode == 0
    run = machine.run("find-python", "import there_is_no_such_module")
    assert run.returncode == 1
    assert "No Python 3.12 or newer was found" in run.stderr
    assert "make PYTHON=/path/to/python3" in run.stderr


def test_uv_gets_the_settings_of_pip(machine):
    machine.python("python3")
    machine.command("uv", 'echo "--group $SSL_CERT_FILE $UV_DEFAULT_INDEX $UV_PYTHON_DOWNLOADS $*"')
    run = machine.run("uv", "venv", PIP_CERT="/my/cert", PIP_INDEX_URL="file:///my/index")
    assert run.stdout.split() == ["--group", "/my/cert", "file:///my/index", "never", "venv"]


def test_settings_of_uv_itself_win(machine):
    machine.python("python3")
    machine.command("uv", 'echo "--group $SSL_CERT_FILE $UV_DEFAULT_INDEX"')
    run = machine.run(
        "uv",
        PIP_CERT="/pip/cert",
        SSL_CERT_FILE="/my/cert",
        PIP_INDEX_URL="file:///pip",
        UV_DEFAULT_INDEX="file:///my",
    )
    assert run.stdout.split() == ["--group", "/my/cert", "file:///my"]


@pytest.mark.parametrize("target", ["serve", "test", "check", "gpu", "oracles", "bench"])
def test_make_knows_what_to_do(target):
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    run = subprocess.run(
        ["make", "--dry-run", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
