"""The step over a cache that is split over devices."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend import api
from kvattn.attend.prepare import prepared, usable
from kvattn.attend.step import Step, needing_pages
from kvattn.attend.tokens import NewTokens, PerHead
from kvattn.cache import Cache
from kvattn.errors import ShapeError, ShardingError
from kvattn.pallas.interpreter import interpreted
from kvattn.positions import RoPE, Temperature
from kvattn.sharding.cache import placed_by, resolved
from kvattn.sharding.filled import filled_up
from kvattn.sharding.pages import check_tables
from kvattn.sharding.scheme import Scheme
from kvattn.sharding.split import Split, split_over


def cached_attention[C: Cache](
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"] | None,
    value: Float[ArrayLike, "B T K Hv"] | None,
    cache: C,
    *,
    mesh: Mesh | AbstractMesh,
    by: str = "auto",
    axis: str = "model",
    data_axis: str | None = "data",
    num_heads: int | None = None,
    num_new: ArrayLike | Sequence[int] | None = None,
    padding: str = "right",
    rope: RoPE | None = None,
    window: int | None = None,
    chunk: int | None = None,
    scale: ArrayLike | None = None,
    softcap: float | None = None,
    sinks: Float[ArrayLike, " heads"] | None = None,
    alibi_slopes: Float[ArrayLike, " heads"] | None = None,
    relative_bias: Float[ArrayLike, "heads distances"] | None = None,
    temperature: Temperature | None = None,
    token_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]] | None = None,
    append: bool = True,
    implementation: api.Implementation = None,
) -> tuple[Float[Array, "B T N Hv"], C]:
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

    Where rows are split, by batch or over `data_axis`, each reads by itself what others share (`PagedKVCache.shared`).

    Arguments are checked as `kvattn.cached_attention` does. Kernels run: inside, every mesh axis is `jax.shard_map`'s.
    What only a device sees (a token that cannot be encoded or scored) sets a status bit also outside jit. Donate the
    cache and every device updates its part in place.

    Args:
        query: float [B, T, N, H].
        key: float [B, T, K, H]; None for a static cache, and for the cache of another layer, as there. K heads also
            where `shard_cache` made copies in the cache.
        value: float [B, T, K, Hv]; None likewise, and where values are in the keys.
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
        chunk: see there.
        scale: see there.
        softcap: see there.
        sinks: see there.
        alibi_slopes: see there.
        relative_bias: see there.
        temperature: see there.
        token_ids: see there.
        append: see there.
        implementation: see there.

    Returns:
        out [B, T, N, Hv], and the new cache.

    Raises:
        ShardingError: an axis that is not there; rows, heads or slots that do not divide; a cache on another mesh, or
            split another way.
        RangeError: pages of another device than the row's. Under jit: status bit.
        Else as `kvattn.cached_attention`.
    """
    split = split_over(mesh, axis, data_axis)
    cache = usable(cache)
    split.check_mesh("the cache", cache)
    shape = getattr(query, "shape", ())
    if len(shape) == 4:
        num_heads = shape[2] if num_heads is None else _real_heads(num_heads, shape[2])
    scheme = resolved(split, cache, by, num_heads)
    lies = placed_by(split, cache) if split.size > 1 else scheme
    if lies not in (None, scheme):
        raise ShardingError(
            f"the cache is split by {lies.name}, not by {scheme.name}: kvattn.sharding.shard_cache(cache, mesh, "
            f'by="{scheme.name}") moves it, once; a step never does.'
        )
    scheme.check(split, cache, num_heads)
    shape = getattr(key, "shape", ())
    given = shape[2] if len(shape) == 4 else cache.num_kv_heads
    copies = scheme.copies(split, cache, given)
    step, new, per_head, cache = prepared(
        query,
        scheme.with_copies(key, copies),
        scheme.with_copies(value, copies),
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
        implementation=tuple(implementation) if isinstance(implementation, list) else implementation,
        num_heads=num_heads,
    )
    new = new.concluded()
    if step.is_empty:
        return step(new, per_head, cache)
    shared = cache.shared if scheme.row_parts(split) > 1 else None
    if shared is not None:  # a span's members may be other devices' rows: here each reads by itself
        cache = cache.replace(shared=None)
    check_tables(cache, needing_pages(new, cache), scheme.row_parts(split))
    assert num_heads is not None
    given = new.query.shape[2]
    scheme = scheme.for_heads(split, cache, given)
    if scheme.fills_heads:
        new, per_head = filled_up(new, per_head, -(-given // split.size) * split.size)
    program = _Program(scheme, split, step, num_heads, copies, interpreted())
    args = new, per_head, cache
    if split.is_explicit or not isinstance(new.query, Tracer):
        args = split.put(args, program.specs(*args))
    out, cache = _run(program, *args)
    cache = cache if shared is None else cache.replace(shared=shared)
    if out.shape[2] != given:
        out = split.put(out, jax.P(split.data)) if split.is_explicit else out
        out = out[:, :, :given]
    return out, cache


@dataclasses.dataclass(frozen=True)
class _Program:
    """What is compiled, apart from shapes. Hashable, so that calls outside jit compile once."""

    scheme: Scheme
    split: Split
    step: Step
    num_heads: int
    copies: int
    interpreted: bool

    def specs(self, new: NewTokens, per_head: PerHead, cache: Cache) -> tuple[NewTokens, PerHead, Cache]:
        """The placements of the arguments."""
        tokens, heads = self.scheme.token_specs(self.split).of(new, per_head)
        return tokens, heads, self.scheme.cache_specs(self.split, cache)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run[C: Cache](
    program: _Program, new: NewTokens, per_head: PerHead, cache: C
) -> tuple[Float[Array, "B T N Hv"], C]:
    """The step, once per device."""
    scheme, specs = program.scheme, program.specs(new, per_head, cache)
    local = scheme.local(program.split, program.step, program.num_heads, program.copies)
    return jax.shard_map(
        local,
        mesh=program.split.mesh,
        axis_names=program.split.own_axes,
        in_specs=specs,
        out_specs=(specs[0].query, specs[2]),
        check_vma=scheme.is_checked(cache),
    )(new, per_head, cache)


def _real_heads(num_heads: int, given: int) -> int:
    if _checks.integer("num_heads", num_heads, 1) > given:
        raise ShapeError(f"query has {given} heads, fewer than num_heads {num_heads}.")
    return int(num_heads)
