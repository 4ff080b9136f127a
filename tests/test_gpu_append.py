"""The append of `"mosaic_gpu"` in JAX's GPU interpreter: to the bit what XLA writes and concludes, and no races."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import BF16, F16, F32, worst
from oracles import assert_same_bits

import kvattn
import kvattn.pallas
from kvattn.attend import at_once
from kvattn.attend.prepare import prepared
from kvattn.cache import Layout
from kvattn.cache import status as bits
from kvattn.pallas import gpu_append
from kvattn.policies import Full, OrderedWindow, SlidingWindow

B, K = 9, 2


@pytest.fixture(autouse=True)
def interpreted(capsys):
    with kvattn.pallas.interpret():
        yield
    # Older versions of JAX print a race, newer ones raise.
    assert "RACE DETECTED" not in capsys.readouterr().out


def made(policy, codec, dtype, page_size, slots, size, columns=0):
    """A cache of B rows with nothing but poison in its slots; row r of pages has those that r names, and -1 behind."""
    settings = {"policy": policy, "codec": codec, "dtype": dtype}
    if page_size:
        width = columns or -(-slots // page_size)
        cache = kvattn.PagedKVCache.create(B * width + 2, page_size, K, size, batch_size=B, max_pages=width, **settings)
        table = np.random.default_rng(0).permutation(B * width + 2)[: B * width].reshape(B, width)
        cache = cache.with_tables(table, [0] * B)
    else:
        cache = kvattn.KVCache.create(B, K, size, capacity=slots, layout=Layout(slots, slots + 8, False), **settings)
    return cache.replace(keys=jax.tree.map(worst, cache.keys), values=jax.tree.map(worst, cache.values))


def tokens(size, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, 1, K, size)), dtype) for _ in range(2)]


@jax.jit
def both(cache, key, value, num_new=None):
    """What the kernel makes of a cache, and what XLA does."""
    query = jnp.zeros((B, 1, K, key.shape[-1]), BF16)
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


def check(cache, key, value, num_new=None):
    """They agree in every bit. Returns what they agree on."""
    ours, theirs = both(cache, key, value, num_new)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert_same_bits(a, b)
        assert a.shape == b.shape, path
    return ours


STORES = {
    "bfloat16": (None, BF16, BF16),
    "float16": (None, F16, F16),
    "Int8": (kvattn.Int8(), BF16, BF16),
    "Int8 of float32": (kvattn.Int8(), F32, F32),
    "Float8": (kvattn.Float8(), BF16, BF16),
}
PLACES = {
    "Full": (Full(), 0, 24),
    "pages of 8": (Full(), 8, 24),
    "a window in pages of 8": (OrderedWindow(9), 8, 24),
    "a ring": (SlidingWindow(24), 0, 24),
    "a ring in pages of 8": (SlidingWindow(20), 8, 20),
    "a ring that is too small": (SlidingWindow(40), 0, 24),
}
LENGTHS = [0, 1, 7, 8, 23, 24, 19, 20, 16]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("store", STORES)
def test_what_xla_writes(store, place):
    """Rows that are empty, full, turned or get nothing; counts that are impossible; tokens that cannot be encoded."""
    codec, dtype, given = STORES[store]
    policy, page_size, slots = PLACES[place]
    cache = made(policy, codec, dtype, page_size, slots, 64)
    turns = np.asarray([0, 0, 2, 0, 1, 3, 0, 0, 1]) if policy.most_tokens(slots) is None else 0
    lengths = jnp.asarray(np.minimum(LENGTHS, slots) + turns * slots, jnp.int32)
    status = jnp.asarray([0, bits.LOST, 0, bits.OVERFLOW, 0, 0, bits.BAD_PAGE, 0, 0], jnp.int32)
    cache = cache.replace(lengths=lengths, status=status)
    key, value = tokens(64, given)
    for x, y in ((key, value), (value, key)):
        after = check(cache, x.at[2, 0, 1, 3].set(jnp.nan).at[4, 0, 0].set(0), y.at[3, 0, 0, 63].set(jnp.inf))
        if codec is not None:
            assert (np.asarray(after.status)[[2, 3]] & bits.NONFINITE == bits.NONFINITE).all()
        check(cache, x, y.at[1].set(jnp.nan), jnp.asarray([1, 0, 1, 1, 0, 1, 2, -1, 1], jnp.int32))
    assert int(jnp.sum(after.lengths - lengths)) >= B - 2
