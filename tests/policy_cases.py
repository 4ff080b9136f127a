"""What policies are tried on: random tokens, a step, and which positions a cache keeps."""

import functools

import jax
import numpy as np

import kvattn

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
