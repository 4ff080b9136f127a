"""What a step is given beside the cache: the new tokens, and what there is of each query head."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, Shaped

from kvattn import _checks
from kvattn._typing import Array


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Told:
    """What a caller said of the new tokens, before anything was concluded from it.

    Attributes:
        num_new: how many are real. None: all.
        status: that of the cache.
    """

    num_new: Int32[Array, " B"] | None
    status: Int32[Array, " B"]


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NewTokens:
    """T new tokens of every row. Rows do not depend on each other, nor do key/value heads with their query heads.

    Attributes:
        query: the queries.
        key: the keys; None for a static cache, to which nothing is appended, and where the cache has these tokens.
        value: the values; None likewise, and where they are the first numbers of the keys.
        num_new: how many are real, and taken; the others are pads.
        refused: rows whose tokens do not fit: `num_new` is 0 there.
        bad_count: rows that were given an impossible number of tokens: likewise.
        ids: what policies that look at tokens are told, or None.
        stays: whether the cache takes them, or has them already; else it does without.
        told: what `num_new`, `refused`, `bad_count` and the status of the cache were concluded from, along with lengths
            and tables. None: from something else besides.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"] | None
    value: Float[Array, "B T K Hv"] | None
    num_new: Int32[Array, " B"]
    refused: Bool[Array, " B"]
    bad_count: Bool[Array, " B"]
    ids: Int32[Array, "B T"] | None
    stays: bool = dataclasses.field(default=True, metadata={"static": True})
    told: Told | None = None

    @property
    def length(self) -> int:
        """T."""
        return self.query.shape[1]

    def concluded(self) -> "NewTokens":
        """Without what was `told`: for steps in which other things count as well."""
        return dataclasses.replace(self, told=None)

    def moved_left(self) -> "NewTokens":
        """Left-padded tokens with their pads behind them."""
        late = self.length - self.num_new
        moved = {
            name: None if x is None else rotated_left(x, late)
            for name, x in (("query", self.query), ("key", self.key), ("value", self.value), ("ids", self.ids))
        }
        return dataclasses.replace(self, **moved)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PerHead:
    """What there is of each query head: arrays whose first axis is N.

    Attributes:
        sinks: a logit that joins the softmax sum only; or None.
        slopes: ALiBi's; or None.
        relative: what is added to the score of a key by its distance, the last number for all larger ones; or None.
    """

    sinks: Float[Array, " N"] | None = None
    slopes: Float[Array, " N"] | None = None
    relative: Float[Array, "N distances"] | None = None


def rotated_left(x: Shaped[Array, "B T *rest"], by: Int32[Array, " B"]) -> Shaped[Array, "B T *rest"]:
    """Every row turned to the left by so many tokens."""
    length = x.shape[1]
    if length <= 1:
        return x
    index = (jnp.arange(length, dtype=jnp.int32)[None] + by[:, None]) % length
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def folded(query: Float[Array, "*shape"], scale: typing.Any) -> tuple[Float[Array, "*shape"], float | None]:
    """A scale that is only known when the program runs, multiplied into the queries; another one as a float."""
    if scale is None or _checks.is_concrete(scale):
        return query, None if scale is None else float(scale)
    return query * jnp.asarray(scale, query.dtype), 1.0
