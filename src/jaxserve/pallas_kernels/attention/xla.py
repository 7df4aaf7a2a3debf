"""Attention in plain JAX: correct everywhere, and the way on a CPU.

It reads the plan's lengths and tables and cuts the work anew, in a way that suits XLA: all heads of
some chunks of keys at once, whichever requests they belong to. So every step of the loop is full,
however much lengths differ. Few query tokens, as in decoding, go one by one; more go in tiles.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.attention.backends import Case, present_device
from jaxserve.pallas_kernels.attention.context import context, is_seen, modified
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Plan, Prefix
from jaxserve.pallas_kernels.state import LOG2_E, AttentionState
from jaxserve.pallas_kernels.variant import AttentionVariant

FEW_TOKENS = 4
"""Requests with at most so many query tokens are attended token by token."""
TILE_TOKENS = 64
"""Query tokens of the tiles of other requests."""
CHUNK = 256
"""Keys of a chunk, if pages are not larger."""
STEP_KEYS = 2048
"""Keys per step of the loop over single tokens."""
_MASKED, _LOWEST = -1e30, -1e29
"""Score of a hidden key, and the least maximum of a row: its weight is then 0 without a test."""


def supports(case: Case) -> str | None:
    """Return None: XLA can do everything, everywhere."""
    del case
    return None


def run(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    plan: Plan,
    *,
    variant: AttentionVariant,
    extra: dict[str, Array],
    sm_scale: float,
) -> AttentionState:
    """Attend; see `backends.Backend.run`.

    Source: the running softmax of FlashAttention (arXiv 2205.14135), over pages.
    """
    work = _Work(
        plan=plan,
        kv=kv,
        variant=variant,
        extra=extra,
        sm_scale=sm_scale,
        queries=_queries(q, plan, variant, extra, sm_scale),
    )
    state = work.nothing()
    if plan.spec.cascade_levels:
        state = work.shared(state)
    state = work.single_tokens(state)
    if plan.spec.max_tokens > FEW_TOKENS:
        state = work.tiles(state)
    out, top, mass = (part[:-1] for part in state)
    tokens, heads, dim = plan.spec.max_tokens, plan.spec.q_heads, plan.spec.v_dim
    if variant.use_softmax:
        some = jnp.where(mass == 0, 1.0, mass)
        out = out / some[..., None]
        lse = jnp.where(mass == 0, -jnp.inf, top + jnp.log2(some))
    else:
        lse = jnp.zeros_like(mass)
    o = out.reshape(tokens, heads, dim).astype(q.dtype)
    return AttentionState(o=o, lse=lse.reshape(tokens, heads))


_State = tuple[Array, ...]
"""Unnormalised output, largest score and mass, `[tokens + 1, kv_heads, group, ...]`, float32.

