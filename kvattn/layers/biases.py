"""What is added to the scores of a full sequence, or of Flax's cache, by the distance of query and key."""

import jax.numpy as jnp
from jaxtyping import Float, Int32

from kvattn._typing import Array
from kvattn.layers.settings import AttentionSettings


def of_all(
    settings: AttentionSettings,
    table: Float[Array, "buckets N"] | None,
    distance: Int32[Array, "T S"],
    rank: int,
) -> Float[Array, "... N T S"] | None:
    """The relative bias and ALiBi's; None where the layer has neither.

    Args:
        settings: of the layer.
        table: a number per bucket of distances and head.
        distance: the query's position minus the key's.
        rank: how many axes the scores have.
    """
    bias, slopes = _of_buckets(settings, table, distance, rank), settings.slopes
    if slopes is None:
        return bias
    alibi = -slopes[:, None, None] * distance.astype(slopes.dtype)[None]
    alibi = alibi.reshape((1,) * (rank - alibi.ndim) + alibi.shape)
    return alibi if bias is None else bias + alibi


def of_full(
    settings: AttentionSettings,
    table: Float[Array, "buckets N"] | None,
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
) -> Float[Array, "... N T S"] | None:
    """The relative bias between all tokens of queries and keys, by where they stand."""
    if settings.relative_buckets is None:
        return None
    at, of = (jnp.arange(x.shape[-3], dtype=jnp.int32) for x in (query, key))
    return _of_buckets(settings, table, at[:, None] - of[None, :], query.ndim)


def _of_buckets(
    settings: AttentionSettings,
    table: Float[Array, "buckets N"] | None,
    distance: Int32[Array, "T S"],
    rank: int,
) -> Float[Array, "... N T S"] | None:
    """The relative bias alone; arguments are those of `of_all`."""
    if settings.relative_buckets is None or table is None:
        return None
    bias = settings.relative_buckets.at(table.astype(jnp.float32), distance)
    return bias.reshape((1,) * (rank - bias.ndim) + bias.shape)
