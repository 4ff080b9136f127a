"""Rows that read shared pages together attend to what each would attend to alone, and shared pages are read once."""

import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input_table import Table, run
from flax import nnx
from oracles import assert_accurate, assert_same_bits, attend_token, seen_from
from sharding_cases import KINDS, mesh_of

import kvattn
from kvattn import errors
from kvattn.attend import xla
from kvattn.cache import groups_of, with_tables
from kvattn.cache.status import BAD_SPAN
from kvattn.serving import BlockPool, shared_prefixes, sharing_shapes, tokens_read

B, N, K, H, R, COLUMNS = 8, 4, 2, 16, 4, 10
PAGES = B * COLUMNS + 4
SHAPES = ((1, B), (2, 4), (3, 2))
"""Of three levels: one span of all rows, two of four, three of two."""
ROPE = kvattn.RoPE(H)


# Batches that share -------------------------------------------------------------------------------------------------


def random_tables(seed, batch=B, columns=COLUMNS):
    """Tables of which some begin like others, and lengths: empty rows, pages that are just full, hardly begun ones."""
    rng = np.random.default_rng(seed)
    table = rng.permutation(batch * columns + 4)[: batch * columns].reshape(batch, columns)
    lengths = rng.integers(0, columns * R, batch)
    for row in range(1, batch):
        other = int(rng.integers(0, row))
        common = int(rng.integers(0, columns))
        table[row, :common] = table[other, :common]
        lengths[row] = max(lengths[row], common * R)  # new tokens go to pages of their own
    order = rng.permutation(batch)
    table, lengths = table[order], lengths[order]
    # Nobody writes to what another row reads: a row is as long as what it shares.
    for row in range(batch):
        same = [int(np.argmin(np.append(table[row] == table[other], False))) for other in range(batch) if other != row]
        lengths[row] = max(lengths[row], max(same) * R)
    lengths[rng.integers(batch)] *= int(rng.integers(2))
    return table, np.minimum(lengths, columns * R - 1)


def make(codec=None, policy=None, dtype=jnp.float32, heads=K, **sizes):
    sizes = {"num_pages": PAGES, "page_size": R, "batch_size": B, "max_pages": COLUMNS, **sizes}
    return kvattn.PagedKVCache.create(
        num_kv_heads=heads, head_dim=H, policy=policy, codec=codec, dtype=dtype, **sizes
    )


def worst(x):
    return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max)


@functools.partial(jax.jit, static_argnums=3)
def filled(cache, table, lengths, seed=0):
    """A pool that holds a token in every slot that a row has filled, and poison in all others."""
    cache = cache.replace(keys=jax.tree.map(worst, cache.keys), values=jax.tree.map(worst, cache.values))
    shape = (cache.num_pages, cache.page_size, cache.num_kv_heads, H)
    key, value = (jax.random.normal(k, shape, cache.dtype) for k in jax.random.split(jax.random.key(seed)))
    slot = jnp.arange(cache.num_slots, dtype=jnp.int32)[None]
    page = jnp.take_along_axis(table, slot // cache.page_size, axis=1)
    of_slots = lambda x: x[page, slot % cache.page_size]
    cache = cache.replace(page_table=table)
    return cache.write(jnp.where(slot < lengths[:, None], slot, -1), of_slots(key), of_slots(value))


def new_tokens(seed, length=1, batch=B, heads=K, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(batch, length, h, H)), dtype) for h in (N, heads, heads))


@functools.cache
def step(implementation="xla", **rules):
    """A step that is given tables, as an engine's is. Arrays among the rules are tuples."""
    arrays = {name: jnp.asarray(x) if isinstance(x, tuple) else x for name, x in rules.items()}

    @jax.jit
    def call(new, cache, table, lengths, num_new, shared):
        cache = cache.with_tables(table, lengths, shared)
        return kvattn.cached_attention(*new, cache, num_new=num_new, implementation=implementation, **arrays)

    return call


