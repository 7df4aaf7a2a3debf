"""Logits agree with transformers: tiny random checkpoints, float32, prefill and decode."""

import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.models.config import ModelConfig
from jaxserve.sharding.mesh import make_mesh
from tests.cases import quick, slow

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "oracles" / "golden" / "models"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
EXPERTS = ("deepseek", "gpt_oss", "mixtral", "olmoe", "qwen3_moe")
PLAIN = [name for name in NAMES if not name.startswith(EXPERTS)]
"""Those with experts are compared without an engine in `test_moe`, which is faster."""
COVERED = ("llama_plain", "llama_llama3_rope", "qwen2_plain", "qwen3_plain", "smollm3_plain")
"""What these have, others of the family have as well; Llama 3's rope comes in its old spelling."""
TOLERANCE = 1e-4

SETTINGS = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "logprobs_mode": "raw_logits",
    "max_logprobs": -1,
}


def engine_of(folder: Path, **settings: object) -> LLM:
    return LLM(folder, **(SETTINGS | settings))


def sequences(folder: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (token ids, logits of the prompt, logits of each later token) per sequence."""
    with np.load(folder / "golden.npz") as data:
        count = sum(name.startswith("tokens") for name in data)
        return [
            tuple(data[f"{kind}_{i}"] for kind in ("tokens", "prefill", "decode"))
            for i in range(count)
        ]


def row(candidates: dict, vocab_size: int) -> np.ndarray:
    assert len(candidates) == vocab_size
    return np.array([candidates[token].logprob for token in range(vocab_size)], np.float32)


def check_forward(folder: Path) -> None:
    """The pure forward pass, without a cache."""
    with engine_of(folder) as llm:
        for tokens, prefill, decode in sequences(folder):
            logits = llm.forward(jnp.asarray(tokens)[None]).logits[0]
            expected = np.concatenate([prefill, decode])
            np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def check_engine(folder: Path, **settings: object) -> None:
    """Prefill and greedy decode through pages, batches and the cache."""
    cases = sequences(folder)
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=len(decode) + 1,
            ignore_eos=True,
            detokenize=False,
            logprobs=-1,
            prompt_logprobs=-1,
        )
        for _, _, decode in cases
    ]
    prompts = [tokens[: len(prefill)].tolist() for tokens, prefill, _ in cases]
    with engine_of(folder, **settings) as llm:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    for output, (tokens, prefill, decode) in zip(outputs, cases, strict=True):
        vocab = prefill.shape[-1]
        assert output.outputs[0].token_ids[:-1] == tokens[len(prefill) :].tolist()
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        found = [row(entry, vocab) for entry in output.prompt_logprobs[1:]]
        if found:
            np.testing.assert_allclose(found, prefill[:-1], rtol=0, atol=TOLERANCE)
        found = [row(entry, vocab) for entry in output.outputs[0].logprobs]
        expected = np.concatenate([prefill[-1:], decode])
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_the_golden_files_name_their_makers() -> None:
    meta = json.loads((GOLDEN / "meta.json").read_text())
    assert set(meta["cases"]) == set(meta["seeds"]) == set(NAMES)
    assert meta["transformers"]
    assert meta["torch"]


@pytest.mark.parametrize("name", quick(NAMES, *(name for name in PLAIN if name not in COVERED)))
def test_forward_agrees(name: str) -> None:
    check_forward(GOLDEN / name)


@pytest.mark.optimized
@pytest.mark.parametrize("name", quick(NAMES, "llama_gqa", "gemma3_plain"))
def test_prefill_and_decode_agree(name: str) -> None:
    check_engine(GOLDEN / name)


@pytest.mark.parametrize("name", [slow("llama_llama3_rope"), slow("qwen3_plain"), "gemma2_plain"])
@pytest.mark.parametrize("backend", ["xla", slow("reference"), slow("pallas-xla")])
def test_prefill_and_decode_agree_with_pages(name: str, backend: str) -> None:
    check_engine(GOLDEN / name, kv_layout="pages", attention_backend=backend)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        slow("qwen2_plain", "slots"),
        slow("mistral_window", "slots"),
        slow("gemma2_plain", "slots"),
        ("gemma3_plain", "pages"),
        slow("phi3_window", "pages"),
        slow("smollm3_window_bias", "slots"),
        slow("qwen3_moe_plain", "slots"),
        slow("olmoe_clipped", "pages"),
        slow("gpt_oss_plain", "slots"),
        ("gpt_oss_plain", "pages"),
        ("deepseek_v3_plain", "slots"),
        slow("deepseek_v2_groups", "pages"),
    ],
)
def test_prefill_in_chunks_agrees(name: str, layout: str) -> None:
    check_engine(GOLDEN / name, max_num_batched_tokens=8, kv_layout=layout)


@pytest.mark.parametrize(
    ("name", "tensor", "experts"),
    [
        ("qwen3_moe_plain", 2, 1),
        slow("qwen3_moe_plain", 2, 2),
        slow("qwen3_moe_plain", 1, 4),
        slow("deepseek_v3_plain", 2, 1),
        slow("deepseek_v3_plain", 2, 2),
    ],
)
def test_experts_agree_on_several_devices(name: str, tensor: int, experts: int) -> None:
    check_engine(GOLDEN / name, mesh=make_mesh(tensor, experts))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe_plain", "gpt_oss_plain", "deepseek_v3_plain"])
@pytest.mark.parametrize("backend", ["reference", "pallas-xla"])
def test_experts_agree_with_pages(name: str, backend: str) -> None:
    check_engine(GOLDEN / name, kv_layout="pages", attention_backend=backend)


@pytest.mark.parametrize("name", [slow("mixtral_window"), "gpt_oss_plain", "deepseek_v3_plain"])
def test_found_prefixes_give_the_same_tokens(name: str) -> None:
    cases = sequences(GOLDEN / name)
    tokens, prefill, decode = cases[-1]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=len(decode) + 1, ignore_eos=True, detokenize=False
    )
    prompt = tokens[: len(prefill)].tolist()
    with engine_of(GOLDEN / name, block_size=8, max_num_batched_tokens=16) as llm:
        first, second = (llm.generate([prompt], sampling, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, (len(prompt) - 1) // 8 * 8)
    for output in (first, second):
        assert output.outputs[0].token_ids[:-1] == tokens[len(prefill) :].tolist()


def test_every_golden_window_is_shorter_than_the_longest_prompt() -> None:
    for name in NAMES:
        config = ModelConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
        longest = max(len(prefill) for _, prefill, _ in sequences(GOLDEN / name))
        assert all(kind.window is None or 2 * kind.window < longest for kind in config.kinds)


def test_longrope_takes_its_factors_by_the_longest_context_served() -> None:
    """The same checkpoint, once for contexts as in pretraining and once for longer ones."""
    tokens = sequences(GOLDEN / "phi3_short")[0][0][None]
    logits = {}
    for length in (64, 65):
        with engine_of(GOLDEN / "phi3_short", max_model_len=length) as llm:
            logits[length] = np.asarray(llm.forward(jnp.asarray(tokens)).logits)
    assert np.abs(logits[64] - logits[65]).max() > 0.01


def test_old_spelling_of_rope_agrees(tmp_path: Path) -> None:
    """Checkpoints on the hub still say rope_theta and rope_scaling."""
    folder = tmp_path / "model"
    folder.mkdir()
    source = GOLDEN / "llama_llama3_rope"
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    check_forward(folder)


@pytest.mark.live_oracle
@pytest.mark.parametrize("offset", range(3))
def test_fresh_random_configurations_agree(
    offset: int, oracle_python: Path, tmp_path: Path
) -> None:
    """Both side by side over configurations that nobody has seen before."""
    seed = int(os.environ.get("JAXSERVE_ORACLE_SEED", np.random.SeedSequence().entropy % 10**6))
    script = ROOT / "tests" / "oracles" / "make_models.py"
    made = subprocess.run(
        [oracle_python, script, "--random", str(seed + offset), "--out", tmp_path / "model"],
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    print(f"JAXSERVE_ORACLE_SEED={seed}", made.stdout)  # shown when the test fails
    check_forward(tmp_path / "model")
    check_engine(tmp_path / "model")
