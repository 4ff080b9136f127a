"""The one step: append the new tokens, attend, keep what the policy keeps."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend import api, explicit
from kvattn.attend import xla as _xla
from kvattn.attend.request import Request
from kvattn.attend.state import add_sinks, merge_states
from kvattn.cache import Cache, Layout, View
from kvattn.cache import status as bits
from kvattn.cache.view import block_positions, token_view
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError, UnsupportedError
from kvattn.masks import EMPTY, Mask
from kvattn.policies import Context, Policy
from kvattn.positions import RoPE

CHUNK_ROWS = 128
"""Rows per block when a chunk of new tokens attends to itself."""


def cached_attention[C: Cache](
    query: Array,
    key: Array | None,
    value: Array | None,
    cache: C,
    *,
    num_new: Any = None,
    padding: str = "right",
    rope: RoPE | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    token_ids: Array | None = None,
    implementation: api.Implementation = None,
) -> tuple[Array, C]:
    """Appends T new tokens to a cache and attends: T = 1 is decoding, T > 1 a prompt or a chunk of one.

    Every new token attends to the tokens the cache keeps and to those of the chunk up to itself, at their true
    positions: `cache.lengths` and following. Cutting a sequence into other chunks changes nothing. Donate the cache
    (``jax.jit(..., donate_argnames="cache")``) and it is updated in place.

    Args:
        query: float [B, T, N, H].
        key: float [B, T, K, H], N a multiple of K; query head n reads head n // (N // K). None, with `value`, for a
            static cache (`KVCache.from_encoder`): nothing is appended, every query attends to all its tokens.
        value: float [B, T, K, Hv].
        cache: what was kept so far, a `KVCache` or a `PagedKVCache`.
        num_new: int32 [B], how many of the T tokens are real. None: all.
        padding: where the other tokens lie, "right" (after the real ones) or "left". Pads are not appended, take no
            position, and come out as zeros.
        rope: rotates query and key at the positions the policy wants.
        window: attend to the last `window` tokens only, the query's own included; with a policy's window, the
            smaller, for its sinks too (by the positions they are seen from).
        scale: factor of the scores. None: 1/sqrt(H).
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: float [N], a learned logit per head that joins the softmax sum only.
        alibi_slopes: float [N]: adds slope * (key position - query position) to the scores.
        token_ids: int32 [B, T], for policies that look at tokens.
        implementation: "reference", "xla", "mosaic_gpu", "mosaic_tpu", a sequence of these to try in order, or None for
            the best that works.

    Returns:
        out [B, T, N, Hv] in query's dtype, and the new cache. Products are taken in the wider of query and cache dtype
        and accumulated in float32.

    Raises:
        ShapeError, DTypeError, RangeError, ConfigError: arguments that do not fit.
        CapacityError: the tokens of a row do not fit. Nothing is written. Under jit the row's whole chunk is dropped,
            its output is zeros, and `cache.check()` raises.
        UnsupportedError: the named implementation cannot do this.
        StaleCacheError: the cache was donated to an earlier step.
    """
    step, arguments = prepared(
        query,
        key,
        value,
        cache,
        num_new=num_new,
        padding=padding,
        rope=rope,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        token_ids=token_ids,
        implementation=implementation,
    )
    return step(*arguments) if step.is_empty else explicit.by_shard(step, *arguments)


def prepared(
    query: Any,
    key: Any,
    value: Any,
    cache: Cache,
    *,
    num_new: Any,
    padding: str,
    rope: RoPE | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Any,
    alibi_slopes: Any,
    token_ids: Any,
    implementation: api.Implementation,
    num_heads: int | None = None,
) -> tuple["Step", tuple[Any, ...]]:
    """Checks the arguments of `cached_attention`, and raises what it raises.

    `num_heads`: N, where `query` has heads behind those that are filling. None: all are real.

    Returns:
        the step, and its arguments: query, key, value, cache, given int32 [B], bad_count bool [B], sinks,
        alibi_slopes, token_ids. Rows, and key/value heads with their queries, do not depend on each other.
    """
    if not isinstance(cache, Cache):
        raise DTypeError(
            f"cache must be a KVCache or a PagedKVCache, got {type(cache).__name__}: KVCache.create makes an empty one."
        )
    if rope is not None and not isinstance(rope, RoPE):
        raise DTypeError(f"rope must be a kvattn.RoPE or None, got {rope!r}.")
    cache = cache.usable()
    query = _checks.query("query", query)
    if query.ndim != 4:
        raise ShapeError(f"query must be [B, T, N, H], got shape {query.shape}.")
    batch, length, _, head_dim = query.shape
    heads = query.shape[2] if num_heads is None else num_heads
    if batch != cache.batch_size:
        raise ShapeError(f"query has {batch} rows, the cache {cache.batch_size}.")
    _checks.head_counts(heads, cache.num_kv_heads)
    if head_dim != cache.key_head_dim:
        raise ShapeError(f"query has head dim {head_dim}, the keys of the cache {cache.key_head_dim}.")
    _checks.finite_scale(scale)
    softcap = _checks.positive_softcap(softcap)
    sinks = _checks.per_head("sinks", sinks, heads)
    alibi_slopes = _checks.per_head("alibi_slopes", alibi_slopes, heads, finite=True)
    _checks.one_of("padding", padding, ("right", "left"))
    mask = cache.policy.mask().narrowed(_checks.window(window))
    if window is not None and cache.policy.cache_positions(cache.state) is not None:
        raise UnsupportedError(
            f"window= goes by true positions, {cache.policy} by those in the cache: leave window out, or use "
            'positions_in="original".'
        )
    if token_ids is not None:
        token_ids = _token_ids(token_ids, query)
    if scale is not None and not _checks.is_concrete(scale):
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    # A key that will move in the cache is stored as it is, and rotated when it is read.
    key_rope = None if cache.policy.cache_positions(cache.state) is None else rope
    call = _Call(mask, scale, softcap, padding, rope, implementation, key_rope)

    given, bad_count = _real_tokens(num_new, batch, length)
    if cache.is_static:
        if key is not None or value is not None:
            raise ConfigError("a static cache holds the encoder's keys and values: pass key=None and value=None.")
        if rope is not None or window is not None:
            raise ConfigError("a static cache has no order in common with the queries: no rope and no window.")
        run = _cross
    else:
        key, value = _new_tokens(key, value, query, cache)
        cache, given = cache.vouched(given, mask.window)
        fits = _fits(cache, given, length)
        cache.refuse_overflow(fits, given)
        run = _decode if length == 1 else _chunk
    if length == 0 or batch == 0:
        run = _nothing
    return Step(run, call), (query, key, value, cache, given, bad_count, sinks, alibi_slopes, token_ids)


@dataclasses.dataclass(frozen=True)
class Slots:
    """What a step reads and writes of a cache: all its slots.

    `kvattn.sharding.sequence` has one whose slots are a device's share of them.
    """

    is_share: ClassVar[bool] = False
    """Whether there are slots elsewhere, so that attention to these is a part of it."""

    def write(self, cache: Cache, slots: Array, key: Array, value: Array, implementation: Any = "xla") -> Cache:
        """`Cache.write`, by a kernel where `implementation` has one."""
        return cache.write(slots, key, value, api.writer(cache.store, implementation))

    def view(self, cache: Cache, places: Array | None) -> View:
        """The slots; with `places` int32 [B, K, C] every token stands where the policy says."""
        view = cache.view()
        return view if places is None else dataclasses.replace(view, positions=block_positions(view.layout, places))

    def of_store(self, store: Any, slots: Array) -> Array:
        """The slots int32 [B, T] or [B, K, T] by their numbers in the view; negative where they are not in it."""
        del store
        return slots

    def of_chunk(self, key: Array, value: Array, positions: Array) -> tuple[Array, Array, Array]:
        """The new tokens [B, T, K, H] and their positions [B, T] that are read here."""
        return key, value, positions

    def joined(self, out: Array, lse: Array) -> tuple[Array, Array]:
        """Attention to the slots and new tokens of all, from that to those read here."""
        return out, lse

    def of_group(self, tree: Any) -> Any:
        """The mean over all the query heads of a group, from that over those that are here."""
        return tree

    def all_slots(self, cache: Cache, tree: Any) -> Any:
        """Arrays [B, K, C, ...] of all slots, from those of the slots here."""
        del cache
        return tree

    def all_new(self, tree: Any, length: int) -> Any:
        """Arrays [B, K, T, ...] of all new tokens, from those of the tokens read here."""
        del length
        return tree


ALL_SLOTS = Slots()


@dataclasses.dataclass(frozen=True)
class _Call:
    """The settings of a call, known when it is traced."""

    mask: Mask
    scale: float
    softcap: float | None
    padding: str
    rope: RoPE | None
    implementation: api.Implementation
    key_rope: RoPE | None = None
    slots: Slots = ALL_SLOTS

    def request(self, query: Array, positions: Array, view: View, slopes: Array | None, **more: Any) -> Request:
        settings = {"mask": self.mask, "scale": self.scale, "softcap": self.softcap, "key_rope": self.key_rope, **more}
        return Request(query, positions, view, slopes, **settings)


@dataclasses.dataclass(frozen=True)
class Step:
    """The step itself, on arrays that fit together; on a mesh once per device. Hashable.

    Attributes:
        run: which kind of step.
        call: its settings.
    """

    run: Any
    call: _Call

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do: no rows, or no new tokens."""
        return self.run is _nothing

    def over(self, slots: Slots) -> "Step":
        """The same step on other slots."""
        return dataclasses.replace(self, call=dataclasses.replace(self.call, slots=slots))

    def __call__(self, query, key, value, cache, given, bad_count, sinks, slopes, token_ids) -> tuple[Array, Any]:
        """out [B, T, N, Hv] and the new cache."""
        length, dtype = query.shape[1], query.dtype
        if self.call.padding == "left":
            late = length - given
            query, key, value, token_ids = (
                None if x is None else _shift_left(x, late) for x in (query, key, value, token_ids)
            )
        out, cache = self.run(self.call, query, key, value, cache, given, bad_count, sinks, slopes, token_ids)
        out = out.astype(dtype)
        return _shift_left(out, given - length) if self.call.padding == "left" else out, cache


