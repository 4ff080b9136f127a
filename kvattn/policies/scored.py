"""What the policies share that keep different tokens per head: slots that hold any position, freed one by one."""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from kvattn._typing import Array
from kvattn.masks import EMPTY
from kvattn.policies.base import NOWHERE


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Which token lies in which slot, per key/value head, and its score.

    Attributes:
        positions: int32 [B, K, C], EMPTY where free.
        scores: float32 [B, K, C], meaning left to the policy.
        places: int32 [B, K, C], how many kept tokens come before; None where that is not needed.
    """

    positions: Array
    scores: Array
    places: Array | None = None

    @classmethod
    def empty(cls, batch_size: int, num_kv_heads: int, num_slots: int, *, places: bool = False) -> "Slots":
        """All slots free."""
        shape = (batch_size, num_kv_heads, num_slots)
        free = jnp.full(shape, EMPTY, jnp.int32)
        return cls(free, jnp.zeros(shape, jnp.float32), jnp.copy(free) if places else None)


def first_free(positions: Array, num_new: Array) -> Array:
    """int32 [B, K, 1]: the first free slot where a token comes (num_new int32 [B] > 0), else NOWHERE."""
    free = positions < 0
    slot = jnp.argmax(free, axis=-1).astype(jnp.int32)
    ok = jnp.any(free, axis=-1) & (num_new > 0)[:, None]
    return jnp.where(ok, slot, NOWHERE)[..., None]


def enter(values: Array, slots: Array, new: Array) -> Array:
    """Puts new [B, 1 or K] into the slots int32 [B, K, 1] of [B, K, C]; negative slots are left alone."""
    index = jnp.arange(values.shape[-1], dtype=jnp.int32)[None, None]
    return jnp.where(index == slots, new[..., None].astype(values.dtype), values)


def places(positions: Array) -> Array:
    """int32 [B, K, C]: how many kept tokens come before each one, EMPTY where free. Sorts: not for decode steps."""
    there = positions >= 0
    order = jnp.argsort(jnp.where(there, positions, jnp.iinfo(jnp.int32).max), axis=-1)
    return jnp.where(there, jnp.argsort(order, axis=-1).astype(jnp.int32), EMPTY)


def enter_last(places: Array, slots: Array) -> Array:
    """`places` once a new token lies in its slot: it stands behind all others."""
    return enter(places, slots, jnp.max(places, axis=-1) + 1)


def close_up(places: Array, leaves: Array) -> Array:
    """`places` once the token of at most one slot per head (bool [B, K, C]) has left."""
    last = jnp.iinfo(jnp.int32).max
    gap = jnp.min(jnp.where(leaves, places, last), axis=-1, keepdims=True)
    return jnp.where(leaves, EMPTY, jnp.where(places > gap, places - 1, places))


def lowest(scores: Array, positions: Array, candidates: Array) -> Array:
    """bool [B, K, C], one True at most: the candidate of lowest score, of equal ones that of lowest position."""
    worst = jnp.where(candidates, scores, jnp.inf)
    # NaN counts as lowest: such a token must not stay for ever.
    worst = jnp.where(candidates & jnp.isnan(scores), -jnp.inf, worst)
    tied = candidates & (worst == jnp.min(worst, axis=-1, keepdims=True))
    where = jnp.where(tied, positions, jnp.iinfo(jnp.int32).max)
    return tied & (where == jnp.min(where, axis=-1, keepdims=True))


def best(scores: Array, positions: Array, candidates: Array, count: Array | int) -> Array:
    """bool [B, K, S]: the `count` candidates of highest score; of equal ones the lowest position goes first.

    What is left if `lowest` is taken away again and again. Sorts: for prompts, not for decode steps.
    """
    score = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    order = jnp.lexsort((jnp.where(candidates, positions, EMPTY), jnp.where(candidates, score, -jnp.inf), candidates))
    rank = jnp.argsort(order, axis=-1)
    return candidates & (rank >= scores.shape[-1] - count)


def settle(keep: Array, new_keep: Array):
    """Frees slots and gives them to new tokens, in order.

    Args:
        keep: bool [B, K, C], old tokens that stay.
        new_keep: bool [B, K, T], new tokens that stay; no more than there are free slots.

    Returns:
        move: a function (old [B, K, C, ...], new [B, K, T, ...], empty) that applies the same to an array of the slots;
        int32 [B, K, T]: where each new token goes, NOWHERE if it does not stay.
    """
    num_slots = keep.shape[-1]
    free_first = jnp.argsort(keep, axis=-1, stable=True).astype(jnp.int32)
    nth = jnp.cumsum(new_keep, axis=-1, dtype=jnp.int32) - 1
    where = jnp.take_along_axis(free_first, jnp.clip(nth, 0, num_slots - 1), axis=-1)
    where = jnp.where(new_keep, where, NOWHERE)
    b = jnp.arange(keep.shape[0], dtype=jnp.int32)[:, None, None]
    k = jnp.arange(keep.shape[1], dtype=jnp.int32)[None, :, None]
    target = jnp.where(where < 0, num_slots, where)  # past the end: dropped

    def move(old: Array, new: Array, empty) -> Array:
        stays = keep.reshape(keep.shape + (1,) * (old.ndim - 3))
        return jnp.where(stays, old, empty).at[b, k, target].set(new.astype(old.dtype), mode="drop")

    return move, where


def chunk_positions(lengths: Array, num_new: Array, num_tokens: int) -> Array:
    """int32 [B, T]: positions of the new tokens, EMPTY for pads."""
    t = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    return jnp.where(t < num_new[:, None], lengths[:, None] + t, EMPTY)
