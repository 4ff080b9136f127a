"""What tests of kernels share: caches full of poison where there is no token, calls, and their truth.

`benchmarks/on_device.py` looks at values with it where no pytest need be installed.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import variants

import kvattn
import kvattn.pallas
from kvattn.attend import api
from kvattn.attend.request import Request, grouped, ungrouped
from kvattn.cache import Layout
from kvattn.codecs.float8 import widen
from kvattn.masks import Mask

B = 3
F16, F32, BF16 = jnp.float16, jnp.float32, jnp.bfloat16


def worst(x):
    return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max)


def made(slots, heads, size, *, codec=None, dtype=F32, page_size=0, seed=0, rows=None, platform=None):
    """A cache that holds nothing, in arrays of `rows` slots."""
    if page_size:
        columns = -(-slots // page_size)
        pages = B * columns + 2
        cache = kvattn.PagedKVCache.create(
            pages,
            page_size,
            heads,
            size,
            batch_size=B,
            max_pages=columns,
            codec=codec,
            dtype=dtype,
            platform=platform,
        )
        table = np.random.default_rng(seed).permutation(pages)[: B * columns].reshape(B, columns)
        return cache.with_tables(table, [0] * B)
    layout = Layout(slots, rows or slots, False)
    return kvattn.KVCache.create(B, heads, size, capacity=slots, codec=codec, dtype=dtype, layout=layout)


def filled(lengths, slots, heads, size, *, dtype=F32, fill=worst, seed=0, left=None, **settings):
    """A cache that holds random tokens, and `fill` wherever there is none; also in the first `left` slots of a row."""
    rng = np.random.default_rng(seed)
    cache = made(slots, heads, size, dtype=dtype, seed=seed, **settings)
    cache = cache.replace(keys=jax.tree.map(fill, cache.keys), values=jax.tree.map(fill, cache.values))
    key, value = (jnp.asarray(rng.normal(size=(B, slots, heads, size)), dtype) for _ in range(2))
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    first = jnp.asarray([0] * B if left is None else left, jnp.int32)[:, None]
    where = jnp.where((slot >= first) & (slot < jnp.asarray(lengths, jnp.int32)[:, None]), slot, -1)
    return cache.write(where, key, value).replace(lengths=jnp.asarray(lengths, jnp.int32))


BAD = {
    # In the chunk, before the window of the later tokens ends, and among all that they see.
    **{at: {5: np.nan, 17: np.inf, 40: -np.inf} for at in (97, 50)},
    98: {5: 1.0, 17: -np.inf, 63: np.inf, 44: -np.inf},
    10: {30: np.inf},
}
"""Some positions of a hundred, of which the last four ask: what is not finite there, channel by channel."""


def with_bad_values(lengths, bad, *, slots, size, page_size=0, **settings):
    """A cache in which, of row 0, the values of some tokens are not finite: `bad`, as `BAD` has it."""
    cache = filled(lengths, slots, 2, size, page_size=page_size, **settings)
    rng = np.random.default_rng(7)
    key, value = (rng.normal(size=(B, len(bad), 2, size)).astype(np.float32) for _ in range(2))
    for i, channels in enumerate(bad.values()):
        for channel, what in channels.items():
            value[0, i, 1, channel] = what
    where = np.where(np.arange(B)[:, None] == 0, list(bad), -1)
    dtype = settings.get("dtype", F32)
    write = jax.jit(lambda *new: cache.write(*new))  # compiled, it says nothing
    return write(jnp.asarray(where, jnp.int32), jnp.asarray(key, dtype), jnp.asarray(value, dtype))


def request_for(cache, num_heads, new=1, *, dtype=F32, mask=None, seed=1, **rules):
    """The last `new` tokens of every row ask."""
    rng = np.random.default_rng(seed)
    size = cache.key_head_dim
    query = jnp.asarray(rng.normal(size=(B, new, num_heads, size)), dtype)
    positions = cache.lengths[:, None] - new + jnp.arange(new, dtype=jnp.int32)[None]
    positions = jnp.where(positions >= 0, positions, -1)
    return Request(
        query, positions, cache.view(), mask=mask or Mask(), **{"alibi_slopes": None, "scale": 0.125, **rules}
    )


def truth(request, dtype=np.float64):
    """Attention over the decoded cache by its formula."""
    keys, values = (np.asarray(x, dtype) for x in request.view.dense(F32))
    positions = np.asarray(request.view.layout.from_blocks(request.view.positions[..., None], False)[..., 0])
    query, at = np.asarray(request.query, dtype), np.asarray(request.positions)
    batch, new, heads, _ = query.shape
    group = heads // keys.shape[1]
    out, lse = np.zeros((batch, new, heads, values.shape[-1]), dtype), np.full((batch, new, heads), -np.inf, dtype)
    allowed = np.asarray(request.mask.allowed(request.positions, jnp.asarray(positions)))
    for b, t, n in itertools.product(range(batch), range(new), range(heads)):
        k = n // group
        seen = np.nonzero(allowed[b, min(k, allowed.shape[1] - 1), t])[0]
        if seen.size == 0:
            continue
        scores = keys[b, k, seen] @ query[b, t, n] * dtype(request.scale)
        if request.softcap is not None:
            scores = np.tanh(scores / dtype(request.softcap)) * dtype(request.softcap)
        if request.alibi_slopes is not None:
            distance = positions[b, min(k, positions.shape[1] - 1), seen] - at[b, t]
            scores = scores + dtype(request.alibi_slopes[n]) * distance.astype(dtype)
        top = scores.max()
        weights = np.exp(scores - top)
        out[b, t, n] = weights @ values[b, k, seen] / weights.sum()
        lse[b, t, n] = np.log(weights.sum()) + top
    return out, lse


def honest(request):
    """float32 attention as a kernel would do it: scales multiplied into scores and probabilities."""
    view, (out, _, mass) = request.view, api.attend(request, "reference")
    if isinstance(view.codec, kvattn.Int4):
        return api.attend(request, "xla")[0], mass
    if "scale" not in view.keys:
        return out, mass
    decoded = lambda x: view.store.from_blocks(
        widen(x) if isinstance(view.codec, kvattn.Float8) else x.astype(F32), False
    )
    scale = lambda x: view.store.from_blocks(x, True)[..., 0][:, :, None, None]
    positions = view.layout.from_blocks(view.positions[..., None], False)[..., 0]
    filled = (positions >= 0)[:, :, None, None]
    allowed = request.mask.allowed(request.positions, positions)[:, :, None]
    query = grouped(request.query, view.num_kv_heads)
    scores = jnp.einsum("bkgth,bksh->bkgts", query, decoded(view.keys["data"]))
    scores = scores * scale(view.keys["scale"]) * jnp.float32(request.scale)
    if request.softcap is not None:
        scores = jnp.tanh(scores / request.softcap) * request.softcap
    weights = jnp.where(
        allowed, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True, where=allowed, initial=-1e30)), 0
    )
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights * jnp.where(filled, scale(view.values["scale"]), 0)
    # Where eight-bit floats are not kept as their bits, NaN in an empty slot is NaN here.
    values = jnp.where(filled[:, :, 0, 0, :, None], decoded(view.values["data"]), 0)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, values) / jnp.where(total == 0, 1, total)
    return ungrouped(out), mass


def narrow(request, dtype):
    """Attention in 16 bits: keys, values and probabilities in `dtype`, sums in float32."""
    wide = lambda x: np.asarray(jnp.asarray(x, dtype).astype(F32))
    keys, values = (np.nan_to_num(wide(x)) for x in request.view.dense(F32))
    positions = np.asarray(request.view.layout.from_blocks(request.view.positions[..., None], False)[..., 0])
    query = wide(grouped(request.query, keys.shape[1]))
    scores = np.einsum("bkgth,bksh->bkgts", query, keys) * np.float32(request.scale)
    if request.softcap is not None:
        scores = np.tanh(scores / request.softcap) * np.float32(request.softcap)
    if request.alibi_slopes is not None:
        slopes = np.asarray(request.alibi_slopes).reshape(1, keys.shape[1], -1, 1, 1)
        distance = positions[:, :, None, None] - np.asarray(request.positions)[:, None, None, :, None]
        scores = scores + slopes * distance.astype(np.float32)
    allowed = np.asarray(request.mask.allowed(request.positions, jnp.asarray(positions)))[:, :, None]
    top = np.max(scores, axis=-1, keepdims=True, where=allowed, initial=-1e30)
    weights = np.where(allowed, np.exp(np.where(allowed, scores, top) - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bkgts,bksh->bkgth", wide(weights), values) / np.where(total == 0, 1, total)
    return ungrouped(jnp.asarray(out, F32))


POLICIES = {
    name: policy
    for name, policy in variants.POLICIES.items()
    if name == type(policy).__name__ and policy.mask().chunk is None
}
"""One of each kind; but kernels do not cut positions into chunks (`test_chunked.py`)."""


def assert_steps_are_the_references(implementation, name, size, dtype, lengths):
    """Chunks of these lengths through `cached_attention`: outputs, and what the policy keeps, as by the reference."""
    policy, rng = POLICIES[name], np.random.default_rng(3)
    capacity = variants.capacity_of(policy, 20)
    steps = {
        i: jax.jit(lambda *new, i=i: kvattn.cached_attention(*new, implementation=i, rope=kvattn.RoPE(size)))
        for i in (implementation, "reference")
    }
    caches = {i: kvattn.KVCache.create(B, 2, size, capacity=capacity, policy=policy, dtype=dtype) for i in steps}
    for length in lengths:
        query = jnp.asarray(rng.normal(size=(B, length, 4, size)), F32)
        new = [jnp.asarray(rng.normal(size=(B, length, 2, size)), dtype) for _ in range(2)]
        outs = {}
        for i, cache in caches.items():
            outs[i], caches[i] = steps[i](query, *new, cache)
        np.testing.assert_allclose(*outs.values(), atol=1e-5)
        np.testing.assert_array_equal(*(cache.positions for cache in caches.values()))


def assert_arrays_agree(implementation, other, size, dtype, atol):
    """`decode_attention` and `paged_decode_attention`, lengths per head, log-sum-exp, sinks; returns what they took."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(B, 4, size)), F32)
    k, v = (jnp.asarray(rng.normal(size=(B, 2, 48, size)), dtype) for _ in range(2))
    lengths = np.array([[48, 3], [0, 20], [17, 48]])
    rules = {"window": 16, "sinks": jnp.asarray([0.5, -1.0, 0.0, 2.0]), "softcap": 4.0, "return_lse": True}
    results = [
        kvattn.pallas.decode_attention(q, k, v, lengths, **rules, implementation=i) for i in (implementation, other)
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)
    pools = [x.reshape(B, 2, 6, 8, size).transpose(1, 0, 2, 3, 4).reshape(2, B * 6, 8, size) for x in (k, v)]
    table = np.arange(B * 6).reshape(B, 6)
    paged = kvattn.pallas.paged_decode_attention(q, *pools, lengths, table, **rules, implementation=implementation)
    for a, b in zip(paged, results[0], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    return q, k, v, pools, lengths
