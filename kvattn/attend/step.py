"""The one step: append the new tokens, attend, keep what the policy keeps."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, PyTree

from kvattn import _checks, _target
from kvattn._typing import Array
from kvattn.attend import api, xla
from kvattn.attend.at_once import Appended
from kvattn.attend.part import WHOLE, Part
from kvattn.attend.registry import Result
from kvattn.attend.request import Request
from kvattn.attend.rules import Rules
from kvattn.attend.state import add_sinks, merge_states
from kvattn.attend.together import Parted, parted
from kvattn.attend.tokens import NewTokens, PerHead, rotated_left
from kvattn.cache import Cache, Layout, View
from kvattn.cache import status as bits
from kvattn.cache.view import token_view
from kvattn.errors import RangeError
from kvattn.masks import EMPTY, Mask
from kvattn.policies import Context
from kvattn.positions import RoPE

CHUNK_ROWS = 128
"""Rows per block when a chunk of new tokens attends to itself."""

Stepped = tuple[Float[Array, "B T N Hv"], Cache]
"""The output, and the new cache."""

State = tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]
"""Output and log-sum-exp of some of the tokens."""

type _Run = Callable[["Step", NewTokens, PerHead, Any], Stepped]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step on arguments that fit together (`kvattn.attend.prepare`), on one device or on a device's part. Hashable.

    Attributes:
        run: what kind of step: `append`, `chunk`, `beside`, `read`, `cross` or `nothing`.
        rules: by which queries attend.
        rope: rotates queries, and keys before they are stored.
        padding: where pads lie, "right" or "left".
        implementation: what attends.
        part: of the cache.
    """

    run: _Run
    rules: Rules
    rope: RoPE | None
    padding: str
    implementation: api.Implementation
    part: Part = WHOLE

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do: no rows, or no new tokens."""
        return self.run is nothing

    def over(self, part: Part) -> "Step":
        """The same step on another part of the cache."""
        return dataclasses.replace(self, part=part)

    def __call__(self, new: NewTokens, per_head: PerHead, cache: Any) -> tuple[Float[Array, "B T N Hv"], Any]:
        """Output in the queries' dtype, zeros for pads; and the new cache."""
        with _target.aimed_at(cache.platform or _target.of_arrays(cache.keys)):
            return self._run(new, per_head, cache)

    def _run(self, new: NewTokens, per_head: PerHead, cache: Any) -> tuple[Float[Array, "B T N Hv"], Any]:
        dtype, late = new.query.dtype, new.length - new.num_new
        if self.padding == "left":
            out, cache = self.run(self, new.moved_left(), per_head, cache)
            return rotated_left(out, -late).astype(dtype), cache
        out, cache = self.run(self, new, per_head, cache)
        return out.astype(dtype), cache


