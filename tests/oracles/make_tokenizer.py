"""Write golden token ids, texts and rendered chats of outside tokenizers.

Run in the oracle environment (transformers; sentencepiece and llama_cpp_python where they are):

    python tests/oracles/make_tokenizer.py [--model FILE.gguf]
    python tests/oracles/make_tokenizer.py --compare TEXTS.json OUT.json   # ids of given texts

* `golden/tokenizer_smollm2.json`: the default model's vocabulary. Ids come from transformers 5.23,
  which builds the tokenizer from the GGUF file but leaves out a step of this one: SmolLM2 takes
  every digit as a word of its own, as the file says (`tokenizer.ggml.pre` is `smollm`). The step is
  put back, and llama.cpp 0.3.36, which has it, must agree on every text.
* `golden/tokenizer_sentencepiece.json`: a small vocabulary trained by sentencepiece 0.2.3 on the
  documentation of Python's standard library, in the form of GGUF metadata, with the ids that
  sentencepiece gives, and for texts with special tokens those that llama.cpp gives.
* `golden/chat_templates.json`: templates that use every extension of chat templates, written for
  these tests, with what transformers renders.

Seeds and versions are in each file.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import json
import pydoc
import random
import sys
import tempfile
from pathlib import Path

import transformers
from tokenizers import pre_tokenizers

GOLDEN = Path(__file__).parent / "golden"
SEED = 20260102
NUM_TEXTS, NUM_SEQUENCES = 150, 80

_WORDS = """
the of and to in Hello world's I'll we've don't CAN'T It's def return import numpy print(f'{x}')
range(10): 3.14159 2024-11-23 1,000,000 ½ ² Ⅷ ٣ naïve café Straße Ωmega Привет мир 你好 世界
日本語 テスト 한국어 العربية עברית हिन्दी ไทย 🙂 👩\u200d👩\u200d👧\u200d👦 🇫🇷 e\u0301 A\u030a ﬁ
ｆｕｌｌ
"""
WORDS = tuple(_WORDS.split())
RANGES = (
    *[(0x20, 0x7E)] * 4, (0xA0, 0x17F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF),
    (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F),
    (0x2190, 0x21FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF),
    (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF), (0x01, 0x1F),
    (0x80, 0x9F),
)  # fmt: skip
SPACES = (" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\xa0", "\u2003", "\u3000", "\x0b")


def random_texts(count: int, seed: int, specials: list[str]) -> list[str]:
    """Return texts of words, odd characters, runs of white space, numbers and special tokens."""
    rng = random.Random(seed)

    def char() -> str:
        return chr(rng.randint(*rng.choice(RANGES)))

    makers = [
        *[lambda: rng.choice(WORDS)] * 7,
        *[lambda: " " + rng.choice(WORDS)] * 3,
        *[char] * 3,
        *[lambda: rng.choice(SPACES) * rng.randint(1, 5)] * 3,
        *[lambda: rng.choice(specials or WORDS)] * 2,
        *[lambda: str(rng.randint(0, 10 ** rng.randint(1, 9)))] * 2,
        lambda: "".join(char() for _ in range(rng.randint(1, 8))),
    ]
    return ["".join(rng.choice(makers)() for _ in range(rng.randint(0, 24))) for _ in range(count)]


def version(distribution: str) -> str | None:
    """Return a package's version, or None where it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(name: str, content: dict) -> None:
    """Write one golden file, a case per line."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list) and not isinstance(value[0], str | int | float):
            lines = ",\n".join(json.dumps(item, ensure_ascii=True) for item in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    path = GOLDEN / name
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def load_smollm2(model: Path) -> transformers.PreTrainedTokenizerBase:
    """Build the default model's tokenizer with transformers, and put its digit rule back."""
    made = transformers.AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return made


