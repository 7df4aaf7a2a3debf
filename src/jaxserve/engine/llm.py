"""`LLM`: the library's face. Works in scripts and inside a running notebook loop alike."""

import queue
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tqdm.auto import tqdm

from jaxserve.attention.custom import CustomAttention
from jaxserve.core.config import ContentFormat, EngineConfig
from jaxserve.core.errors import RequestError, UnsupportedError
from jaxserve.core.event import FinishReason, RequestOutput, TokenEvent, failure_of
from jaxserve.core.lora import Adapter, LoRARequest
from jaxserve.core.pooling import EmbeddingRequestOutput, ScoringRequestOutput
from jaxserve.core.protocols import Scheduler
from jaxserve.core.request import Request, SamplingParams
from jaxserve.engine.abstract_host import Prompt, SloFields
from jaxserve.engine.async_engine import empty_output
from jaxserve.engine.controls import Controls
from jaxserve.engine.encoder_host import EncoderHost, EncoderSource, decoder_host, open_host
from jaxserve.engine.host import EngineHost, close_when_forgotten
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.pooling import (
    PooledText,
    TextPooling,
    Truncation,
    as_prompts,
    as_texts,
    require_task,
)
from jaxserve.engine.scoring import ForwardOutput, Hook, forward, token_logprobs
from jaxserve.engine.source import ModelSource
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.grammar.compiler import PendingGrammar
from jaxserve.models.bert_config import BertConfig
from jaxserve.models.config import ModelConfig

Message = Mapping[str, Any]
"""One chat message: `role`, `content`."""

_TEXTS_AT_ONCE = 1024
"""Texts handed over together; the progress bar moves when all of them are done."""


