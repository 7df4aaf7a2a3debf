"""Every Mosaic kernel in every configuration that is ever chosen, ready to be compiled."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.attention import mosaic_decode, mosaic_prefill
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.variant import PLAIN, AttentionVariant

KV_HEADS = 8
NUM_PAGES = 1024
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """One kernel in one configuration.

    Attributes:
        kernel: Name of the kernel.
        configuration: What it was chosen by and what was chosen, in words.
        function: Calls the kernel.
        arguments: Shapes and dtypes of its arguments.
        spec: The plan's.
        variant: What is different from plain attention.
        limit: Bytes of shared memory that the tuning table counts with.
    """

    kernel: str
    configuration: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    spec: PlanSpec
    variant: AttentionVariant
    limit: int

    @property
    def name(self) -> str:
        """Kernel and configuration in one."""
        return f"{self.kernel}: {self.configuration}"


def builds() -> list[Build]:
    """Return all of them."""
    return [*tuned(), *varied()]


def tuned() -> Iterator[Build]:
    """Yield a build for every entry of the tuning tables."""
    seen: set[object] = set()
    for key, config in entries(mosaic_decode):
        # How many CTAs share a multiprocessor is the plan's business.
        program = key, dataclasses.replace(config, ctas=1)
        if program in seen:
            continue
        seen.add(program)
        yield decode(
            dim=key.dim,
            heads=4 if key.rows == 8 else 8,
            tokens=max(1, key.rows // 8),
            kv_dtype="float8_e4m3fn" if key.itemsize == 1 else "bfloat16",
            variant=variants.rope() if key.changes_keys else PLAIN,
            limit=key.shared_memory(config),
            config=config,
        )
    for key, config in entries(mosaic_prefill):
        # Wide tiles of a plan may be cut into the same narrow ones: that is one kernel.
        program = dataclasses.replace(key, tile_kv=0), config
        if program in seen:
            continue
        seen.add(program)
        yield prefill(
            dim=key.dim,
            heads=4,
            warpgroups=key.warpgroups,
            tile_kv=key.tile_kv,
            kv_dtype="float8_e4m3fn" if key.itemsize == 1 else "bfloat16",
            variant=variants.rope() if key.changes_keys else PLAIN,
            limit=key.shared_memory(config),
            config=config,
        )


def entries(kernel: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401  a module
    """Yield every key of a kernel's tuning table with every configuration that may be chosen."""
    for key, candidates in kernel.tuning_table().items():
        for config in candidates:
            yield key, config


def varied() -> Iterator[Build]:
    """Yield builds of what else changes the code: groups, pages, dtypes, windows, variants."""
    sinks_and_cap = variants.compose(variants.soft_cap(30.0), variants.sinks())
    far = variants.compose(variants.alibi(), variants.window(512, first=4))
    for make in (decode, prefill):
        one_warpgroup = {"warpgroups": 1} if make is prefill else {}
        yield make(heads=5)
        yield make(heads=7)
        yield make(heads=1)
        yield make(heads=16, page_size=128)
        yield make(page_size=8, **one_warpgroup)
        yield make(kv_dtype="float16")
        yield make(window=1024)
        yield make(split="none")
        yield make(variant=sinks_and_cap)
        yield make(variant=far)
        yield make(variant=variants.sigmoid())
        yield make(variant=variants.packed_mask())
        yield make(variant=variants.packed_mask(per_head=True))
        yield make(kv_dtype="float8_e4m3fn", scales="page", **one_warpgroup)
    yield prefill(cascade_levels=1, window=1024)
    yield prefill(heads=5, warpgroups=1)
    yield prefill(portable=True, tile_kv=64)


def most_demanding() -> list[Build]:
    """Return a few builds that leave out no part of the kernels.

    Of every kernel and width of keys, changed or not, the one with most shared memory; and what is
    written in other words: odd groups, masks, and the form that the interpreter runs.
    """
    largest: dict[tuple[object, ...], Build] = {}
    for build in tuned():
        key = (build.kernel, build.spec.kv_dtype, build.variant.k_mod is not None)
        if key not in largest or build.limit > largest[key].limit:
            largest[key] = build
    masks = variants.packed_mask(per_head=True)
    return [
        *largest.values(),
        decode(heads=5),
        prefill(heads=5),
        decode(variant=masks),
        prefill(variant=masks),
        prefill(portable=True, tile_kv=64),
    ]


def chosen_for_triton() -> Iterator[Build]:
    """Yield those of `varied` that change Triton's code most, for the same kernel in Triton."""
    names = (
        "groups of 5",
        "pages of 8,",
        " float16",
        "window 1024",
        "score_mod and mask",
        "page scales",
    )
    for build in varied():
        if any(name in build.configuration for name in names):
            yield build