def llama_cpp_ids(model: Path, texts: list[str]) -> list[list[int]] | None:
    """Return llama.cpp's ids of some texts, or None where it is missing."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp

    vocabulary = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    return [vocabulary.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def make_smollm2(model: Path) -> None:
    """Write the golden file of the default model."""
    oracle = load_smollm2(model)
    specials = [*oracle.all_special_tokens, "<repo_name>", "<|im_", "im_end|>", "<|im_end|", "<s>"]
    texts = random_texts(NUM_TEXTS, SEED, specials)
    ids = [oracle.encode(text) for text in texts]
    others = llama_cpp_ids(model, texts)
    if others is not None and others != ids:
        differ = [text for text, a, b in zip(texts, ids, others, strict=True) if a != b]
        raise SystemExit(f"llama.cpp disagrees with transformers on {differ}")
    rng = random.Random(SEED + 1)
    sequences = [
        [
            rng.randrange(len(oracle)) if rng.random() < 0.7 else rng.randrange(400)
            for _ in range(rng.randint(0, 24))
        ]
        for _ in range(NUM_SEQUENCES)
    ]
    chats = [
        [{"role": "user", "content": "What is gravity?"}],
        [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "日本語 🙂"}],
        [{"role": "user", "content": text} for text in texts[:3]],
    ]
    write(
        "tokenizer_smollm2.json",
        {
            "meta": {
                "vocabulary": model.name,
                "transformers": transformers.__version__,
                "tokenizers": version("tokenizers"),
                "llama_cpp": version("llama-cpp-python") if others is not None else None,
                "seed": SEED,
            },
            "texts": [list(pair) for pair in zip(texts, ids, strict=True)],
            "sequences": [
                [
                    sequence,
                    oracle.decode(sequence, skip_special_tokens=False),
                    oracle.decode(sequence, skip_special_tokens=True),
                ]
                for sequence in sequences
            ],
            "chats": [
                [
                    chat,
                    text := oracle.apply_chat_template(
                        chat, tokenize=False, add_generation_prompt=True
                    ),
                    oracle.encode(text, add_special_tokens=False),
                ]
                for chat in chats
            ],
        },
    )


CORPUS = ("argparse", "asyncio.tasks", "collections", "datetime", "fractions", "inspect", "json")
CONTROLS = ["<|user|>", "<|end|>"]
USER_DEFINED = ["<tool>", "▁▁▁▁"]


def make_sentencepiece() -> None:
    """Train a small SentencePiece vocabulary and write its golden file."""
    if version("sentencepiece") is None or version("gguf") is None:
        print("sentencepiece or gguf is missing; its golden file stays as it is", file=sys.stderr)
        return
    import sentencepiece

    lines = [
        line
        for name in CORPUS
        for line in pydoc.plain(pydoc.render_doc(importlib.import_module(name))).splitlines()
        if " at 0x" not in line  # addresses, which are others every time
    ]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *(" ".join(WORDS[:30]),) * 20]),
        model_writer=trained,
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=CONTROLS,
        user_defined_symbols=USER_DEFINED,
        num_threads=1,
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    metadata = sentencepiece_metadata(oracle)
    texts = [
        text
        for text in random_texts(NUM_TEXTS - 40, SEED + 2, [])
        # With user-defined pieces, llama.cpp cuts a text in parts and begins each with a space.
        if not any(symbol.replace("\u2581", " ") in f" {text}" for symbol in USER_DEFINED)
    ]
    mixed = random_texts(60, SEED + 3, [*CONTROLS, "<tool>", "    ", "<s>", "<unk>", "<0x41>"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.gguf"
        write_vocabulary(file, metadata)
        others = llama_cpp_ids(file, mixed)
        plain = llama_cpp_ids(file, texts)
    ids = oracle.encode(texts)
    if plain is not None:
        print("sentencepiece and llama.cpp differ:", sum(map(list.__ne__, ids, plain)))
    rng = random.Random(SEED + 4)
    first = oracle.piece_to_id("<0x00>")  # what is before has no text, or not the same everywhere
    sequences = [
        [
            rng.randrange(first, len(oracle)) if rng.random() < 0.5 else first + rng.randrange(256)
            for _ in range(rng.randint(0, 16))
        ]
        for _ in range(NUM_SEQUENCES)
    ]
    write(
        "tokenizer_sentencepiece.json",
        {
            "meta": {
                "sentencepiece": version("sentencepiece"),
                "llama_cpp": version("llama-cpp-python") if others is not None else None,
                "corpus": f"pydoc of {', '.join(CORPUS)}",
                "seed": SEED,
            },
            "metadata": metadata,
            "texts": [list(pair) for pair in zip(texts, ids, strict=True)],
            "mixed": [list(pair) for pair in zip(mixed, others or [], strict=others is not None)],
            "sequences": [[sequence, oracle.decode(sequence)] for sequence in sequences],
        },
    )


def sentencepiece_metadata(oracle: "object") -> dict:
    """Return a SentencePiece vocabulary as GGUF metadata."""
    ids = range(len(oracle))

    def kind(token_id: int) -> int:
        if oracle.is_unknown(token_id):
            return 2
        if oracle.is_control(token_id):
            return 3
        if oracle.is_byte(token_id):
            return 6
        return 4 if oracle.id_to_piece(token_id) in USER_DEFINED else 1

    pieces = [oracle.id_to_piece(token_id) for token_id in ids]
    types = [kind(token_id) for token_id in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            # Converters write user-defined pieces as the text that they match.
            piece.replace("\u2581", " ") if kind == 4 else piece
            for piece, kind in zip(pieces, types, strict=True)
        ],
        "tokenizer.ggml.scores": [oracle.get_score(token_id) for token_id in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": oracle.bos_id(),
        "tokenizer.ggml.eos_token_id": oracle.eos_id(),
        "tokenizer.ggml.unknown_token_id": oracle.unk_id(),
    }


def write_vocabulary(path: Path, metadata: dict) -> None:
    """Write a GGUF file that holds a vocabulary and nothing else."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_scores(metadata["tokenizer.ggml.scores"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_bos_token_id(metadata["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
    writer.add_unk_token_id(metadata["tokenizer.ggml.unknown_token_id"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


TEMPLATES = {
    "plain": (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "blocks": (
        "{{ bos_token }}\n"
        "    {% for message in messages %}\n"
        "  {# a comment #}\n"
        "{{ loop.index0 }}:{{ message.role|upper }}\n"
        "    {%- if loop.last %} last{% endif %}\n"
        "\t{% if message.content is string %}\n"
        "{{ message.content | trim }}\n"
        "    {% endif %}\n"
        "    {% endfor %}\n"
        "end\n"
    ),
    "namespace": (
        "{% set ns = namespace(system='none', users=0) %}"
        "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
        "{% elif m.role == 'user' %}{% set ns.users = ns.users + 1 %}{% endif %}{% endfor %}"
        "{{ ns.system }}/{{ ns.users }}"
    ),
    "loop_controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}|{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
        "{% generation %}{% set kept = m.content %}{{ kept }}{{ eos_token }}{% endgeneration %}"
        "{{ kept }}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    ),
    "tools": (
        "{% if tools %}{{ tools | tojson(indent=2) }}\n{% for tool in tools %}"
        "{{ tool | tojson }}{{ tool.function.parameters | tojson(separators=(',', ':')) }}"
        "{{ tool.function | tojson(sort_keys=True) }}{{ tool | tojson(ensure_ascii=True) }}"
        "{% endfor %}{% else %}no tools{% endif %}{% for m in messages %}{{ m.content }}"
        "{% if m.tool_calls is defined %}{% for call in m.tool_calls %}"
        "{% for name, value in call.function.arguments | items %}{{ name }}={{ value | tojson }};"
        "{% endfor %}{{ call.function | tojson }}{% endfor %}{% endif %}{% endfor %}"
    ),
    "macros": (
        "{% macro turn(role, text, close=true) %}[{{ role }}]{{ text }}"
        "{% if close %}[/{{ role }}]{% endif %}{% endmacro %}"
        "{% for m in messages[:-1] %}{{ turn(m.role, m.content) }}{% endfor %}"
        "{{ turn(messages[-1].role, messages[-1].content.split(' ')[-1], close=false) }}"
        "{{ messages | map(attribute='role') | join(',') }}"
        "{{ (messages | selectattr('role', 'equalto', 'user') | list) | length }}"
    ),
    "variables": (
        "{{ strftime_now('fixed') }} {{ eos_token }} {{ not documents }}"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
        "{{ nothing }}{{ nothing | default('default') }}"
        "{%- set names %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}{{ names }}"
    ),
    "trimmed": (
        "{% for m in messages %}({{ m.role }}) {{ m.content | trim }} #{% endfor %}"
        "{% if add_generation_prompt %}(assistant){% endif %}"
    ),
    "system_first": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% if messages[0]['content'] is string %}{% set before = messages[0]['content'] + '//' %}"
        "{% else %}{% set before = messages[0]['content'][0]['text'] + '//' %}{% endif %}"
        "{% set rest = messages[1:] %}{% else %}{% set before = '' %}{% set rest = messages %}"
        "{% endif %}{% for m in rest %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "<{{ role }}>{{ before if loop.first else '' }}"
        "{% if m['content'] is string %}{{ m['content'] | trim }}"
        "{% elif m['content'] is iterable %}{% for item in m['content'] %}"
        "{% if item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}"
        "{% else %}{{ raise_exception('no content') }}{% endif %}<end>\n{% endfor %}"
        "{{ '<model>\n' if add_generation_prompt }}"
    ),
    "string_methods": (
        "{%- set mode = 'think' if enable_thinking is undefined or enable_thinking else 'plain' -%}"
        "{%- for m in messages -%}{%- set text = m.content -%}"
        "{%- if loop.last -%}{%- elif text.startswith('Hi') -%}"
        "{%- set text = text.replace('Hi', 'Ho').rstrip() -%}"
        "{%- elif 'brief' in text and not text.endswith('.') -%}{%- set text = text[:-2] -%}"
        "{%- elif text | length > 3 -%}{%- set text = text.split(' ')[0].lstrip('W') ~ '!' -%}"
        "{%- endif -%}{{- '<' ~ m.role ~ '/' ~ mode ~ '>' ~ text ~ '\n' -}}{%- endfor -%}"
        "{%- if tools is not none and tools -%}{%- for tool in tools -%}"
        "{{- loop.index ~ '. ' ~ (tool.function | string) ~ '\n' -}}{%- endfor -%}{%- endif -%}"
    ),
    "filtered": (
        "{%- set others = messages | rejectattr('role', 'equalto', 'system') | list -%}"
        "{%- set calls = others | selectattr('tool_calls', 'defined') | list -%}"
        "{%- set users = others | selectattr('role', 'equalto', 'user') | list -%}"
        "{{- bos_token -}}{%- for m in others -%}"
        "{%- if m['role'] == 'user' -%}{%- if tools and m == users[-1] -%}"
        "[TOOLS] {{ tools | map(attribute='function') | list | tojson }}[/TOOLS]{%- endif -%}"
        "[U] {{ m['content'] }}[/U]"
        "{%- elif m.tool_calls is defined and m.tool_calls is not none -%}"
        "[CALLS] [{%- for call in m.tool_calls -%}{{ call.function | tojson }}"
        "{{ ', ' if not loop.last else ']' }}{%- endfor -%}"
        "{%- else -%}{{ ' ' + m['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
        "{{- calls | length -}}"
    ),
    "raises": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate.') }}{% endif %}{{ m.content }}{% endfor %}"
    ),
}
CHATS = [
    [{"role": "user", "content": "Hi & <b>bye</b> ü 🙂"}],
    [
        {"role": "system", "content": " Be brief. \n"},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two words "},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "get", "arguments": {"city": "Zürich", "days": [1, 2]}},
                }
            ],
        },
        {"role": "tool", "content": '{"t": 3}'},
        {"role": "user", "content": "And tomorrow?"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get",
            "description": "Wetter in <Zürich> & 'more'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def make_templates(model: Path) -> None:
    """Write what transformers renders with each template."""
    oracle = load_smollm2(model)
    options = [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "tools": TOOLS, "kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": False, "continue_final_message": True},
    ]
    cases = []
    for name, template in TEMPLATES.items():
        for chat in CHATS:
            for option in options:
                plain = {key: value for key, value in option.items() if key != "kwargs"}
                try:
                    text = oracle.apply_chat_template(
                        chat,
                        chat_template=template,
                        tokenize=False,
                        **plain,
                        **option.get("kwargs", {}),
                    )
                except Exception:  # noqa: BLE001  whatever it is, ours must refuse it too
                    text = None
                cases.append([name, chat, option, text])
    write(
        "chat_templates.json",
        {
            "meta": {"transformers": transformers.__version__, "jinja2": version("jinja2")},
            "variables": {"bos_token": oracle.bos_token, "eos_token": oracle.eos_token},
            "templates": TEMPLATES,
            "cases": cases,
        },
    )


def compare(model: Path, texts: Path, out: Path) -> None:
    """Write the ids that the oracle gives to a list of texts, for the live comparison."""
    oracle = load_smollm2(model)
    ids = [oracle.encode(text) for text in json.loads(texts.read_text(encoding="utf-8"))]
    out.write_text(json.dumps(ids), encoding="utf-8")


def main() -> None:
    """Write every golden file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="the GGUF file; default: fetched or cached")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("TEXTS", "OUT"))
    args = parser.parse_args()
    model = args.model
    if model is None:
        from jaxserve.models.hub import DEFAULT_MODEL, resolve_model

        model = resolve_model(DEFAULT_MODEL)
    if args.compare:
        compare(model, *args.compare)
        return
    make_smollm2(model)
    make_sentencepiece()
    make_templates(model)


if __name__ == "__main__":
    main()
