"""Where the results of a layer's matrix products lie on a mesh of Explicit axes.

In an Explicit mesh JAX refuses a product that contracts a split axis unless the call says how the
result is split. The answer is nearly always the same (the batch as the input has it, the features
as the kernel has them), so the layers work it out where the caller says nothing. On one device, or
in an Auto mesh, every function here returns None.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Num

from kvattn._typing import Array
from kvattn.attend.full import check_shapes
from kvattn.errors import ShardingError


def explicit_spec(x: Array) -> PartitionSpec | None:
    """How `x` [...] is split over Explicit mesh axes, one entry per axis of `x`; None outside such a mesh."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or not sharding.mesh.are_all_axes_explicit:
        return None
    return PartitionSpec(*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))


def on_mesh_of(x: Array, *entries: object) -> NamedSharding:
    """A placement on the mesh that `x` [...] is typed with, which need not be the current one."""
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*entries))


def typed(x: Array, kernel: Array) -> Array:
    """`x` [...] with a type that names the Explicit mesh of `kernel`, which need not be the current one; whole there.

    The transposes of products go by types, so the gradient of `x` needs it. Outside a trace there are none.
    """
    tracing = isinstance(x, Tracer) or isinstance(kernel, Tracer)
    if not tracing or explicit_spec(kernel) is None or explicit_spec(x) is not None:
        return x
    sharding: Any = (jax.typeof(kernel) if isinstance(kernel, Tracer) else kernel).sharding
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def product_spec(inputs: Array, kernel: Array, num_contracted: int) -> NamedSharding | None:
    """How ``inputs [..., *in] @ kernel [*in, *out]`` should be split; None when JAX infers it alone."""
    left, right = explicit_spec(inputs), explicit_spec(kernel)
    if left is None or right is None:
        return None
    batch, features = tuple(left[: inputs.ndim - num_contracted]), tuple(right[num_contracted:])
    taken = {name for entry in batch for name in _names(entry)}
    clash = any(name in taken for entry in features for name in _names(entry))
    contracted = tuple(left[inputs.ndim - num_contracted :]) + tuple(right[:num_contracted])
    if not clash and not any(entry is not None for entry in contracted):
        return None
    features = (None if taken.intersection(_names(entry)) else entry for entry in features)
    return on_mesh_of(kernel, *batch, *features)


Metadata = Mapping[str, Any]
"""What Flax keeps beside a parameter; here ``out_sharding`` and ``mesh``."""


@dataclasses.dataclass(frozen=True)
class GateMetadata:
    """The metadata of the gate's parameters: its kernel [D, N, Hv] or [D, N], and its bias."""

    kernel: Metadata
    bias: Metadata


@dataclasses.dataclass(frozen=True)
class HeadMetadata:
    """The metadata of an attention layer's parameters.

    Attributes:
        query: of the kernel [D, N, H].
        query_bias: [N, H].
        kv: of the kernels [D, K, H].
        kv_bias: [K, H].
        out: of the kernel [N, H, D].
        out_bias: [D].
        sinks: [N].
        relative_bias: [buckets, N].
        gates: of the kernel and the bias of each kind of gate.
    """

    query: Metadata
    query_bias: Metadata
    kv: Metadata
    kv_bias: Metadata
    out: Metadata
    out_bias: Metadata
    sinks: Metadata
    relative_bias: Metadata
    gates: Mapping[str, GateMetadata]


