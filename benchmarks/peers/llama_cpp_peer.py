"""llama.cpp as a peer, through the low-level API of llama_cpp_python.

Runs the F32 or BF16 GGUF written from the same dequantised values (`write_gguf`), with a key-value
cache of the same precision; sequences decode side by side in one `llama_batch`. The figures flatter
it: no scheduler, no detokenizing, no server. (The wheel holds the libraries only, not the
`llama-server` program, and the Python server of that package serves one request at a time.)
"""

import argparse
import ctypes
import os
import platform
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from benchmarks.peers import protocol

MAX_SEQS = 16
CONTEXT_PER_SEQ = 1024
TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "float16": gguf.GGMLQuantizationType.F16,
}
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
}


def write_gguf(source: Path, target: Path, dtype: str) -> None:
    """Write a GGUF file whose matrices are the dequantised ones of `source`.

    Args:
        source: Quantised file.
        target: Written atomically; metadata are copied.
        dtype: "float32" or "bfloat16"; norms stay float32 as llama.cpp wants them.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    skip = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, spec in reader.fields.items():
        if name in skip or name.startswith("GGUF."):
            continue
        kind = spec.types[0]
        sub_type = spec.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, spec.contents(), kind, sub_type)
    writer.add_file_type(FILE_TYPES[dtype])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = TYPES[dtype] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values.astype(np.float32), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)


class LlamaCppPeer:
    """Decode loop over `llama_decode` with up to `MAX_SEQS` sequences."""

    def load(
        self,
        *,
        gguf: str,
        dtype: str,
        cache_dir: str,
        threads: int = 2,
        flash_attention: bool | None = None,
        flash_prefill: bool = True,
        kv_unified: bool = False,
        kv_type: str | None = None,
    ) -> dict[str, Any]:
        """Load the model, writing the unquantised file first where it is missing.

        Args:
            gguf: Path of the quantised file.
            dtype: "float32" or "bfloat16".
            cache_dir: Folder that keeps the written file.
            threads: Threads of ggml.
            flash_attention: Whether decoding uses its fused attention; None: the faster choice.
            flash_prefill: The same for the prefill of one prompt (on is faster).
            kv_unified: Whether all sequences share one cache buffer (slower).
            kv_type: Precision of the cache; None: float32 for float32, else float16 (the faster).
        """
        target = Path(cache_dir) / f"{Path(gguf).name.split('.')[0]}.{dtype}.gguf"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_gguf(Path(gguf), target, dtype)
        llama_cpp.llama_log_set(_ignore_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(target).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load its {dtype} file")
        if flash_attention is None:
            flash_attention = dtype != "float32"  # measured: README.md
        kv_type = kv_type or ("float32" if dtype == "float32" else "float16")
        common = {"threads": threads, "kv_unified": kv_unified, "kv_type": kv_type}
        self._decoder = self._new_context(MAX_SEQS, flash_attention=flash_attention, **common)
        self._prefiller = self._new_context(1, flash_attention=flash_prefill, **common)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)
        return {
            "name": "llama.cpp",
            "versions": {
                "llama_cpp_python": llama_cpp.__version__,
                "python": platform.python_version(),
            },
            "settings": {
                "dtype": dtype,
                "threads": threads,
                "flash_attention": flash_attention,
                "flash_prefill": flash_prefill,
                "kv_unified": kv_unified,
                "kv_type": kv_type,
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
                "system": llama_cpp.llama_print_system_info().decode().strip(),
            },
        }

    def _new_context(
        self,
        max_seqs: int,
        *,
        threads: int,
        flash_attention: bool,
        kv_unified: bool,
        kv_type: str,
    ) -> int:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_seqs * CONTEXT_PER_SEQ
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_seq_max = max_seqs
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = int(TYPES[kv_type])
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.kv_unified = kv_unified
        params.offload_kqv = False
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context with these settings")
        return context

    def _run(self, context: int, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, sequence, wants logits) tuples."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}")

    def _argmax(self, context: int, index: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(pointer, shape=(self._num_vocab,)).argmax())

    def _start(self, context: int, prompts: list[list[int]]) -> list[int]:
        """Prefill from an empty cache; answer with the first tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)  # noqa: FBT003
        first: list[int] = []
        group = max(1, 2048 // len(prompts[0]))
        for begin in range(0, len(prompts), group):
            part = prompts[begin : begin + group]
            rows = [
                (token, position, begin + i, position == len(prompt) - 1)
                for i, prompt in enumerate(part)
                for position, token in enumerate(prompt)
            ]
            self._run(context, rows)
            ends = [i for i, row in enumerate(rows) if row[3]]
            first.extend(self._argmax(context, i) for i in ends)
        return first

    def _next(self, tokens: list[int], position: int) -> list[int]:
        self._run(self._decoder, [(token, position, i, True) for i, token in enumerate(tokens)])
        return [self._argmax(self._decoder, i) for i in range(len(tokens))]

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Time one prompt from its ids to its first token."""
        started = time.perf_counter()
        token = self._start(self._prefiller, [prompt])[0]
        return {"seconds": time.perf_counter() - started, "token": token}

    def decode(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Time decode steps after an untimed prefill."""
        position = len(prompts[0])
        tokens = self._next(self._start(self._decoder, prompts), position)
        seconds, first = [], []
        for _ in range(steps):
            position += 1
            started = time.perf_counter()
            tokens = self._next(tokens, position)
            seconds.append(time.perf_counter() - started)
            first.append(tokens[0])
        return {**protocol.decode_result(seconds, len(prompts)), "tokens": first[:8]}

    def burst(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Serve all prompts as one batch from start to end."""
        started = time.perf_counter()
        tokens = self._start(self._decoder, prompts)
        first = time.perf_counter()
        for step in range(steps - 1):
            tokens = self._next(tokens, len(prompts[0]) + step)
        return protocol.burst_result(started, first, time.perf_counter(), len(prompts), steps)


@llama_cpp.llama_log_callback
def _ignore_log(level: int, text: bytes, user_data: object) -> None:
    """Drop llama.cpp's chatter."""


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    protocol.serve(LlamaCppPeer())
