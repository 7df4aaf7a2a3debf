"""Say what transformers makes of a directory: its weights, its logits, its tokenizer.

Run in the oracle environment (torch and transformers; jaxserve is not imported):

    python tests/oracles/load_export.py DIR CASES.json OUT.json

CASES holds `sequences` (lists of token ids), and optionally `texts` and `chats`. OUT gets the
logits of every sequence, `num_new` greedy tokens after each, the ids of every text, the ids and
texts of every chat, and the dtype that the directory asks for.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    """Load, compute, write."""
    folder, cases_file, out_file = sys.argv[1:]
    cases = json.loads(Path(cases_file).read_text(encoding="utf-8"))
    asked = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    found = {
        "dtype": str(asked).removeprefix("torch."),
        "problems": sorted(
            str(name)
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for name in info[kind]
        ),
        "eos_token_id": model.generation_config.eos_token_id,
        "logits": [],
        "greedy": [],
        "ids": [],
        "chats": [],
    }
    with torch.no_grad():
        for tokens in cases["sequences"]:
            ids = torch.tensor([tokens])
            found["logits"].append(model(ids).logits[0].tolist() if cases["with_logits"] else [])
            if cases["num_new"]:
                out = model.generate(ids, max_new_tokens=cases["num_new"], do_sample=False)
                found["greedy"].append(out[0, len(tokens) :].tolist())
    if "texts" in cases:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        found["ids"] = [tokenizer(text)["input_ids"] for text in cases["texts"]]
        for chat in cases["chats"]:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            found["chats"].append([text, ids])
    Path(out_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