def head_metadata(
    mesh: Mesh | AbstractMesh, axis: str, num_heads: int, num_kv_heads: int, head_dim: int
) -> HeadMetadata:
    """Splits query heads over `axis`, and key/value heads where they divide; else these lie on every device.

    Query heads that do not divide (71 over 8) are split within: each device has some features of every head.

    Raises:
        ShardingError: no mesh, or one without the axis.
    """
    parts = axis_size(mesh, axis)
    by_head = axis if num_heads % parts == 0 else None
    within = axis if by_head is None and head_dim % parts == 0 else None
    kv = axis if num_kv_heads % parts == 0 else None

    def on(*entries: str | None) -> Metadata:
        return {"out_sharding": PartitionSpec(*entries), "mesh": mesh}

    return HeadMetadata(
        query=on(None, by_head, within),
        query_bias=on(by_head, within),
        kv=on(None, kv, None),
        kv_bias=on(kv, None),
        out=on(by_head, within, None),
        out_bias=on(),
        sinks=on(by_head),
        relative_bias=on(None, by_head),
        gates={
            "elementwise": GateMetadata(on(None, by_head, within), on(by_head, within)),
            "headwise": GateMetadata(on(None, by_head), on(by_head)),
        },
    )


@dataclasses.dataclass(frozen=True)
class LatentMetadata:
    """The metadata of those parameters of a latent attention layer that have heads.

    Attributes:
        up: of kernels [C, N, H], from latents (or features) to heads.
        out: of the kernel [N, Hv, D].
    """

    up: Metadata
    out: Metadata


def latent_metadata(mesh: Mesh | AbstractMesh | None, axis: str, num_heads: int) -> LatentMetadata:
    """Splits heads over `axis`, if they divide; else all is on every device. None: no mesh.

    Raises:
        ShardingError: a mesh without the axis.
    """
    if mesh is None:
        return LatentMetadata({}, {})
    heads = axis if num_heads % axis_size(mesh, axis) == 0 else None
    up, out = (PartitionSpec(*entries) for entries in ((None, heads, None), (heads, None, None)))
    return LatentMetadata({"out_sharding": up, "mesh": mesh}, {"out_sharding": out, "mesh": mesh})


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """How many devices a mesh has along an axis.

    Raises:
        ShardingError: no mesh, or one without the axis.
    """
    names = getattr(mesh, "axis_names", None)
    if names is None:
        raise ShardingError(f"mesh must be a jax.sharding.Mesh such as jax.make_mesh returns, got {mesh!r}.")
    if axis not in names:
        raise ShardingError(f"the mesh has no axis {axis!r}; it has {', '.join(map(repr, names))}: name one as axis.")
    return mesh.shape[axis]


def put(module: nnx.Module, mesh: Mesh | AbstractMesh) -> None:
    """Moves every parameter of a module to the mesh, split as its metadata says, whole where that says nothing."""
    explicit = mesh.are_all_axes_explicit

    def moved(leaf: nnx.Variable[Array]) -> nnx.Variable[Array]:
        x = leaf.get_value()
        sharding = NamedSharding(mesh, leaf.get_metadata().get("out_sharding", PartitionSpec()))
        if not isinstance(x, Tracer):
            return leaf.replace(jax.device_put(x, sharding))
        return leaf.replace(jax.reshard(x, sharding) if explicit else jax.lax.with_sharding_constraint(x, sharding))

    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    nnx.update(module, nnx.from_flat_state([(path, moved(leaf)) for path, leaf in flat]))


def by_heads(x: Num[Array, "B T heads H"], mesh: Mesh | AbstractMesh, axis: str) -> Num[Array, "B T heads H"]:
    """Tokens on a mesh of Auto axes, held where a kernel whose heads are split puts them."""
    if mesh.are_all_axes_explicit or x.shape[2] % axis_size(mesh, axis):
        return x
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None, axis, None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def whole_heads(x: Num[Array, "B T heads H"]) -> Num[Array, "B T heads H"]:
    """Tokens with all features of a head together, where an Explicit mesh splits them."""
    spec = explicit_spec(x)
    return x if spec is None or spec[3] is None else jax.reshard(x, on_mesh_of(x, *spec[:3], None))


def heads_as(x: Num[Array, "B T N _"], kernel: Num[Array, "_ N H"]) -> Num[Array, "B T N _"]:
    """Tokens whose heads lie on an Explicit mesh where those of a kernel do, each of them whole."""
    spec, heads = explicit_spec(x), explicit_spec(kernel)
    if spec is None or heads is None:
        return x
    return jax.reshard(x, on_mesh_of(x, *spec[:2], heads[1], None))


