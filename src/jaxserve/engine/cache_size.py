"""How large the key-value cache is, and how it is laid out: what memory allows."""

import logging
from dataclasses import dataclass

import jax.numpy as jnp
import psutil

from jaxserve.cache.buffers import slot_capacity
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import CapacityError, ConfigError
from jaxserve.core.units import format_bytes
from jaxserve.engine.kernel_choice import PAGED_BACKENDS
from jaxserve.engine.parallel import num_cache_parts
from jaxserve.engine.source import LoadedModel
from jaxserve.engine.sparse import index_bytes
from jaxserve.models.config import ModelConfig
from jaxserve.models.lora import LoraShape

logger = logging.getLogger(__name__)

Q_BLOCK = 128
_CPU_KV_TILE = 256
_GPU_KV_TILE = 1024
_SLOT_SHARE = 0.75
_CPU_CACHE_SHARE = 0.25
_CPU_CACHE_BYTES = 4 << 30
_SHORTEST_AUTO_LEN = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """How the memory of the cache is laid out.

    Attributes:
        max_model_len: Most tokens per sequence.
        num_pages: Pages of each group of devices.
        use_pages: Paged layout; otherwise dense slots.
        keep_store: With slots: whether a page store for prefixes exists.
    """

    max_model_len: int
    num_pages: int
    use_pages: bool
    keep_store: bool


def lora_shape(config: EngineConfig) -> LoraShape | None:
    """Return the slots for adapters; None without any."""
    options = config.lora
    if not options.enable_lora:
        return None
    return LoraShape(slots=options.max_loras, rank=options.max_lora_rank)


def _token_bytes(shape: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values of one token."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * jnp.dtype(dtype).itemsize


def plan_cache(
    config: EngineConfig,
    model: LoadedModel,
    dtype: str,
    max_num_seqs: int,
    draft: LoadedModel | None,
) -> CachePlan:
    """Choose sizes of the cache that memory allows.

    Args:
        config: Settings, some of them "auto".
        model: The model.
        dtype: Precision of keys and values.
        max_num_seqs: Most sequences running at once.
        draft: A model that drafts, whose cache mirrors the other.

    Raises:
        ConfigError: If a setting exceeds what the model can do, or two contradict each other.
        CapacityError: If not even one sequence of the greatest length fits.
    """
    shape, cache = model.config, config.cache
    on_cpu = model.mesh.devices.flat[0].platform == "cpu"
    tile = kv_tile(config, on_cpu=on_cpu)
    use_pages = uses_pages(config, on_cpu=on_cpu)
    per_token = _token_bytes(shape, dtype)
    if draft is not None:
        per_token += _token_bytes(draft.config, dtype)
    # Each group of devices has a cache of its own; what follows is about one of them.
    budget = cache.kv_cache_memory_bytes or _free_memory(config, model, on_cpu=on_cpu)
    budget, max_num_seqs = budget // model.groups, -(-max_num_seqs // model.groups)
    slots_of_adapters = lora_shape(config)
    if slots_of_adapters is not None and not cache.kv_cache_memory_bytes:
        budget -= slots_of_adapters.num_values(shape) * jnp.dtype(dtype).itemsize
    index = index_bytes(config, shape)
    if index:  # there is room for the index of what pages and slots hold
        budget = int(budget * per_token / (per_token + index))
    longest = config.model.max_model_len
    if longest is not None and longest > shape.max_position:
        raise ConfigError(
            f"max_model_len={longest} exceeds the model's {shape.max_position} positions."
        )
    if longest is None:
        rows = 1 if use_pages else max_num_seqs
        room = int(budget * (1.0 if use_pages else _SLOT_SHARE)) // (per_token * rows)
        longest = shape.max_position
        if room < longest:
            longest = max(_SHORTEST_AUTO_LEN, 1 << max(0, room.bit_length() - 1))
            longest = min(longest, shape.max_position)
            logger.info("max_model_len set to %d, which is what memory allows", longest)
    slots = 0 if use_pages else max_num_seqs * slot_capacity(longest, Q_BLOCK, tile) * per_token
    keep_store = cache.enable_prefix_caching or use_pages
    num_pages = cache.num_gpu_blocks_override
    if num_pages is None:
        wanted = max_num_seqs * -(-longest // cache.block_size)
        room = (budget - slots) // (per_token * cache.block_size)
        num_pages = min(wanted, room) if keep_store else wanted
        least = -(-longest // cache.block_size)
        if num_pages < least:
            needed = slots + least * cache.block_size * per_token
            raise CapacityError(
                f"the key-value cache has {format_bytes(budget)}, but {max_num_seqs} sequences of "
                f"{longest} tokens need {format_bytes(needed)}. Lower --max-model-len or "
                "--max-num-seqs, or raise --kv-cache-memory-bytes."
            )
    return CachePlan(
        max_model_len=longest, num_pages=num_pages, use_pages=use_pages, keep_store=keep_store
    )


def uses_pages(config: EngineConfig, *, on_cpu: bool) -> bool:
    """Tell whether the cache is in pages, and not in dense slots.

    Raises:
        ConfigError: If attention reads pages, but slots are asked for.
    """
    layout, backend = config.cache.kv_layout, config.runner.attention_backend
    if backend not in PAGED_BACKENDS:
        return layout == "pages" or (layout == "auto" and not on_cpu)
    if layout == "slots":
        raise ConfigError(
            f"attention_backend={backend!r} reads pages, but kv_layout is 'slots'; "
            "use kv_layout='pages' or 'auto'."
        )
    return True


def kv_tile(config: EngineConfig, *, on_cpu: bool) -> int:
    """Choose keys per tile: what fits a core's cache, or fills a GPU; a multiple of the page."""
    wanted, page = (_CPU_KV_TILE if on_cpu else _GPU_KV_TILE), config.cache.block_size
    return -(-wanted // page) * page


def _free_memory(config: EngineConfig, model: LoadedModel, *, on_cpu: bool) -> int:
    if on_cpu:
        return min(int(psutil.virtual_memory().available * _CPU_CACHE_SHARE), _CPU_CACHE_BYTES)
    stats = model.mesh.devices.flat[0].memory_stats() or {}
    limit, used = stats.get("bytes_limit", 0), stats.get("bytes_in_use", 0)
    share = config.cache.gpu_memory_utilization
    # Activations, logits and the program itself live beside weights and cache.
    parts = model.groups * num_cache_parts(model.mesh, model.config.num_kv_heads)
    budget = int((limit * share - used) * 0.9) * parts
    if budget <= 0:
        raise CapacityError(
            f"the device has {format_bytes(limit)} of which {format_bytes(used)} are in use; "
            f"gpu_memory_utilization={share} leaves nothing for the key-value cache."
        )
    return budget
