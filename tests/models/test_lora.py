"""Adapters give the logits that PEFT and transformers compute with them, in float32."""

import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, LoRARequest, SamplingParams
from tests.cases import quick, slow
from tests.models.test_parity import GOLDEN as MODELS
from tests.models.test_parity import ROOT, SETTINGS, TOLERANCE, row

GOLDEN = MODELS.parent / "lora"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
NUM_NEW = 5


def check(model: Path, folder: Path, **settings: object) -> None:
    """All adapters of a folder and none, in one batch: prefill, then decode."""
    adapters = sorted(
        path.name for path in folder.iterdir() if (path / "adapter_config.json").exists()
    )
    requests = [LoRARequest(n, i + 1, str(folder / n)) for i, n in enumerate(adapters)]
    with np.load(folder / "golden.npz") as data:
        golden = {name: data[name] for name in data}
    tokens = golden["tokens"].tolist()
    sampling = SamplingParams(
        temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False,
        logprobs=-1, prompt_logprobs=-1,
    )  # fmt: skip
    asked = [*requests, None]
    settings = {"enable_lora": True, "max_loras": len(requests), "max_lora_rank": 8} | settings
    with LLM(model, **(SETTINGS | settings)) as llm:
        outputs = llm.generate([tokens] * len(asked), sampling, lora_request=asked, use_tqdm=False)
        plain = np.asarray(llm.forward(jnp.asarray(tokens)[None]).logits[0])
        vocab = plain.shape[-1]
        again = [
            llm.generate(
                [[*tokens, *output.outputs[0].token_ids]],
                sampling.replace(max_tokens=1),
                lora_request=request,
                use_tqdm=False,
            )[0]
            for output, request in zip(outputs, asked, strict=True)
        ]
    for output, longer, request in zip(outputs, again, asked, strict=True):
        assert output.lora_request == request
        expected = golden[f"logits_{request.lora_name}"] if request else plain
        found = [row(entry, vocab) for entry in output.prompt_logprobs[1:]]
        decoded = [row(entry, vocab) for entry in output.outputs[0].logprobs]
        np.testing.assert_allclose([*found, decoded[0]], expected, rtol=0, atol=TOLERANCE)
        scored = [row(entry, vocab) for entry in longer.prompt_logprobs[-NUM_NEW:]]
        np.testing.assert_allclose(decoded, scored, rtol=0, atol=TOLERANCE)
        if request is not None:
            assert np.abs(expected - plain).max() > 0.1, "the adapter changes nothing"


@pytest.mark.parametrize("name", quick(NAMES, "llama_gqa"))
def test_adapters_agree_with_peft(name: str) -> None:
    check(MODELS / name, GOLDEN / name)


@pytest.mark.parametrize(
    "settings",
    [
        slow({"kv_layout": "pages", "max_num_batched_tokens": 8}),
        slow({"max_loras": 1, "max_num_batched_tokens": 8}),
        {"batch_invariant": True},
        slow({"tensor_parallel_size": 2}),
        slow({"max_loras": 3, "max_lora_rank": 16, "attention_backend": "xla"}),
    ],
    ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items()),
)
def test_adapters_agree_with_peft_whatever_the_settings(settings: dict[str, object]) -> None:
    check(MODELS / "llama_gqa", GOLDEN / "llama_gqa", **settings)


def test_the_golden_files_name_their_makers() -> None:
    meta = json.loads((GOLDEN / "meta.json").read_text())
    assert set(meta["cases"]) == set(NAMES)
    assert meta["peft"]


@pytest.mark.live_oracle
@pytest.mark.parametrize("offset", range(2))
def test_fresh_random_adapters_agree(offset: int, oracle_python: Path, tmp_path: Path) -> None:
    """Ranks, scales, targets and models that nobody has seen before."""
    seed = int(os.environ.get("JAXSERVE_ORACLE_SEED", np.random.SeedSequence().entropy % 10**6))
    script = ROOT / "tests" / "oracles" / "make_lora.py"
    made = subprocess.run(
        [oracle_python, script, "--random", str(seed + offset), "--out", tmp_path],
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    print(f"JAXSERVE_ORACLE_SEED={seed}", made.stdout)  # shown when the test fails
    check(tmp_path / "model", tmp_path)
