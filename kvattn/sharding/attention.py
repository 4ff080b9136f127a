"""The step over a cache that is split over devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend import api
from kvattn.attend.step import Step, prepared
from kvattn.cache import Cache
from kvattn.errors import ShapeError, ShardingError
from kvattn.pallas.interpreter import interpreted
from kvattn.positions import RoPE
from kvattn.sharding import batch
from kvattn.sharding.cache import SCHEMES, check_divides, placed_by, resolved
from kvattn.sharding.filling import filled_up
from kvattn.sharding.pages import check_tables
from kvattn.sharding.place import Place, place_of


def cached_attention(
    query: Array,
    key: Array | None,
    value: Array | None,
    cache: Cache,
    *,
    mesh: Any,
    by: str = "auto",
    axis: str = "model",
    data_axis: str | None = "data",
    num_heads: int | None = None,
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
) -> tuple[Array, Any]:
    """`kvattn.cached_attention` over a cache that is split over a mesh axis, with the same results.

    ======================  ==========================  =======================  ==================================
    by                      query and out lie           a device reads           exchanged in a step
    ======================  ==========================  =======================  ==================================
    ``"heads"``             split by heads              its heads                nothing
    ``"batch"``             split by heads              its rows                 2 all-to-alls: queries and outputs
    ``"sequence"``          whole                       its slots of every row   all-reduces: maxima, sums, outputs
    ``"replicated"``        split by heads              all of one head          nothing
    ======================  ==========================  =======================  ==================================

    Rows are split over `data_axis` besides. Arguments that lie elsewhere are brought there; so are new keys and values:
    whole for "sequence", "replicated", and "batch" (where each device then takes its rows), by heads for "heads". Query
    heads that do not divide (71 over 8) are split within by "batch", if H does: queries and out have some features of
    every head on each device, as a projection does whose kernel [D, N, H] is split along H. Otherwise they are filled
    up, and out, which cannot be split then, is whole; or pass 72 heads and ``num_heads=71``.

    Arguments are checked as `kvattn.cached_attention` does. Kernels run: inside, every mesh axis is `jax.shard_map`'s.
    What only a device sees (a token that cannot be encoded or scored) sets a status bit also outside jit. Donate the
    cache and every device updates its part in place.

    Args:
        query: float [B, T, N, H].
        key: float [B, T, K, H]; None for a static cache. K heads also where `shard_cache` made copies in the cache.
        value: float [B, T, K, Hv].
        cache: from `shard_cache`. One that lies on a single device is split by the first step, if it divides.
        mesh: of Explicit or Auto axes.
        by: as in `shard_cache`; "auto" is how the cache lies. Inside jit on Auto axes that cannot be seen: there "auto"
            is what `choose` says for the cache's shape, and the compiler moves a cache that lies otherwise.
        axis: the mesh axis it is split over.
        data_axis: the mesh axis that splits rows besides, where the mesh has it.
        num_heads: N, where `query` has more heads than that so that they divide: the last ones come out as zeros. None:
            all are real.
        num_new: this and all that follow as in `kvattn.cached_attention`.
        padding: see there.
        rope: see there.
        window: see there.
        scale: see there.
        softcap: see there.
        sinks: see there.
        alibi_slopes: see there.
        token_ids: see there.
        implementation: see there.

    Returns:
        out [B, T, N, Hv], and the new cache.

    Raises:
        ShardingError: an axis that is not there; rows, heads or slots that do not divide; a cache on another mesh, or
            split another way.
        RangeError: pages of another device than the row's. Under jit: status bit.
        Else as `kvattn.cached_attention`.
    """
    place = place_of(mesh, axis, data_axis)
    cache = cache.usable() if isinstance(cache, Cache) else cache
    place.check_mesh("the cache", cache)
    if getattr(query, "ndim", 0) == 4:
        num_heads = query.shape[2] if num_heads is None else _real_heads(num_heads, query.shape[2])
    by = resolved(place, cache, by, num_heads)
    known = placed_by(place, cache) if place.size > 1 else by
    if known not in (None, by):
        raise ShardingError(
            f'the cache is split by {known}, not by {by}: kvattn.sharding.shard_cache(cache, mesh, by="{by}") moves '
            "it, once; a step never does."
        )
    check_divides(place, cache, by, num_heads)
    copies = _copies(key, cache, place, by)
    key, value = (_copied(x, copies) if by == "heads" else x for x in (key, value))
    step, args = prepared(
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
        implementation=tuple(implementation) if isinstance(implementation, list) else implementation,
        num_heads=num_heads,
    )
    if step.is_empty:
        return step(*args)
    check_tables(cache, args[4], place.num_data * (place.size if by == "batch" else 1))
    assert num_heads is not None
    within = _split_within(by, place, query, cache)
    plan = _Plan(by, place, step, num_heads, copies, within, interpreted())
    if by != "sequence" and not within:
        args = filled_up(args, -(-query.shape[2] // place.size) * place.size)
    if place.is_explicit or not isinstance(args[0], Tracer):
        args = place.put(args, plan.specs(args))
    out, cache = _run(plan, args)
    if out.shape[2] != query.shape[2]:
        out = place.put(out, jax.P(place.data)) if place.is_explicit else out
        out = out[:, :, : query.shape[2]]
    return out, cache


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is compiled, apart from shapes. Hashable, so that calls outside jit compile once."""

    by: str
    place: Place
    step: Step
    num_heads: int
    copies: int
    within: bool
    interpreted: bool

    def specs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The placements of the arguments."""
        scheme = SCHEMES[self.by]
        query, key, row, head = scheme.token_specs(self.place)
        if self.within:
            query = batch.split_within(self.place)
        cache = scheme.cache_specs(self.place, args[3])
        specs = (query, key, key, cache, row, row, head, head, row)
        return tuple(None if x is None else spec for x, spec in zip(args, specs, strict=True))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(plan: _Plan, args: tuple[Any, ...]) -> tuple[Array, Cache]:
    """The step, once per device."""
    place, specs = plan.place, plan.specs(args)
    if plan.within:
        local = batch.local(place, plan.step, plan.num_heads, plan.copies, within=True)
    else:
        local = SCHEMES[plan.by].local(place, plan.step, plan.num_heads, plan.copies)
    out_specs, checked = (specs[0], specs[3]), SCHEMES[plan.by].is_checked(args[3])
    return jax.shard_map(local, mesh=place.mesh, in_specs=specs, out_specs=out_specs, check_vma=checked)(*args)


def _split_within(by: str, place: Place, query: Array, cache: Cache) -> bool:
    """Whether each device has some features of every query head, because the heads do not divide."""
    sizes = (cache.key_head_dim, cache.value_head_dim)
    return by == "batch" and query.shape[2] % place.size > 0 and not any(size % place.size for size in sizes)


def _copies(key: Any, cache: Cache, place: Place, by: str) -> int:
    """On how many devices each key/value head is, together with some of its query heads."""
    if by == "replicated":
        return place.size
    heads = cache.num_kv_heads
    if by != "heads" or getattr(key, "ndim", 0) != 4 or heads != place.size or not 0 < key.shape[2] < heads:
        return 1
    return 1 if heads % key.shape[2] else heads // key.shape[2]


def _copied(x: Any, copies: int) -> Any:
    """New keys or values [B, T, K, H] with the copies that `arrange` made of the cache's heads."""
    return x if x is None or copies == 1 else jnp.repeat(x, copies, axis=2)


def _real_heads(num_heads: Any, given: int) -> int:
    if _checks.integer("num_heads", num_heads, 1) > given:
        raise ShapeError(f"query has {given} heads, fewer than num_heads {num_heads}.")
    return int(num_heads)