The last row is for what belongs to nobody.
"""


def _queries(
    q: Array,
    plan: Plan,
    variant: AttentionVariant,
    extra: Mapping[str, Array],
    sm_scale: float,
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """Return queries by key-value head, in the dtype that products are taken in."""
    spec = plan.spec
    if variant.q_mod is not None:
        head = jnp.arange(spec.q_heads)[None, :, None]
        request, position = (
            part[:, None, None] for part in (plan.token_request, plan.token_position)
        )
        ctx = context(plan, variant, extra, sm_scale, request=request, head=head)
        q = modified(q.astype(jnp.float32), variant, ctx, position, is_key=False)
    q = q.reshape(spec.max_tokens, spec.kv_heads, spec.group, spec.head_dim)
    return q.astype(_product_dtype(plan))


def _product_dtype(plan: Plan) -> jnp.dtype:
    """Return the dtype in which products are taken; CPUs are slow at half precision."""
    name = plan.spec.q_dtype
    return jnp.dtype("float32" if present_device()[0] == "cpu" else name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    plan: Plan
    kv: PagedKV
    variant: AttentionVariant
    extra: Mapping[str, Array]
    sm_scale: float
    queries: Array

    @property
    def chunk(self) -> int:
        """Keys per chunk: whole pages, and no more than there can be."""
        spec = self.plan.spec
        pages = max(1, min(CHUNK // spec.page_size, spec.max_pages))
        return pages * spec.page_size

    def reach(self, position: Array, count: Array | int, kv_len: Array) -> tuple[Array, Array]:
        """Return the first key, at the beginning of a page, and the end of what some queries see.

        Args:
            position: Position of the first query.
            count: How many queries.
            kv_len: Keys of their request.
        """
        spec = self.plan.spec
        end = kv_len
        if spec.causal:
            end = jnp.clip(position + count, 0, kv_len)
        if spec.window is None:
            return jnp.zeros_like(end), end
        begin = jnp.clip(position - (spec.window - 1), 0, end)
        # Where nothing may depend on other tokens, chunks lie at fixed places.
        unit = spec.page_size if spec.split_mode == "balanced" else self.chunk
        return begin // unit * unit, end

    def own_begin(self, begin: Array, end: Array, request: Array) -> Array:
        """Return the first key that a request does not share with others."""
        if not self.plan.spec.cascade_levels:
            return begin
        return jnp.minimum(jnp.maximum(begin, self.plan.shared_len[request]), end)

    def single_tokens(self, state: _State) -> _State:
        """Attend from tokens of requests that have few, some chunks of keys per step."""
        plan, spec, size = self.plan, self.plan.spec, self.chunk
        tokens = spec.max_tokens
        request = jnp.maximum(plan.token_request, 0)
        is_mine = (plan.token_request >= 0) & (plan.q_len[request] <= FEW_TOKENS)
        begin, end = self.reach(plan.token_position, 1, plan.kv_len[request])
        begin = self.own_begin(begin, end, request)
        count = jnp.where(is_mine, (end - begin + size - 1) // size, 0)
        last = jnp.cumsum(count)
        most = tokens + spec.max_pages * spec.page_size // size
        width = max(1, min(STEP_KEYS // size, most))

        def step(i: Int[Array, ""], state: _State) -> _State:
            number = i * width + jnp.arange(width)
            token = jnp.searchsorted(last, number, side="right", method="compare_all")
            owner = jnp.minimum(token, tokens - 1)
            chunk = number - (last[owner] - count[owner])
            parts = self._visit(
                queries=self.queries[owner],
                token=owner[:, None],
                request=request[owner],
                position=plan.token_position[owner][:, None],
                begin=begin[owner] + chunk * size,
                is_used=token < tokens,
            )

            def put(part: Int[Array, ""], state: _State) -> _State:
                # One after another, in the order of keys: whatever else is in the batch, a token's
                # sums are the same to the last bit, and nothing of one token meets another's.
                rows = tuple(whole[token[part]] for whole in state)
                seen = tuple(new[part] for new in parts)
                rows = _added(rows, seen, use_softmax=self.variant.use_softmax)
                return tuple(w.at[token[part]].set(r) for w, r in zip(state, rows, strict=True))

            return lax.fori_loop(0, jnp.minimum(width, last[-1] - i * width), put, state)

        return lax.fori_loop(0, (last[-1] + width - 1) // width, step, state)

    def tiles(self, state: _State) -> _State:
        """Attend from all other tokens, tile after tile."""
        plan, spec = self.plan, self.plan.spec
        width = min(TILE_TOKENS, spec.max_tokens)
        number = jnp.where(plan.q_len > FEW_TOKENS, (plan.q_len + width - 1) // width, 0)
        last = jnp.cumsum(number)

        def tile(i: Int[Array, ""], state: _State) -> _State:
            request = jnp.searchsorted(last, i, side="right", method="compare_all")
            offset = (i - (last[request] - number[request])) * width
            row = offset + jnp.arange(width)
            position = plan.kv_len[request] - plan.q_len[request] + row
            is_row = row < plan.q_len[request]
            begin, end = self.reach(position[0], jnp.sum(is_row), plan.kv_len[request])
            begin = self.own_begin(begin, end, request)
            token = jnp.where(is_row, plan.q_start[request] + row, spec.max_tokens)
            return self._visit_tile(state, token, position, request, begin, end)

        return lax.fori_loop(0, last[-1], tile, state)

    def shared(self, state: _State) -> _State:
        """Attend to shared prefixes, from the tokens of all their requests at once."""
        plan, spec = self.plan, self.plan.spec
        width = min(TILE_TOKENS, spec.max_tokens)
        length = plan.prefixes[:, Prefix.Q_LEN]
        number = (length + width - 1) // width  # padding has no tokens
        last = jnp.cumsum(number)

        def tile(i: Int[Array, ""], state: _State) -> _State:
            group = jnp.searchsorted(last, i, side="right", method="compare_all")
            prefix = plan.prefixes[group]
            row = (i - (last[group] - number[group])) * width + jnp.arange(width)
            token = jnp.where(row < length[group], prefix[Prefix.Q_START] + row, spec.max_tokens)
            position = plan.token_position.at[token].get(mode="fill", fill_value=-1)
            begin, end = prefix[Prefix.BEGIN], prefix[Prefix.END]
            if spec.window is not None:
                lowest = jnp.min(position, where=position >= 0, initial=jnp.iinfo(jnp.int32).max)
                first = jnp.clip(lowest - (spec.window - 1), begin, end)
                begin = begin + (first - begin) // spec.page_size * spec.page_size
            return self._visit_tile(state, token, position, prefix[Prefix.REQUEST], begin, end)

        return lax.fori_loop(0, last[-1], tile, state)

    def _visit_tile(
        self, state: _State, token: Array, position: Array, request: Array, begin: Array, end: Array
    ) -> _State:
        """Let the tokens of one tile see some keys of one request.

        Args:
            state: Of all tokens.
            token: The tile's; padding points behind the last one.
            position: Their positions.
            request: Whose pages are read.
            begin: First key, at the beginning of a page.
            end: One past the last key.
        """
        spec, size, width = self.plan.spec, self.chunk, token.shape[0]
        taken = jnp.minimum(token, spec.max_tokens - 1)
        queries = jnp.swapaxes(self.queries[taken], 0, 1)
        queries = queries.reshape(1, spec.kv_heads, width * spec.group, spec.head_dim)

        def visit(chunk: Int[Array, ""], rows: _State) -> _State:
            parts = self._visit(
                queries=queries,
                token=taken[None],
                request=request[None],
                position=position[None],
                begin=(begin + chunk * size)[None],
                is_used=jnp.ones(1, jnp.bool_),
                end=end[None],
            )
            return _added(rows, parts, use_softmax=self.variant.use_softmax)

        def get(whole: Array) -> Array:
            part = jnp.moveaxis(whole[token], 0, 1)
            return part.reshape(1, spec.kv_heads, width * spec.group, *part.shape[3:])

        def put(whole: Array, part: Array) -> Array:
            part = part.reshape(spec.kv_heads, width, spec.group, *part.shape[3:])
            return whole.at[token].set(jnp.moveaxis(part, 1, 0))

        before = tuple(get(part) for part in state)
        count = (end - begin + size - 1) // size
        after = lax.fori_loop(0, count, visit, before)
        return tuple(put(a, b) for a, b in zip(state, after, strict=True))

    def nothing(self) -> _State:
        """Return the state of tokens that have seen nothing."""
        spec = self.plan.spec
        return _empty((spec.max_tokens + 1, spec.kv_heads, spec.group), spec.v_dim)

    def _visit(
        self,
        *,
        queries: Array,
        token: Array,
        request: Array,
        position: Array,
        begin: Array,
        is_used: Array,
        end: Array | None = None,
    ) -> _State:
        """Attend from some tiles of tokens, each to one chunk of keys.

        Args:
            queries: Queries of each tile, `[tiles, kv_heads, tokens * group, head_dim]`.
            token: Tokens of each tile, `[tiles, tokens]`.
            request: Whose pages are read, `[tiles]`.
            position: Their positions, `[tiles, tokens]`.
            begin: First key of each chunk, at the beginning of a page, `[tiles]`.
            is_used: Whether the tile is real.
            end: One past the last key that may be seen, if that is not the request's last.

        Returns:
            State `[tiles, kv_heads, tokens * group, ...]`.
        """
        plan, spec, variant = self.plan, self.plan.spec, self.variant
        num, width = token.shape
        k_pos = begin[:, None] + jnp.arange(self.chunk)
        limit = plan.kv_len[request] if end is None else end
        is_key = (k_pos < limit[:, None]) & is_used[:, None]
        k, v = self._keys(request, begin, k_pos, is_key)
        scores = jnp.einsum("thqd,thkd->thqk", queries, k, preferred_element_type=jnp.float32)
        shape = (num, spec.kv_heads, width, spec.group, self.chunk)
        scores = scores.reshape(shape)
        is_plain = variant.score_mod is None
        scores = scores * (self.sm_scale * LOG2_E if is_plain else self.sm_scale)
        head = jnp.arange(spec.q_heads).reshape(1, spec.kv_heads, 1, spec.group, 1)
        owner = jnp.maximum(plan.token_request[token], 0)[:, None, :, None, None]
        ctx = context(plan, variant, self.extra, self.sm_scale, request=owner, head=head)
        at = (position[:, None, :, None, None], k_pos[:, None, None, None, :])
        if variant.score_mod is not None:
            scores = variant.score_mod(scores, ctx, *at, head)
            scores = scores * LOG2_E if variant.use_softmax else scores
        seen = is_seen(plan, variant, self.extra, ctx, *at)
        seen &= is_key[:, None, None, None, :]
        rows = (num, spec.kv_heads, width * spec.group)
        if variant.use_softmax:
            scores = jnp.where(seen, scores, _MASKED).reshape(*rows, self.chunk)
            top = jnp.maximum(jnp.max(scores, axis=-1), _LOWEST)
            weights = jnp.exp2(scores - top[..., None])
        else:
            weights = jnp.where(seen, scores, 0.0).reshape(*rows, self.chunk)
            top = jnp.zeros(rows, jnp.float32)
        mass = jnp.sum(weights, axis=-1)
        out = jnp.einsum(
            "thqk,thkd->thqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return out, top, mass

    def _keys(
        self, request: Array, begin: Array, k_pos: Array, is_key: Array
    ) -> tuple[Array, Array]:
        """Gather keys and values `[tiles, kv_heads, chunk, dim]`; values that are none are zero."""
        plan, spec, kv = self.plan, self.plan.spec, self.kv
        first = plan.kv_indptr[request] + begin // spec.page_size
        entry = first[:, None] + jnp.arange(self.chunk // spec.page_size)
        page = plan.kv_indices.at[entry].get(mode="clip")
        block = page[:, None, :] * spec.kv_heads + jnp.arange(spec.kv_heads)[None, :, None]
        dtype = _product_dtype(plan)

        def gather(pool: Array, scale: Array | None) -> Array:
            # One head of one page is one block, so nothing has to be transposed.
            blocks = pool.reshape(-1, *pool.shape[2:])
            taken = blocks.at[block].get(mode="promise_in_bounds").astype(dtype)
            if scale is not None:
                scale = jnp.asarray(scale, jnp.float32)
                shape = (kv.num_pages, spec.kv_heads)
                factor = jnp.broadcast_to(scale, shape).reshape(-1)[block]
                taken = (taken * factor[..., None, None]).astype(dtype)
            return taken.reshape(*block.shape[:2], self.chunk, pool.shape[3])

        k, v = gather(kv.k, kv.k_scale), gather(kv.v, kv.v_scale)
        if self.variant.k_mod is not None:
            ctx = context(
                plan,
                self.variant,
                self.extra,
                self.sm_scale,
                request=request[:, None, None, None],
                head=jnp.arange(spec.kv_heads)[None, :, None, None],
            )
            at = k_pos[:, None, :, None]
            k = modified(k.astype(jnp.float32), self.variant, ctx, at, is_key=True).astype(dtype)
        return k, jnp.where(is_key[:, None, :, None], v, jnp.zeros((), dtype))


def _empty(shape: tuple[int, ...], dim: int) -> _State:
    return (
        jnp.zeros((*shape, dim), jnp.float32),
        jnp.full(shape, _LOWEST, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


def _added(state: _State, parts: _State, *, use_softmax: bool) -> _State:
    """Merge two states of the same rows."""
    shapes = [part.shape for part in state]
    parts = tuple(p.reshape(shape) for p, shape in zip(parts, shapes, strict=True))
    out, top, mass = state
    if not use_softmax:
        return out + parts[0], top, mass
    new = jnp.maximum(top, parts[1])
    fade, gain = jnp.exp2(top - new), jnp.exp2(parts[1] - new)
    out = out * fade[..., None] + parts[0] * gain[..., None]
    return out, new, mass * fade + parts[2] * gain