def truth(new, before, after, lengths, num_new, dtype, window=None, sinks=None, **rules):
    """Every row alone: its tokens as the cache decodes them, one query at a time."""
    query, batch = np.asarray(new[0].astype(jnp.float32), np.float64), len(lengths)
    keys, values = (np.asarray(x.astype(jnp.float32), np.float64) for x in after.dense())
    del before
    rope = rules.pop("rope", None)
    if rope is not None:
        at = jnp.asarray(lengths)[:, None] + jnp.arange(query.shape[1])[None]
        query = np.asarray(rope(new[0], at), np.float64)
    out = np.zeros((*query.shape[:3], values.shape[-1]))
    for b, t in itertools.product(range(batch), range(query.shape[1])):
        if t >= num_new[b]:
            continue
        at = lengths[b] + t
        seen = sorted(seen_from(at, window))
        rows = [keys[b, :, s] for s in seen], [values[b, :, s] for s in seen]
        out[b, t], _ = attend_token(query[b, t], *rows, distances=[s - at for s in seen], sinks=sinks, dtype=dtype, **rules)
    return out


def check(seed, cache, *, length=1, implementation="xla", window=None, shapes=SHAPES, **rules):
    """A random batch: the accuracy rule, that something is shared, and what the step without it would have left."""
    table, lengths = random_tables(seed)
    lengths = np.minimum(lengths, COLUMNS * R - length)
    shared = shared_prefixes(table, lengths, R, shapes=shapes, fewest=0)
    rng = np.random.default_rng(seed)
    num_new = np.where(rng.random(B) < 0.8, rng.integers(1, length + 1, B), 0).astype(np.int32)
    dtype, new = cache.dtype, new_tokens(seed, length, dtype=cache.dtype)
    cache = filled(cache, jnp.asarray(table), jnp.asarray(lengths), seed % 3)
    call = step(implementation, **({} if window is None else {"window": window}), **rules)
    args = new, cache, jnp.asarray(table), jnp.asarray(lengths, jnp.int32), jnp.asarray(num_new)
    out, after = call(*args, shared)
    alone, expected = call(*args, None)
    if cache.policy != kvattn.Full():
        window = cache.policy.window
    rules = {name: np.asarray(x) if isinstance(x, tuple) else x for name, x in rules.items()}
    exact, low = (
        truth(new, cache, after, lengths, num_new, d, window=window, **rules) for d in (np.float64, np.dtype(dtype))
    )
    assert_accurate(out, exact, low)
    assert (np.asarray(out)[np.arange(length)[None] >= num_new[:, None]] == 0).all()
    after.check()
    for one, other in zip(jax.tree.leaves(after.replace(shared=None)), jax.tree.leaves(expected), strict=True):
        assert_same_bits(one, other, "caches")
    return shared, np.abs(np.asarray(out, np.float32) - np.asarray(alone, np.float32)).max()


def test_random_groups_and_levels():
    """Every shape of sharing there is, in one compiled program."""
    found = [check(seed, make())[0] for seed in range(24)]
    sizes = {
        tuple(int((level.members >= 0).sum(1).max()) for level in shared) for shared in found if shared is not None
    }
    assert len(sizes) > 5 and any(a > 2 and b > 0 and c > 0 for a, b, c in sizes)
    assert step()._cache_size() <= 2  # with and without


RULES = {
    "window": {"window": 9},
    "everything": {
        "softcap": 2.0,
        "sinks": (0.5, -1.0, 0.0, 2.0),
        "alibi_slopes": (0.5, 0.25, 0.125, 0.06),
        "scale": 0.4,
    },
    "rotated": {"rope": ROPE, "window": 21},
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    for seed in range(4):
        assert check(seed, make(), **RULES[name])[0] is not None


CODECS = {"bfloat16": {"dtype": jnp.bfloat16}} | {
    type(codec).__name__: {"codec": codec} for codec in (kvattn.Int8(), kvattn.Float8(), kvattn.Int4(8))
}


@pytest.mark.parametrize("name", CODECS)
def test_codecs(name):
    for seed in range(3):
        check(seed, make(**CODECS[name]))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_several_tokens_of_a_row(implementation):
    """Drafts that are verified, or a short rest of a prompt; long chunks are bound by products and read alone."""
    for seed in range(3):
        check(seed, make(), length=3, implementation=implementation, window=17)


def test_many_tokens_of_a_row_read_by_themselves():
    _, off = check(0, make(), length=9)
    assert off == 0  # the same program
    _, off = check(0, make(), length=3)
    assert off > 0
