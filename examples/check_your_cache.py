"""Checks decoding caches with `kvattn.testing`: kvattn's own, Flax's, and some written as other libraries' are.

    python examples/check_your_cache.py                    prints what each does not do
    python examples/check_your_cache.py --only "Flax NNX"  one of them, with the whole report
    python examples/check_your_cache.py --write            also benchmarks/results/check_caches.json, docs/testing.md

A cache is described by two functions and by what it claims. Those of other libraries are claimed to do what their
documentation says, and to raise where a token does not fit. The ones that say "like" are written here from that
documentation, in a few lines of NumPy or JAX: they show the kind, not the library.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvattn
from kvattn.testing import Claims, Report, check_cache

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "check_caches.json"
PAGE = ROOT / "docs" / "testing.md"


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache, described: what `check_cache` is given."""

    make: Callable[..., Any]
    step: Callable[..., Any]
    claims: Claims
    readers: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    def check(self, **options: Any) -> Report:
        """All that it claims, tried."""
        return check_cache(self.make, self.step, self.claims, **self.readers, **options)


# kvattn ---------------------------------------------------------------------------------------------------------------

ALL = {"padding": ("right", "left"), "ragged": True, "empty_rows": True, "jit": True}
"""What every cache of kvattn takes."""


def filled(cache, number):
    fill = lambda x: jnp.full_like(x, number) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return dataclasses.replace(cache, keys=jax.tree.map(fill, cache.keys), values=jax.tree.map(fill, cache.values))


READERS = {
    "lengths": lambda cache: cache.lengths,
    "failed": lambda cache: cache.status != 0,
    "fill": filled,
}


