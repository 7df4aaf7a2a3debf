"""Flags, environment variables and configuration files of the server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.cli.main import main
from jaxserve.core.errors import ConfigError
from jaxserve.serve import flags
from jaxserve.serve.flags import iter_flags, parse
from jaxserve.serve.options import ServerConfig, iter_settings


def refused(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    """Parse what must not parse; return the one line that says why."""
    with pytest.raises(SystemExit) as stop:
        parse(argv, environ)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_nothing_given_gives_the_defaults():
    settings = parse([], {})
    assert settings.model is None
    assert settings.server == ServerConfig()
    assert (settings.server.listen.host, settings.server.listen.port) == ("127.0.0.1", 8000)


def test_every_setting_is_a_flag_with_a_help_text():
    made = {flag.name: flag for flag in iter_flags()}
    assert list(made) == [spec.name for _, spec in iter_settings()]
    assert all(flag.text for flag in made.values())
    assert {flag.group for flag in made.values()} <= set(flags.GROUPS)


def test_no_two_flags_share_a_name():
    names = [name for flag in iter_flags() for name in flag.names]
    assert len(names) == len(set(names))
    assert not {f"--{name}" for name in flags.NEGATIONS} & set(names)


@pytest.mark.parametrize(
    "spelling",
    [
        ["--max-model-len", "4096"],
        ["--max_model_len", "4096"],
        ["--max_model_len=4096"],
        ["--context-length", "4096"],
        ["--max-model-len", "4K"],
        ["--max-model-len", "4.096k"],
    ],
)
def test_a_flag_has_many_spellings(spelling: list[str]):
    assert parse(["m", *spelling], {}).engine.model.max_model_len == 4096


def test_underscores_in_values_stay():
    assert parse(["--chat_template=my_file_1"], {}).engine.model.chat_template == "my_file_1"


@pytest.mark.parametrize("word", ["auto", "-1", "none"])
def test_auto_is_spelled_in_words_or_minus_one(word: str):
    assert parse(["--max-model-len", word], {}).engine.model.max_model_len is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], True),
        (["--enable-prefix-caching"], True),
        (["--no-enable-prefix-caching"], False),
        (["--no_enable_prefix_caching"], False),
        (["--disable-radix-cache"], False),
    ],
)
def test_booleans_come_in_pairs(argv: list[str], expected: bool):
    assert parse(argv, {}).engine.cache.enable_prefix_caching is expected


def test_overlap_can_be_switched_off_in_the_other_engines_words():
    assert parse(["--disable-overlap-schedule"], {}).engine.scheduler.async_scheduling is False


def test_short_names():
    assert parse(["-tp", "2"], {}).engine.parallel.tensor_parallel_size == 2
    assert parse(["--tp", "2"], {}).engine.parallel.tensor_parallel_size == 2
    assert parse(["-q", "int8"], {}).engine.model.quantization == "int8"
    assert parse(["--quantization", "none"], {}).engine.model.quantization is None


def test_model_is_positional_or_a_flag():
    assert parse(["org/name"], {}).model == "org/name"
    assert parse(["--model", "org/name"], {}).model == "org/name"
    assert parse(["--model-path", "org/name"], {}).model == "org/name"


def test_lists_take_several_words_json_or_commas():
    assert parse(["--api-key", "a", "b"], {}).server.access.api_key == ("a", "b")
    assert parse(["--api-key", "a", "--api-key", "b"], {}).server.access.api_key == ("a", "b")
    origins = parse(["--allowed-origins", '["*"]'], {}).server.access.allowed_origins
    assert origins == ("*",)
    assert parse([], {"JAXSERVE_API_KEY": "a,b"}).server.access.api_key == ("a", "b")
    assert parse([], {"JAXSERVE_API_KEY": '["a", "b"]'}).server.access.api_key == ("a", "b")


def test_metrics_alias_can_be_dropped():
    assert parse([], {}).server.api.metrics_alias == ("vllm",)
    assert parse(["--metrics-alias", "none"], {}).server.api.metrics_alias == ()


def test_json_flags():
    made = parse(["--default-chat-template-kwargs", '{"enable_thinking": false}'], {})
    assert made.server.api.default_chat_template_kwargs == {"enable_thinking": False}


def test_command_line_beats_environment_beats_file(tmp_path: Path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "port: 1\nmax_num_seqs: 1\nblock-size: 32\nmodel: from-file\nno-async-scheduling: true\n"
        "api-key: [a, b]\ndefault-chat-template-kwargs: {x: 1}\nmax-model-len: 2k\n"
    )
    environ = {"JAXSERVE_PORT": "2", "JAXSERVE_MAX_NUM_SEQS": "2", "JAXSERVE_CONFIG": str(path)}
    made = parse(["--port", "3"], environ)
    assert made.server.listen.port == 3
    assert made.engine.scheduler.max_num_seqs == 2
    assert made.engine.cache.block_size == 32
    assert made.engine.scheduler.async_scheduling is False
    assert made.server.access.api_key == ("a", "b")
    assert made.server.api.default_chat_template_kwargs == {"x": 1}
    assert made.engine.model.max_model_len == 2000
    assert made.model == "from-file"
    assert parse(["given", "--config", str(path)], {}).model == "given"


def test_file_understands_aliases_and_negations(tmp_path: Path):
    path = tmp_path / "settings.yaml"
    path.write_text("tp: 2\ndisable-radix-cache: true\nenable_log_requests: yes\n")
    made = parse(["--config", str(path)], {})
    assert made.engine.parallel.tensor_parallel_size == 2
    assert made.engine.cache.enable_prefix_caching is False
    assert made.server.log.enable_log_requests is True


def test_environment_booleans_and_empty_values():
    made = parse([], {"JAXSERVE_ASYNC_SCHEDULING": "0", "JAXSERVE_PORT": ""})
    assert made.engine.scheduler.async_scheduling is False
    assert made.server.listen.port == 8000


def test_misspelled_environment_variable_is_reported():
    warnings: list[str] = []
    parse([], {"JAXSERVE_PROT": "1", "JAXSERVE_CACHE_DIR": "x"}, warn=warnings.append)
    assert warnings == [
        "environment variable JAXSERVE_PROT is not used. Did you mean 'JAXSERVE_PORT'?"
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--max-model-length", "4"], "unknown flag '--max-model-length'. Did you mean '--max-m"),
        (["--max_modle_len=4"], "unknown flag '--max-modle-len'. Did you mean '--max-model-len'?"),
        (["--no-enable-prefix-cachin"], "Did you mean '--no-enable-prefix-caching'?"),
        (["a", "b"], "unexpected argument 'b'; one model can be named"),
        (["--port", "eighty"], "--port must be a whole number, got 'eighty'"),
        (["--port", "70000"], "port must be at most 65535, got 70000"),
        (["--max-model-len", "4.5"], "--max-model-len must be a whole number such as 4096, 4k"),
        (
            ["--dtype", "bfloat61"],
            "must be one of auto, float32, bfloat16, float16, got 'bfloat61'",
        ),
        (["--dtype", "bfloat61"], "Did you mean 'bfloat16'?"),
        (["--warmup", "lazily"], "Did you mean 'lazy'?"),
        (["--gpu-memory-utilization", "1.5"], "must be in (0, 1], got 1.5"),
        (["--gpu-memory-utilization", "most"], "must be a number, got 'most'"),
        (["--default-chat-template-kwargs", "[1]"], "must be a JSON object, got [1]"),
        (["--default-chat-template-kwargs", "{"], "must be a JSON object: "),
        (["--allowed-origins", "[x"], "must be words, or a JSON list"),
        (["--ssl-keyfile", "key.pem"], "ssl_keyfile and ssl_certfile go together"),
        (["--log-level", "loud"], "must be one of critical, error"),
        (["--root-path", "api"], "must begin with a slash, got 'api'; use '/api'"),
        (["--config", "nowhere.yaml"], "'nowhere.yaml' cannot be read: No such file"),
        (["--port"], "expected one argument"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_two(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert expected in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prot: 1", "unknown flag 'prot' in settings.yaml. Did you mean 'port'?"),
        ("port: [1]", "--port must be a whole number, got [1]"),
        ("async-scheduling: maybe", "must be true or false, got 'maybe'"),
        ("- port", "must hold `flag: value` lines"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_mistakes_in_the_file(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    assert expected in refused(capsys, "--config", str(path))


def test_mistakes_in_the_environment(capsys: pytest.CaptureFixture[str]):
    assert "must be true or false" in refused(capsys, JAXSERVE_ASYNC_SCHEDULING="perhaps")


def test_unknown_setting_of_the_server_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown setting 'hots'. Did you mean 'host'\?"):
        ServerConfig.from_settings({"hots": "::"})


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], {})
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(flag.option in text for flag in iter_flags() if not flag.is_hidden)


def test_flags_load_neither_jax_nor_a_web_library():
    script = (
        "import sys, json; from jaxserve.serve import flags, launch; import jaxserve.cli.main;"
        "flags.parse(['m', '--port', '0'], {}); print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"jax", "flax", "numpy", "fastapi", "starlette", "uvicorn", "pydantic"}


def test_commands_without_a_model(capsys: pytest.CaptureFixture[str]):
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("jaxserve ")
    assert main([]) == 0
    assert "serve [MODEL]" in capsys.readouterr().out
    assert main(["serv"]) == 2
    assert "unknown command 'serv'. Did you mean 'serve'?" in capsys.readouterr().err


def test_models_lists_the_default_model(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    assert "smollm2-135m-instruct" in capsys.readouterr().out


def test_pull_of_an_unknown_name_says_what_there_is(capsys: pytest.CaptureFixture[str]):
    assert main(["pull", "smollm2-135m-instrukt"]) == 1
    message = capsys.readouterr().err
    assert "Did you mean 'smollm2-135m-instruct'?" in message
    assert message.count("\n") == 1


def test_pull_of_a_path_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["pull", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)


def test_single_keys_of_json_flags():
    argv = [
        "m", "--structured_outputs_config.backend", "guidance",
        "--structured-outputs-config.disable_any_whitespace=true",
    ]  # fmt: skip
    config = {"backend": "guidance", "disable_any_whitespace": True}
    assert parse(argv, {}).engine.structured.structured_outputs_config == config
    argv += ["--structured-outputs-config", '{"enable_in_reasoning": true}']
    merged = parse(argv, {}).engine.structured.structured_outputs_config
    assert merged == config | {"enable_in_reasoning": True}
    assert parse(["--grammar-backend", "llguidance"], {}).engine.structured.backend == "llguidance"
    assert parse(["m"], {}).engine.structured.backend == "auto"


def test_policies_are_chosen_by_name_with_their_times_budget_and_log(capsys):
    words = ["--scheduling-policy", "slo", "--cost-model", "c.json", "--policy-budget-ms", "5"]
    made = parse([*words, "--decision-log", "d.jsonl", "--slo-pace", "tpot_gap"], {}).engine
    found = made.scheduler
    assert (found.scheduling_policy, found.cost_model, found.policy_budget_ms) == (
        "slo",
        "c.json",
        5.0,
    )
    assert (found.decision_log, found.slo_pace) == ("d.jsonl", "tpot_gap")
    with pytest.raises(SystemExit):
        parse(["--scheduling-policy", "slow"], {})
    assert "Did you mean 'slo'?" in capsys.readouterr().err
