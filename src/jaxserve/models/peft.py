"""Adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

Everything is checked while it is read: what would be computed differently here is refused by name.
"""

import hashlib
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.core.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedError
from jaxserve.core.lora import LoRARequest
from jaxserve.models.config import ModelConfig
from jaxserve.models.fields import Fields
from jaxserve.models.files import read_json
from jaxserve.models.fused import fused_parts, text_name
from jaxserve.models.hub import resolve_adapter
from jaxserve.models.loading import SafetensorsFiles, some_names
from jaxserve.models.lora import Factors, target_sizes

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_MODULE = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FEED_FORWARD = re.compile(r"\.layers\.\d+\.(mlp|block_sparse_moe)\.")
_ALL_LINEAR = "all-linear"
_OUTSIDE = ("embed_tokens", "lm_head")
_REFUSED = {
    "use_dora": "DoRA scales by norms of the adapted weights",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "lora_bias": "only weights are adapted, no biases",
    "modules_to_save": "whole modules beside the adapter are not served; merge them into the model",
    "trainable_token_indices": "embeddings are not adapted",
    "target_parameters": "only linear layers are adapted",
    "fan_in_fan_out": "no supported model stores its weights like that",
    "layer_replication": "layers are not repeated",
    "alora_invocation_tokens": "an activated LoRA begins in the middle of a prompt",
    "arrow_config": "Arrow chooses among adapters per token",
    "monteclora_config": "MonteCLoRA draws its weights",
    "kasa_config": "KaSA has a factor of its own",
    "velora_config": "VeLoRA changes its inputs",
}
"""Options of PEFT that change what is computed, with the reason why they are refused."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin training that also change the weights of the base model."""
_HARMLESS = frozenset(
    {
        "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "r",
        "inference_mode", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias",
        "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
        "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "peft_version",
        "ensure_weight_tying",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraAdapter:
    """An adapter in host memory.

    Attributes:
        lora_request: What was asked for.
        key: Digest of its name and content.
        rank: Its largest rank.
        layers: Factors of the adapted projections of each layer, by name, in the precision of the
            model.
        base_model: Name of the model that it was trained on, if it says.
    """

    lora_request: LoRARequest
    key: str
    rank: int
    layers: tuple[Mapping[str, Factors], ...]
    base_model: str | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(a.nbytes + b.nbytes for layer in self.layers for a, b in layer.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where tensors come from: a file, or a mapping."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def read_adapter(
    request: LoRARequest, config: ModelConfig, *, dtype: np.dtype, max_rank: int
) -> LoraAdapter:
    """Read an adapter from its folder, or from the arrays that the request brings.

    Args:
        request: What to read.
        config: The model that it is for.
        dtype: Precision of the model.
        max_rank: Largest rank that can be served.

    Raises:
        ModelNotFoundError: If there is no such folder, or a file in it is missing.
        CheckpointError: If a file is damaged, a tensor is missing, extra, of a wrong shape, or
            holds what is no number; names it.
        UnsupportedError: If the adapter is of a kind that would be computed differently here.
        ConfigError: If its rank is too large.
    """
    if request.lora_tensors is not None:
        where = f"adapter {request.lora_name!r}"
        tensors = {str(name): _as_array(v, name, where) for name, v in request.lora_tensors.items()}
        source = _Source(
            where=where,
            shapes={name: tensor.shape for name, tensor in tensors.items()},
            read=tensors.__getitem__,
        )
        return _read(request, request.peft_config or {}, source, config, dtype, max_rank)
    folder = resolve_adapter(request.lora_path)
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{folder}: no such folder; an adapter is a folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}."
        )
    raw = read_json(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        old = "; save it again as safetensors" if (folder / "adapter_model.bin").is_file() else ""
        raise ModelNotFoundError(f"{folder}: found no {WEIGHTS_FILE}{old}.")
    files = SafetensorsFiles(folder, names=[WEIGHTS_FILE])
    try:
        source = _Source(
            where=str(folder / WEIGHTS_FILE), shapes=files.tensor_shapes(), read=files.read
        )
        return _read(request, raw, source, config, dtype, max_rank)
    finally:
        files.close()


def _as_array(value: object, name: object, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        array = np.asarray(None)
    if array.dtype == object or array.dtype.kind in "USbM":
        raise CheckpointError(f"{where}: tensor {name!r} is no array of numbers.")
    return array


def _read(
    request: LoRARequest,
    raw: Mapping[str, object],
    source: _Source,
    config: ModelConfig,
    dtype: np.dtype,
    max_rank: int,
) -> LoraAdapter:
    file = f"{request.lora_path}/{CONFIG_FILE}" if request.lora_path else "peft_config"
    options = _Options(raw, file)
    parts = _parts(config)
    names = _checked_names(source, options, parts, config)
    layers: list[dict[str, Factors]] = [{} for _ in range(config.num_layers)]
    digest = hashlib.blake2b(request.lora_name.encode("utf-8", "replace"), digest_size=16)
    largest = 0
    for module, (layer, stored) in sorted(names.items()):
        rank = options.rank(module)
        if rank > max_rank:
            raise ConfigError(
                f"{source.where}: {module} has rank {rank}, but at most {max_rank} can be served; "
                f"start with --max-lora-rank {rank} or more."
            )
        largest = max(largest, rank)
        first, second = _factors(module, rank, source, parts[stored], options, dtype)
        for array in (first, second):
            digest.update(f"{module} {array.shape} {array.dtype}".encode())
            digest.update(array.tobytes())
        start = 0
        for target, (_, rows) in parts[stored]:
            layers[layer][target] = first, np.ascontiguousarray(second[:, start : start + rows])
            start += rows
    return LoraAdapter(
        lora_request=request,
        key=digest.hexdigest(),
        rank=largest,
        layers=tuple(layers),
        base_model=options.base_model,
    )


_Parts = Mapping[str, tuple[tuple[str, tuple[int, int]], ...]]
"""What transformers calls a projection of a layer -> our names of its parts, with their sizes."""


def _parts(config: ModelConfig) -> _Parts:
    sizes = target_sizes(config)
    parts: dict[str, tuple[tuple[str, tuple[int, int]], ...]]
    parts = {name: ((name, size),) for name, size in sizes.items()}
    for whole, pieces in fused_parts(config).items():
        parts[whole] = tuple((name, sizes[name]) for name, _ in pieces)
        for name, _ in pieces:
            del parts[name]
    return parts


def _checked_names(
    source: _Source, options: "_Options", parts: _Parts, config: ModelConfig
) -> dict[str, tuple[int, str]]:
    """Return the adapted modules, each with its layer and its name there."""
    found: dict[str, set[str]] = {}
    extra: list[str] = []
    places: dict[str, tuple[int, str]] = {}
    for tensor in source.shapes:
        match = _TENSOR.fullmatch(tensor.removeprefix(_PREFIX))
        module = match[1] if match else ""
        place = _place(module, parts, config)
        if match is None or place is None or not options.covers(module):
            extra.append(tensor)
            continue
        found.setdefault(module, set()).add(match[2])
        places[module] = place
    of_experts = [tensor for tensor in extra if config.experts and _FEED_FORWARD.search(tensor)]
    if of_experts:
        raise UnsupportedError(
            f"{source.where}: found {some_names(of_experts)}, but feed-forwards of a model with "
            f"experts are not adapted. Adapted can be: {', '.join(parts)}."
        )
    taken = set(places.values())
    missing = [
        f"{module}.lora_{factor}.weight"
        for module, factors in found.items()
        for factor in "AB"
        if factor not in factors
    ]
    for layer in range(config.num_layers):
        for stored in parts:
            module = f"model.layers.{layer}.{stored}"
            if (layer, stored) not in taken and options.covers(module):
                missing.append(f"{module}.lora_A.weight")
    problems = [
        f"{what}: {some_names(names)}"
        for what, names in (("missing", missing), ("without a place in the model", extra))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source.where}: the tensors do not fit {CONFIG_FILE} and the model being served. "
            f"Tensors {'; tensors '.join(problems)}. Adapted can be: {', '.join(parts)}."
        )
    if not found:
        raise CheckpointError(f"{source.where}: found no tensors, expected lora_A and lora_B.")
    if len(taken) < len(places):
        raise CheckpointError(f"{source.where}: two names mean the same module; keep one of them.")
    return places


def _place(module: str, parts: _Parts, config: ModelConfig) -> tuple[int, str] | None:
    match = _MODULE.fullmatch(text_name(module) or "")
    if match is None or int(match[1]) >= config.num_layers or match[2] not in parts:
        return None
    return int(match[1]), match[2]


def _factors(
    module: str,
    rank: int,
    source: _Source,
    parts: tuple[tuple[str, tuple[int, int]], ...],
    options: "_Options",
    dtype: np.dtype,
) -> Factors:
    """Read `A` and `B` of a module, turned around, the scale taken into `B`."""
    in_size, out_size = parts[0][1][0], sum(size for _, (_, size) in parts)
    factors: list[np.ndarray] = []
    for letter, shape in (("A", (rank, in_size)), ("B", (out_size, rank))):
        name = f"{module}.lora_{letter}.weight"
        stored = name if name in source.shapes else _PREFIX + name
        if tuple(source.shapes[stored]) != shape:
            raise CheckpointError(
                f"{source.where}: found {name} of shape {tuple(source.shapes[stored])}, expected "
                f"{shape} for rank {rank} and the model being served; check that the adapter was "
                "trained on this model."
            )
        wide = source.read(stored).astype(np.float32)
        if letter == "B":
            wide *= np.float32(options.scale(module, rank))
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(wide.T.astype(dtype))
        # Rows without this adapter multiply its numbers by zero, which needs finite numbers.
        if not np.isfinite(array.astype(np.float32)).all():
            raise CheckpointError(
                f"{source.where}: {name} holds infinite or undefined numbers"
                f"{'' if not np.isfinite(wide).all() else f' in {dtype}'}; train or save the "
                "adapter again."
            )
        factors.append(array)
    return factors[0], factors[1]


class _Options:
    """What `adapter_config.json` says; refuses what would be computed differently.

    Args:
        raw: Its contents.
        where: Its path, for messages.

    Source: PEFT `LoraConfig`, and how it matches names of modules.
    """

    def __init__(self, raw: Mapping[str, object], where: str) -> None:
        fields = Fields(raw, where=where)
        self._where = where
        self._refuse(raw)
        self._rank = fields.count("r", 8)
        self._alpha = fields.number("lora_alpha", 8)
        self._use_rslora = fields.flag("use_rslora")
        self._ranks = self._patterns(fields, "rank_pattern", fields.count)
        self._alphas = self._patterns(fields, "alpha_pattern", fields.number)
        self._targets = self._words(raw, "target_modules")
        self._excluded = self._words(raw, "exclude_modules")
        self._layers = self._layer_numbers(raw)
        self._layer_names = self._words(raw, "layers_pattern")
        self.base_model = fields.word("base_model_name_or_path")

    def _refuse(self, raw: Mapping[str, object]) -> None:
        kind = raw.get("peft_type", "LORA")
        if kind != "LORA":
            raise UnsupportedError(
                f"{self._where}: found peft_type {str(kind)[:40]!r}, expected 'LORA'; other kinds "
                "of adapters are not supported."
            )
        task = raw.get("task_type")
        if task not in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
            raise UnsupportedError(
                f"{self._where}: found task_type {str(task)[:40]!r}, expected 'CAUSAL_LM'; heads "
                "for other tasks are not served."
            )
        for name, reason in _REFUSED.items():
            if raw.get(name):
                self._unsupported(name, raw[name], reason)
        if raw.get("bias", "none") not in (None, "none"):
            self._unsupported("bias", raw["bias"], "only weights are adapted, no biases")
        init = raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
            self._unsupported(
                "init_lora_weights", init,
                "it changes the base model as well; convert the adapter with PEFT's "
                "path_initial_model_for_weight_conversion",
            )  # fmt: skip
        unknown = [k for k, v in raw.items() if v and k not in _HARMLESS and k not in _REFUSED]
        if unknown:
            logger.warning("%s: options %s are unknown and ignored", self._where, unknown[:5])

    def _unsupported(self, name: str, value: object, reason: str) -> None:
        raise UnsupportedError(
            f"{self._where}: found {name}={str(value)[:60]}, which is not supported: {reason}."
        )

    def _patterns(
        self, fields: Fields, key: str, read: Callable[[str], Any]
    ) -> list[tuple["re.Pattern[str]", Any]]:
        table = fields.table(key) or {}
        values = Fields(table, where=f"{self._where}: {key}")
        checked = values.count if read == fields.count else values.number
        return [(self._regex(rf"(.*\.)?({name})", key), checked(name)) for name in table]

    def _regex(self, text: str, key: str) -> "re.Pattern[str]":
        try:
            return re.compile(text)
        except re.error as error:
            raise CheckpointError(
                f"{self._where}: {key} holds {text[:60]!r}, which is no regular expression: "
                f"{error}."
            ) from None

    def _words(self, raw: Mapping[str, object], key: str) -> "Collection[str] | re.Pattern[str]":
        """Return suffixes of names, or a regular expression of whole names."""
        value = raw.get(key)
        if value is None:
            return ()
        if isinstance(value, str):
            if key == "target_modules" and value.lower() == _ALL_LINEAR:
                return self._regex(r".*\.(self_attn|mlp)\.\w+_proj", key)
            return (value,) if key == "layers_pattern" else self._regex(value, key)
        words = list(value) if isinstance(value, list | tuple | set | frozenset) else [None]
        if not all(isinstance(word, str) for word in words):
            raise CheckpointError(
                f"{self._where}: {key} must be a word or a list of words, got {str(value)[:60]}."
            )
        outside = sorted(set(map(str, words)) & set(_OUTSIDE)) if key == "target_modules" else []
        if outside:
            self._unsupported(key, outside, "embeddings and the output projection are not adapted")
        return tuple(map(str, words))

    def _layer_numbers(self, raw: Mapping[str, object]) -> frozenset[int] | None:
        value = raw.get("layers_to_transform")
        if value is None or value == []:
            return None
        numbers: Iterable[object] = value if isinstance(value, list | tuple) else (value,)
        found = frozenset(n for n in numbers if isinstance(n, int) and not isinstance(n, bool))
        if len(found) != len(set(numbers)):
            raise CheckpointError(
                f"{self._where}: layers_to_transform must be a layer or a list of layers, got "
                f"{str(value)[:60]}."
            )
        return found

    def covers(self, module: str) -> bool:
        """Tell whether a module is to be adapted, by PEFT's rules."""
        if _matches(self._excluded, module) or not _matches(self._targets, module):
            return False
        if self._layers is None or isinstance(self._targets, re.Pattern):
            return True
        names = "|".join(self._layer_names) if isinstance(self._layer_names, tuple) else ""
        match = re.match(rf"(?:^|.*?\.)(?:{names or '[^.]*'})\.(\d+)\.", module)
        return match is not None and int(match[1]) in self._layers

    def rank(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return _first(self._ranks, module, self._rank)

    def scale(self, module: str, rank: int) -> float:
        """Return what the product of both factors is multiplied with."""
        alpha = _first(self._alphas, module, self._alpha)
        return alpha / (math.sqrt(rank) if self._use_rslora else rank)


def _first(patterns: Iterable[tuple["re.Pattern[str]", Any]], module: str, default: Any) -> Any:  # noqa: ANN401  counts or numbers
    return next((v for pattern, v in patterns if pattern.fullmatch(module)), default)


def _matches(words: "Collection[str] | re.Pattern[str]", module: str) -> bool:
    if isinstance(words, re.Pattern):
        return words.fullmatch(module) is not None
    return any(module == word or module.endswith(f".{word}") for word in words)
