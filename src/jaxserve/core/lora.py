"""Words for low-rank adapters: `LoRARequest` names one, `Adapter` is one that has been read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxserve.core.errors import RequestError

MAX_NAME_LEN = 256
_LARGEST_ID = 2**31


@dataclass(frozen=True, slots=True, kw_only=False)
class LoRARequest:
    """A low-rank adapter, as requests and the calls of `LLM` name it.

    An adapter is read when it is first named, and kept for later. Two requests mean the same
    adapter if they have the same `lora_int_id`.

    Attributes:
        lora_name: What it is called; servers serve it under this name.
        lora_int_id: Its number, from 1 on; no two adapters share one.
        lora_path: Folder in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.
        base_model_name: Model that it was trained on, for listings.
        load_inplace: Whether to read it anew and put it in the place of the adapter of the same
            name and number.
        lora_tensors: Its weights, instead of a folder: arrays by PEFT's names, such as
            `model.layers.0.self_attn.q_proj.lora_A.weight` `[rank, in]`, with or without
            `base_model.model.` in front.
        peft_config: The contents of `adapter_config.json` that belong to `lora_tensors`.

    Raises:
        RequestError: If a field is impossible; names it.

    Source: vLLM `LoRARequest` (names); verl (`lora_tensors`, `peft_config`).
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = field(default=None, kw_only=True)
    load_inplace: bool = field(default=False, kw_only=True, compare=False)
    lora_tensors: Mapping[str, Any] | None = field(
        default=None, kw_only=True, compare=False, repr=False
    )
    peft_config: Mapping[str, Any] | None = field(
        default=None, kw_only=True, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Check every field."""
        name, number = self.lora_name, self.lora_int_id
        is_text = isinstance(name, str) and name.isprintable()  # it becomes a label of a metric
        if not is_text or not 0 < len(name) <= MAX_NAME_LEN:
            raise RequestError(
                f"lora_name must be a text of 1 to {MAX_NAME_LEN} printable characters, got "
                f"{str(name)[:40]!r}.",
                param="lora_name",
            )
        is_number = isinstance(number, int) and not isinstance(number, bool)
        if not is_number or not 0 < number < _LARGEST_ID:
            raise RequestError(
                f"lora_int_id must be a whole number from 1 on, got {str(number)[:40]}.",
                param="lora_int_id",
            )
        object.__setattr__(self, "lora_path", str(self.lora_path))
        if bool(self.lora_path) == (self.lora_tensors is not None):
            raise RequestError(
                f"adapter {name!r} needs either lora_path or lora_tensors, got "
                f"{'both' if self.lora_path else 'neither'}.",
                param="lora_path",
            )
        if (self.lora_tensors is None) != (self.peft_config is None):
            raise RequestError(
                f"adapter {name!r}: lora_tensors and peft_config go together; give both or none.",
                param="peft_config",
            )


class Adapter(Protocol):
    """An adapter whose weights have been read.

    Attributes:
        lora_request: What was asked for.
        key: Digest of its name and content; adapters of different keys share nothing.
    """

    @property
    def lora_request(self) -> LoRARequest:
        """What was asked for."""
        ...

    @property
    def key(self) -> str:
        """Digest of its name and content."""
        ...
