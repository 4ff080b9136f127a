"""Derivatives of implementations that have none of their own: those of the reference."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from kvattn import _manual
from kvattn._typing import Array
from kvattn.attend import reference
from kvattn.attend.registry import Result
from kvattn.attend.request import Request

Attend = Callable[[Request], Result]
"""What an implementation does; see `Request`."""
Arrays = tuple[Shaped[Array, "..."], ...]
"""Those of a request."""
Structure = tuple[jax.tree_util.PyTreeDef, tuple[bool, ...]]
"""The request without its arrays, and which of these can be differentiated."""


def differentiable(attend: Attend) -> Attend:
    """The same function; forward and reverse derivatives are those of `reference.attend`."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def on_leaves(structure: Structure, rest: Arrays, floats: Arrays) -> Result:
        return attend(_join(structure, rest, floats))

    @on_leaves.defjvp
    def _(structure: Structure, primals: tuple[Arrays, Arrays], tangents: tuple) -> tuple[Result, Result]:
        rest, floats = primals
        primal = on_leaves(structure, rest, floats)
        _, tangent = jax.jvp(lambda *f: reference.attend(_join(structure, rest, f)), floats, tangents[1])
        return primal, jax.tree.map(lambda t, x: _manual.like(t.astype(x.dtype), x), tangent, primal)

    @functools.wraps(attend)
    def call(request: Request) -> Result:
        floats, rest, structure = _split(request)
        return on_leaves(structure, rest, floats)

    return call


def _split(request: Request) -> tuple[Arrays, Arrays, Structure]:
    """Separates the arrays which can be differentiated from the others, and says how they fit together."""
    leaves, structure = jax.tree.flatten(request)
    inexact = tuple(jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves)
    floats = tuple(x for x, keep in zip(leaves, inexact, strict=True) if keep)
    rest = tuple(x for x, keep in zip(leaves, inexact, strict=True) if not keep)
    return floats, rest, (structure, inexact)


def _join(structure: Structure, rest: Arrays, floats: Arrays) -> Request:
    """The inverse of `_split`."""
    tree, inexact = structure
    others, numbers = iter(rest), iter(floats)
    return jax.tree.unflatten(tree, [next(numbers) if keep else next(others) for keep in inexact])
