"""Query heads that were added so that they divide over devices."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from kvattn._typing import Array
from kvattn.attend.step import Stepped
from kvattn.attend.tokens import NewTokens, PerHead
from kvattn.cache import Cache
from kvattn.sharding.scheme import DeviceStep


def filled_up(new: NewTokens, per_head: PerHead, num_heads: int) -> tuple[NewTokens, PerHead]:
    """The arguments of a step with so many query heads, zeros behind those that are given."""
    per_head = jax.tree.map(lambda x: _filled(x, 0, num_heads), per_head)
    return dataclasses.replace(new, query=_filled(new.query, 2, num_heads)), per_head


def real_heads(step: DeviceStep, num_heads: int) -> DeviceStep:
    """The step on the first `num_heads` heads; out is 0 for the others."""

    def call(new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
        count = new.query.shape[2]
        new = dataclasses.replace(new, query=new.query[:, :, :num_heads])
        out, cache = step(new, jax.tree.map(lambda x: x[:num_heads], per_head), cache)
        return _filled(out, 2, count), cache

    return call


def _filled(x: Shaped[Array, "..."], axis: int, count: int) -> Shaped[Array, "..."]:
    """x with zeros behind it along an axis, which is `count` long then."""
    if x.shape[axis] >= count:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count - x.shape[axis])
    return jnp.pad(x, padding)
