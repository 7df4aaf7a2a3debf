"""transformers on a GPU: random weights of a given shape, static cache, compiled decode step.

`generate` with a static cache compiles the step by itself; the time of each token is read where
`generate` looks whether to stop, which waits for the device.
"""

import argparse
import itertools
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peers import protocol


class _Stamps(transformers.StoppingCriteria):
    """Notes the instant of every token; never stops."""

    def __init__(self) -> None:
        """Start without any."""
        self.instants: list[float] = []

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,  # noqa: ARG002  the form of the base class
        **kwargs: object,  # noqa: ARG002
    ) -> torch.Tensor:
        """Note one token."""
        input_ids[0, -1].item()
        self.instants.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class TransformersGpuPeer:
    """Greedy `generate` of one batch of equal lengths."""

    def load(self, *, config_dir: str, dtype: str, device: str = "cuda") -> dict[str, Any]:
        """Draw weights.

        Args:
            config_dir: Folder with config.json.
            dtype: Precision.
            device: Where it runs.
        """
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(Path(config_dir))
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            )
        self._model, self._device = model.eval(), device
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return {
            "name": "transformers",
            "versions": {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "settings": {"dtype": dtype, "cache": "static", "attention": "sdpa", "compiled": True},
        }

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Time one prompt from its ids to its first token."""
        started = time.perf_counter()
        ids = torch.tensor([prompt], device=self._device)
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1).item()
        return {"seconds": time.perf_counter() - started, "token": token}

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Time decode steps; those before the third, which compile the first time, are left out."""
        ids = torch.tensor(prompts, device=self._device)
        stamps = _Stamps()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps + 3,
            do_sample=False,
            cache_implementation="static",
            stopping_criteria=transformers.StoppingCriteriaList([stamps]),
        )
        at = stamps.instants[2:]
        seconds = [after - before for before, after in itertools.pairwise(at)]
        return protocol.decode_result(seconds, len(prompts))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    protocol.serve(TransformersGpuPeer())
