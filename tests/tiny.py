"""A model of a few kilobytes with random weights and one token per byte, and an engine on it.

`Bench` turns the engine by hand, on the test's own thread, so that every test is repeatable.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from flax import nnx

from jaxserve.attention.custom import CustomAttention
from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.event import FinishReason, RequestOutput, TokenEvent
from jaxserve.core.protocols import Scheduler
from jaxserve.core.request import Request, RequestId, SamplingParams
from jaxserve.engine.async_engine import empty_output
from jaxserve.engine.setup import assemble
from jaxserve.engine.source import ModelSource
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import CausalLM
from jaxserve.models.registry import FAMILIES

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 32, 2, 4, 2, 8, 64
MAX_LEN = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ prefix }}{% endif %}"
)


def write_tiny_model(folder: Path) -> Path:
    """Write config, weights and tokenizer into a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    end = tokenizer.token_to_id("<|im_end|>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "add_bos_token": False})
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": vocab,
                "hidden_size": HIDDEN,
                "intermediate_size": MLP,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KV_HEADS,
                "head_dim": HEAD_DIM,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "max_position_embeddings": MAX_LEN,
                "tie_word_embeddings": False,
                "hidden_act": "silu",
                "eos_token_id": end,
                "torch_dtype": "float32",
            }
        )
    )
    safetensors.numpy.save_file(_weights(vocab), folder / "model.safetensors")
    return folder


def _tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPECIAL])
    return made


def _weights(vocab: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)

    def draw(*shape: int, scale: float = 0.25) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": draw(vocab, HIDDEN, scale=1.0),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": draw(vocab, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            prefix + "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            prefix + "self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.o_proj.weight": draw(HIDDEN, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": draw(MLP, HIDDEN),
            prefix + "mlp.up_proj.weight": draw(MLP, HIDDEN),
            prefix + "mlp.down_proj.weight": draw(HIDDEN, MLP),
        }
    return weights


def tiny_module(dtype: str = "float32", **changes: object) -> CausalLM:
    """Draw a live module with weights large enough that its choices are clear."""
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": MAX_LEN,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "eos_token_id": 299,
            "torch_dtype": dtype,
        }
        | changes
    )
    family = FAMILIES[config.model_type]
    module = family(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(5))
    module.embed_tokens.embedding[...] = module.embed_tokens.embedding[...] * 50
    return module


class Bench:
    """An engine that is turned by hand.

    Args:
        source: The model.
        tokenizer: For text.
        scheduler: Used instead of the configured policy.
        attention: Used instead of the model's own.
        **settings: Settings of the engine; small ones by default.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        tokenizer: Tokenizer | None = None,
        scheduler: Scheduler | None = None,
        attention: CustomAttention | None = None,
        **settings: object,
    ) -> None:
        small = {
            "max_model_len": 512,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "block_size": 8,
            "num_gpu_blocks_override": 256,
        }
        made = assemble(
            source,
            EngineConfig.from_settings(small | settings),
            clock=WallClock(),
            tokenizer=tokenizer,
            scheduler=scheduler,
            attention=attention,
        )
        self.engine = made.engine
        self.graph = made.model.graph
        self.params = made.model.state
        self.outputs: dict[str, RequestOutput] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.metrics = made.engine.metrics
        self.policy = made.policy
        self._count = 0

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        **fields: object,
    ) -> str:
        """Submit a prompt and return the id of its request."""
        self._count += 1
        fields = {"arrival": float(self._count)} | fields
        name = request_id or f"r{self._count}"
        request = Request(
            request_id=RequestId(name),
            prompt_token_ids=tuple(prompt),
            sampling=sampling or SamplingParams(),
            **fields,
        )
        output, events = empty_output(request), []

        def sink(event: TokenEvent) -> None:
            events.append(event)
            output.apply(event)

        self.engine.submit(request, sink)
        self.outputs[name], self.events[name] = output, events
        return name

    def run(self, *, steps: int = 20_000) -> None:
        """Turn the engine until nothing is left to do."""
        for _ in range(steps):
            if not self.engine.has_work:
                return
            self.engine.step()
        raise AssertionError(f"still busy after {steps} steps")

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Complete prompts side by side."""
        names = [self.submit(p, s) for p, s in zip(prompts, sampling, strict=True)]
        self.run()
        return [self.outputs[name] for name in names]

    def complete(self, prompt: Sequence[int], **sampling: object) -> RequestOutput:
        """Complete one prompt by itself."""
        return self.generate([prompt], [SamplingParams(**sampling)])[0]

    def assert_idle(self) -> None:
        """Check that no page, row or place in the queue has been lost."""
        engine = self.engine
        assert engine.num_unfinished == 0
        assert engine.pool.num_free == engine.pool.num_pages
        assert not engine.placement.running
        assert not engine._requests
        assert not engine._sequences
        assert not engine._waiting

    def errors(self, name: str) -> list[str]:
        """Return the messages of failed completions of one request."""
        found = [e for e in self.events[name] if e.finish_reason is FinishReason.ERROR]
        return [event.error or "" for event in found]


def pointers(tree: object) -> list[int]:
    """Say where the arrays of a tree lie in memory."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]
