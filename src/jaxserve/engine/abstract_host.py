"""What faces need of a decoder, whether one engine runs it or several do."""

import abc
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, cast

from jaxserve.core.config import EngineConfig
from jaxserve.core.control import PauseMode, SleepTag, WeightUpdate
from jaxserve.core.errors import RequestError
from jaxserve.core.lora import Adapter, LoRARequest
from jaxserve.core.protocols import Clock
from jaxserve.core.request import Request, RequestId, SamplingParams, Slo, new_request_id
from jaxserve.core.view import ReplicaStatus
from jaxserve.engine.adapters import AdapterStore
from jaxserve.engine.decoder_pooling import DecoderPooler
from jaxserve.engine.inbox import Door
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.pooling import TextPooling
from jaxserve.engine.profiling import Profiler
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.engine.weights import Names, NewWeights
from jaxserve.grammar.compiler import PendingGrammar
from jaxserve.models.config import ModelConfig
from jaxserve.models.peft import LoraAdapter
from jaxserve.models.pooling import read_pooling

Prompt = str | Sequence[int] | Mapping[str, object]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`, and maybe `cache_salt` and
`output_token_ids`."""

SloFields = Slo | Mapping[str, object]
"""Service-level objectives, or a mapping with their names and values."""


class Levers(Protocol):
    """Pauses, sleep and new weights; `Lifecycle` says what each does."""

    @property
    def weight_version(self) -> str:
        """Version of the weights."""
        ...

    @property
    def num_updates(self) -> int:
        """How often the weights have been changed."""
        ...

    @property
    def is_paused(self) -> bool:
        """Whether generation is paused."""
        ...

    @property
    def is_sleeping(self) -> bool:
        """Whether some part is asleep."""
        ...

    @property
    def asleep(self) -> tuple[SleepTag, ...]:
        """The parts that are asleep."""
        ...

    def update(
        self,
        weights: NewWeights,
        *,
        version: str | int | None = None,
        flush_cache: bool = True,
        recompute: bool = False,
        abort_all_requests: bool = False,
        start: float | None = None,
    ) -> Future[WeightUpdate]:
        """Serve other weights from the next step on."""
        ...

    def rename(self, version: str | int, *, abort_all_requests: bool = False) -> Future[None]:
        """Call the weights something else."""
        ...

    def pause(self, mode: PauseMode = "abort", *, clear_cache: bool = True) -> Future[None]:
        """Pause generation."""
        ...

    def resume(self) -> Future[None]:
        """Go on after `pause`."""
        ...

    def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> Future[bool]:
        """Empty the prefix cache."""
        ...

    def sleep(self, level: int = 1, mode: PauseMode = "abort") -> Future[None]:
        """Pause, and give memory back."""
        ...

    def wake_up(self, tags: Iterable[str] | None = None) -> Future[bool]:
        """Undo `sleep`, wholly or in part."""
        ...


class AbstractHost(abc.ABC):
    """A loaded decoder that serves.

    Attributes:
        clock: Where times of arrival come from.
        name: What the model is called.
        tokenizer: Its tokenizer, if it has one.
        model_config: Its shape.
        config: Settings with every "auto" resolved.
        default_sampling: Sampling defaults of the model.
        path: Where it came from; None for live parameters.
        adapters: Low-rank adapters that have been read.
        profiler: Records traces.
    """

    clock: Clock
    name: str
    tokenizer: Tokenizer | None
    model_config: ModelConfig
    config: EngineConfig
    default_sampling: dict[str, Any]
    path: Path | None
    adapters: AdapterStore
    profiler: Profiler

    @property
    @abc.abstractmethod
    def thread(self) -> Door:
        """What takes requests."""

    @property
    @abc.abstractmethod
    def lifecycle(self) -> Levers:
        """Pauses, sleep and new weights."""

    @property
    @abc.abstractmethod
    def metrics(self) -> EngineMetrics:
        """Counters."""

    @property
    @abc.abstractmethod
    def num_unfinished(self) -> int:
        """Completions under way."""

    @property
    @abc.abstractmethod
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""

    @property
    @abc.abstractmethod
    def max_num_seqs(self) -> int:
        """Most sequences running at once."""

    @property
    @abc.abstractmethod
    def num_free_pages(self) -> int:
        """Pages of the key-value cache that nobody holds."""

    @abc.abstractmethod
    def check_health(self) -> None:
        """Raise if nothing can be served.

        Raises:
            EngineDeadError: With the reason.
        """

    @abc.abstractmethod
    def begin_grammar(self, request: Request) -> PendingGrammar | None:
        """Begin to compile the grammar of a request; None if its text is free.

        Raises:
            RequestError: If the constraint is malformed, or none can be served here.
        """

    @abc.abstractmethod
    def prepare_weights(
        self, params: object, names: Names, *, partial: bool, donate: bool
    ) -> NewWeights:
        """Bring weights into the form in which they are served; see `Controls.update_params`."""

    @abc.abstractmethod
    def update_from_disk(
        self,
        model_path: str | Path,
        *,
        version: str | int | None = None,
        flush_cache: bool = True,
        recompute: bool = False,
        abort_all_requests: bool = False,
    ) -> Future[WeightUpdate]:
        """Read a checkpoint of the same model, then serve it; blocks while it is read."""

    @abc.abstractmethod
    def adapter_replaced(self, adapter: LoraAdapter) -> None:
        """Forget what an adapter of the same number has left on the device."""

    @abc.abstractmethod
    def pin_adapter(self, adapter: LoraAdapter) -> None:
        """Bring an adapter onto the device and keep its slot for it.

        Raises:
            RequestError: If no slot would be left for others.
        """

    @abc.abstractmethod
    def unpin_adapter(self, lora_id: int) -> None:
        """Let the slot of a pinned adapter go; harmless if it was not pinned."""

    @abc.abstractmethod
    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; tells whether that was so in time."""

    @abc.abstractmethod
    def close(self) -> None:
        """Abort what is under way and free the cache."""

    def statuses(self) -> Sequence[ReplicaStatus]:
        """Tell how every replica stands; empty for a single engine."""
        return ()

    # Requests ----------------------------------------------------------------------------------

    @property
    def tasks(self) -> frozenset[str]:
        """What the model is used for: `generate`, `pooling`, or both."""
        runner = self.config.pooling.runner
        return frozenset({"generate", "pooling"} if runner == "auto" else {runner})

    @functools.cached_property
    def pooling(self) -> TextPooling:
        """Embeds and scores with the states of the served model.

        Raises:
            ConfigError: If the setting `pooler_config` asks for what a decoder cannot do.
        """
        how = read_pooling(self.path, default="last")
        how = how.with_overrides(self.config.pooling.pooler_config)
        pooler = DecoderPooler(
            self.thread,
            self.clock,
            how,
            model_config=self.model_config,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
        )
        return TextPooling(pooler, self.tokenizer)

    def default_params(self) -> SamplingParams:
        """Return the parameters of a request that gives none: the model's own defaults."""
        return SamplingParams(**self.default_sampling)

    def make_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        output_token_ids: Sequence[int] = (),
        slo: SloFields | None = None,
        lora_request: LoRARequest | Adapter | None = None,
    ) -> Request:
        """Turn a prompt into a request.

        Args:
            prompt: Text, token ids, or a mapping.
            sampling: Parameters; the model's defaults if absent.
            request_id: Unique among unfinished requests; random if absent.
            priority: Lower is served first, under the `priority` policy.
            cache_salt: Prefixes are shared only within one salt.
            output_token_ids: Output of an interrupted run of this request, behind which the
                completion goes on.
            slo: How soon its tokens are wanted: an `Slo`, or a mapping with its fields.
            lora_request: Adapter to add to the weights; read now, if it has not been.

        Raises:
            RequestError: If the prompt is of no known form, or is text and there is no tokenizer,
                or an objective is impossible, or adapters are switched off.
            ConfigError: If the adapter is damaged, missing, or does not fit the model.
        """
        text: str | None = None
        tokens: object = prompt
        if isinstance(prompt, Mapping):
            cache_salt = str(prompt.get("cache_salt") or cache_salt)
            output_token_ids = cast(
                Sequence[int], prompt.get("output_token_ids") or output_token_ids
            )
            text = cast(str | None, prompt.get("prompt"))
            tokens = prompt.get("prompt_token_ids")
            if tokens is None and text is None:
                raise RequestError(
                    "a prompt mapping needs 'prompt' or 'prompt_token_ids', found "
                    f"{sorted(map(str, prompt))}.",
                    param="prompt",
                )
            tokens = text if tokens is None else tokens
        if isinstance(tokens, str):
            text = tokens
            ids = self.encode(tokens)
        else:
            ids = self._check_ids(tokens)
        output = self._check_ids(output_token_ids, "output_token_ids") if output_token_ids else ()
        return Request(
            request_id=RequestId(request_id or new_request_id()),
            prompt_token_ids=tuple(ids),
            sampling=sampling if sampling is not None else self.default_params(),
            prompt=text,
            arrival=self.clock.now(),
            priority=priority,
            cache_salt=cache_salt,
            output_token_ids=tuple(output),
            slo=_as_slo(slo),
            adapter=self.get_adapter(lora_request),
        )

    def get_adapter(self, lora_request: LoRARequest | Adapter | None) -> Adapter | None:
        """Return an adapter with its weights, reading them if they are not in memory.

        Args:
            lora_request: Names it; one that has been got already stays as it is.

        Raises:
            RequestError: If adapters are switched off, or name and number are those of others.
            ConfigError: If it is damaged, missing, or does not fit the model.
        """
        if lora_request is None or isinstance(lora_request, LoraAdapter):
            return lora_request
        return self.adapters.get(cast(LoRARequest, lora_request))

    def _check_ids(self, tokens: object, param: str = "prompt") -> list[int]:
        try:
            # operator.index takes every kind of integer and nothing that would have to be rounded.
            ids = [operator.index(token) for token in cast(Iterable[SupportsIndex], tokens)]
        except TypeError:
            form = "a list of token ids" if param != "prompt" else "a string or a list of token ids"
            raise RequestError(
                f"{param} must be {form}, got {type(tokens).__name__}.", param=param
            ) from None
        return ids

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, with the special tokens that the model puts around text.

        Raises:
            RequestError: If there is no tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer; give token ids, or pass tokenizer=.", param="prompt"
            )
        return self.tokenizer.encode(text)


def _as_slo(slo: SloFields | None) -> Slo | None:
    if slo is None or isinstance(slo, Slo):
        return slo
    if not isinstance(slo, Mapping):
        raise RequestError(
            f"slo must be an Slo or a mapping with its fields, got {type(slo).__name__}.",
            param="slo",
        )
    return Slo.from_mapping(slo)
