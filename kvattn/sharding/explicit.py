"""The step where its arguments lie: `kvattn.cached_attention`.

Rows and key/value heads do not depend on each other, so a step whose arrays are split by them needs no communication at
all. Explicit sharding refuses the scatter and the loop of the step all the same; `jax.shard_map` over exactly the axes
that the arguments are split by says what is meant. Arrays on Auto meshes need nothing: there the compiler splits the
step.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from kvattn._typing import Array
from kvattn.attend import api
from kvattn.attend.prepare import prepared
from kvattn.attend.step import Step
from kvattn.attend.tokens import NewTokens, PerHead
from kvattn.cache import Cache
from kvattn.cache.axes import axis_of
from kvattn.errors import ShardingError
from kvattn.positions import RoPE, Temperature
from kvattn.sharding.pages import with_own_pages
from kvattn.sharding.scheme import TokenSpecs
from kvattn.sharding.split import MeshAxes, names, specs_of


def cached_attention[C: Cache](
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"] | None,
    value: Float[ArrayLike, "B T K Hv"] | None,
    cache: C,
    *,
    num_new: ArrayLike | Sequence[int] | None = None,
    padding: str = "right",
    rope: RoPE | None = None,
    window: int | None = None,
    chunk: int | None = None,
    scale: ArrayLike | None = None,
    softcap: float | None = None,
    sinks: Float[ArrayLike, " N"] | None = None,
    alibi_slopes: Float[ArrayLike, " N"] | None = None,
    relative_bias: Float[ArrayLike, "N distances"] | None = None,
    temperature: Temperature | None = None,
    token_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]] | None = None,
    append: bool = True,
    implementation: api.Implementation = None,
) -> tuple[Float[Array, "B T N Hv"], C]:
    """Appends T new tokens to a cache and attends: T = 1 is decoding, T > 1 a prompt or a chunk of one.

    Every new token attends to the tokens the cache keeps and to those of the chunk up to itself, at their true
    positions: `cache.lengths` and following. Cutting a sequence into other chunks changes nothing. Donate the cache
    (``jax.jit(..., donate_argnames="cache")``) and it is updated in place.

    Args:
        query: float [B, T, N, H].
        key: float [B, T, K, H], N a multiple of K; query head n reads head n // (N // K). None, with `value`: nothing
            is appended. For a static cache (`KVCache.from_encoder`) every query attends to all its tokens; for any
            other the queries are those of its last tokens, `num_new` of T, which another layer appended (below).
        value: float [B, T, K, Hv]. None for a cache whose values are in its keys (``values_in_keys=True``).
        cache: what was kept so far, a `KVCache` or a `PagedKVCache`.
        num_new: int32 [B], how many of the T tokens are real. None: all.
        padding: where the other tokens lie, "right" (after the real ones) or "left". Pads are not appended, take no
            position, and come out as zeros.
        rope: rotates query and key at the positions the policy wants. Where values are in the keys it must leave them
            alone: ``RoPE(H, rotary_begin=Hv)``.
        window: attend to the last `window` tokens only, the query's own included; with a policy's window, the
            smaller, for its sinks too (by the positions they are seen from).
        chunk: attend within chunks of so many positions only: the query of position t sees chunk * (t // chunk) to t.
        scale: factor of the scores. None: 1/sqrt(H).
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: float [N], a learned logit per head that joins the softmax sum only.
        alibi_slopes: float [N]: adds slope * (key position - query position) to the scores.
        relative_bias: float [N, distances]: adds what stands there for the distance from key to query, the last number
            for all larger ones. `kvattn.RelativeBuckets` makes it of T5's table.
        temperature: multiplies queries by a factor of their true positions.
        token_ids: int32 [B, T], for policies that look at tokens.
        append: False: keys and values are attended to as in any step, but the cache comes back without them.
        implementation: "reference", "xla", "mosaic_gpu", "mosaic_tpu", a sequence of these to try in order, or None for
            the best that works.

    Returns:
        out [B, T, N, Hv] in query's dtype, and the new cache. Products are taken in the wider of query and cache dtype
        and accumulated in float32.

    Layers that share a cache (YOCO, arXiv:2405.05254; CLA, arXiv:2405.12981): one of them owns it and appends, the
    others call this with its new cache, and key and value None, each with queries of its own. The cache comes back as
    it was. What these queries attend to is what the policy keeps once the owner's step is done: policies that go by
    attention have then let a token go, and count the attention of the owner's queries only. Where T > 1 tokens came at
    once and some are gone that the first of them see (a ring has turned, a budget was cut) that is refused; pass the
    tokens' keys and values with the cache that the owner was given, and ``append=False``: that attends to just what the
    owner's queries attend to.

    Raises:
        ShapeError, DTypeError, RangeError, ConfigError: arguments that do not fit.
        UnsupportedError: a shared cache has let go of tokens that the queries attend to. Under jit the row's output is
            zeros, and `cache.check()` raises.
        CapacityError: the tokens of a row do not fit. Nothing is written. Under jit the row's whole chunk is dropped,
            its output is zeros, and `cache.check()` raises.
        UnsupportedError: the named implementation cannot do this.
        StaleCacheError: the cache was donated to an earlier step.
    """
    step, new, per_head, cache = prepared(
        query,
        key,
        value,
        cache,
        num_new=num_new,
        padding=padding,
        rope=rope,
        window=window,
        chunk=chunk,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
        temperature=temperature,
        token_ids=token_ids,
        append=append,
        implementation=implementation,
    )
    return step(new, per_head, cache) if step.is_empty else by_shard(step, new, per_head, cache)


def by_shard[C: Cache](step: Step, new: NewTokens, per_head: PerHead, cache: C) -> tuple[Float[Array, "B T N Hv"], C]:
    """Runs a step, once per shard where its arguments lie on an Explicit mesh.

    Rows split as those of the queries, heads as those of new keys and of queries. The cache is brought to that
    placement, so one that was created without sharding takes it on at the first step.

    Raises:
        ShardingError: query heads are split and the key/value heads cannot be.
    """
    stored, axes = next(iter(cache.keys.values())), next(iter(cache.axes.keys.values()))
    mesh, rows, q_heads = _placement(new.query, 0, 2)
    if mesh is None:
        mesh, rows, _ = _placement(stored, axis_of("rows", axes), None)
        if mesh is None:
            return step(new, per_head, cache)
    kv_heads = _axes(stored, axis_of("heads", axes)) if new.key is None else _axes(new.key, 2)
    shards, num_kv_heads = math.prod(mesh.shape[name] for name in names(q_heads)), cache.num_kv_heads
    if q_heads != kv_heads and num_kv_heads > 1:
        if num_kv_heads % shards:
            raise ShardingError(
                f"the {new.query.shape[2]} query heads are split over {shards} devices (axes {q_heads}), which the "
                f"{num_kv_heads} key/value heads do not divide into: split the rows of the batch instead, or "
                "replicate the query heads."
            )
        kv_heads = q_heads
    if num_kv_heads == 1:
        kv_heads = None
    if rows is not None and axis_of("rows", axes) is None:
        raise ShardingError(
            f"the rows of the queries are split over {rows}, but the sequences of a PagedKVCache share one pool: "
            "split by heads, or give every device pages of its own (kvattn.sharding.cached_attention)."
        )

    new = new.concluded()
    specs = TokenSpecs(P(rows, None, q_heads, None), P(rows, None, kv_heads, None), P(rows), P(q_heads))
    in_specs = (*specs.of(new, per_head), specs_of(cache, rows=rows, heads=kv_heads))
    args = jax.tree.map(lambda x, spec: jax.reshard(x, jax.NamedSharding(mesh, spec)), (new, per_head, cache), in_specs)
    # Unchecked: NaN in one head marks the rows of its device only (`kvattn.cache.status`), with no word to the others.
    run = jax.shard_map(
        with_own_pages(step, None), mesh=mesh, in_specs=in_specs, out_specs=(specs.query, in_specs[2]), check_vma=False
    )
    return run(*args)


def _placement(
    x: Shaped[Array, "..."], row_axis: int | None, head_axis: int | None
) -> tuple[AbstractMesh | None, MeshAxes, MeshAxes]:
    """The Explicit mesh of an array and the axes its rows and heads are split by; (None, ...) if there is none."""
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if mesh.empty or not mesh.are_all_axes_explicit or all(axes is None for axes in sharding.spec):
        return None, None, None
    return mesh, _axes(x, row_axis), _axes(x, head_axis)


def _axes(x: Shaped[Array, "..."], axis: int | None) -> MeshAxes:
    """The mesh axes that an axis of an array is split by."""
    spec = jax.typeof(x).sharding.spec
    return None if axis is None or axis >= len(spec) else spec[axis]
