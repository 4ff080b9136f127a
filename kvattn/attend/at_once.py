"""One new token per row, and all that changes with it, by one kernel: where it lies, lengths, status, what may ask.

A step knows all of that from lengths and tables alone where a policy goes by length. XLA reckons it in several small
programs, and starting each takes as long as a kernel needs to write the token.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from kvattn._typing import Array, Encoded
from kvattn.attend.tokens import NewTokens
from kvattn.cache import Cache
from kvattn.masks import EMPTY
from kvattn.policies import Context


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Appended:
    """A cache with one more token in its rows.

    Attributes:
        keys: its arrays.
        values: likewise.
        lengths: tokens seen.
        status: with what was refused.
        positions: those of the new tokens, EMPTY in rows that got none.
        counts: as a view has them: all slots from this number on are empty.
    """

    keys: Encoded
    values: Encoded
    lengths: Int32[Array, " B"]
    status: Int32[Array, " B"]
    positions: Int32[Array, " B"]
    counts: Int32[Array, " B"]


@runtime_checkable
class Appender(Protocol):
    """What appends by a kernel: a module, or any object with these two functions."""

    @property
    def unsupported(self) -> Callable[[NewTokens, Cache], str | None]:
        """Why it cannot append to a cache; None: it can. Only shapes and settings may be looked at."""
        ...

    @property
    def append(self) -> Callable[[NewTokens, Cache], Appended]:
        """Appends keys and values as they are to be stored, from what `NewTokens.told` says of them."""
        ...


def takes(new: NewTokens, cache: Cache) -> bool:
    """Whether a step knows all that changes from lengths and tables."""
    alone = cache.shared is None and cache.codec.rows is None and not cache.layout.on_host
    one_table = cache.page_table is None or cache.page_table.ndim == 2
    return new.told is not None and new.length == 1 and cache.policy.goes_by_length and alone and one_table


def by_xla(new: NewTokens, cache: Cache) -> Appended:
    """What a kernel has to return; from the numbers that were found out before."""
    slots = cache.policy.place(cache.state, Context(cache.lengths, new.num_new, 1, cache.num_slots))
    assert new.key is not None
    after = cache.write(slots, new.key, new.value).advance(new.num_new, new.refused, new.bad_count)
    positions = jnp.where(new.num_new > 0, cache.lengths, EMPTY)
    counts = jnp.minimum(after.lengths, cache.num_slots)
    return Appended(after.keys, after.values, after.lengths, after.status, positions, counts)


def with_derivatives(append: Callable[[NewTokens, Cache], Appended]) -> Callable[[NewTokens, Cache], Appended]:
    """The same function; under `jax.vmap` it is `by_xla`, whose derivatives it has."""

    def call(new: NewTokens, cache: Cache) -> Appended:
        leaves, tree = jax.tree.flatten((new, cache))
        return _called(append, tree, *leaves)

    return call


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _called(append: Callable[[NewTokens, Cache], Appended], tree: Any, *leaves: Array) -> Appended:
    return _mapped(append, tree)(*leaves)


@_called.defjvp
def _(append: Any, tree: Any, primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Appended, Appended]:
    _, tangent = jax.jvp(lambda *leaves: by_xla(*jax.tree.unflatten(tree, leaves)), primals, tangents)
    return _called(append, tree, *primals), tangent


def _mapped(append: Callable[[NewTokens, Cache], Appended], tree: Any) -> Callable[..., Appended]:
    """The function of the leaves."""

    @jax.custom_batching.custom_vmap
    def mapped(*leaves: Array) -> Appended:
        return append(*jax.tree.unflatten(tree, leaves))

    @mapped.def_vmap
    def _(size: int, batched: Any, *leaves: Array) -> tuple[Appended, Any]:
        of_one = lambda *leaves: by_xla(*jax.tree.unflatten(tree, leaves))
        axes = [0 if is_batched else None for is_batched in batched]
        found = jax.vmap(of_one, axes, axis_size=size)(*leaves)
        return found, jax.tree.map(lambda _: True, found)

    return mapped