def ours(policy=None, codec=None, page_size=None, **claims):
    """A cache of kvattn. Where tokens are kept by position it is claimed which, else how many."""
    policy = kvattn.Full() if policy is None else policy
    claims = Claims(**{"overflow": "reports" if isinstance(policy, kvattn.Full) else "never", **ALL, **claims})
    rope = None if claims.rope_theta is None else kvattn.RoPE(claims.head_dim, theta=claims.rope_theta)

    def make(batch_size, capacity, num_kv_heads, head_dim, dtype):
        options = {"policy": policy, "codec": codec, "dtype": dtype}
        if page_size is None:
            room = capacity if isinstance(policy, kvattn.Full) else None
            return kvattn.KVCache.create(batch_size, num_kv_heads, head_dim, capacity=room, **options)
        pages = -(-capacity // page_size)
        cache = kvattn.PagedKVCache.create(
            batch_size * pages, page_size, num_kv_heads, head_dim, batch_size=batch_size, max_pages=pages, **options
        )
        order = np.random.default_rng(0).permutation(batch_size * pages)  # pages may lie anywhere
        return cache.with_tables(
            jnp.asarray(order.reshape(batch_size, pages), jnp.int32), np.zeros(batch_size, np.int32)
        )

    def step(cache, query, key, value, **pads):
        return kvattn.cached_attention(query, key, value, cache, rope=rope, **pads)

    return Case(make, step, claims, READERS)


# Flax -----------------------------------------------------------------------------------------------------------------


def flax_nnx():
    """`flax.nnx.MultiHeadAttention` with ``decode=True``; its projections are the identity."""
    from flax import nnx

    def make(batch_size, capacity, num_kv_heads, head_dim, dtype):
        heads, size = 2 * num_kv_heads, 2 * num_kv_heads * head_dim
        layer = nnx.MultiHeadAttention(
            heads,
            size,
            num_kv_heads=num_kv_heads,
            in_kv_features=num_kv_heads * head_dim,
            use_bias=False,
            decode=True,
            deterministic=True,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        for part in (layer.query, layer.key, layer.value, layer.out):
            part.kernel[...] = jnp.eye(math.isqrt(part.kernel.size)).reshape(part.kernel.shape)
        layer.init_cache((batch_size, capacity, size), dtype)
        return nnx.split(layer)

    def step(cache, query, key, value):
        layer = nnx.merge(*cache)
        flat = lambda x: x.reshape(*x.shape[:2], -1)
        out = layer(flat(query), flat(key), flat(value))
        return out.reshape(query.shape), nnx.split(layer)

    def fill(cache, number):
        layer = nnx.merge(*cache)
        for stored in (layer.cached_key, layer.cached_value):
            stored[...] = jnp.full_like(stored[...], number)
        return nnx.split(layer)

    return Case(make, step, Claims(prompts=False, chunks=False, jit=True), {"fill": fill})


def flax_linen():
    """`flax.linen.MultiHeadDotProductAttention` with ``decode=True``; its projections are the identity."""
    import flax.linen as nn

    heads, head_dim = 4, 64
    module = nn.MultiHeadDotProductAttention(heads, use_bias=False, decode=True, deterministic=True)
    eye = jnp.eye(heads * head_dim)
    kernel = {"kernel": eye.reshape(-1, heads, head_dim)}
    params = {**dict.fromkeys(("query", "key", "value"), kernel), "out": {"kernel": eye.reshape(heads, head_dim, -1)}}

    def make(batch_size, capacity, num_kv_heads, head_dim, dtype):
        like = jnp.zeros((batch_size, capacity, heads * head_dim), dtype)
        return module.init(jax.random.key(0), like)["cache"]

    def step(cache, query, key, value):
        flat = lambda x: x.reshape(*x.shape[:2], -1)
        variables = {"params": params, "cache": cache}
        out, changed = module.apply(variables, flat(query), flat(key), flat(value), mutable=["cache"])
        return out.reshape(query.shape), changed["cache"]

    def fill(cache, number):
        return {n: x if n == "cache_index" else jnp.full_like(x, number) for n, x in cache.items()}

    return Case(make, step, Claims(prompts=False, chunks=False, jit=True, num_kv_heads=heads), {"fill": fill})


# Written as others' are -----------------------------------------------------------------------------------------------


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(query, keys, values, mask):
    """Attention as most write it: what may not be seen has a very small score."""
    group = query.shape[2] // keys.shape[2]
    keys, values = (np.repeat(x, group, axis=2) for x in (keys, values))
    scores = np.einsum("btnh,bsnh->bnts", query, keys) / np.sqrt(np.float32(query.shape[-1]))
    weights = softmax(np.where(mask[:, None], scores, np.finfo(np.float32).min))
    return np.einsum("bnts,bsnh->btnh", weights, values)


def keras_like():
    """One array [B, 2, S, N, H], spliced at an index that the caller counts; the caller's mask is causal.

    As `keras_hub.layers.CachedMultiHeadAttention` documents `cache` and `cache_update_index`, with JAX below.
    """

    def make(batch_size, capacity, num_kv_heads, head_dim, dtype):
        return jnp.zeros((batch_size, 2, capacity, num_kv_heads, head_dim), dtype), jnp.int32(0)

    def step(cache, query, key, value):
        stored, index = cache
        splice = lambda x, new: jax.lax.dynamic_update_slice(x, new, (0, index, 0, 0))
        stored = jnp.stack((splice(stored[:, 0], key), splice(stored[:, 1], value)), axis=1)
        length, capacity = query.shape[1], stored.shape[2]
        mask = jnp.arange(capacity) <= index + jnp.arange(length)[:, None]
        scores = jnp.einsum("btnh,bsnh->bnts", query, stored[:, 0]) / np.sqrt(query.shape[-1]).astype(query.dtype)
        scores = scores + jnp.where(mask, 0, -1e9)  # its softmax adds a large negative number
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), stored[:, 1])
        return out, (stored, index + length)

    fill = lambda cache, number: (jnp.full_like(cache[0], number), cache[1])
    return Case(make, step, Claims(jit=True, num_kv_heads=4), {"fill": fill})