def nothing(step: Step, new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
    """No rows, or no new tokens."""
    return jnp.zeros((*new.query.shape[:3], cache.value_head_dim), new.query.dtype), cache


def append(step: Step, new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
    """One new token, or a few that overwrite nothing: write, attend to all that is kept, let the policy look."""
    kernel = step.part.appender(new, cache, step.implementation)
    if kernel is not None:
        return _append_at_once(step, new, per_head, cache, kernel)
    policy, part, told, tokens = cache.policy, step.part, _told(new, cache), _located(step, new, cache)
    assert tokens.key is not None
    slots, is_one = policy.place(cache.state, told), new.length == 1  # several: of a policy without a state
    cache = part.write(cache, slots, tokens.key, tokens.value, step.implementation)
    cache = cache.replace(state=policy.enter(cache.state, slots, told)) if is_one else cache

    parts = parted(cache, new.length, new.num_new)
    view = part.view(parts.own)
    if cache.codec.rounds:
        fresh = part.slots(parts.own.store, parts.slots(slots))
        view = dataclasses.replace(view, fresh=(fresh, tokens.key, tokens.value))
    # Mass goes by the whole softmax sum: where one request does not know it, it is taken afterwards.
    afterwards = per_head.sinks is not None or part.is_share
    want_mass = policy.needs_mass and not afterwards
    requests = _requests(step, tokens.of_own(parts), view, per_head, want_mass)
    out, lse, mass = _attended(step, requests, per_head, _together(step, tokens, parts, per_head))
    if policy.needs_mass and (afterwards or len(requests) > 1):
        received = [xla.measure(request, lse, _received) for request in requests]
        mass = part.all_slots(cache, functools.reduce(jnp.add, received))
    mass = None if mass is None else part.of_group(mass)

    state = policy.observe(cache.state, slots, mass, told) if is_one else cache.state
    cache = cache.replace(state=state, status=_scorable(cache, lse))
    return out, cache.advance(new.num_new, new.refused, new.bad_count)


def _append_at_once(
    step: Step,
    new: NewTokens,
    per_head: PerHead,
    cache: Cache,
    kernel: Callable[[NewTokens, Cache], Appended],
) -> Stepped:
    """`append` of one token by a kernel that does all that goes with it: it asks for nothing else."""
    policy, told = cache.policy, _told(new, cache)
    tokens = _located(step, dataclasses.replace(new, num_new=jnp.ones_like(new.num_new)), cache)
    assert tokens.key is not None
    slots = policy.place(cache.state, told)
    value = None if tokens.value is None else tokens.value.swapaxes(1, 2)
    cache.unfit(slots, tokens.key.swapaxes(1, 2), value)  # raises what can be seen
    appended = kernel(dataclasses.replace(new, key=tokens.key), cache)
    cache = cache.replace(keys=appended.keys, values=appended.values, lengths=appended.lengths, status=appended.status)
    view = dataclasses.replace(step.part.view(cache), counts=appended.counts)
    if cache.codec.rounds:
        view = dataclasses.replace(view, fresh=(slots, tokens.key, tokens.value))
    tokens = dataclasses.replace(tokens, positions=appended.positions[:, None])
    out, _, _ = _attended(step, _requests(step, tokens, view, per_head), per_head)
    return out, cache


def chunk(step: Step, new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
    """Several new tokens: attend to what is kept and to the chunk, and only then let them take slots.

    Writing first would overwrite what the first tokens of the chunk still attend to.
    """
    policy, part, told, tokens = cache.policy, step.part, _told(new, cache), _located(step, new, cache)
    (out, lse), to_kept, to_new = _with_kept(step, tokens, per_head, cache)
    kept = fresh = None
    if policy.needs_mass:
        kept = part.all_slots(cache, _measured(step, to_kept, lse, cache, told))
        fresh = part.all_new(_measured(step, to_new, lse, cache, told), new.length)
    assert tokens.key is not None
    state, slots = policy.absorb(cache.state, kept, fresh, told)
    cache = part.write(cache, slots, tokens.key, tokens.value)
    cache = cache.replace(state=state, status=_scorable(cache, lse))
    return out, cache.advance(new.num_new, new.refused, new.bad_count)


def beside(step: Step, new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
    """As `chunk`, but none of the new tokens takes a slot: they are another layer's, which keeps them (or has)."""
    (out, _), *_ = _with_kept(step, _located(step, new, cache), per_head, cache)
    return out, cache.advance(jnp.zeros_like(new.num_new), new.refused, new.bad_count)


def read(step: Step, new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
    """Queries of the last tokens of a cache, which another layer appended: attend to what is kept.

    What these queries attend to is of no account to a policy: its scores are the owner's.
    """
    part, count = step.part, jnp.zeros_like(new.num_new)
    tokens = _located(step, new, cache, before=new.num_new)
    parts = parted(cache.replace(lengths=cache.lengths - new.num_new), new.length, new.num_new)
    view = part.view(parts.own, held=new.length > 1)
    requests = _requests(step, tokens.of_own(parts), view, per_head)
    out, _, _ = _attended(step, requests, per_head, _together(step, tokens, parts, per_head))
    cache = cache.replace(status=bits.mark(cache.status, new.refused, bits.LOST))
    return out, cache.advance(count, jnp.zeros_like(new.refused), new.bad_count)


def cross(step: Step, new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
    """Cross-attention: every real query attends to every token of the encoder."""
    t = jnp.arange(new.length, dtype=jnp.int32)[None]
    positions = jnp.where(t < new.num_new[:, None], t, EMPTY)
    everything = Mask(causal=False)
    request = step.rules.request(new.query, positions, step.part.view(cache), per_head, mask=everything)
    out, _, _ = _attended(step, [request], per_head)
    return out, cache.advance(jnp.zeros_like(new.num_new), new.refused, new.bad_count)


# Where tokens are seen ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Located:
    """The new tokens at the positions that the policy wants.

    Attributes:
        query: rotated.
        key: as it is stored; None where the cache has it already.
        value: the values; None also where they are in the keys.
        positions: EMPTY for pads.
        from_sinks: for policies whose first n tokens are seen from elsewhere: n, and queries and positions for them.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"] | None
    value: Float[Array, "B T K Hv"] | None
    positions: Int32[Array, "B T"]
    from_sinks: tuple[int, Float[Array, "B T N H"], Int32[Array, "B T"]] | None

    def of_own(self, parts: Parted) -> "_Located":
        """Their positions as those of what a row reads by itself."""
        return dataclasses.replace(self, positions=parts.positions(self.positions))


def _located(step: Step, new: NewTokens, cache: Cache, before: Int32[Array, " B"] | None = None) -> _Located:
    """Gives the new tokens their positions, and rotates them there.

    Args:
        step: says how.
        new: the tokens.
        cache: which they come to.
        before: how many of its last tokens they are, where it has them already.
    """
    policy, t = cache.policy, jnp.arange(new.length, dtype=jnp.int32)[None]
    is_real = t < new.num_new[:, None]
    first = cache.lengths if before is None else cache.lengths - before
    # Pads take no position: 0 stands for theirs, and nothing comes of it.
    seen_at = jnp.where(is_real, (first - _gone(cache))[:, None] + t, 0)
    rotated = lambda x, positions: x if step.rope is None else step.rope(x, positions)
    query = step.rules.warmed(new.query, first[:, None] + t)
    from_sinks = policy.sink_positions(seen_at)
    if from_sinks is not None:
        count, positions = from_sinks
        from_sinks = count, rotated(query, positions), jnp.where(is_real, positions, EMPTY)
    # A key that will move in the cache is stored as it is, and rotated when it is read.
    key = new.key
    if key is not None and step.rules.key_rope is None:
        key = rotated(key, seen_at)
    return _Located(rotated(query, seen_at), key, new.value, jnp.where(is_real, seen_at, EMPTY), from_sinks)


def _gone(cache: Cache) -> Int32[Array, " B"]:
    """How many tokens were let go, if tokens are seen from where they stand in the cache; else 0."""
    positions = cache.policy.cache_positions(cache.state)
    return jnp.zeros_like(cache.lengths) if positions is None else cache.lengths - 1 - jnp.max(positions, axis=(1, 2))


def needing_pages(new: NewTokens, cache: Cache) -> Context:
    """The tokens that must have pages in a step, besides those that were there before it."""
    nobody = jnp.zeros_like(new.num_new)
    if new.key is None and cache.policy.in_order:  # they lie in the last slots
        return Context(cache.lengths - new.num_new, new.num_new, new.length, cache.num_slots)
    comes = new.num_new if new.key is not None and new.stays else nobody
    return Context(cache.lengths, comes, new.length, cache.num_slots)


def _told(new: NewTokens, cache: Cache) -> Context:
    return Context(cache.lengths, new.num_new, new.length, cache.num_slots, new.ids)


def _own_view(step: Step, tokens: _Located, cache: Cache) -> View:
    """The new tokens as the chunk sees them."""
    assert tokens.key is not None
    key, value, positions = step.part.of_chunk(tokens.key, tokens.value, tokens.positions)
    token_bytes = key.shape[-1] * key.dtype.itemsize
    layout = Layout.best(key.shape[1], token_bytes, head_dim=key.shape[-1], values_in_keys=value is None)
    layout = dataclasses.replace(layout, rows=min(layout.rows, CHUNK_ROWS))
    view = token_view(cache.codec.for_chunk(key.dtype), key, value, positions, layout, cache.value_head_dim)
    return dataclasses.replace(view, platform=cache.platform)


# Attention ---------------------------------------------------------------------------------------


def _requests(step: Step, tokens: _Located, view: View, per_head: PerHead, want_mass: bool = False) -> list[Request]:
    """What the queries ask of one view: one request, or two where the first tokens are seen from elsewhere."""
    mask, request = step.rules.mask, functools.partial(step.rules.request, view=view, per_head=per_head)
    if tokens.from_sinks is None:
        return [request(tokens.query, tokens.positions, want_mass=want_mass)]
    num_sinks, query, positions = tokens.from_sinks
    # The mask may end before the sinks do: a window of the model that is smaller than the policy's has none.
    rest = dataclasses.replace(mask, begin=num_sinks, num_sinks=0, reach=None)
    sinks = Mask(end=num_sinks, window=mask.reach if mask.num_sinks else mask.window)
    return [
        request(tokens.query, tokens.positions, mask=rest),
        request(query, positions, mask=sinks),
    ]


def _together(step: Step, tokens: _Located, parts: Parted, per_head: PerHead) -> Iterator[State]:
    """Attention to what rows read together, level by level."""
    for spans in parts.levels:
        query, positions = spans.queries(tokens.query), spans.positions(tokens.positions)
        request = step.rules.request(query, positions, spans.view(step.part), per_head, of_several=True)
        out, lse, _ = api.attend(request, step.implementation)
        yield spans.by_row(out, lse)


def _with_kept(
    step: Step, tokens: _Located, per_head: PerHead, cache: Cache
) -> tuple[State, list[Request], list[Request]]:
    """Attention to what is kept and to the new tokens themselves; and what was asked of the one and the other."""
    parts = parted(cache, tokens.query.shape[1])
    to_kept = _requests(step, tokens.of_own(parts), step.part.view(parts.own), per_head)
    to_new = _requests(step, tokens, _own_view(step, tokens, cache), per_head)
    out, lse, _ = _attended(step, [*to_kept, *to_new], per_head, _together(step, tokens, parts, per_head))
    return (out, lse), to_kept, to_new


def _attended(step: Step, requests: list[Request], per_head: PerHead, shared: Iterable[State] = ()) -> Result:
    """Attention over the union of what the requests see, and of what is shared; mass only of a single request."""
    shared = tuple(shared)
    if len(requests) == 1 and not shared and per_head.sinks is None and not step.part.is_share:
        # Nothing is merged with it: a kernel may write what the caller gets.
        requests = [dataclasses.replace(requests[0], out_dtype=jnp.dtype(requests[0].query.dtype))]
    (out, lse, mass), *others = [api.attend(request, step.implementation) for request in requests]
    for other_out, other_lse in (*(other[:2] for other in others), *shared):
        out, lse = merge_states(out, lse, other_out, other_lse)
    out, lse = step.part.joined(out, lse)
    if per_head.sinks is not None:
        out, lse = add_sinks(out, lse, per_head.sinks)
    return out, lse, mass


# What policies want to know ----------------------------------------------------------------------


def _received(
    probs: Float[Array, "B K T R"], q_positions: Int32[Array, "B T"], kv_positions: Int32[Array, "B K1 R"]
) -> Float[Array, "B K R"]:
    """The attention each slot received."""
    return jnp.sum(probs, axis=2)


def _measured(step: Step, requests: list[Request], lse: Float[Array, "B T N"], cache: Cache, told: Context) -> PyTree:
    """`Policy.measure` of the attention that the slots of a view received."""
    policy, average, gone = cache.policy, step.part.of_group, _gone(cache)

    def original(positions: Int32[Array, "B ..."]) -> Int32[Array, "B ..."]:
        return jnp.where(positions < 0, EMPTY, positions + gone.reshape(-1, *(1,) * (positions.ndim - 1)))

    def of_block(
        probs: Float[Array, "B K T R"], q_positions: Int32[Array, "B T"], kv_positions: Int32[Array, "B K1 R"]
    ) -> PyTree:
        # Sums can be averaged over the heads of a group afterwards; anything else is measured of the average.
        probs = probs if policy.measures_sums else average(probs)
        return policy.measure(cache.state, probs, original(q_positions), original(kv_positions), told)

    parts = [xla.measure(request, lse, of_block) for request in requests]
    total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
    return average(total) if policy.measures_sums else total


def _scorable(cache: Cache, lse: Float[Array, "B T N"]) -> Int32[Array, " B"]:
    """The cache's status once attention was looked at: rows whose tokens cannot be scored are refused or marked."""
    if not cache.policy.needs_mass:
        return cache.status
    rows = jnp.any(jnp.isnan(lse), axis=(1, 2))
    if _checks.is_concrete(rows) and bool(jnp.any(rows)):
        raise RangeError(
            f"rows {np.nonzero(np.asarray(rows))[0].tolist()} have queries or keys that are NaN, so {cache.policy} "
            "cannot tell what they attend to. Nothing was written."
        )
    return bits.mark(cache.status, rows, bits.NONFINITE)
