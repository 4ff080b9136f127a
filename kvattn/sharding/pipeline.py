"""By layers: pipeline stages that keep their layers' weights and caches, microbatches moved from stage to stage.

The schedule of GPipe (Huang et al., arXiv:1811.06965): S stages and M microbatches take S + M - 1 ticks. At tick t
stage s works on microbatch t - s, then hands its activations to stage s + 1 (`jax.lax.ppermute`). Each stage idles for
S - 1 ticks.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Int32, PyTree, Shaped

from kvattn import _checks, _manual
from kvattn._typing import Array
from kvattn.cache import Cache
from kvattn.cache.host import is_on_host
from kvattn.errors import ConfigError, ShapeError, ShardingError, UnsupportedError
from kvattn.sharding.cache import arrange, cache_sharding
from kvattn.sharding.split import Split, names, split_over

Layer = Callable[..., tuple[Shaped[Array, "*activations"], PyTree]]


def pipeline(
    layer: Layer,
    weights: PyTree,
    inputs: Shaped[Array, "M *activations"],
    caches: PyTree,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str = "stage",
    extras: PyTree = (),
) -> tuple[Shaped[Array, "M *activations"], PyTree]:
    """Runs L layers one after the other, the layers split over the devices of a mesh axis.

    The same as ``for i in range(L): x, caches[i] = layer(weights[i], x, caches[i])`` on every microbatch. Under
    `jax.jit` donate the caches: each stage updates its own in place, one microbatch at a time.

    Args:
        layer: ``layer(weights, x, cache, *extras) -> (x, cache)``, one layer on one microbatch, x keeping shape and
            dtype: `kvattn.cached_attention` and whatever surrounds it. Over other axes of the mesh a stage may be split
            further, as it would be without stages: by ``kvattn.sharding.cached_attention(..., mesh=mesh, by="heads")``.
        weights: a tree whose arrays are [L, ...].
        inputs: [M, B / M, ...], the activations of M microbatches.
        caches: a tree whose arrays are [L, M, ...]: of each layer, one cache per microbatch (`layer_caches`).
        mesh: of Explicit or Auto axes.
        axis: the one that splits the layers; L is a multiple of its size. Over other axes arrays stay as they lie.
        extras: a tuple of trees whose arrays are [M, ...]: what layers want to know of a microbatch (`num_new`).

    Returns:
        outputs [M, B / M, ...], on every stage, and the caches, on their stages.

    Raises:
        ShardingError: an axis that the mesh does not have, layers that do not divide.
        ShapeError: leading axes that are not L and M.
        UnsupportedError: caches in the host's memory.
    """
    _refuse_host(caches)
    split = split_over(mesh, axis, None)
    num_layers, count = _leading(weights, "weights", 1)[0], _leading(inputs, "inputs", 1)[0]
    _check_layers(split, num_layers)
    if jax.tree.leaves(caches) and _leading(caches, "caches", 2) != (num_layers, count):
        raise ShapeError(
            f"caches must be [L, M, ...] = [{num_layers}, {count}, ...] for these weights and inputs, got "
            f"{_leading(caches, 'caches', 2)}."
        )
    if jax.tree.leaves(extras) and _leading(extras, "extras", 1)[0] != count:
        raise ShapeError(f"extras must be [M, ...], M = {count} as of inputs, got {_leading(extras, 'extras', 1)}.")
    staged = lambda tree: jax.tree.map(lambda _: P(axis), tree)
    whole = lambda tree: jax.tree.map(lambda _: P(), tree)
    args, specs = (weights, inputs, caches, extras), (staged(weights), P(), staged(caches), whole(extras))
    if split.is_explicit:
        args = split.put(args, jax.tree.map(lambda x, spec: _with_stages(split, x, spec), args, specs))
    # Unchecked: `layer` is the user's, and may hold loops that JAX's types do not let through.
    run = jax.shard_map(
        _stages(split, layer),
        mesh=mesh,
        axis_names={axis},
        in_specs=specs,
        out_specs=(P(), specs[2]),
        check_vma=False,
    )
    return run(*args)


def layer_caches[T](
    make: Callable[[], T],
    num_layers: int,
    num_microbatches: int,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "stage",
    by: str | None = None,
    by_axis: str = "model",
    data_axis: str | None = "data",
) -> T:
    """The caches of `pipeline`, all as `make` makes one (of B / M rows): arrays [L, M, ...].

    Args:
        make: makes the cache of one layer and microbatch, or a tree of arrays.
        num_layers: L.
        num_microbatches: M.
        mesh: makes each device's part on that device; None: all of it where JAX puts what is new.
        axis: the mesh axis that splits the layers.
        by: how each cache is split within its stage, as in `kvattn.sharding.shard_cache`; None: not at all.
        by_axis: the mesh axis that splits it.
        data_axis: the mesh axis that splits its rows besides, where the mesh has it.

    Raises:
        ConfigError: `by` without a mesh.
        ShardingError: as `kvattn.sharding.shard_cache`; layers that do not divide.
        UnsupportedError: caches in the host's memory.
    """
    _checks.integer("num_layers", num_layers, 1)
    _checks.integer("num_microbatches", num_microbatches, 1)
    placing: dict[str, Any] = {"by": by, "axis": by_axis, "data_axis": data_axis}

    def one() -> Any:
        cache = make()
        _refuse_host(cache)
        return cache if by is None or mesh is None else arrange(cast(Cache, cache), mesh, **placing)

    def every() -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_layers, num_microbatches, *x.shape)), one())

    if mesh is None:
        if by is not None:
            raise ConfigError(f"by={by!r} splits caches over a mesh: give mesh as well.")
        return every()
    split = split_over(mesh, axis, None)
    _check_layers(split, num_layers)
    shapes = jax.eval_shape(one)
    where = jax.tree.map(lambda _: P(), shapes) if by is None else _placed(shapes, mesh, placing)
    named = lambda x, spec: split.named(P(axis, None, *spec), x.ndim + 2)
    return jax.jit(every, out_shardings=jax.tree.map(named, shapes, where))()


def _placed(cache: Cache, mesh: Mesh | AbstractMesh, placing: dict[str, Any]) -> PyTree:
    """The placement of each array of one cache."""
    return jax.tree.map(lambda sharding: sharding.spec, cache_sharding(cache, mesh, **placing))


def _check_layers(split: Split, num_layers: int) -> None:
    if num_layers % split.size:
        raise ShardingError(
            f"{num_layers} layers do not divide over {split.size} stages (mesh axis {split.axis!r}): use a divisor of "
            f"{num_layers}."
        )


def _refuse_host(caches: PyTree) -> None:
    """A stage takes a layer's cache out of the others whole; from the host only single blocks can be taken."""
    if any(map(is_on_host, jax.tree.leaves(caches))):
        raise UnsupportedError(
            "stages hold their caches in the device's memory, and these lie in the host's: create them with "
            'memory_kind="device", or split them by heads, batch or sequence (kvattn.sharding.shard_cache).'
        )


