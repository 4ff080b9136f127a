"""What policies are tried on: random tokens, a step, and which positions a cache keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import kvattn
from kvattn.policies import Context

B, T, N, K, H = 8, 30, 4, 2, 8


def tokens(seed, sharp=1.5, batch=B, length=T, heads=(N, K)):
    """Random queries, keys and values; `sharp` spreads the scores."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(batch, length, h, H)) for h in (heads[0], heads[1], heads[1]))
    return q * sharp, k * sharp, v


@functools.cache
def step(implementation="xla", rope=None):
    """One jitted step per setting, shared by the tests."""
    call = functools.partial(kvattn.cached_attention, implementation=implementation, rope=rope)
    return jax.jit(call, donate_argnums=3, static_argnames=())


def kept(cache, row):
    """The set of positions each head keeps."""
    positions = np.asarray(cache.positions)[row]
    positions = np.broadcast_to(positions, (cache.num_kv_heads, positions.shape[-1]))
    return [set(p[p >= 0].tolist()) for p in positions]


def alone(policy, weights, chunks, *, capacity=None, ids=None):
    """The state and the slots of a policy that is told of drawn attention: without keys, queries and caches.

    Args:
        policy: which lets tokens go by attention.
        weights: positive, [B, K, T, T]: of each query and position, before they are normalised.
        chunks: of each step, how many new tokens each row has, [B]. Steps of more than one token are all as long.
        capacity: of a cache.
        ids: token ids [B, T].
    """
    batch, heads, length, _ = weights.shape
    num_slots = policy.num_slots(capacity)
    state, lengths = policy.init(batch, heads, num_slots), np.zeros(batch, np.int32)
    weights = jnp.asarray(weights, jnp.float32)
    for num_new in chunks:
        size = 1 if max(num_new) == 1 else np.max(chunks)
        told = None
        if ids is not None:
            index = np.minimum(lengths[:, None] + np.arange(size), length - 1)
            told = jnp.asarray(np.take_along_axis(ids, index, axis=1))
        how = policy, num_slots, int(size)
        state = _alone(*how, state, weights, jnp.asarray(lengths), jnp.asarray(num_new, jnp.int32), told)
        lengths = lengths + np.asarray(num_new, np.int32)
    return state


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _alone(policy, num_slots, length, state, weights, lengths, num_new, ids):
    """One step."""
    told = Context(lengths, num_new, length, num_slots, ids)
    queries = told.positions
    rows = jnp.arange(lengths.shape[0])[:, None, None, None], jnp.arange(weights.shape[1])[:, None, None]

    def probabilities(positions):
        """[B, K, T, S] of the tokens at these positions, [B, K, S]."""
        t, s = queries[:, None, :, None], positions[:, :, None]
        drawn = jnp.where((s >= 0) & (s <= t) & (t >= 0), weights[*rows, t, s], 0)
        return drawn / jnp.maximum(drawn.sum(-1, keepdims=True), 1e-30)

    if length == 1:
        slots = policy.place(state, told)
        state = policy.enter(state, slots, told)
        mass = probabilities(policy.positions(state, lengths + num_new, num_slots))[:, :, 0]
        return policy.observe(state, slots, mass, told)
    held = policy.positions(state, lengths, num_slots)
    new = jnp.broadcast_to(queries[:, None], (*held.shape[:2], length))
    probs = probabilities(jnp.concatenate([held, new], -1))
    kept = policy.measure(state, probs[..., :num_slots], queries, held, told)
    return policy.absorb(state, kept, policy.measure(state, probs[..., num_slots:], queries, new, told), told)[0]