def _nothing(call: _Call, query, key, value, cache: Cache, given, bad_count, sinks, slopes, token_ids):
    """No rows, or no new tokens."""
    return jnp.zeros((*query.shape[:3], cache.value_head_dim), query.dtype), cache


def _decode(call: _Call, query, key, value, cache: Cache, given, bad_count, sinks, slopes, token_ids):
    """One new token: write it, attend to all that is kept, let the policy look."""
    policy, num_slots, lengths = cache.policy, cache.num_slots, cache.lengths
    queries, key, positions, new, fits = _place_in_time(call, query, key, cache, given)
    step = Context(lengths, new, 1, num_slots, token_ids)
    slots = policy.place(cache.state, step)
    written = call.slots.write(cache, slots, key, value, call.implementation)
    seen = policy.enter(cache.state, slots, step)
    view = call.slots.view(written.replace(lengths=lengths + new, state=seen), policy.cache_positions(seen))
    if cache.codec.rounds:
        view = dataclasses.replace(view, fresh=(call.slots.of_store(cache.store, slots), key, value))
    # Mass goes by the whole softmax sum: where that is not known from one request, it is taken afterwards.
    late = sinks is not None or call.slots.is_share
    requests = _requests(call, queries, positions, view, slopes, want_mass=policy.needs_mass and not late)
    out, lse, mass = _attend_all(call, requests, sinks)
    if policy.needs_mass and (late or len(requests) > 1):
        mass = functools.reduce(jnp.add, [_xla.measure(request, lse, _total) for request in requests])
        mass = call.slots.all_slots(written, mass)
    if mass is not None:
        mass = call.slots.of_group(mass)
    state = policy.observe(seen, slots, mass, step)
    written = written.replace(state=state, status=_scorable(policy, written.status, lse))
    return out, written.advance(new, ~fits, bad_count)


