"""Loops, branches and kernels that run inside a user's `jax.shard_map` too.

There the type of a value names the mesh axes over which devices hold different ones. A loop demands the same type of
what it starts from as of what it goes on with, a branch the same of both sides, and a kernel wants to be told. What
starts from constants differs over no axis yet. Outside `jax.shard_map` all this is `jax.lax`'s own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import ManualAxisType
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Integer, PyTree, Shaped

from kvattn._typing import Array

Index = int | Integer[Array, ""]


def fori_loop[T](first: Index, end: Index, body: Callable[..., T], start: T, **options: Any) -> T:
    """`jax.lax.fori_loop`; `start` may differ over fewer mesh axes than what `body` returns."""
    return jax.lax.fori_loop(first, end, body, _settled(lambda carry: body(first, carry), start), **options)


def scan[T, X, Y](body: Callable[[T, X], tuple[T, Y]], start: T, xs: X) -> tuple[T, Y]:
    """`jax.lax.scan`; `start` may differ over fewer mesh axes than what `body` returns."""
    one = lambda carry: body(carry, jax.tree.map(lambda x: x[0], xs))[0]
    return jax.lax.scan(body, _settled(one, start), xs)


def cond[T](pred: Bool[Array, ""], yes: Callable[..., T], no: Callable[..., T], *operands: PyTree) -> T:
    """`jax.lax.cond`; the branches may return what differs over different mesh axes."""
    return jax.lax.cond(pred, *alike((yes, no), *operands), *operands)


def alike[T](branches: Sequence[Callable[..., T]], *operands: PyTree) -> Sequence[Callable[..., T]]:
    """Branches whose results differ over the same mesh axes: those over which a result of any does."""
    if not is_typed():
        return branches
    results = [jax.eval_shape(branch, *operands) for branch in branches]
    axes = jax.tree.map(lambda *each: frozenset().union(*map(_axes, each)), *results)
    return [lambda *x, f=f: jax.tree.map(_over, f(*x), axes) for f in branches]


def like(x: Shaped[Array, "*shape"], *others: PyTree) -> Shaped[Array, "*shape"]:
    """The array x, as different over mesh axes as any array of the trees `others`."""
    return _over(x, _axes_of(others)) if is_typed() else x


def result(shape: tuple[int, ...], dtype: DTypeLike, operands: PyTree) -> jax.ShapeDtypeStruct:
    """What a kernel returns: it differs over the mesh axes over which any array of the tree `operands` does."""
    if not is_typed():
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=_axes_of(operands)))


def is_typed() -> bool:
    """Whether types name mesh axes here: inside `jax.shard_map`, but not under ``check_vma=False``."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return bool(axes) and bool(_axes(jax.lax.axis_index(axes[0])))


def _settled[T](step: Callable[[T], T], carry: T) -> T:
    """The carry, as different over mesh axes as anything that `step` makes of it.

    One look is enough: what differs over an axis comes from what `step` closes over, or from the carry.
    """
    if not is_typed():
        return carry
    axes = _axes_of((carry, jax.eval_shape(step, carry)))
    return jax.tree.map(lambda x: _over(x, axes), carry)


def _axes_of(tree: PyTree) -> frozenset[str]:
    """The mesh axes over which any array of a tree differs."""
    return frozenset().union(*map(_axes, jax.tree.leaves(tree)))


def _axes(x: ArrayLike | jax.ShapeDtypeStruct) -> frozenset[str]:
    """The mesh axes over which devices hold different values of x [...]."""
    return jax.typeof(x).manual_axis_type.varying


def _over(x: Shaped[ArrayLike, "*shape"], axes: frozenset[str]) -> Shaped[Array, "*shape"]:
    """x, as a value that may differ over these axes as well."""
    x = jnp.asarray(x)
    return jax.lax.pcast(x, tuple(sorted(axes - _axes(x))), to="varying") if axes - _axes(x) else x