class Masked:
    """Keys, values and which of them are real: what the caches of HuggingFace's kind have in common.

    Batches are padded on the left; every query is masked by position and by what is real.
    """

    window = None

    def __init__(self, batch_size, capacity, num_kv_heads, head_dim, dtype):
        self.keys, self.values = np.zeros((2, batch_size, 0, num_kv_heads, head_dim), dtype)
        self.real = np.zeros((batch_size, 0), bool)
        self.seen = 0

    def update(self, key, value, real):
        """Stores tokens; gives all that the queries may see, and the index of the first of it."""
        self.keys = np.concatenate([self.keys, key], axis=1)
        self.values = np.concatenate([self.values, value], axis=1)
        self.real = np.concatenate([self.real, real], axis=1)
        return self.keys, self.values, self.real, 0

    def step(self, query, key, value, num_new=None, padding="left"):
        """Appends and attends, under a mask of positions and of what is real."""
        rows, length = query.shape[:2]
        counts = np.full(rows, length) if num_new is None else num_new
        real = np.arange(length) >= length - counts[:, None]
        keys, values, real, first = self.update(key, value, real)
        at = self.seen + np.arange(length)[:, None]
        index = first + np.arange(keys.shape[1])
        mask = (index <= at) if self.window is None else (index <= at) & (index > at - self.window)
        self.seen += length
        return attention(query, keys, values, mask[None] & real[:, None]), self


class Growing(Masked):
    """As a dynamic cache: keys and values grow at every step."""


class Static(Masked):
    """As a static cache: room for all tokens from the beginning, written at their positions."""

    def __init__(self, batch_size, capacity, num_kv_heads, head_dim, dtype):
        self.keys, self.values = np.zeros((2, batch_size, capacity, num_kv_heads, head_dim), dtype)
        self.real = np.ones((batch_size, capacity), bool)
        self.seen = 0

    def update(self, key, value, real):
        """Writes them at their positions; past the end NumPy raises."""
        at = self.seen + np.arange(key.shape[1])
        self.keys[:, at], self.values[:, at], self.real[:, at] = key, value, real
        return self.keys, self.values, self.real, 0


class Sliding(Masked):
    """As a sliding-window layer: the last window - 1 tokens are kept, and shown with the new ones."""

    window = 5

    def update(self, key, value, real):
        """All that is kept and the new ones are shown, the last of them kept."""
        keys, values, real, _ = super().update(key, value, real)
        first = self.seen + key.shape[1] - keys.shape[1]
        last = slice(max(0, keys.shape[1] - self.window + 1), None)
        self.keys, self.values, self.real = keys[:, last], values[:, last], real[:, last]
        return keys, values, real, first


class StaticSliding(Sliding):
    """As a static sliding window: a fixed array of the window, rolled by one token once it is full.

    One token is rolled in before it reads, a longer chunk is shown beside what the array holds.
    """

    def __init__(self, batch_size, capacity, num_kv_heads, head_dim, dtype):
        self.keys, self.values = np.zeros((2, batch_size, self.window, num_kv_heads, head_dim), dtype)
        self.real = np.ones((batch_size, self.window), bool)
        self.seen = 0

    def update(self, key, value, real):
        """Where they go in, and what is shown."""
        length, held = key.shape[1], min(self.seen, self.window)
        last = slice(held + length - self.window if held + length > self.window else 0, None)
        shown, first = [], self.seen - held
        for name, new in (("keys", key), ("values", value), ("real", real)):
            stored = getattr(self, name)
            every = np.concatenate([stored[:, :held], new], axis=1)
            kept = every[:, last]
            setattr(self, name, np.concatenate([kept, stored[:, kept.shape[1] :]], axis=1))
            shown.append(every if length > 1 and held + length > self.window else getattr(self, name))
        rolled = max(0, self.seen + length - self.window)
        return *shown, first if shown[0].shape[1] > self.window else rolled


class RolledTooSoon(StaticSliding):
    """The same, but a chunk is rolled in before its first queries read what it pushes out."""

    def update(self, key, value, real):
        """Shows the array alone, whatever the chunk's length."""
        super().update(key, value, real)
        return self.keys, self.values, self.real, max(0, self.seen + key.shape[1] - self.window)


class RingByHand:
    """A ring as one writes it first: slot = position % window, all slots seen once it is full, RoPE by slot."""

    window, theta = 5, 10000.0

    def __init__(self, batch_size, capacity, num_kv_heads, head_dim, dtype):
        self.keys, self.values = np.zeros((2, batch_size, self.window, num_kv_heads, head_dim), dtype)
        self.seen = 0

    def turned(self, x, place):
        """RoPE."""
        half = x.shape[-1] // 2
        phase = (place * self.theta ** (-np.arange(half) / half)).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(phase) - b * np.sin(phase), b * np.cos(phase) + a * np.sin(phase)], -1)

    def step(self, query, key, value):
        """Writes over the oldest, and attends to all slots."""
        slot = self.seen % self.window
        self.keys[:, slot], self.values[:, slot] = self.turned(key[:, 0], slot), value[:, 0]
        self.seen += 1
        mask = np.arange(self.window) < self.seen
        mask = np.broadcast_to(mask, (len(query), 1, self.window))
        return attention(self.turned(query, slot), self.keys, self.values, mask), self