def beside(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Splits key and value [..., S, K, H] over an Explicit mesh as the query [..., T, N, H] is: rows and heads alike.

    Heads that do not divide are repeated until they do; each device then holds the heads its queries read. One
    key/value head for 32 query heads on 4 devices becomes 4.
    """
    spec = explicit_spec(query)
    if spec is None:
        return key, value
    check_shapes(query, key, value)
    *batch, _, heads, _ = spec
    shards = math.prod(jax.typeof(query).sharding.mesh.shape[name] for name in _names(heads))
    repeats = math.lcm(key.shape[-2], shards) // key.shape[-2]

    def moved(x: Array) -> Array:  # [..., S, K, H]
        own = explicit_spec(x)
        if own is None:
            return x
        if repeats > 1:
            x = jnp.repeat(jax.reshard(x, on_mesh_of(x, *batch, own[-3], None, own[-1])), repeats, axis=-2)
        return jax.reshard(x, on_mesh_of(x, *batch, own[-3], heads, own[-1]))

    return moved(key), moved(value)


def head_axis(kernel: Array) -> Any:
    """The mesh axis over which a key kernel [D, K, H] splits its heads, for the cache to follow; None if whole."""
    spec = explicit_spec(kernel)
    if spec is None and isinstance(kernel, jax.Array) and not isinstance(kernel, Tracer):
        sharding = kernel.sharding
        spec = sharding.spec if isinstance(sharding, NamedSharding) else None
    return spec[-2] if spec is not None and len(spec) == kernel.ndim else None


def cache_metadata(given: Any, kernel: Array, rank: int) -> dict[str, Any]:
    """The `nnx.Cache` metadata that splits a cache [..., L, K, H] as `given`, or as the key kernel splits its heads."""
    mesh = None
    if isinstance(given, NamedSharding):
        given, mesh = given.spec, given.mesh
    if given is None:
        axis = head_axis(kernel)
        if axis is None:
            return {}
        given = PartitionSpec(*(None,) * (rank - 2), axis, None)
    if len(given) > rank:
        raise ShardingError(f"cache_sharding {given} has more entries than the cache has axes ({rank}).")
    if jax.sharding.get_abstract_mesh().empty:
        if mesh is None and not isinstance(kernel, Tracer) and isinstance(kernel.sharding, NamedSharding):
            mesh = kernel.sharding.mesh
        if mesh is None:
            raise ShardingError(
                f"cache_sharding {given} names the axes of no mesh: call inside jax.set_mesh(mesh), "
                "or give a jax.NamedSharding."
            )
        return {"out_sharding": given, "mesh": mesh}
    return {"out_sharding": given}


def like(x: Array, reference: Array) -> Array:
    """Moves `x` [...] to the split of `reference` (same rank); does nothing outside an Explicit mesh."""
    spec = explicit_spec(reference)
    if spec is None or spec == explicit_spec(x):
        return x
    return jax.reshard(x, on_mesh_of(reference, *spec))


def like_rows(x: Array, reference: Array) -> Array:
    """Moves the rows of `x` [B, ...] to where those of `reference` are on an Explicit mesh; the rest of it is whole."""
    if explicit_spec(x) is None:
        return x
    spec = explicit_spec(reference)
    return jax.reshard(x, on_mesh_of(x, None if spec is None else spec[0]))


def like_batch(x: Array, reference: Array) -> Array:
    """Moves the axes of `x` [...] (each 1 or that of `reference`) to where those of `reference` are; the rest is whole.

    Does nothing outside an Explicit mesh.
    """
    spec = explicit_spec(reference)
    if spec is None:
        return x
    entries = (entry if size > 1 else None for entry, size in zip(spec, x.shape, strict=True))
    return jax.reshard(x, on_mesh_of(reference, *entries))


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
