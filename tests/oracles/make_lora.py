"""Write random adapters with PEFT, and the logits that transformers computes with them.

Run in the oracle environment (torch, transformers and peft; jaxserve is not imported):

    python tests/oracles/make_lora.py                    # every case -> golden/lora/<model>/
    python tests/oracles/make_lora.py --random SEED --out DIR   # one fresh random case -> DIR

The models are those of `golden/models`. Each directory holds a few adapters as PEFT saves them
(`<adapter>/adapter_config.json`, `<adapter>/adapter_model.safetensors`) and `golden.npz`: random
ids `tokens`, and the logits of all their positions with each adapter, `logits_<adapter>`. A random
case also gets a model of its own, in `DIR/model`. Everything is float32 on the CPU.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.oracles import make_models

MODELS = make_models.GOLDEN
GOLDEN = MODELS.parent / "lora"
SEED = 20260301
NUM_TOKENS = 20

CASES: dict[str, dict[str, dict]] = {
    "llama_gqa": {
        "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "all": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    },
    "qwen2_plain": {
        "pattern": {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers\.\d+\.mlp\.down_proj": 6},
            "alpha_pattern": {"o_proj": 3},
        },
    },
    "qwen3_plain": {"attention": {"r": 3, "target_modules": r".*\.self_attn\.[qkvo]_proj"}},
    "mistral_window": {
        "layer": {
            "r": 5,
            "lora_alpha": 5,
            "target_modules": ["k_proj", "gate_proj", "up_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    },
    "gemma2_plain": {"all": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}},
    "gemma3_plain": {"mlp": {"r": 4, "lora_alpha": 2, "target_modules": r".*\.mlp\..*_proj"}},
    "phi3_partial_tied": {"all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}},
    "smollm3_plain": {
        "excluded": {
            "r": 4,
            "target_modules": "all-linear",
            "exclude_modules": r".*\.1\.mlp\.\w+",
        },
    },
    "qwen3_moe_plain": {
        "attention": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
    },
}


def random_options(seed: int, family: str) -> dict:
    """Draw an adapter that no committed case has."""
    rng = random.Random(seed)
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    if family != "phi3":
        inner = () if family in make_models.EXPERTS else ("gate", "up", "down")
        names = [f"{name}_proj" for name in ("q", "k", "v", "o", *inner)]
    targets = rng.sample(names, rng.randint(1, len(names)))
    return {
        "r": rng.randint(1, 8),
        "lora_alpha": rng.choice([1, 4, 16, 32]),
        "use_rslora": rng.random() < 0.5,
        "target_modules": targets,
        "rank_pattern": {rng.choice(targets): rng.randint(1, 8)},
        "alpha_pattern": {rng.choice(targets): rng.randint(1, 32)},
    }


def write_case(base: Path, cases: dict[str, dict], folder: Path, seed: int) -> None:
    """Write adapters of one model, and what it computes with them."""
    golden: dict[str, np.ndarray] = {}
    for number, (name, options) in enumerate(cases.items()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, attn_implementation="eager"
        )
        vocab = model.config.vocab_size
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocab, (1, NUM_TOKENS), generator=generator)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        torch.manual_seed(seed + number)
        adapted = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
            golden[f"logits_{name}"] = adapted(ids).logits[0].numpy().astype(np.float32)
        golden["tokens"] = ids[0].numpy().astype(np.int32)
        adapted.peft_config["default"].base_model_name_or_path = base.name
        shutil.rmtree(folder / name, ignore_errors=True)
        adapted.save_pretrained(folder / name, save_embedding_layers=False)
        (folder / name / "README.md").unlink(missing_ok=True)
    np.savez_compressed(folder / "golden.npz", **golden)


def main() -> None:
    """Read the command line and write one random case, or all committed ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, metavar="SEED", help="one fresh random case")
    parser.add_argument("--out", type=Path, help="where the random case goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.random is not None:
        if args.out is None:
            parser.error("--random needs --out DIR")
        seed, case = args.random, make_models.random_case(args.random)
        while case["family"].startswith("deepseek"):  # whose attention has no adapters
            seed += 1000
            case = make_models.random_case(seed)
        make_models.write(case, args.random, args.out / "model")
        cases = {
            name: random_options(args.random + i, case["family"]) for i, name in enumerate("ab")
        }
        write_case(args.out / "model", cases, args.out, args.random)
        print(json.dumps({"model": case, "adapters": cases}))
        return
    for number, (name, cases) in enumerate(CASES.items()):
        (GOLDEN / name).mkdir(parents=True, exist_ok=True)
        write_case(MODELS / name, cases, GOLDEN / name, SEED + 10 * number)
        size = sum(path.stat().st_size for path in (GOLDEN / name).rglob("*.*"))
        print(f"{name}: {size / 1000:.0f} kB")
    meta = {
        "generator": "tests/oracles/make_lora.py",
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "dtype": "float32, eager attention, CPU",
        "cases": CASES,
    }
    (GOLDEN / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


if __name__ == "__main__":
    main()
