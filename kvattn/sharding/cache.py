"""Placing a cache on a mesh."""

import math
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kvattn import _checks, _target
from kvattn.cache import Cache
from kvattn.cache.axes import axis_of
from kvattn.cache.base import nbytes_of
from kvattn.cache.host import MEMORY_KIND
from kvattn.errors import ShardingError
from kvattn.sharding import scheme as schemes
from kvattn.sharding.batch import Batch
from kvattn.sharding.choose import choose
from kvattn.sharding.heads import Heads, without_copies
from kvattn.sharding.replicated import Replicated
from kvattn.sharding.scheme import Scheme
from kvattn.sharding.sequence import Sequence
from kvattn.sharding.split import Split, names, split_over

for _scheme in (Heads(), Batch(), Sequence(), Replicated()):
    schemes.register(_scheme)


def cache_sharding(
    cache: Cache, mesh: Mesh | AbstractMesh, *, by: str = "auto", axis: str = "model", data_axis: str | None = "data"
) -> Any:
    """Where each array of a cache lies: the cache's tree with a `jax.sharding.NamedSharding` at each leaf.

    For ``jax.jit(..., out_shardings=...)``, `jax.device_put`, checkpoints. The cache's arrays must divide as they are;
    `arrange` makes them.

    Args:
        cache: a `KVCache` or `PagedKVCache`, or its shapes (`jax.eval_shape`).
        mesh: the devices.
        by: "heads", "batch", "sequence", "replicated", or "auto": as `choose` says.
        axis: the mesh axis to split over.
        data_axis: the mesh axis that splits rows besides, where the mesh has it; None: rows are not split besides.

    Raises:
        ShardingError: an axis that the mesh does not have; rows, heads or slots that do not divide.
        UnsupportedError: a codec whose tokens cannot be split this way.
    """
    split = split_over(mesh, axis, data_axis)
    scheme = resolved(split, cache, by)
    scheme.check(split, cache, None)

    def sharding(x: Any, spec: PartitionSpec, axes: str) -> NamedSharding:
        on_host = cache.layout.on_host and axis_of("blocks", axes) is not None
        sharding = split.named(spec, x.ndim)
        return sharding.with_memory_kind(MEMORY_KIND) if on_host else sharding

    return jax.tree.map(sharding, cache, scheme.cache_specs(split, cache), cache.axes)


def shard_cache[C: Cache](
    cache: C,
    mesh: Mesh | AbstractMesh,
    *,
    by: str = "auto",
    axis: str = "model",
    data_axis: str | None = "data",
    num_kv_heads: int | None = None,
) -> C:
    """The cache on a mesh; from one placement to another too (prompts by heads, then decoding by batch).

    It is `arrange`, then `jax.device_put` (under jit a constraint, so that what is moved is the compiler's business:
    from "replicated" to "batch" nothing is, from "heads" to "batch" each device sends what it does not keep). A cache
    too large for one device is best made in place: ``jax.jit(lambda: shard_cache(KVCache.create(...), mesh))()``.

    Args:
        cache: anywhere.
        mesh: as in `cache_sharding`.
        by: likewise.
        axis: likewise.
        data_axis: likewise.
        num_kv_heads: K, of a cache whose heads `arrange` copied, to take the copies back. None: it has none.

    Raises:
        ShardingError, UnsupportedError: as `cache_sharding`.
        StaleCacheError: the cache was donated.
    """
    cache = cache.usable()
    split = split_over(mesh, axis, data_axis)
    cache = arrange(cache, mesh, by=by, axis=axis, data_axis=data_axis, num_kv_heads=num_kv_heads)
    return split.put(cache, resolved(split, cache, by).cache_specs(split, cache))


