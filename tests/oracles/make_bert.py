"""Write tiny random BERT checkpoints of transformers, and what it computes from them.

Run in the oracle environment (torch and transformers; jaxserve is not imported):

    python tests/oracles/make_bert.py                 # tiny cases -> golden/bert/<name>/
    python tests/oracles/make_bert.py --minilm DIR    # all-MiniLM-L6-v2 in DIR -> golden/minilm.npz

Each directory holds a Hugging Face checkpoint and `golden.npz`: token ids, segments and lengths of
a padded batch, the final hidden states and, with a classification head, its outputs; cross-encoders
also have texts, in pairs, with the outputs for them. `minilm.npz` holds texts with their token ids
and normalised mean-pooled vectors, by the recipe of the model's own card.
Everything is float32 on the CPU with eager attention.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "bert"
SEED = 20260301
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LENGTHS = (1, 2, 7, 16, 17, 30, 48)

SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
}
CASES = {
    "plain": ("BertModel", {}),
    "prefixed": ("BertForMaskedLM", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "relu": ("BertModel", {"hidden_act": "relu", "num_attention_heads": 2, "type_vocab_size": 3}),
    "cross": ("BertForSequenceClassification", {"num_labels": 1}),
}
PAIRS = [
    ("a cat sat", "the cat is sitting"),
    ("a cat sat", "rain, rain! go away?"),
    ("don't", "x"),
    ("one two three four five", "six seven"),
]
SENTENCES = [
    "The cat sits outside.",
    "A man is playing guitar",
    "The feline is outdoors!",
    "a",
    "Ünïcödé, naïve café: 日本語 — and emoji 🎉?",
    "E = mc^2; 3.14159 * 2 (approximately) = 6.28318",
    "antidisestablishmentarianism supercalifragilisticexpialidocious",
    "  leading and trailing spaces, and\nnew\tlines  ",
    "def f(x):\n    return x ** 2  # square",
    " ".join(["The quick brown fox jumps over the lazy dog."] * 22),
]


def wordpiece() -> tokenizers.Tokenizer:
    """Make a WordPiece tokenizer of single letters."""
    words = [*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *".,!?'-"]
    vocab = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.add_special_tokens(SPECIAL)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


def write(name: str, number: int) -> None:
    """Write one case."""
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kind, changes = CASES[name]
    config = transformers.BertConfig(**(SMALL | changes), attn_implementation="eager")
    torch.manual_seed(SEED + number)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():  # as large as trained weights, so that mistakes show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer = wordpiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    random = np.random.default_rng(SEED + number)
    tokens = random.integers(5, 63, (len(LENGTHS), max(LENGTHS)))
    place = np.arange(max(LENGTHS))[None]
    lengths = np.asarray(LENGTHS)[:, None]
    segments = ((place >= lengths // 2) & (place < lengths)).astype(np.int64)
    if "Classification" not in kind:
        segments[:] = 0
    inputs = {
        "input_ids": torch.tensor(np.where(place < lengths, tokens, 0)),
        "token_type_ids": torch.tensor(segments),
        "attention_mask": torch.tensor((place < lengths).astype(np.int64)),
    }
    body = getattr(model, "bert", model)
    out = {
        "tokens": inputs["input_ids"].numpy().astype(np.int32),
        "segments": segments.astype(np.int32),
        "lengths": np.asarray(LENGTHS, np.int32),
    }
    with torch.inference_mode():
        hidden = body(**inputs).last_hidden_state
        out["hidden"] = (hidden * inputs["attention_mask"][..., None]).numpy()
        if "Classification" in kind:
            out["logits"] = model(**inputs).logits.numpy()
            fast = transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
            )
            left, right = zip(*PAIRS, strict=True)
            pairs = fast(
                list(left),
                list(right),
                padding=True,
                return_token_type_ids=True,
                return_tensors="pt",
            )
            assert pairs["token_type_ids"].max() == 1
            out["pair_logits"] = model(**pairs).logits.numpy()
            out["pair_texts"] = np.asarray(PAIRS)
    np.savez_compressed(folder / "golden.npz", **out)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: {size / 1000:.0f} kB")


def write_minilm(path: Path) -> None:
    """Embed the sentences with the real model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        vectors = (states * mask).sum(1) / mask.sum(1)
        vectors = torch.nn.functional.normalize(vectors, dim=1)
    np.savez_compressed(
        GOLDEN.parent / "minilm.npz",
        texts=np.asarray(SENTENCES),
        tokens=batch["input_ids"].numpy().astype(np.int32),
        lengths=batch["attention_mask"].sum(1).numpy().astype(np.int32),
        vectors=vectors.numpy(),
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path, metavar="DIR", help="directory of all-MiniLM-L6-v2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.minilm is not None:
        write_minilm(args.minilm)
        return
    for number, name in enumerate(CASES):
        write(name, number)
    meta = {
        "generator": "tests/oracles/make_bert.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "seed": SEED,
        "cases": CASES,
    }
    (GOLDEN / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


if __name__ == "__main__":
    main()