def _chunk(call: _Call, query, key, value, cache: Cache, given, bad_count, sinks, slopes, token_ids):
    """Several new tokens: attend to what is kept and to the chunk, and only then let them take slots.

    Writing first would overwrite what the first tokens of the chunk still attend to.
    """
    policy, num_slots, lengths, length = cache.policy, cache.num_slots, cache.lengths, query.shape[1]
    queries, key, positions, new, fits = _place_in_time(call, query, key, cache, given)
    own_tokens = call.slots.of_chunk(key, value, positions)
    layout = Layout.best(own_tokens[0].shape[1], key.shape[-1] * key.dtype.itemsize, head_dim=key.shape[-1])
    layout = dataclasses.replace(layout, rows=min(layout.rows, CHUNK_ROWS))
    own = token_view(cache.codec.for_chunk(key.dtype), *own_tokens, layout)
    places = policy.cache_positions(cache.state)
    old_requests = _requests(call, queries, positions, call.slots.view(cache, places), slopes)
    own_requests = _requests(call, queries, positions, own, slopes)
    out, lse, _ = _attend_all(call, old_requests + own_requests, sinks)
    step = Context(lengths, new, length, num_slots, token_ids)
    kept = fresh = None
    if policy.needs_mass:
        # What was left out before the chunk, if it was attended to by places in the cache.
        gone = jnp.zeros_like(lengths) if places is None else lengths - _count(places)

        def true(where):
            return jnp.where(where < 0, EMPTY, where + gone.reshape(-1, *(1,) * (where.ndim - 1)))

        # Sums of attention may be averaged over the heads of a group at last; what else is measured is of the average.
        first, last = call.slots.of_group, lambda x: x
        if policy.measures_sums:
            first, last = last, first

        def measured(requests):
            function = lambda probs, q, kv: policy.measure(cache.state, first(probs), true(q), true(kv), step)
            parts = [_xla.measure(request, lse, function) for request in requests]
            return last(functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts))

        kept = call.slots.all_slots(cache, measured(old_requests))
        fresh = call.slots.all_new(measured(own_requests), length)
    state, slots = policy.absorb(cache.state, kept, fresh, step)
    cache = call.slots.write(cache, slots, key, value)
    cache = cache.replace(state=state, status=_scorable(policy, cache.status, lse))
    return out, cache.advance(new, ~fits, bad_count)


