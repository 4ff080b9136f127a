"""`convert_to_gqa`: a multi-head checkpoint becomes a grouped-query one by averaging key and value heads.

Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
(arXiv:2305.13245), section 2.1. The mean did better there than the first head of each group or random weights
(figure 4).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.meta import AxisMetadata
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from kvattn import _checks
from kvattn.errors import ConfigError, DTypeError, ShapeError, UnsupportedError
from kvattn.families.config import DecoderConfig
from kvattn.layers import placement
from kvattn.layers.originals import NNXAttention

Path = tuple[str, ...]
Leaf = np.ndarray | jax.Array | jax.ShapeDtypeStruct

KERNELS = (("query", "kernel"), ("key", "kernel"), ("value", "kernel"), ("out", "kernel"))
CACHE_NAMES = ("cached_key", "cached_value", "cache_index")
NORMS = ("query_ln", "key_ln")


def convert_to_gqa[T](params_or_model: T, num_kv_heads: int) -> T:
    """Gives every attention layer `num_kv_heads` key/value heads: each is the mean of the heads it replaces.

    Query head n then reads head ``n // (N // num_kv_heads)``, so heads are averaged in blocks of neighbours. Kernels
    and biases of keys and values change; everything else stays. The result is the start of a short training
    (uptraining): where the heads of a block differ, it is a worse model than the one it came from.

    Means are taken in float32 (float64 of float64) and cast back. A head axis that is split over a mesh stays split
    where the new count divides, and is whole on every device otherwise. Arrays that do not change are shared with
    what was given, not copied: donate one of the two only. An optimizer's moments are no parameters: leave them out of
    the tree, where they would be averaged as well, and begin with new ones.

    Args:
        params_or_model: what holds attention layers of K heads, K a multiple of `num_kv_heads`. Either

            * an NNX module: a `kvattn.models.Decoder`, a layer of `kvattn.layers` or `flax.nnx.MultiHeadAttention`, or
              any module that has such layers. It is left as it is;
            * or a tree of parameters: of Linen, with or without the level ``params``, an `nnx.State`, or any pytree of
              NumPy arrays, JAX arrays or `jax.ShapeDtypeStruct`, nested or with joined names ("a/b" or "a.b").
              Attention layers are the subtrees with ``query``, ``key``, ``value`` and ``out``, whose kernels are
              [D, N, H], [D', K, H], [D', K, H'] and [N, H', D]; all four may have the same further axes in front, as
              layers stacked by `flax.linen.scan` have.
        num_kv_heads: heads left in every layer; 1 makes it multi-query attention.

    Returns:
        the same kind of thing. A decoder's `config` has the new count, and layers their new `num_kv_heads`.

    Raises:
        DTypeError: a `num_kv_heads` that is no int, kernels that are no floats, something that is no module or tree.
        ConfigError: a head count that `num_kv_heads` does not divide; no attention layer; Flax's decode cache.
        ShapeError: projections of an attention layer that do not fit each other.
        UnsupportedError: keys that are normalised head by head (the mean of normalised keys is not the normalised
            mean); values that are the keys; parameters of the key and value projections that are neither kernel nor
            bias; latent attention; in a module, attention layers of classes that are not Flax's or kvattn's.

    Example:
        >>> from flax import nnx
        >>> from kvattn.layers import MultiHeadAttention
        >>> from kvattn.models import convert_to_gqa
        >>> layer = MultiHeadAttention(num_heads=8, in_features=64, rngs=nnx.Rngs(0))
        >>> convert_to_gqa(layer, 2).key.kernel.shape
        (64, 2, 8)
        >>> convert_to_gqa(nnx.state(layer), 1)["value"]["kernel"].shape
        (64, 1, 8)
    """
    num_kv_heads = _checks.integer("num_kv_heads", num_kv_heads, 1)
    if isinstance(params_or_model, nnx.Module):
        return _convert_module(params_or_model, num_kv_heads)
    return _convert_tree(params_or_model, num_kv_heads)


def _convert_module[M: nnx.Module](given: M, num_kv_heads: int) -> M:
    model = nnx.clone(given)
    modules = {_names(path): module for path, module in nnx.iter_modules(model)}
    layers = {path: module for path, module in modules.items() if isinstance(module, NNXAttention)}
    leaves = _leaves(nnx.state(model))
    _refuse_latent(leaves)
    for path in _attention_layers(leaves):
        if path not in layers:
            raise UnsupportedError(
                f"{_where(path)} is no flax.nnx.MultiHeadAttention, so where it keeps its head counts is unknown: "
                "convert nnx.state(model), and merge the result with a module made for the new count."
            )
    if not layers:
        raise _no_attention(given)
    for path, layer in layers.items():
        if any(getattr(layer, name, None) is not None for name in CACHE_NAMES):
            raise _holds_cache(path)
        if not getattr(layer, "shares_kv", False):
            _changes(path, _leaves(nnx.state(layer)), num_kv_heads)
    for layer in layers.values():
        layer.num_kv_heads = num_kv_heads
        for projection in (layer.key, layer.value):
            if projection is None:  # it has another layer's keys and values
                continue
            projection.out_features = (num_kv_heads, *projection.out_features[1:])
            for variable in (projection.kernel, projection.bias):
                if variable is not None:  # Layers may share one: the second time nothing is left to do.
                    variable.set_value(_pool(variable.get_value(), num_kv_heads))
                    _settle(variable)
    for module in modules.values():
        config = getattr(module, "config", None)
        if isinstance(config, DecoderConfig):
            module.config = dataclasses.replace(config, num_kv_heads=num_kv_heads)  # pyright: ignore
    return model


def _convert_tree[T: PyTree](tree: T, num_kv_heads: int) -> T:
    flat, structure = jax.tree.flatten_with_path(tree, is_leaf=_is_box)
    if structure == jax.tree.structure(0):
        raise DTypeError(
            f"convert_to_gqa takes an NNX module or a tree of parameters, got {type(tree).__name__}. Of a Linen module "
            "give the parameters, what init returns."
        )
    leaves = _leaves(tree)
    for path in leaves:
        if path and path[-1] in CACHE_NAMES:
            raise _holds_cache(path[:-1])
    _refuse_latent(leaves)
    layers = _attention_layers(leaves)
    if not layers:
        raise _no_attention(tree)
    changes = {path for prefix, layer in layers.items() for path in _changes(prefix, layer, num_kv_heads)}

    def converted(keys: Iterable[object], leaf: object) -> object:
        return _rewrap(leaf, _pool(_unwrap(leaf), num_kv_heads)) if _path(keys) in changes else leaf

    return jax.tree.unflatten(structure, [converted(keys, leaf) for keys, leaf in flat])


# Finding attention layers and refusing those that cannot be converted. ------------------------------


def _leaves(tree: PyTree) -> dict[Path, object]:
    """The arrays by path, without the boxes Flax puts around them."""
    flat, _ = jax.tree.flatten_with_path(tree, is_leaf=_is_box)
    return {_path(keys): _unwrap(leaf) for keys, leaf in flat}


def _path(keys: Iterable[object]) -> Path:
    """A pytree path as names; names that were joined (``a/b``, ``a.b``, tuples) are taken apart."""
    return _names(next(getattr(k, kind) for kind in ("key", "name", "idx") if hasattr(k, kind)) for k in keys)


def _names(keys: Iterable[object]) -> Path:
    parts = (part for key in keys for part in (key if isinstance(key, tuple) else (key,)))
    return tuple(name for part in parts for name in re.split(r"[./]", str(part)))


def _refuse_latent(leaves: Iterable[Path]) -> None:
    """Refuses trees with a layer of latent attention: it has one key/value head already.

    Raises:
        UnsupportedError: naming the layer.
    """
    for path in leaves:
        if path[-2:] == ("kv_down", "kernel"):
            raise UnsupportedError(
                f"{_where(path[:-2])} is latent attention (MLA): it caches one key for all heads, so there are no "
                "key/value heads to merge. Give only the layers that have some."
            )


def _attention_layers(leaves: Mapping[Path, object]) -> dict[Path, dict[Path, object]]:
    """By path, the leaves of every subtree that has the four kernels of an attention layer."""
    candidates = {path[:-2] for path in leaves if path[-2:] == KERNELS[0]}
    for prefix in candidates:
        has = [(*prefix, *kernel) in leaves for kernel in KERNELS]
        if has == [True, True, False, True]:
            raise UnsupportedError(
                f"{_where(prefix)} has no projection to values, which are its keys: convert_to_gqa averages kernels of "
                "both."
            )
    found = {prefix for prefix in candidates if all((*prefix, *kernel) in leaves for kernel in KERNELS)}
    layers: dict[Path, dict[Path, object]] = {prefix: {} for prefix in sorted(found)}
    for path, leaf in leaves.items():
        for end in range(len(path)):
            if path[:end] in layers:
                layers[path[:end]][path[end:]] = leaf
    return layers


def _changes(prefix: Path, layer: Mapping[Path, object], num_kv_heads: int) -> list[Path]:
    """The paths of what has to be pooled in one layer, nothing if it has `num_kv_heads` already.

    Args:
        prefix: where the layer lies.
        layer: its arrays, by path from there.
        num_kv_heads: heads to be left.
    """
    where = _where(prefix)
    if any(path[0] in NORMS for path in layer):
        raise UnsupportedError(
            f"{where} normalises queries and keys head by head: the mean of normalised keys is not the normalised "
            "mean, so averaged kernels would not give averaged keys."
        )
    unknown = sorted(".".join(p) for p in layer if p[0] in ("key", "value") and p[1:] not in (("kernel",), ("bias",)))
    if unknown:
        raise UnsupportedError(
            f"{where} has parameters that convert_to_gqa does not know how to average, {', '.join(unknown)}: "
            "merge them into the kernels first."
        )
    pooled = [(name, kind) for name in ("key", "value") for kind in ("kernel", "bias") if (name, kind) in layer]
    shapes: dict[Path, tuple[int, ...]] = {}
    for path in [*KERNELS, *pooled]:
        array = layer.get(path)
        if not isinstance(array, Leaf) or not jnp.issubdtype(array.dtype, jnp.floating):
            given = array.dtype if isinstance(array, Leaf) else type(array).__name__
            raise DTypeError(f"{where}: {'.'.join(path)} must be an array of floats, got {given}.")
        shapes[path] = tuple(array.shape)
    if not _fit(shapes):
        listed = ", ".join(f"{'.'.join(path)} {shape}" for path, shape in shapes.items())
        raise ShapeError(
            f"{where} is no attention layer: query.kernel must be [D, N, H], key.kernel [D', K, H], value.kernel "
            f"[D', K, H'], out.kernel [N, H', D], biases [K, H] and [K, H'], all with the same axes in front or none; "
            f"got {listed}."
        )
    num_heads, count = shapes["query", "kernel"][-2], shapes["key", "kernel"][-2]
    _checks.head_counts(num_heads, count)
    if count % num_kv_heads:
        more = "; heads can be merged, not split" if num_kv_heads > count else ""
        raise ConfigError(
            f"{where} has {count} key/value heads, which cannot become {num_kv_heads}{more}: give a divisor of {count}."
        )
    return [] if count == num_kv_heads else [(*prefix, *path) for path in pooled]


def _fit(shapes: Mapping[Path, tuple[int, ...]]) -> bool:
    """Whether kernels, and biases of keys and values where there are some, are those of one attention layer."""
    query, key, value, out = (shapes[path] for path in KERNELS)
    ranks = {len(query), len(key), len(value), len(out)}
    if len(ranks) > 1 or min(ranks) < 3:
        return False
    stacked = query[:-3] == key[:-3] == value[:-3] == out[:-3]
    heads = query[-2] == out[-3] and key[-2] == value[-2]
    sizes = query[-1] == key[-1] and value[-1] == out[-2]
    biases = all(
        shapes.get((name, "bias"), expected) == expected
        for name, kernel in (("key", key), ("value", value))
        for expected in [(*kernel[:-3], *kernel[-2:])]
    )
    return stacked and heads and sizes and biases


def _where(path: Path) -> str:
    return f"the attention layer {'.'.join(path)!r}" if path else "the attention layer"


def _no_attention(given: object) -> ConfigError:
    return ConfigError(
        f"there is no attention layer in this {type(given).__name__}: none of its subtrees has query, key, value and "
        "out with a kernel each."
    )


def _holds_cache(path: Path) -> ConfigError:
    return ConfigError(
        f"{_where(path)} holds Flax's decode cache, which the heads of the unconverted model filled: convert the "
        "parameters without it (nnx.state(model, nnx.Param), or the collection 'params'), or the module before its "
        "init_cache."
    )


# Averaging. -----------------------------------------------------------------------------------------


def _is_box(x: object) -> bool:
    return isinstance(x, nnx.Variable | AxisMetadata)


def _unwrap(leaf: object) -> Any:
    if isinstance(leaf, nnx.Variable):
        return leaf.get_value()
    return leaf.unbox() if isinstance(leaf, AxisMetadata) else leaf


def _rewrap(leaf: object, array: Leaf) -> object:
    """Puts an array into a box of the same kind."""
    if isinstance(leaf, nnx.Variable):
        return _settle(leaf.replace(array))
    return leaf.replace_boxed(array) if isinstance(leaf, AxisMetadata) else array


def _settle[V: nnx.Variable[Any]](variable: V) -> V:
    """Makes a variable say that its heads are whole, where it says that a mesh splits them and they do not divide."""
    metadata, shape = variable.get_metadata(), variable.get_value().shape
    mesh, spec = metadata.get("mesh"), metadata.get("out_sharding")
    if mesh is not None and spec is not None:
        variable.set_metadata(out_sharding=_split(spec, mesh, shape))
    return variable


def _pool(x: Leaf, num_kv_heads: int) -> Any:
    """[..., K, H] -> [..., num_kv_heads, H], the means of blocks of K / num_kv_heads heads."""
    *lead, count, size = x.shape
    if count == num_kv_heads:
        return x
    whole, after = _shardings(x, num_kv_heads)
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(shape=(*lead, num_kv_heads, size), sharding=x.sharding if after is None else after)
    blocks = (*lead, num_kv_heads, count // num_kv_heads, size)
    wide = np.float64 if x.dtype == np.float64 else np.float32
    if isinstance(x, np.ndarray):
        return x.astype(wide).reshape(blocks).mean(axis=-2).astype(x.dtype)
    spread = x if whole is None else jax.device_put(x, whole)
    pooled = jnp.mean(spread.astype(wide).reshape(blocks), axis=-2).astype(x.dtype)
    return pooled if after is None else jax.device_put(pooled, after)


def _shardings(x: Leaf, num_kv_heads: int) -> tuple[NamedSharding | None, NamedSharding | None]:
    """Where a mesh splits the heads of [..., K, H]: how to lay them out to be averaged, and the means after that."""
    explicit = placement.explicit_spec(x) is not None if isinstance(x, Tracer) else False
    sharding = jax.typeof(x).sharding if explicit else getattr(x, "sharding", None)
    if (isinstance(x, Tracer) and not explicit) or not isinstance(sharding, NamedSharding):
        return None, None
    mesh, shape = sharding.mesh, x.shape
    whole = _split(sharding.spec, mesh, (*shape[:-2], None, shape[-1]))
    if whole == sharding.spec:
        return None, None
    after = _split(sharding.spec, mesh, (*shape[:-2], num_kv_heads, shape[-1]))
    return NamedSharding(mesh, whole), NamedSharding(mesh, after)


def _split(spec: PartitionSpec, mesh: Mesh | AbstractMesh, shape: Sequence[int | None]) -> PartitionSpec:
    """`spec` for an array [..., K, H], its heads whole where the mesh does not divide them or K is None."""
    axes = (*spec, *(None,) * (len(shape) - len(spec)))
    names = axes[-2] if isinstance(axes[-2], tuple) else (axes[-2],)
    if axes[-2] is None or (shape[-2] is not None and shape[-2] % math.prod(mesh.shape[name] for name in names) == 0):
        return PartitionSpec(*spec)
    return PartitionSpec(*axes[:-2], None, axes[-1])