def numpy_case(cls, **claims):
    def fill(cache, number):
        cache.keys[:], cache.values[:] = number, number
        return cache

    return Case(cls, cls.step, Claims(**claims), {"fill": fill})


# The table ------------------------------------------------------------------------------------------------------------


def cases() -> dict[str, Case]:
    """Every cache that is checked, by name."""
    rope = {"rope_theta": 10000.0}
    return {
        "Flax NNX": flax_nnx(),
        "Flax Linen": flax_linen(),
        "Keras-like": keras_like(),
        "HF-like dynamic": numpy_case(Growing, padding=("left",), overflow="never"),
        "HF-like static": numpy_case(Static, padding=("left",)),
        "HF-like sliding": numpy_case(Sliding, window=5, padding=("left",), overflow="never"),
        "HF-like static sliding": numpy_case(StaticSliding, window=5, padding=("left",), overflow="never"),
        "rolled too soon": numpy_case(RolledTooSoon, window=5, overflow="never"),
        "ring by hand": numpy_case(RingByHand, window=5, overflow="never", prompts=False, chunks=False, **rope),
        "kvattn": ours(**rope),
        "kvattn SlidingWindow": ours(kvattn.SlidingWindow(5), window=5, **rope),
        "kvattn StreamingLLM": ours(kvattn.StreamingLLM(2, 5), window=5, sinks=2, positions="cache", **rope),
        "kvattn Chunked": ours(kvattn.Chunked(5), chunk_size=5, **rope),
        "kvattn H2O": ours(kvattn.H2O(3, 2), budget=6),
        "kvattn Scissorhands": ours(kvattn.Scissorhands(5, 2, 8), budget=6),
        "kvattn bfloat16": ours(dtype="bfloat16"),
        "kvattn Int8": ours(codec=kvattn.Int8(), tolerance=0.03),
        "kvattn Float8": ours(codec=kvattn.Float8(), tolerance=0.2),
        "kvattn Int4": ours(codec=kvattn.Int4(), tolerance=0.4),
        "kvattn KIVI": ours(codec=kvattn.KIVI(bits=4, group_size=4, residual=8), tolerance=0.4),
        "kvattn pages": ours(page_size=4, **rope),
    }


def checked(name: str, case: Case) -> dict[str, Any]:
    """What became of one cache: which checks held, failed and were not tried, and what was seen instead."""
    report = case.check()
    by = lambda status: [finding.name for finding in report if finding.status == status]
    return {
        "cache": name,
        "ok": by("ok"),
        "failed": {f.name: {"expected": f.expected, "seen": f.seen} for f in report if f.status == "failed"},
        "not tried": by("not tried"),
        "not offered": by("not offered"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/testing.md."""
    lines = ["| cache | held | what does not hold |", "|---|---|---|"]
    for row in rows:
        failed = [f"**{n}**: expected {f['expected']}; saw {f['seen']}" for n, f in row["failed"].items()]
        lines.append(f"| {row['cache']} | {len(row['ok'])} | {'<br>'.join(failed)} |")
    return "\n".join(lines)


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table between its marks."""
    return re.sub(
        r"(<!-- table -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table(rows)}\n{m[2]}", page, flags=re.DOTALL
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="one of them, and its whole report")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)} and the table")
    words = parser.parse_args()
    if words.only is not None:
        print(cases()[words.only].check())
        return
    rows = []
    for name, case in cases().items():
        rows.append(checked(name, case))
        failed = ", ".join(rows[-1]["failed"])
        print(f"{name:<24} {len(rows[-1]['ok']):>2} hold" + (f", not: {failed}" if failed else ""), flush=True)
    if words.write:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
        text = json.dumps({"versions": versions, "caches": rows}, indent=1, ensure_ascii=False)
        RESULTS.write_text(text + "\n", encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