def _scorable(policy: Policy, status: Array, lse: Array) -> Array:
    """The status once attention was looked at: rows whose tokens cannot be scored are refused or marked."""
    if not policy.needs_mass:
        return status
    rows = jnp.any(jnp.isnan(lse), axis=(1, 2))
    if _checks.is_concrete(rows) and bool(jnp.any(rows)):
        raise RangeError(
            f"rows {np.nonzero(np.asarray(rows))[0].tolist()} have queries or keys that are NaN, so {policy} cannot "
            "tell what they attend to. Nothing was written."
        )
    return bits.mark(status, rows, bits.NONFINITE)


def _cross(call: _Call, query, key, value, cache: Cache, given, bad_count, sinks, slopes, token_ids):
    """Cross-attention: every real query attends to every token of the encoder."""
    del key, value, token_ids
    t = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(t < given[:, None], t, EMPTY)
    request = call.request(query, positions, call.slots.view(cache, None), slopes, mask=Mask(causal=False))
    out, _, _ = _attend_all(call, [request], sinks)
    nothing = jnp.zeros_like(given)
    return out, cache.advance(nothing, nothing > 0, bad_count)


def _requests(call: _Call, queries, positions, view: View, slopes, want_mass: bool = False) -> list[Request]:
    """What the queries ask of one view: one request, or two where the first tokens are seen from elsewhere."""
    (query, _), *near = queries
    if not near:
        return [call.request(query, positions, view, slopes, want_mass=want_mass)]
    ((sink_query, (num_sinks, sink_positions)),) = near
    # The mask may end before the sinks do: a window of the model that is smaller than the policy's has none.
    rest = dataclasses.replace(call.mask, begin=num_sinks, num_sinks=0, reach=None)
    reach = call.mask.reach if call.mask.num_sinks else call.mask.window
    sinks = Mask(causal=True, end=num_sinks, window=reach)
    sink_positions = jnp.where(positions >= 0, sink_positions, EMPTY)
    return [
        call.request(query, positions, view, slopes, mask=rest),
        call.request(sink_query, sink_positions, view, slopes, mask=sinks),
    ]


