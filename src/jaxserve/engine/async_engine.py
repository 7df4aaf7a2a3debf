"""`AsyncLLM`: the asynchronous face, on which the server stands."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import jax

from jaxserve.attention.custom import CustomAttention
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import RequestError
from jaxserve.core.event import CompletionOutput, RequestOutput, TokenEvent, failure_of
from jaxserve.core.lora import Adapter, LoRARequest
from jaxserve.core.pooling import EmbeddingRequestOutput, ScoringRequestOutput
from jaxserve.core.protocols import Scheduler
from jaxserve.core.request import Request, SamplingParams
from jaxserve.core.view import ReplicaStatus
from jaxserve.engine.abstract_host import AbstractHost, Prompt, SloFields
from jaxserve.engine.constraints import check_resumed
from jaxserve.engine.controls import AsyncControls
from jaxserve.engine.encoder_host import EncoderHost, EncoderSource, open_host
from jaxserve.engine.host import Progress, close_when_forgotten
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.pooling import (
    KEEP_WHOLE,
    TextPooling,
    Truncation,
    as_prompts,
    as_texts,
    cannot,
    require_task,
)
from jaxserve.engine.source import ModelSource
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.bert_config import BertConfig
from jaxserve.models.config import ModelConfig


class _Mailbox:
    """Carries events from the engine's thread to one event loop, one wake-up per batch."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._letters: list[tuple[asyncio.Queue[TokenEvent], TokenEvent]] = []

    def post(self, queue: "asyncio.Queue[TokenEvent]", event: TokenEvent) -> None:
        """Deliver one event; from any thread."""
        with self._lock:
            self._letters.append((queue, event))
            if len(self._letters) > 1:
                return  # a delivery is on its way already
        with contextlib.suppress(RuntimeError):  # a closed loop: nobody is left to read
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            letters, self._letters = self._letters, []
        for queue, event in letters:
            queue.put_nowait(event)


