"""Caches that get one token, and what the append of `"mosaic_gpu"` and XLA make of them; needs no pytest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import BF16, F16, F32, worst

import kvattn
from kvattn.attend import at_once
from kvattn.attend.prepare import prepared
from kvattn.cache import Layout
from kvattn.cache import status as bits
from kvattn.pallas import gpu_append
from kvattn.policies import Full, OrderedWindow, SlidingWindow

B, K = 9, 2
STORES = {
    "bfloat16": (None, BF16, BF16),
    "float16": (None, F16, F16),
    "Int8": (kvattn.Int8(), BF16, BF16),
    "Int8 of float32": (kvattn.Int8(), F32, F32),
    "Float8": (kvattn.Float8(), BF16, BF16),
    "Int4": (kvattn.Int4(32), BF16, BF16),
    "Int4 of float32": (kvattn.Int4(16), F32, F32),
}
PLACES = {
    "Full": (Full(), 0, 24),
    "pages": (Full(), 8, 24),
    "a window in pages": (OrderedWindow(9), 8, 24),
    "a ring": (SlidingWindow(24), 0, 24),
    "a ring in pages": (SlidingWindow(20), 8, 20),
    "a ring that is too small": (SlidingWindow(40), 0, 24),
}
LENGTHS = [0, 1, 7, 8, 23, 24, 19, 20, 16]


def heads_of(codec):
    """Key/value heads: as few as the kernel encodes."""
    return 8 if isinstance(codec, kvattn.Int4) else K


def made(policy, codec, dtype, page_size, slots, size, columns=0):
    """A cache of B rows with nothing but poison in its slots; row r of pages has those that r names, and -1 behind."""
    settings, heads = {"policy": policy, "codec": codec, "dtype": dtype}, heads_of(codec)
    if page_size:
        width = columns or -(-slots // page_size)
        cache = kvattn.PagedKVCache.create(
            B * width + 2, page_size, heads, size, batch_size=B, max_pages=width, **settings
        )
        table = np.random.default_rng(0).permutation(B * width + 2)[: B * width].reshape(B, width)
        cache = cache.with_tables(table, [0] * B)
    else:
        cache = kvattn.KVCache.create(
            B, heads, size, capacity=slots, layout=Layout(slots, slots + 8, False), **settings
        )
    return cache.replace(keys=jax.tree.map(worst, cache.keys), values=jax.tree.map(worst, cache.values))


def tokens(size, dtype, seed=0, codec=None):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, 1, heads_of(codec), size)), dtype) for _ in range(2)]


def filled(policy, codec, dtype, page_size, slots):
    """Rows that are empty, full or turned, some with bits of before."""
    cache = made(policy, codec, dtype, page_size, slots, 64)
    turns = np.asarray([0, 0, 2, 0, 1, 3, 0, 0, 1]) if policy.most_tokens(slots) is None else 0
    lengths = jnp.asarray(np.minimum(LENGTHS, slots) + turns * slots, jnp.int32)
    status = jnp.asarray([0, bits.LOST, 0, bits.OVERFLOW, 0, 0, bits.BAD_PAGE, 0, 0], jnp.int32)
    return cache.replace(lengths=lengths, status=status)


@jax.jit
def both(cache, key, value, num_new=None):
    """What the kernel makes of a cache, and what XLA does."""
    query = jnp.zeros((key.shape[0], 1, key.shape[2], key.shape[-1]), BF16)
    nothing = ("rope", "window", "chunk", "scale", "softcap", "sinks", "alibi_slopes", "relative_bias", "temperature")
    rules = {**dict.fromkeys((*nothing, "token_ids"))}
    _, new, _, vouched = prepared(
        query, key, value, cache, num_new=num_new, padding="right", append=True, implementation="mosaic_gpu", **rules
    )
    assert at_once.takes(new, vouched)
    assert gpu_append.unsupported(new, vouched) is None
    # The kernel is not to be told what was concluded.
    blank = dataclasses.replace(new, num_new=new.num_new * 0 - 7, refused=~new.refused, bad_count=~new.bad_count)
    return gpu_append.append(blank, vouched.replace(status=vouched.status * 0 - 1)), at_once.by_xla(new, vouched)