def _with_stages(split: Split, x: Shaped[ArrayLike, "..."], spec: P) -> P:
    """Where x lies, but for the stages: over them as the spec says."""
    sharding = jax.typeof(x).sharding
    entries = [*sharding.spec] if sharding.mesh.axis_names == split.mesh.axis_names else []
    entries += [None] * (jnp.ndim(x) - len(entries))
    others = [tuple(n for n in names(entry) if n != split.axis) or None for entry in entries]
    return P(*spec, *others[len(spec) :])


def _stages(split: Split, layer: Layer) -> Callable[..., tuple[Shaped[Array, "M *activations"], PyTree]]:
    """What each device does: its layers, on one microbatch after the other."""
    num_stages, axis = split.size, split.axis
    onwards = [(i, i + 1) for i in range(num_stages - 1)]

    def run(
        weights: PyTree, inputs: Shaped[Array, "M *activations"], caches: PyTree, extras: PyTree
    ) -> tuple[Shaped[Array, "M *activations"], PyTree]:
        stage, count = jax.lax.axis_index(axis), inputs.shape[0]

        more = lambda at: jax.tree.map(lambda e: jax.lax.dynamic_index_in_dim(e, at, 0, keepdims=False), extras)

        def stage_on(
            microbatch: Int32[Array, ""], x: Shaped[Array, "*activations"], caches: PyTree
        ) -> tuple[Shaped[Array, "*activations"], PyTree]:
            def one(carry: tuple, own: tuple) -> tuple[tuple, None]:
                # Only this layer's cache of this microbatch is taken out of the others, and put back.
                (x, caches), (number, w) = carry, own
                cache = jax.tree.map(lambda c: _at(c, number, microbatch), caches)
                x, cache = layer(w, x, cache, *more(microbatch))
                return (x, jax.tree.map(lambda c, new: _put(c, number, microbatch, new), caches, cache)), None

            numbers = jnp.arange(jax.tree.leaves(weights)[0].shape[0], dtype=jnp.int32)
            return _manual.scan(one, (x, caches), (numbers, weights))[0]

        def tick(carry: tuple, t: Int32[Array, ""]) -> tuple[tuple, None]:
            x, outputs, caches = carry
            microbatch = t - stage
            busy = (microbatch >= 0) & (microbatch < count)
            at = jnp.clip(microbatch, 0, count - 1)
            x = jnp.where(stage == 0, jax.lax.dynamic_index_in_dim(inputs, at, 0, keepdims=False), x)
            # An idle stage must leave its caches alone.
            x, caches = _manual.cond(busy, stage_on, lambda _, x, caches: (x, caches), at, x, caches)
            done = jax.lax.dynamic_update_index_in_dim(outputs, x, at, 0)
            outputs = jnp.where(busy & (stage == num_stages - 1), done, outputs)
            return (jax.lax.ppermute(x, axis, onwards), outputs, caches), None

        ticks = jnp.arange(num_stages + count - 1, dtype=jnp.int32)
        start = jnp.zeros_like(inputs[0]), jnp.zeros_like(inputs), caches
        (_, outputs, caches), _ = _manual.scan(tick, start, ticks)
        # Only the last stage has them: to the others they are zeros.
        return jax.lax.psum(outputs, axis), caches

    return run