class AsyncLLM(AsyncControls):
    """A model behind asyncio.

    Args:
        model: Name, path, module, or (configuration, parameters).
        tokenizer: Used instead of the model's own.
        config: Settings; or give them one by one.
        mesh: Devices.
        scheduler: Used instead of the configured policy.
        attention: How attention differs from the model's own; needs `attention_backend="pallas"`.
        progress: Whether to show progress bars on stderr.
        on_warm_up: Told about the progress of compilation.
        **settings: Single settings, named as in `EngineConfig`.

    Raises:
        ConfigError: If settings, name, files or parameters are wrong.
        CapacityError: If the cache does not fit into memory.
    """

    def __init__(
        self,
        model: ModelSource | EncoderSource,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        mesh: jax.sharding.Mesh | None = None,
        scheduler: Scheduler | None = None,
        attention: CustomAttention | None = None,
        progress: bool = False,
        on_warm_up: Progress | None = None,
        **settings: Any,  # noqa: ANN401  checked by EngineConfig
    ) -> None:
        """Load, warm up, start the engine's thread."""
        loaded = open_host(
            model,
            tokenizer=tokenizer,
            config=config,
            mesh=mesh,
            scheduler=scheduler,
            attention=attention,
            progress=progress,
            on_warm_up=on_warm_up,
            **settings,
        )
        self._begin(loaded)

    @classmethod
    def over(cls, host: AbstractHost) -> "AsyncLLM":
        """Return the face of a decoder that serves already, such as a fleet.

        Args:
            host: Closed with the face.
        """
        face = cls.__new__(cls)
        face._begin(host)  # noqa: SLF001  its own class
        return face

    def _begin(self, loaded: AbstractHost | EncoderHost) -> None:
        self._loaded = loaded
        close_when_forgotten(self, loaded.close)
        self._mailboxes: dict[asyncio.AbstractEventLoop, _Mailbox] = {}
        self.is_ready = True

    @property
    def _host(self) -> AbstractHost:
        """What serves a decoder."""
        if isinstance(self._loaded, EncoderHost):
            raise cannot("generate")
        return self._loaded

    @property
    def tasks(self) -> frozenset[str]:
        """What the model is used for: `generate`, `pooling`, or both."""
        return self._loaded.tasks

    def require(self, task: str) -> None:
        """Check that the model is used for a task, `generate` or `pooling`.

        Raises:
            RequestError: If it is not.
        """
        require_task(self.tasks, task)

    @property
    def pooling(self) -> TextPooling:
        """What embeds and scores.

        Raises:
            RequestError: If the model is used for generation only.
        """
        require_task(self.tasks, "pooling")
        return self._loaded.pooling

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncation: Truncation = KEEP_WHOLE,
        add_special_tokens: bool = True,
        priority: int = 0,
        lora_request: LoRARequest | Adapter | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Embed texts; see `LLM.embed`. Cancelling drops what has not been started.

        Args:
            prompts: One prompt or many.
            dimensions: Length to cut vectors to.
            normalize: Whether to bring them to length 1; None does as the model's files say.
            truncation: What happens to texts that are too long.
            add_special_tokens: Add what the model expects around a text.
            priority: Lower is served first, under the `priority` policy.
            lora_request: Low-rank adapter to add to a decoder's weights.

        Raises:
            RequestError: If a prompt cannot be served.
            CapacityError: If too many requests are under way.
            EngineDeadError: If the engine has stopped or failed at this request.
        """
        pooling = self.pooling
        pooling.check_embeds()
        pooling.check_dimensions(dimensions)
        texts = await asyncio.to_thread(
            pooling.read, as_prompts(prompts), truncation, add_special_tokens=add_special_tokens
        )
        adapter = await self.get_adapter(lora_request)
        vectors = await asyncio.wrap_future(
            pooling.pooler.submit(texts, priority=priority, adapter=adapter)
        )
        return pooling.embeddings(texts, vectors, dimensions=dimensions, normalize=normalize)

    async def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        truncation: Truncation = KEEP_WHOLE,
        priority: int = 0,
        lora_request: LoRARequest | Adapter | None = None,
    ) -> list[ScoringRequestOutput]:
        """Score pairs of texts; see `LLM.score`. Cancelling drops what has not been started.

        Args:
            data_1: One text, or as many as `data_2`.
            data_2: The texts to compare with.
            truncation: What happens to texts that are too long.
            priority: Lower is served first, under the `priority` policy.
            lora_request: Low-rank adapter to add to a decoder's weights.

        Raises:
            RequestError: If a text cannot be served.
            CapacityError: If too many requests are under way.
            EngineDeadError: If the engine has stopped or failed at this request.
        """
        pooling = self.pooling
        pooling.check_scores()
        first, second = as_texts(data_1), as_texts(data_2)
        texts = await asyncio.to_thread(pooling.read_scored, first, second, truncation)
        adapter = await self.get_adapter(lora_request)
        vectors = await asyncio.wrap_future(
            pooling.pooler.submit(texts, priority=priority, adapter=adapter)
        )
        return pooling.scores(first, second, texts, vectors)

    @property
    def model_name(self) -> str:
        """What the model is called."""
        return self._loaded.name

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if there is one."""
        return self._loaded.tokenizer

    @property
    def model_config(self) -> ModelConfig | BertConfig:
        """The model's shape."""
        return self._loaded.model_config

    @property
    def config(self) -> EngineConfig:
        """Settings with every "auto" resolved."""
        return self._loaded.config

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._loaded.max_model_len

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding."""
        return self._loaded.model_config.vocab_size

    @property
    def metrics(self) -> EngineMetrics:
        """Counters of the engine."""
        return self._loaded.metrics

    @property
    def default_sampling(self) -> dict[str, Any]:
        """Sampling defaults of the model, as keyword arguments of `SamplingParams`."""
        return dict(self._loaded.default_sampling)

    @property
    def num_unfinished(self) -> int:
        """Completions under way."""
        return self._loaded.num_unfinished

    @property
    def num_free_pages(self) -> int:
        """Pages of the key-value cache that nobody holds."""
        return self._host.num_free_pages

    @property
    def host(self) -> AbstractHost:
        """What serves underneath."""
        return self._host

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
        """Turn a prompt into a request; see `AbstractHost.make_request`."""
        self.require("generate")
        return self._host.make_request(
            prompt, sampling, request_id=request_id, priority=priority, cache_salt=cache_salt,
            output_token_ids=output_token_ids,
            slo=slo, lora_request=lora_request,
        )  # fmt: skip

    async def get_adapter(self, lora_request: LoRARequest | Adapter | None) -> Adapter | None:
        """Return an adapter with its weights, reading them on another thread if need be.

        Raises:
            RequestError: If adapters are switched off, or name and number are those of others.
            ConfigError: If it is damaged, missing, or does not fit the model.
        """
        if lora_request is None:
            return None
        return await asyncio.to_thread(self._loaded.get_adapter, lora_request)

    @property
    def lora_requests(self) -> list[LoRARequest]:
        """The adapters that requests may use, in the order in which they came."""
        return [] if isinstance(self._loaded, EncoderHost) else self._host.adapters.requests()

    async def events(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Submit a request and yield its events; closing the generator early aborts it.

        Raises:
            RequestError: If it can never be served.
            CapacityError: If too many completions are under way.
            EngineDeadError: If the engine has stopped.
        """
        queue = self.submit(request)
        try:
            await self.grammar_ready(request)
        except RequestError:
            self._host.thread.cancel(request.request_id)
            raise
        # Closed with this generator, not when the loop gets round to it.
        async with contextlib.aclosing(self.follow(request, queue)) as events:
            async for event in events:
                yield event

    def submit(self, request: Request) -> "asyncio.Queue[TokenEvent]":
        """Submit a request from within an event loop; `follow` then yields its events.

        Raises:
            RequestError: If it can never be served.
            CapacityError: If too many completions are under way.
            EngineDeadError: If the engine has stopped.
        """
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            for old in [known for known in self._mailboxes if known.is_closed()]:
                del self._mailboxes[old]
            mailbox = self._mailboxes[loop] = _Mailbox(loop)
        queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._host.thread.submit(request, lambda event: mailbox.post(queue, event))
        return queue

    async def grammar_ready(self, request: Request) -> None:
        """Wait until the grammar of a request has been compiled; at once if its text is free.

        Submit the request first: it then waits in its place, and holds nothing meanwhile.

        Raises:
            RequestError: If the grammar does not compile, or not in time, or does not allow the
                output of an earlier run.
        """
        grammar = self._host.begin_grammar(request)
        if grammar is None:
            return
        if grammar.poll() is None:
            await asyncio.to_thread(grammar.wait)
        matcher = grammar.poll()
        if request.output_token_ids and matcher is not None:
            await asyncio.to_thread(check_resumed, request, matcher)

    async def follow(
        self, request: Request, queue: "asyncio.Queue[TokenEvent]"
    ) -> AsyncGenerator[TokenEvent]:
        """Yield the events of a submitted request; closing the generator early aborts it."""
        num_open = request.sampling.n
        try:
            while num_open:
                event = await queue.get()
                if event.finish_reason is not None:
                    num_open -= 1
                yield event
        finally:
            if num_open:
                self._host.thread.cancel(request.request_id)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        output_token_ids: Sequence[int] = (),
        slo: SloFields | None = None,
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Yield the growing output of one prompt; the last item is finished.

        Args:
            prompt: Text, token ids, or a mapping.
            sampling_params: Parameters; the model's defaults if absent.
            request_id: Unique among unfinished requests.
            priority: Lower is served first, under the `priority` policy.
            cache_salt: Prefixes are shared only within one salt.
            output_token_ids: Output of an interrupted run of this request, behind which the
                completion goes on; the outputs hold only what is new.
            slo: How soon its tokens are wanted: an `Slo`, or a mapping with its fields.
            lora_request: Low-rank adapter to add to the weights.

        Raises:
            RequestError: If it can never be served.
            CapacityError: If too many completions are under way.
            EngineDeadError: If the engine has stopped or failed at this request.
        """
        adapter = await self.get_adapter(lora_request)
        request = self.make_request(
            prompt, sampling_params, request_id=request_id, priority=priority,
            cache_salt=cache_salt, output_token_ids=output_token_ids, slo=slo,
            lora_request=adapter,
        )  # fmt: skip
        output = empty_output(request)
        async with contextlib.aclosing(self.events(request)) as events:
            async for event in events:
                failure = failure_of(event)
                if failure is not None:
                    raise failure
                output.apply(event)
                yield output

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End one or several requests; their completions finish with reason `abort`."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            self._host.thread.cancel(one)

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        """How every replica of a fleet stands; empty for a single engine."""
        return self._loaded.statuses() if isinstance(self._loaded, AbstractHost) else ()

    def check_health(self) -> None:
        """Raise `EngineDeadError` if the engine has stopped."""
        self._loaded.check_health()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is under way.

        Args:
            timeout_s: Longest wait in seconds.

        Returns:
            Whether everything has ended.
        """
        return await asyncio.to_thread(self._loaded.drain, timeout_s)

    def close(self) -> None:
        """Abort what is under way and free the cache."""
        self.is_ready = False
        self._loaded.close()


def empty_output(request: Request) -> RequestOutput:
    """Return the record of a request of which nothing has been generated yet."""
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[CompletionOutput(index=i) for i in range(request.sampling.n)],
        lora_request=None if request.adapter is None else request.adapter.lora_request,
    )