class LLM(Controls):
    """A model to generate with, to score with, and to look into.

    Args:
        model: A name (`smollm2-135m-instruct`, `org/name`), a path, an `nnx` module of
            `jaxserve.models`, or (configuration, parameters); live parameters are served in
            place, without a copy.
        tokenizer: Used instead of the model's own.
        config: Settings; or give them one by one.
        mesh: Devices; live parameters bring their own.
        scheduler: Used instead of the configured policy.
        attention: How attention differs from the model's own; needs `attention_backend="pallas"`.
        use_tqdm: Whether loading and warm-up show progress bars.
        **settings: Single settings, named as in `EngineConfig`: `dtype`, `max_model_len`,
            `max_num_seqs`, `max_num_batched_tokens`, `gpu_memory_utilization`, `warmup`, ...

    Raises:
        ConfigError: If settings, name, files or parameters are wrong.
        CapacityError: If the cache does not fit into memory.
    """

    def __init__(
        self,
        model: ModelSource | EncoderSource = "smollm2-135m-instruct",
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        mesh: jax.sharding.Mesh | None = None,
        scheduler: Scheduler | None = None,
        attention: CustomAttention | None = None,
        use_tqdm: bool = False,
        **settings: Any,  # noqa: ANN401  checked by EngineConfig
    ) -> None:
        """Load the model; steps are compiled at first use unless `warmup="full"` is given."""
        if config is None:
            settings = {"warmup": "lazy", **settings}
        self._loaded = open_host(
            model,
            tokenizer=tokenizer,
            config=config,
            mesh=mesh,
            scheduler=scheduler,
            attention=attention,
            progress=use_tqdm,
            **settings,
        )
        close_when_forgotten(self, self._loaded.close)

    @property
    def _host(self) -> EngineHost:
        """The engine of a decoder."""
        return decoder_host(self._loaded)

    # Generating --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        slo: SloFields | Sequence[SloFields | None] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: One prompt or many; a prompt is a string, a list of token ids, or a mapping.
            sampling_params: One for all, or one per prompt; the model's defaults if absent.
            use_tqdm: Whether to show a progress bar with tokens per second.
            priority: One for all, or one per prompt.
            slo: Service-level objectives, an `Slo` or a mapping with its fields: one for all, or
                one per prompt. They are judged and counted, see `RequestOutput.slo`.
            lora_request: Low-rank adapters to add to the weights: one for all, or one per prompt
                (None for none). Those that are not in memory are read first.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            RequestError: If a prompt or parameter cannot be served; nothing is run then.
            ConfigError: If an adapter is damaged, missing, or does not fit; nothing is run then.
            EngineDeadError: If the engine failed.
        """
        require_task(self._loaded.tasks, "generate")
        listed = as_prompts(prompts)
        params = _spread(sampling_params, len(listed), "sampling_params")
        priorities = _spread(priority, len(listed), "priority")
        objectives = _spread(slo, len(listed), "slo")
        loras = _spread(lora_request, len(listed), "lora_request")
        requests = [
            self._host.make_request(
                prompt, param, priority=rank or 0, slo=wanted, lora_request=lora
            )
            for prompt, param, rank, wanted, lora in zip(
                listed, params, priorities, objectives, loras, strict=True
            )
        ]
        grammars = self._compile_grammars(requests)
        outputs = self._run(requests, use_tqdm=use_tqdm)
        del grammars  # held until here, so that however many there are, none is compiled twice
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template_content_format: ContentFormat = "auto",
        slo: SloFields | Sequence[SloFields | None] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations; the template is applied as the server does.

        Args:
            messages: One conversation or many.
            sampling_params: One for all, or one per conversation.
            use_tqdm: Whether to show a progress bar.
            chat_template: Used instead of the model's.
            add_generation_prompt: Whether to open the assistant's turn.
            continue_final_message: Whether to go on with the last message instead.
            tools: Descriptions of tools; described in the system message where the template knows
                none.
            chat_template_kwargs: Further variables of the template.
            chat_template_content_format: Whether content reaches the template as a string or as a
                list of parts (openai); auto looks at the template.
            slo: Service-level objectives: one for all, or one per conversation.
            lora_request: Low-rank adapters: one for all, or one per conversation.

        Returns:
            One output per conversation.

        Raises:
            RequestError: If there is no template, or it refuses the messages.
        """
        require_task(self._loaded.tasks, "generate")
        tokenizer = self.get_tokenizer()
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        many = cast(Sequence[Sequence[Message]], [messages] if is_one else messages)
        prompts: list[Prompt] = []
        prompts += [
            tokenizer.encode_chat(
                list(conversation),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=chat_template,
                kwargs=chat_template_kwargs,
                content_format=chat_template_content_format,
            )
            for conversation in many
        ]
        return self.generate(
            prompts, sampling_params, use_tqdm=use_tqdm, slo=slo, lora_request=lora_request
        )

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        slo: SloFields | None = None,
        lora_request: LoRARequest | None = None,
    ) -> Iterator[TokenEvent]:
        """Complete one prompt, yielding tokens and text as they come.

        Args:
            prompt: A string, token ids, or a mapping.
            sampling_params: Parameters; the model's defaults if absent.
            slo: Service-level objectives; judged in the metrics of the last event.
            lora_request: Low-rank adapter to add to the weights.

        Yields:
            Events; their texts, joined, are the completion. Leaving the loop early aborts it.

        Raises:
            RequestError: If it can never be served.
            EngineDeadError: If the engine failed.
        """
        require_task(self._loaded.tasks, "generate")
        request = self._host.make_request(
            prompt, sampling_params, slo=slo, lora_request=lora_request
        )
        self._compile_grammars([request])
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self._host.thread.submit(request, events.put)
        num_open = request.sampling.n
        try:
            while num_open:
                event = events.get()
                num_open -= event.finish_reason is not None
                _raise_on_error(event)
                yield event
        finally:
            if num_open:
                self._host.thread.cancel(request.request_id)

    def _compile_grammars(self, requests: Sequence[Request]) -> list[PendingGrammar | None]:
        """Wait until every grammar is ready, so that a wrong one is an error of the call."""
        pending = [self._host.begin_grammar(request) for request in requests]
        for grammar in pending:
            if grammar is not None:
                grammar.wait()
        return pending

    def _run(self, requests: Sequence[Request], *, use_tqdm: bool) -> list[RequestOutput]:
        """Submit, wait, collect. Outputs grow on the engine's thread; only ends wake this one."""
        outputs: dict[str, RequestOutput] = {
            request.request_id: empty_output(request) for request in requests
        }
        ends: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()

        def sink(event: TokenEvent) -> None:
            if event.finish_reason is not FinishReason.ERROR:
                outputs[event.request_id].apply(event)
            if event.finish_reason is not None:
                ends.put(event)

        num_open = 0
        try:
            for request in requests:
                self._host.thread.submit(request, sink)
                num_open += request.sampling.n
            with tqdm(total=num_open, desc="Generating", unit="seq", disable=not use_tqdm) as bar:
                while num_open:
                    event = ends.get()
                    num_open -= 1
                    if event.rejection is None:  # one that is declined leaves the others alone
                        _raise_on_error(event)
                    bar.update()
                    _show_rate(bar, outputs)
        except BaseException:
            # Also KeyboardInterrupt: the engine goes on, free of what nobody waits for.
            for request in requests:
                self._host.thread.cancel(request.request_id)
            raise
        return [outputs[request.request_id] for request in requests]

    # Embedding and scoring -----------------------------------------------------------------------

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Turn texts into vectors: pooled states of an encoder, or of the decoder being served.

        Args:
            prompts: One prompt or many; a prompt is a string, a list of token ids, or a mapping.
            use_tqdm: Whether to show a progress bar.
            truncate_prompt_tokens: Longer texts are cut to so many tokens; -1 to as many as the
                model takes; None refuses texts that are too long.
            dimensions: Length to cut vectors to, for models made for that.
            normalize: Whether to bring vectors to length 1; None does as the model's files say.
            lora_request: Low-rank adapter to add to a decoder's weights.

        Returns:
            One output per prompt, in the order of the prompts; `.outputs.embedding` is the vector.

        Raises:
            RequestError: If a prompt cannot be served; nothing is run then.
            EngineDeadError: If the engine failed.
        """
        pooling = self._pooling()
        pooling.check_embeds()
        pooling.check_dimensions(dimensions)
        texts = pooling.read(as_prompts(prompts), Truncation(limit=truncate_prompt_tokens))
        adapter = self._loaded.get_adapter(lora_request)
        vectors = self._pool(pooling, texts, "Embedding", adapter, use_tqdm=use_tqdm)
        return pooling.embeddings(texts, vectors, dimensions=dimensions, normalize=normalize)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[ScoringRequestOutput]:
        """Say how well texts go together: by a cross-encoder's head, else the cosine of vectors.

        Args:
            data_1: One text, or as many as `data_2`.
            data_2: The texts that it is, or they are, compared with.
            use_tqdm: Whether to show a progress bar.
            truncate_prompt_tokens: As for `embed`; a cross-encoder cuts the longer text of a pair.
            lora_request: Low-rank adapter to add to a decoder's weights.

        Returns:
            One output per text of `data_2`; `.outputs.score` is the score.

        Raises:
            RequestError: If a text cannot be served; nothing is run then.
            EngineDeadError: If the engine failed.
        """
        pooling = self._pooling()
        pooling.check_scores()
        first, second = as_texts(data_1), as_texts(data_2)
        texts = pooling.read_scored(first, second, Truncation(limit=truncate_prompt_tokens))
        adapter = self._loaded.get_adapter(lora_request)
        vectors = self._pool(pooling, texts, "Scoring", adapter, use_tqdm=use_tqdm)
        return pooling.scores(first, second, texts, vectors)

    def _pooling(self) -> TextPooling:
        require_task(self._loaded.tasks, "pooling")
        return self._loaded.pooling

    def _pool(
        self,
        pooling: TextPooling,
        texts: Sequence[PooledText],
        verb: str,
        adapter: Adapter | None,
        *,
        use_tqdm: bool,
    ) -> list[np.ndarray]:
        futures = [
            pooling.pooler.submit(texts[start : start + _TEXTS_AT_ONCE], adapter=adapter)
            for start in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
        vectors: list[np.ndarray] = []
        try:
            with tqdm(total=len(texts), desc=verb, unit="text", disable=not use_tqdm) as bar:
                for future in futures:
                    vectors += future.result()
                    bar.update(len(vectors) - bar.n)
        except BaseException:
            # Also KeyboardInterrupt: the engine goes on, free of what nobody waits for.
            for future in futures:
                future.cancel()
            raise
        return vectors

    # Looking inside ----------------------------------------------------------------------------

    @property
    def params(self) -> nnx.State:
        """The weights being served, by reference.

        Raises:
            RequestError: While they are asleep.
        """
        if isinstance(self._loaded, EncoderHost):
            return self._loaded.runner.params
        return self._loaded.engine.runner.params

    def logprobs(
        self,
        params: nnx.State,
        tokens: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time"]:
        """Score tokens: a pure function, safe under `jit`, `grad` and `vmap`.

        Args:
            params: Weights, such as `llm.params`. Where quantised weights are served, plain ones
                are taken too, and gradients want them: see `jaxserve.dequantize`.
            tokens: Token ids, padded on the right.
            mask: False entries score 0.

        Returns:
            Log-probability of each token given those before it; 0 for the first. Agrees with
            what sampling reports.

        Raises:
            UnsupportedError: If attention is not the model's own.
        """
        self._check_plain("logprobs")
        return token_logprobs(self._host.graph_for(params), params, tokens, mask)

    def forward(
        self,
        tokens: Int[Array, "batch time"],
        *,
        params: nnx.State | None = None,
        return_hidden: Sequence[int | str] = (),
        hooks: Mapping[str, Hook] | None = None,
    ) -> ForwardOutput:
        """Run the model once, without a cache: a pure function of tokens and weights.

        Args:
            tokens: Token ids, padded on the right.
            params: Weights; those being served if absent.
            return_hidden: Which states to return: 0 or `embed_tokens`, i or `layers.{i-1}` for
                the output of the i-th layer, -1 or `norm` for the final normed states.
            hooks: Name -> function of a state that returns its replacement; traced.

        Returns:
            Logits, and the states asked for.

        Raises:
            RequestError: If a name is unknown.
            UnsupportedError: If attention is not the model's own.
        """
        self._check_plain("forward")
        weights = self.params if params is None else params
        return forward(
            self._host.graph_for(weights),
            weights,
            tokens,
            return_hidden=return_hidden,
            hooks=hooks or {},
        )

    def _check_plain(self, name: str) -> None:
        if self._host.has_custom_attention:
            raise UnsupportedError(
                f"{name}() knows the model's own attention only, and this engine has another; ask "
                "generate() for logprobs or prompt_logprobs, or leave attention out."
            )

    # Odds and ends -----------------------------------------------------------------------------

    @property
    def model_config(self) -> ModelConfig | BertConfig:
        """The model's shape."""
        return self._loaded.model_config

    @property
    def config(self) -> EngineConfig:
        """Settings with every "auto" resolved."""
        return self._loaded.config

    @property
    def metrics(self) -> EngineMetrics:
        """Counters of the engine."""
        return self._loaded.metrics

    @property
    def host(self) -> EngineHost:
        """The engine underneath, for tests and measurements."""
        return self._host

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            RequestError: If the model has none.
        """
        if self._loaded.tokenizer is None:
            raise RequestError("this model has no tokenizer; pass tokenizer= to LLM.")
        return self._loaded.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of a call that gives none."""
        return self._host.default_params()

    def close(self) -> None:
        """Stop the engine and free the cache; live parameters stay untouched."""
        self._loaded.close()

    def __enter__(self) -> Self:
        """Return the engine itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _spread[T](value: T | Sequence[T] | None, count: int, name: str) -> list[T | None]:
    if isinstance(value, Sequence):
        if len(value) != count:
            raise RequestError(
                f"{count} prompts need {count} {name}, got {len(value)}.", param=name
            )
        return list(value)
    return [value] * count


def _raise_on_error(event: TokenEvent) -> None:
    failure = failure_of(event)
    if failure is not None:
        raise failure


def _show_rate(bar: "tqdm[Any]", outputs: Mapping[str, RequestOutput]) -> None:
    if bar.disable:
        return
    elapsed = bar.format_dict["elapsed"] or 1e-9
    count = sum(len(o.token_ids) for output in outputs.values() for o in output.outputs)
    bar.set_postfix_str(f"{count / elapsed:.1f} tok/s", refresh=False)