def _at(
    x: Shaped[Array, "L M *rest"], number: Int32[Array, ""], microbatch: Int32[Array, ""]
) -> Shaped[Array, "*rest"]:
    """What x has of a layer and a microbatch."""
    start = (number, microbatch, *(0,) * (x.ndim - 2))
    return jax.lax.dynamic_slice(x, start, (1, 1, *x.shape[2:])).reshape(x.shape[2:])


def _put(
    x: Shaped[Array, "L M *rest"],
    number: Int32[Array, ""],
    microbatch: Int32[Array, ""],
    new: Shaped[Array, "*rest"],
) -> Shaped[Array, "L M *rest"]:
    """x with something new there."""
    start = (number, microbatch, *(0,) * (x.ndim - 2))
    return jax.lax.dynamic_update_slice(x, new[None, None], start)


def _leading(tree: PyTree, name: str, rank: int) -> tuple[int, ...]:
    """The first `rank` axes, which all arrays of the tree share."""
    leaves = jax.tree.leaves(tree)
    shapes = {tuple(jnp.shape(x)[:rank]) for x in leaves}
    if not leaves:
        raise ConfigError(f"{name} has no arrays.")
    if len(shapes) != 1 or len(next(iter(shapes))) != rank:
        raise ShapeError(f"all arrays of {name} must share their first {rank} axes, got {sorted(shapes)}.")
    return shapes.pop()
