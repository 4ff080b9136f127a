"""`FastGen`: each head keeps what its own prompt shows that it needs (Ge et al., arXiv:2310.01801)."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from kvattn import _checks, _manual
from kvattn._trees import portable
from kvattn._typing import Array, Rows
from kvattn.errors import ConfigError, DTypeError, RangeError
from kvattn.masks import EMPTY
from kvattn.policies import scored
from kvattn.policies.base import Context
from kvattn.policies.registry import register

SPECIAL, PUNCTUATION, FREQUENT, LOCAL, FULL = range(5)
"""What a head keeps, cheapest first; each keeps all that the one before it keeps."""


@typing.no_type_check
@portable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Profile(scored.ScoredState):
    """What each head keeps, and what lies in its slots.

    Attributes:
        scores: float32 [B, K, C], attention received so far.
        kinds: int32 [B, K, C]: 2 for a special token, 1 for punctuation, 0 for others.
        choice: int32 [B, K]: SPECIAL ... FULL; EMPTY before the prompt.
        prompt: int32 [B]: tokens of the prompt.
    """

    scores: Array
    kinds: Array
    choice: Array
    prompt: Array


@dataclasses.dataclass(frozen=True)
class FastGen(scored.ScoredPolicy):
    """Chooses, per row and key/value head, the cheapest of five nested ways to keep the prompt's attention.

    1. special tokens; 2. and punctuation; 3. and the `frequent` share of the prompt that received most attention; 4.
    and the `local` share that comes last; 5. everything. The first tokens appended to an empty row are its prompt: they
    attend densely, and the choice falls on the first way that keeps at least `recovery` of the attention, averaged over
    the prompt's queries and the query heads of the group. (The L1 distance of a renormalised row is twice the attention
    lost, so this bounds the paper's criterion.) When nothing else reaches it, everything is kept.

    Afterwards each new token attends to what is kept and to itself; then a head keeps what its way says: the tokens of
    the kinds it admits, the last ones of its `local` share, and of all its tokens, special ones included, the most
    attended ones of its `frequent` share. Shares are those of the prompt's length, rounded down.

    A contiguous cache sets memory aside for `capacity` tokens per head; what a head does not keep is skipped, not
    returned. In pages (`kvattn.PagedKVCache`) every head has a table of its own, and gives pages back. As any head may
    keep everything, a sequence takes `capacity` tokens in all, let go ones included; then `CapacityError`.

    Args:
        recovery: share of the attention to keep, 0 < recovery <= 1; at 1 everything is kept.
        special_tokens: ids that every head keeps. Empty: way 1 is skipped.
        punctuation_tokens: ids of punctuation.
        frequent: share of the prompt, 0 to 1.
        local: share of the prompt, 0 to 1.
    """

    recovery: float = 0.95
    special_tokens: tuple[int, ...] = ()
    punctuation_tokens: tuple[int, ...] = ()
    frequent: float = 0.3
    local: float = 0.3

    is_uneven: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("recovery", "frequent", "local"):
            number = getattr(self, name)
            if not _checks.is_concrete(number):
                raise ConfigError(f"{name} must be known when the program is traced: pass a Python float.")
            number = _checks.real(name, number)
            if not 0 <= number <= 1 or (name == "recovery" and number == 0):
                raise RangeError(f"{name} must lie in {'(' if name == 'recovery' else '['}0, 1], got {number}.")
            object.__setattr__(self, name, number)
        for name in ("special_tokens", "punctuation_tokens"):
            ids = getattr(self, name)
            if not _checks.is_concrete(ids):
                raise ConfigError(f"{name} must be known when the program is traced: pass a tuple of ints.")
            if not isinstance(ids, Iterable):
                raise DTypeError(f"{name} must hold ints, got {ids!r}: pass a tuple of ids.")
            ids = tuple(ids)
            if any(isinstance(i, bool | np.bool_) or not hasattr(i, "__index__") for i in ids):
                raise DTypeError(f"{name} must hold ints, got {ids}.")
            object.__setattr__(self, name, tuple(int(i) for i in ids))

    def num_slots(self, capacity: int | None) -> int:
        """C: the capacity, which a head that keeps everything needs."""
        if capacity is None:
            raise ConfigError("under FastGen a head may keep everything: give the cache a capacity.")
        return _checks.integer("capacity", capacity, 1)

    def init(self, batch_size: int, num_kv_heads: int, num_slots: int) -> Profile:
        """Nothing kept, nothing chosen."""
        shape = (batch_size, num_kv_heads, num_slots)
        return Profile(
            positions=jnp.full(shape, EMPTY, jnp.int32),
            cache_positions=None,
            scores=jnp.zeros(shape, jnp.float32),
            kinds=jnp.zeros(shape, jnp.int32),
            choice=jnp.full(shape[:2], EMPTY, jnp.int32),
            prompt=jnp.zeros(shape[:1], jnp.int32),
        )

    def enter(self, state: Profile, slots: Int32[Array, "B K 1"], step: Context) -> Profile:
        """The new token has its kind, and starts without a score."""
        kinds = scored.put(state.kinds, slots, self._kinds(step))
        scores = scored.put(state.scores, slots, jnp.zeros((1, 1)))
        return super().enter(state, slots, step).replace(kinds=kinds, scores=scores)

    def observe(
        self, state: Profile, slots: Int32[Array, "B K 1"], mass: Float[Array, "B K C"], step: Context
    ) -> Profile:
        """Adds the attention received; lets go of what the ways of the heads no longer keep."""
        came = (step.num_new > 0)[:, None, None]
        there = state.positions >= 0
        scores = scored.added(state.scores, mass, there, step)
        choice = jnp.where(self._starts(step)[:, None], FULL, state.choice)  # as `_choose` does for a single token
        prompt = self._prompt(state, step)
        bound = self._bound(state.kinds, state.positions, choice, prompt, step) & there & came
        share = jnp.where(choice >= FREQUENT, self._share(self.frequent, prompt)[:, None], 0)[..., None]

        def too_many(bound: Array) -> tuple[Array, Array]:
            """The lowest of the tokens, and bool [B, K, 1]: whether the share is used up by tokens above it."""
            score, position = scored.first(scores, state.positions, bound)
            lowest = bound & (state.positions == position)
            return lowest, scored.above(scores, state.positions, there, score, position) >= share

        # One token came, so one leaves; more only where special tokens have overtaken others (then it sorts).
        lowest, over = too_many(bound)
        _, over_again = too_many(bound & ~lowest)
        leaves = _manual.cond(
            jnp.any(over_again & jnp.any(bound & ~lowest, axis=-1, keepdims=True)),
            lambda: bound & ~scored.best(scores, state.positions, there, share),
            lambda: lowest & over,
        )
        positions = jnp.where(leaves, EMPTY, state.positions)
        return state.replace(positions=positions, scores=scores, choice=choice, prompt=prompt)

    def measure(
        self,
        state: Profile,
        probs: Float[Array, "B K T R"],
        q_positions: Int32[Array, "B T"],
        kv_positions: Int32[Array, "B #K R"],
        step: Context,
    ) -> Float[Array, "B K R 2"]:
        """Attention received, and the part of it that came from near by."""
        prompt = self._prompt(state, step)
        near = kv_positions[:, :, None, :] > (q_positions - self._share(self.local, prompt)[:, None])[:, None, :, None]
        return jnp.stack([jnp.sum(probs, axis=2), jnp.sum(jnp.where(near, probs, 0), axis=2)], axis=-1)

    def absorb(
        self, state: Profile, kept: Float[Array, "B K C 2"], new: Float[Array, "B K T 2"], step: Context
    ) -> tuple[Profile, Int32[Array, "B K T"]]:
        """Profiles rows that were empty; keeps what the heads' ways keep."""
        positions = scored.joined(state.positions, step)
        kinds_new = jnp.broadcast_to(self._kinds(step)[:, None], new.shape[:3])
        kinds = jnp.concatenate([state.kinds, kinds_new], axis=-1)
        scores = jnp.concatenate([state.scores + kept[..., 0], new[..., 0]], axis=-1)
        near = jnp.concatenate([kept[..., 1], new[..., 1]], axis=-1)
        there = positions >= 0

        prompt = self._prompt(state, step)
        frequent = scored.best(scores, positions, there, self._share(self.frequent, prompt)[:, None, None])
        chosen = self._choose(scores, near, kinds, frequent, there, prompt)
        choice = jnp.where(self._starts(step)[:, None], chosen, state.choice)

        bound = self._bound(kinds, positions, choice, prompt, step)
        keep = there & (~bound | (frequent & (choice >= FREQUENT)[..., None]))
        settled, slots = scored.settle(keep, step.num_slots)
        state = state.replace(
            positions=settled(positions, EMPTY),
            scores=settled(scores, 0),
            kinds=settled(kinds, 0),
            choice=choice,
            prompt=prompt,
        )
        return state, slots

    def moved(self, state: Profile, order: Int32[Array, "B K C"]) -> Profile:
        """Positions, scores and kinds go with their tokens."""
        there = lambda x: jnp.take_along_axis(x, order, axis=-1)
        return state.replace(positions=there(state.positions), scores=there(state.scores), kinds=there(state.kinds))

    def _starts(self, step: Context) -> Rows:
        """The rows whose prompt comes with this step."""
        return (step.num_new > 0) & (step.lengths == 0)

    def _prompt(self, state: Profile, step: Context) -> Int32[Array, " B"]:
        """Tokens of the prompt, that of this step included."""
        return jnp.where(self._starts(step), step.num_new, state.prompt)

    def _choose(
        self,
        scores: Float[Array, "B K S"],
        near: Float[Array, "B K S"],
        kinds: Int32[Array, "B K S"],
        frequent: Bool[Array, "B K S"],
        there: Bool[Array, "B K S"],
        prompt: Int32[Array, " B"],
    ) -> Int32[Array, "B K"]:
        """The first way that keeps enough of the prompt's attention."""
        total = jnp.maximum(prompt, 1).astype(jnp.float32)[:, None]
        special, punctuation = kinds == 2, kinds >= 1
        common = punctuation | frequent

        def share(kept: Array, amount: Array) -> Array:
            """Of the attention [B, K, S], what falls on tokens that are kept: [B, K]."""
            return jnp.sum(jnp.where(kept & there, amount, 0), axis=-1) / total

        kept = jnp.stack(
            [
                share(special, scores) if self.special_tokens else jnp.full_like(scores[..., 0], -1),
                share(punctuation, scores),
                share(common, scores),
                share(common, scores - near) + share(there, near),
                jnp.full_like(scores[..., 0], jnp.inf),
            ],
            axis=-1,
        )
        enough = kept >= self.recovery if self.recovery < 1 else jnp.isposinf(kept)
        # A row that starts with a single token has nothing to profile: all its heads keep everything.
        return jnp.where((prompt == 1)[:, None], FULL, jnp.argmax(enough, axis=-1).astype(jnp.int32))

    def _bound(
        self,
        kinds: Int32[Array, "B K S"],
        positions: Int32[Array, "B K S"],
        choice: Int32[Array, "B K"],
        prompt: Int32[Array, " B"],
        step: Context,
    ) -> Bool[Array, "B K S"]:
        """The tokens that a head keeps only as far as its share of frequent ones goes."""
        choice = choice[..., None]
        ordinary = jnp.where(choice == SPECIAL, kinds < 2, kinds < 1)
        recent = positions > (step.last - self._share(self.local, prompt))[:, None, None]
        return ordinary & (choice != FULL) & ~(recent & (choice == LOCAL))

    def _kinds(self, step: Context) -> Int32[Array, "B T"]:
        """Of the new tokens: 2 special, 1 punctuation, 0 others."""
        kinds = jnp.zeros_like(step.positions)
        if step.token_ids is None:
            if self.special_tokens or self.punctuation_tokens:
                raise ConfigError(
                    "FastGen with special_tokens or punctuation_tokens looks at tokens: pass token_ids int32 [B, T] to "
                    "cached_attention (models do it by themselves)."
                )
            return kinds
        for kind, ids in ((1, self.punctuation_tokens), (2, self.special_tokens)):
            ids = [i for i in ids if abs(i) <= _checks.INT32_MAX]  # token ids are int32: others match none
            if ids:
                known = jnp.asarray(ids, jnp.int32)[None, None]
                kinds = jnp.where(jnp.any(step.token_ids[..., None] == known, axis=-1), kind, kinds)
        return kinds

    def _share(self, share: float, prompt: Int[Array, " B"]) -> Int32[Array, " B"]:
        """A share of the prompt, rounded down (a hair's breadth is forgiven to float32)."""
        return jnp.floor(prompt.astype(jnp.float32) * share + 1e-4).astype(jnp.int32)


register(FastGen, "fastgen", examples=[FastGen(0.6)])