def arrange[C: Cache](
    cache: C,
    mesh: Mesh | AbstractMesh,
    *,
    by: str = "auto",
    axis: str = "model",
    data_axis: str | None = "data",
    num_kv_heads: int | None = None,
) -> C:
    """The cache with arrays that divide over the mesh, wherever they are now. Works under `jax.eval_shape`.

    By heads with fewer key/value heads than devices, each is stored n / K times, neighbours: the cache then has n. By
    sequence, blocks of slots are made longer. Else, and where all divides already, it is the cache itself.

    Args:
        cache: a `KVCache` or `PagedKVCache`.
        mesh: as in `cache_sharding`.
        by: likewise.
        axis: likewise.
        data_axis: likewise.
        num_kv_heads: as in `shard_cache`.

    Raises:
        ShardingError, UnsupportedError: as `cache_sharding`.
    """
    split = split_over(mesh, axis, data_axis)
    if num_kv_heads is not None and num_kv_heads != cache.num_kv_heads:
        _checks.integer("num_kv_heads", num_kv_heads, 1)
        if cache.num_kv_heads % num_kv_heads:
            raise ShardingError(
                f"{cache.num_kv_heads} key/value heads are no copies of {num_kv_heads}: give the number that the cache "
                "was created with."
            )
        if split.is_explicit:  # JAX cuts no axis there that is split: split the rows meanwhile, where they divide
            rows = Batch() if cache.batch_size % (split.num_data * split.size) == 0 else Replicated()
            cache = split.put(cache, rows.cache_specs(split, cache))
        cache = without_copies(cache, cache.num_kv_heads // num_kv_heads)
    scheme = resolved(split, cache, by)
    with _target.aimed_at(cache.platform or mesh):
        cache = scheme.arrange(split, cache)
    scheme.check(split, cache, None)
    return cache


def bytes_per_device(
    cache: Cache, mesh: Mesh | AbstractMesh, *, by: str = "auto", axis: str = "model", data_axis: str | None = "data"
) -> int:
    """Bytes of a cache on each device of the mesh, or its host: codes, scales, policy state, tables, all of it.

    Args:
        cache: a cache or its shapes, placed or not.
        mesh: as in `cache_sharding`.
        by: likewise.
        axis: likewise.
        data_axis: likewise.
    """
    split = split_over(mesh, axis, data_axis)
    scheme = resolved(split, cache, by)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
    cache = jax.eval_shape(lambda cache: arrange(cache, mesh, by=scheme.name, axis=axis, data_axis=data_axis), shapes)
    specs = scheme.cache_specs(split, cache)

    def size(x: jax.ShapeDtypeStruct, spec: PartitionSpec) -> int:
        shards = math.prod(split.mesh.shape[name] for entry in spec for name in names(entry))
        return nbytes_of(x) // shards

    return sum(jax.tree.leaves(jax.tree.map(size, cache, specs)))


def resolved(split: Split, cache: Cache, by: str, num_heads: int | None = None) -> Scheme:
    """The scheme that `by` means: "auto" is the one that the cache lies in, if that is known, else as `choose` says."""
    if by != "auto":
        return schemes.named(by)
    lies = placed_by(split, cache)
    if lies is not None:
        return lies
    heads = cache.num_kv_heads * split.size if num_heads is None else num_heads
    return schemes.named(choose(heads, cache.num_kv_heads, cache.batch_size // split.num_data, split.size))


def placed_by(split: Split, cache: Cache) -> Scheme | None:
    """The scheme that a cache is known to lie in; None: not known, or not split over the axis."""
    for scheme in schemes.known():
        specs = scheme.cache_specs(split, cache)
        leaves = zip(jax.tree.leaves(cache), jax.tree.leaves(specs), strict=True)
        if scheme.is_split and all(_lies(x, spec, split.axis) for x, spec in leaves):
            return scheme
    return None


def _lies(x: object, spec: PartitionSpec, axis: str) -> bool:
    """Whether an array is known to be split over the axis just where the spec is."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return False
    where = lambda spec: [i for i, entry in enumerate(spec) if axis in names(entry)]
    return where(sharding.spec) == where(spec)
