"""Derivatives of implementations that have none of their own: those of the reference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvattn import _manual
from kvattn._typing import Array
from kvattn.attend import reference
from kvattn.attend.request import Request

Result = tuple[Array, Array, Array | None]
Attend = Callable[[Request], Result]


def differentiable(attend: Attend) -> Attend:
    """The same function; forward and reverse derivatives are those of `reference.attend`."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def on_leaves(structure: Any, rest: tuple, floats: tuple) -> Result:
        return attend(_join(structure, rest, floats))

    @on_leaves.defjvp
    def _(structure, primals, tangents):
        rest, floats = primals
        primal = on_leaves(structure, rest, floats)
        _, tangent = jax.jvp(lambda *f: reference.attend(_join(structure, rest, f)), floats, tangents[1])
        return primal, jax.tree.map(_manual.like, tangent, primal)

    @functools.wraps(attend)
    def call(request: Request) -> Result:
        floats, rest, structure = _split(request)
        return on_leaves(structure, rest, floats)

    return call


def _split(request: Request):
    """Separates what can be differentiated from what cannot."""
    leaves, structure = jax.tree.flatten(request)
    inexact = tuple(jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves)
    floats = tuple(x for x, keep in zip(leaves, inexact, strict=True) if keep)
    rest = tuple(x for x, keep in zip(leaves, inexact, strict=True) if not keep)
    return floats, rest, (structure, inexact)


def _join(structure, rest, floats) -> Request:
    tree, inexact = structure
    rest, floats = iter(rest), iter(floats)
    return jax.tree.unflatten(tree, [next(floats) if keep else next(rest) for keep in inexact])
