"""Codecs in small, how far what they hold may be from the tokens, and attention over what they hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import variants
from oracles import attend_token

import kvattn

B, H = 2, 16
KIVI = kvattn.KIVI(bits=2, group_size=4, residual=8)
OTHERS = tuple(codec for codec in variants.CODECS.values() if type(codec) not in kvattn.codecs.ALL)
"""Codecs of users, registered by a plugin: to be those of single tokens."""
TOKENWISE = (kvattn.Int8(), kvattn.Float8(), kvattn.Int4(group_size=8), *OTHERS)
FLOAT32 = np.finfo(np.float32)


def there_and_back(codec, x):
    return np.asarray(codec.decode(codec.encode(jnp.asarray(x)), x.shape[-1], jnp.float32), np.float64)


def bound(codec, x):
    """The largest error the codec's documentation allows for each number of [..., H], in float64."""
    x = np.asarray(x, np.float64)
    largest = np.abs(x).max(-1, keepdims=True)
    if isinstance(codec, kvattn.Int8):
        return np.maximum(largest / 127 / 2 * (1 + 1e-5), FLOAT32.tiny) + 0 * x
    if isinstance(codec, kvattn.Float8):
        return np.maximum(np.abs(x) * 2.0**-4, largest / 448 / 1024) * (1 + 1e-5) + FLOAT32.tiny
    if codec in OTHERS:  # a bound of their own is theirs to test
        return np.maximum(largest / 8, FLOAT32.tiny) + 0 * x
    out = np.zeros_like(x)
    for first in range(0, x.shape[-1], codec.group_size):
        group = x[..., first : first + codec.group_size]
        span = group.max(-1, keepdims=True) - group.min(-1, keepdims=True)
        # Scale and minimum have 16 bits: the span a group is given is a little wider than it is.
        wider = np.abs(group).max(-1, keepdims=True) * 2.0**-7
        out[..., first : first + codec.group_size] = (span * 1.01 + wider) / 15 / 2 + FLOAT32.tiny
    return out


@functools.cache
def step_of(implementation="xla"):
    return jax.jit(functools.partial(kvattn.cached_attention, implementation=implementation))


def over_decoded(query, cache, window=None):
    """float64 attention of the last token over the decoded cache, slot by slot."""
    keys, values = (np.asarray(x, np.float64) for x in cache.dense())
    positions = np.asarray(cache.positions)
    out = np.zeros((*query.shape[:3], values.shape[-1]))
    group = query.shape[2] // keys.shape[1]
    for b in range(query.shape[0]):
        for k in range(keys.shape[1]):
            held = np.nonzero((positions[b, k] if positions.ndim == 3 else positions[b]) >= 0)[0]
            heads = slice(k * group, (k + 1) * group)
            out[b, 0, heads], _ = attend_token(
                query[b, 0, heads], [keys[b, k, None, s] for s in held], [values[b, k, None, s] for s in held]
            )
    return out


def kivi_replay(keys, values, codec):
    """Lists, as the authors' code: [(number of keys encoded, ...)]. Returns which of n keys and values are exact."""
    full_keys, full_values, coded_keys, coded_values = [], [], [], []
    for t in range(len(keys)):
        full_keys.append(t)
        full_values.append(t)
        if len(full_keys) == codec.residual:
            coded_keys += full_keys
            full_keys = []
        if len(full_values) > codec.residual:
            coded_values.append(full_values.pop(0))
    return coded_keys, coded_values
