"""What the policies share that keep different tokens per head: slots that hold any position, freed one by one."""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from kvattn._trees import Tree, portable
from kvattn._typing import Array
from kvattn.masks import EMPTY
from kvattn.policies.base import NOWHERE


@typing.no_type_check
@portable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Slots(Tree):
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
    """bool [B, K, C]: the candidate of lowest score, of equal ones that of lowest position. One, if there is any."""
    return candidates & (positions == first(scores, positions, candidates)[1])


def first(scores: Array, positions: Array, candidates: Array) -> tuple[Array, Array]:
    """(score, position) [B, K, 1] of the `lowest` candidate; infinity and the largest int32 where there is none.

    Scores are compared with each other, never with a copy: computed twice, a sum of floats need not be the same.
    """
    # NaN counts as lowest: such a token must not stay for ever.
    score = jnp.where(jnp.isnan(scores), -jnp.inf, jax.lax.stop_gradient(scores))
    last = jnp.iinfo(positions.dtype).max
    score, position = jnp.where(candidates, score, jnp.inf), jnp.where(candidates, positions, last)
    ends = jnp.array(jnp.inf, score.dtype), jnp.array(last, position.dtype)
    # A sixteenth of the rest in every round: CPUs reduce few rows of many neighbours several times as fast as one row.
    while (lanes := score.shape[-1] // 16) > 1:
        rows = [x[..., : 16 * lanes].reshape(*x.shape[:-1], 16, lanes) for x in (score, position)]
        firsts = jax.lax.reduce(tuple(rows), ends, _earlier, (positions.ndim - 1,))
        score, position = (
            jnp.concatenate([x, rest[..., 16 * lanes :]], axis=-1)
            for x, rest in zip(firsts, (score, position), strict=True)
        )
    score, position = jax.lax.reduce((score, position), ends, _earlier, (positions.ndim - 1,))
    return score[..., None], position[..., None]


def above(scores: Array, positions: Array, candidates: Array, score: Array, position: Array) -> Array:
    """int32 [B, K, 1]: the candidates that go after (score, position) [B, K, 1], which `first` found."""
    score_of = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    later = (score_of > score) | ((score_of == score) & (positions > position))
    return jnp.sum(candidates & later & (positions != position), axis=-1, keepdims=True, dtype=jnp.int32)


def _earlier(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Of two (score, position) the one that goes first."""
    goes = (one[0] < other[0]) | ((one[0] == other[0]) & (one[1] <= other[1]))
    return jnp.where(goes, one[0], other[0]), jnp.where(goes, one[1], other[1])


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