def decode(*, tokens: int = 1, heads: int = 4, **settings: Any) -> Build:  # noqa: ANN401
    """Return a build of the decode kernel.

    Args:
        tokens: Query tokens of a work item.
        heads: Heads of a group.
        **settings: See `_build`.
    """
    return _build(
        "attention decode",
        mosaic_decode.decode,
        heads=heads,
        tile_q=tokens * heads,
        max_tokens=64 * tokens,
        tile_kv=64,
        words=f"{tokens} tokens",
        **settings,
    )


def prefill(
    *,
    heads: int = 4,
    warpgroups: int = 2,
    tile_kv: int = 128,
    portable: bool = False,
    config: Any = None,  # noqa: ANN401
    **settings: Any,  # noqa: ANN401
) -> Build:
    """Return a build of the prefill kernel.

    Args:
        heads: Heads of a group.
        warpgroups: Computing warpgroups.
        tile_kv: Keys per tile of the plan.
        portable: Whether to build what the interpreter runs.
        config: Configuration; None takes the chosen one.
        **settings: See `_build`.
    """
    if portable:
        config = mosaic_prefill.TuningConfig(tile_kv=64, portable=True)
    return _build(
        "attention prefill",
        mosaic_prefill.prefill,
        heads=heads,
        tile_q=mosaic_prefill.tile_q(heads, warpgroups=warpgroups),
        max_tokens=2048,
        tile_kv=tile_kv,
        config=config,
        words=f"{warpgroups} warpgroups, tiles of {tile_kv} keys" + ", portable" * portable,
        **settings,
    )


def _build(
    kernel: str,
    function: Callable[..., Any],
    *,
    words: str,
    heads: int,
    tile_q: int,
    tile_kv: int,
    max_tokens: int,
    dim: int = 128,
    page_size: int = 16,
    kv_dtype: str = "bfloat16",
    scales: str | None = None,
    window: int | None = None,
    split: str = "balanced",
    cascade_levels: int = 0,
    variant: AttentionVariant = PLAIN,
    limit: int | None = None,
    config: Any = None,  # noqa: ANN401
) -> Build:
    narrow = kv_dtype == "float8_e4m3fn"
    q_dtype = "bfloat16" if narrow else kv_dtype
    spec = PlanSpec(
        q_heads=heads * KV_HEADS,
        kv_heads=KV_HEADS,
        head_dim=dim,
        page_size=page_size,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        max_requests=64,
        max_tokens=max_tokens,
        max_pages=4096,
        window=window,
        variant=variant,
        tile_q=tile_q,
        tile_kv=tile_kv,
        num_ctas=MULTIPROCESSORS,
        disable_split=split == "none",
        cascade_levels=cascade_levels,
    )
    array = jax.ShapeDtypeStruct
    scale_shapes = {"head": (KV_HEADS,), "page": (NUM_PAGES, KV_HEADS)}
    scales = scales or ("head" if narrow else None)
    scale = None if scales is None else array(scale_shapes[scales], jnp.float32)
    pool = array((NUM_PAGES, KV_HEADS, page_size, dim), jnp.dtype(kv_dtype))
    kv = PagedKV(k=pool, v=pool, k_scale=scale, v_scale=scale)
    q = array((max_tokens, spec.q_heads, dim), jnp.dtype(q_dtype))
    plan = Plan(buffer=array((spec.num_words,), jnp.int32), spec=spec)
    shapes = {"scalar": (), "head": (spec.q_heads,), "request": (spec.max_requests,)}
    extra = {n: array(shapes[kind], jnp.float32) for n, kind in variant.extras.items()}
    if variant.packed_mask != "none":
        lead = (spec.q_heads,) if variant.packed_mask == "per_head" else ()
        extra["mask"] = array((*lead, 4096), jnp.uint32)

    def call(q: Any, kv: Any, plan: Any, extra: Any) -> Any:  # noqa: ANN401
        return function(
            q, kv, plan, variant=variant, extra=extra, sm_scale=dim**-0.5, config=config
        )

    module = mosaic_decode if function is mosaic_decode.decode else mosaic_prefill
    chosen = config or module.choose(spec, variant)
    notes = [
        f"dim {dim}",
        f"groups of {heads}",
        words,
        f"pages of {page_size}",
        kv_dtype,
        f"{scales} scales" if scales else "",
        f"window {window}" if window else "",
        "unsplit" if split == "none" else "",
        "cascade" if cascade_levels else "",
        _words_of(variant),
        f"-> {chosen.stages} stages of {chosen.tile_kv}",
        "no turns" if "2 warpgroups" in words and not chosen.schedule_barrier else "",
    ]
    return Build(
        kernel=kernel,
        configuration=", ".join(filter(None, notes)).replace(", ->", " ->"),
        function=call,
        arguments=(q, kv, plan, extra),
        spec=spec,
        variant=variant,
        limit=limit or 232_448,
    )


def _words_of(variant: AttentionVariant) -> str:
    parts = [
        name for name in ("score_mod", "mask_mod", "k_mod") if getattr(variant, name) is not None
    ]
    if variant.packed_mask != "none":
        parts.append(f"{variant.packed_mask} mask")
    if not variant.use_softmax:
        parts.append("no softmax")
    return " and ".join(parts)
