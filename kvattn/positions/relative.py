"""T5's relative positions: a learned number for each head and bucket of distances, added to the scores."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Int32

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import ConfigError, ShapeError


@dataclasses.dataclass(frozen=True)
class RelativeBuckets:
    """Which bucket a distance belongs to, in T5 (https://arxiv.org/abs/1910.10683, section 2.1).

    Distances below half of the buckets have one each; above, buckets widen logarithmically up to `max_distance`, from
    where on all share the last. Frozen and hashable: it holds no numbers that are learned.

    Args:
        num_buckets: how many buckets there are: even, at least 4.
        max_distance: from this distance on tokens share the last bucket: above those that have a bucket each.
        bidirectional: half of the buckets are for keys that come after the query, as in encoders. A decoder has none:
            such keys are in the bucket of distance 0, and masked.

    Raises:
        ConfigError: numbers that leave no bucket to widen.
        DTypeError: numbers that are no ints, a flag that is no bool.

    Example:
        >>> buckets = RelativeBuckets(num_buckets=8, max_distance=16)
        >>> buckets.of(jnp.array([0, 1, 3, 4, 7, 15, 16, 99])).tolist()
        [0, 1, 3, 4, 5, 7, 7, 7]
        >>> buckets.by_distance(jnp.ones((8, 2))).shape  # for kvattn.cached_attention(relative_bias=...)
        (2, 17)
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self) -> None:
        count = _checks.integer("num_buckets", self.num_buckets, 4)
        _checks.flag("bidirectional", self.bidirectional)
        exact = self._each_way // 2
        if count % 2 or exact < 2:
            raise ConfigError(
                f"num_buckets must be even, and at least {8 if self.bidirectional else 4}, so that some can widen; got "
                f"{count}."
            )
        if _checks.integer("max_distance", self.max_distance, 1) <= exact:
            raise ConfigError(
                f"max_distance must be above {exact}, up to which each distance has a bucket of its own, got "
                f"{self.max_distance}."
            )

    @property
    def _each_way(self) -> int:
        """Buckets for the keys on one side of the query."""
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    def _table(self) -> Int32[np.ndarray, " distances"]:
        """The bucket of each distance into the past, the last for all that are larger.

        In float32 and in this order, as T5 computes it: at the borders of buckets rounding decides.
        """
        exact, distance = self._each_way // 2, np.arange(self.max_distance + 1, dtype=np.int32)
        ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
        wide = ratio / np.float32(math.log(self.max_distance / exact)) * np.float32(self._each_way - exact)
        far = np.minimum(exact + wide.astype(np.int32), self._each_way - 1)
        return np.where(distance < exact, distance, far).astype(np.int32)

    def of(self, distance: Int[ArrayLike, "*shape"]) -> Int32[Array, "*shape"]:
        """The bucket of a distance, which is the query's position minus the key's."""
        distance, table = jnp.asarray(distance), jnp.asarray(self._table())
        past = table[jnp.clip(distance, 0, self.max_distance)]
        if not self.bidirectional:
            return past
        ahead = table[jnp.clip(-distance, 0, self.max_distance)] + self._each_way
        return jnp.where(distance < 0, ahead, past)

    def by_distance(self, table: Float[ArrayLike, "buckets N"]) -> Float[Array, "N distances"]:
        """What is added to the scores of keys at distance 0, 1, ..., `max_distance` and more into the past.

        This is the `relative_bias` of `kvattn.cached_attention`.

        Args:
            table: the learned numbers.

        Raises:
            ShapeError: a table of another shape.
            DTypeError: one that holds no floats.
        """
        return self._checked(table)[self.of(jnp.arange(self.max_distance + 1, dtype=jnp.int32))].T

    def between(
        self, table: Float[ArrayLike, "buckets N"], query_length: int, key_length: int
    ) -> Float[Array, "N T S"]:
        """What is added to the scores of a full sequence: the `bias` of `kvattn.dot_product_attention`.

        Args:
            table: the learned numbers.
            query_length: T, of queries at positions 0 to T - 1.
            key_length: S, of keys at positions 0 to S - 1.

        Raises:
            As `by_distance`.
        """
        query, key = (jnp.arange(length, dtype=jnp.int32) for length in (query_length, key_length))
        return self.at(table, query[:, None] - key[None, :])

    def at(self, table: Float[ArrayLike, "buckets N"], distance: Int[ArrayLike, "T S"]) -> Float[Array, "N T S"]:
        """What is added to scores at these distances, which are the query's position minus the key's.

        Raises:
            As `by_distance`.
        """
        return jnp.moveaxis(self._checked(table)[self.of(distance)], -1, 0)

    def _checked(self, table: object) -> Float[Array, "buckets N"]:
        found = _checks.floating("table", table)
        if found.ndim != 2 or found.shape[0] != self.num_buckets:
            raise ShapeError(f"table must be [num_buckets, N] = [{self.num_buckets}, N], got shape {found.shape}.")
        return found