def _count(places: Array) -> Array:
    """int32 [B]: tokens kept."""
    return jnp.max(places, axis=(1, 2)) + 1


def _attend_all(call: _Call, requests: list[Request], sinks) -> tuple[Array, Array, Array | None]:
    """Attention over the union of what the requests see."""
    (out, lse, mass), *others = [api.attend(request, call.implementation) for request in requests]
    for other_out, other_lse, _ in others:
        out, lse = merge_states(out, lse, other_out, other_lse)
    out, lse = call.slots.joined(out, lse)
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks)
    return out, lse, mass


def _total(probs, q_positions, kv_positions):
    del q_positions, kv_positions
    return jnp.sum(probs, axis=2)


def _place_in_time(call: _Call, query, key, cache: Cache, given):
    """Positions the new tokens are seen at, rotation by them, and which rows can take their tokens at all.

    Returns:
        queries: [(query, None)], and (query, (n, positions)) for the first n tokens where the policy wants it;
        key, as it is stored; positions int32 [B, T], EMPTY for pads; new int32 [B], tokens appended; fits bool [B].
    """
    fits = _fits(cache, given, query.shape[1])
    new = jnp.where(fits, given, 0)
    t = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    # Pads take no position: 0 stands for theirs, and nothing comes of it.
    places = cache.policy.cache_positions(cache.state)
    before = cache.lengths if places is None else _count(places)
    seen_at = jnp.where(t < new[:, None], before[:, None] + t, 0)
    rotated = lambda x, where: x if call.rope is None else call.rope(x, where)
    queries: list[Any] = [(rotated(query, seen_at), None)]
    elsewhere = cache.policy.sink_positions(seen_at)
    if elsewhere is not None:
        queries.append((rotated(query, elsewhere[1]), elsewhere))
    positions = jnp.where(t < new[:, None], seen_at, EMPTY)
    return queries, rotated(key, seen_at) if call.key_rope is None else key, positions, new, fits


def _fits(cache: Cache, given: Array, length: int) -> Array:
    """bool [B]: whether the tokens can be appended; lengths are int32 and must not wrap."""
    room = cache.lengths <= _checks.INT32_MAX - given
    return room & cache.policy.fits(cache.state, Context(cache.lengths, given, length, cache.num_slots))


def _real_tokens(num_new: Any, batch: int, length: int) -> tuple[Array, Array]:
    """How many of the T tokens of each row are real, and which rows give an impossible number."""
    given = _checks.counts("num_new", length if num_new is None else num_new, batch, 0, length)
    bad = (given < 0) | (given > length)
    return jnp.where(bad, 0, given), bad


def _new_tokens(key, value, query, cache: Cache) -> tuple[Array, Array]:
    if key is None or value is None:
        raise ConfigError("key and value are needed; only a static cache (KVCache.from_encoder) goes without.")
    key, value = _checks.floating("key", key), _checks.floating("value", value)
    batch, length = query.shape[:2]
    heads = cache.num_kv_heads
    for name, x, features in (("key", key, cache.key_head_dim), ("value", value, cache.value_head_dim)):
        expected = (batch, length, heads, features)
        if x.shape != expected:
            raise ShapeError(f"{name} must be [B, T, K, H] = {expected} for this query and cache, got {x.shape}.")
    return key, value


def _token_ids(token_ids: Any, query: Array) -> Array:
    token_ids = _checks.int32("token_ids", token_ids)
    if token_ids.shape != query.shape[:2]:
        raise ShapeError(f"token_ids must be [B, T] = {query.shape[:2]}, got {token_ids.shape}.")
    return jnp.asarray(token_ids)


def _shift_left(x: Array, by: Array) -> Array:
    """Rotates each row of [B, T, ...] to the left by int32 [B] places."""
    length = x.shape[1]
    if length == 0:
        return x
    index = (jnp.arange(length, dtype=jnp.int32)[None] + by[:, None]) % length
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
