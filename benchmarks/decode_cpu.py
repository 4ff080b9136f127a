"""One decode step on CPU, beside what a user would otherwise run.

Every figure is a ratio of two medians taken in turns in one process, after the values were checked. The floor is
reading the K/V bytes once (a sum). Shape: B8 N32 K8 H128, 4096 slots. Writes ``benchmarks/results/decode_cpu.json`` and
a picture.

    python benchmarks/decode_cpu.py [--repeats 31] [--no-save]
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import kvattn
from kvattn.models import Decoder, DecoderConfig

B, N, K, H, S = 8, 32, 8, 128, 4096
PAGE_SIZE = 128
RESULTS = pathlib.Path(__file__).parent / "results"


class Clock:
    """Medians of calls that are timed in turns, so that a busy moment of the machine hits all alike."""

    def __init__(self, repeats: int, title: str):
        self.repeats, self.title, self.calls = repeats, title, {}

    def add(self, name: str, call, before=lambda: ()) -> None:
        """Registers a call; it takes what the untimed `before` returns, and returns what to wait for."""
        self.calls[name] = before, call

    def run(self) -> dict[str, float]:
        """Seconds per call."""
        times = {name: [] for name in self.calls}
        for i in tqdm(range(self.repeats + 2), desc=self.title, leave=False, disable=None):
            for name, (before, call) in self.calls.items():
                given = jax.block_until_ready(before())
                start = time.perf_counter()
                jax.block_until_ready(call(*given))
                if i >= 2:
                    times[name].append(time.perf_counter() - start)
        return {name: float(np.median(t)) for name, t in times.items()}


def random_cache(dtype) -> kvattn.KVCache:
    """A cache with every slot filled."""
    cache = kvattn.KVCache.create(B, K, H, capacity=S, dtype=dtype)
    keys = iter(jax.random.split(jax.random.key(0), 2))
    fill = lambda tree, key: jax.tree.map(lambda x: jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype), tree)
    return dataclasses.replace(cache, keys=fill(cache.keys, next(keys)), values=fill(cache.values, next(keys)))


def in_pages(cache: kvattn.KVCache, page_size: int) -> kvattn.PagedKVCache:
    """The same tokens in pages that lie in no order."""
    num_pages = B * S // page_size
    paged = kvattn.PagedKVCache.create(
        num_pages, page_size, K, H, batch_size=B, max_pages=S // page_size, dtype=cache.dtype
    )
    table = np.random.default_rng(0).permutation(num_pages).reshape(B, -1).astype(np.int32)
    paged = paged.with_tables(table, [0] * B)
    slots = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    append = kvattn.jit(lambda k, v, cache: cache.write(slots, k, v))
    return append(*(x.transpose(0, 2, 1, 3) for x in cache.dense()), paged)


def with_lengths[C: kvattn.cache.Cache](cache: C, length: int) -> C:
    """The same cache, said to hold `length` tokens per row."""
    return dataclasses.replace(cache, lengths=jnp.full((B,), length, jnp.int32))


def core(dtype, repeats: int) -> dict:
    """The bare step against `jax.nn.dot_product_attention` and against reading the bytes."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (B, 1, heads, H), jnp.float32).astype(dtype)
        for i, heads in ((1, N), (2, K), (3, K))
    )
    box = [random_cache(dtype)]
    dense = tuple(x.transpose(0, 2, 1, 3) for x in box[0].dense())  # [B, S, K, H], what jax.nn takes
    step = kvattn.jit(kvattn.cached_attention)
    peer = jax.jit(jax.nn.dot_product_attention)

    def read_sum(x):
        if x.dtype == jnp.float16:  # XLA converts float16 one number at a time on CPUs: read the bits instead
            return jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32))
        return jnp.sum(x.astype(jnp.float32))

    read = jax.jit(lambda cache: [read_sum(x) for x in jax.tree.leaves(cache)[:2]])

    def decode(cache):
        out, box[0] = step(q, k, v, cache)
        return out

    def decode_pages(cache):
        out, pages[0] = step(q, k, v, cache)
        return out

    holding = lambda length: lambda: (with_lengths(box[0], length - 1),)
    pages = [in_pages(box[0], PAGE_SIZE)]
    holding_pages = lambda: (with_lengths(pages[0], S - 1),)

    @kvattn.jit
    def append(k, v, cache):
        step = kvattn.policies.Context(cache.lengths, jnp.ones_like(cache.lengths), 1, cache.num_slots)
        slots = cache.policy.place(cache.state, step)
        return cache.write(slots, k, v)

    def append_one(cache):
        box[0] = append(k, v, cache)
        return box[0].lengths

    expected = jax.nn.dot_product_attention(
        q.astype(jnp.float32),
        dense[0].at[:, S - 1].set(k[:, 0]).astype(jnp.float32),
        dense[1].at[:, S - 1].set(v[:, 0]).astype(jnp.float32),
    )
    errors = [
        float(jnp.max(jnp.abs(out.astype(jnp.float32) - expected)))
        for out in (decode(*holding(S)()), decode_pages(*holding_pages()))
    ]
    error = max(errors)
    assert error < (1e-5 if dtype == jnp.float32 else 1e-2), errors

    clock = Clock(repeats, f"step, {jnp.dtype(dtype).name}")
    clock.add("read", lambda: read(box[0]))
    clock.add("step", decode, holding(S))
    clock.add("step_512", decode, holding(512))
    clock.add("step_in_pages", decode_pages, holding_pages)
    clock.add("append", append_one, holding(S))
    if dtype != jnp.float16:  # there it raises: XLA has no float16 product on CPUs
        clock.add("jax_nn", lambda: peer(q, *dense))
    times = clock.run()
    compiled = step.lower(q, k, v, box[0]).compile().memory_analysis()
    kv_bytes = 2 * B * K * S * H * jnp.dtype(dtype).itemsize
    return {
        **{f"{name}_ms": round(t * 1e3, 3) for name, t in times.items()},
        "max_error": error,
        "gb_per_s": round(kv_bytes / times["step"] / 1e9, 1),
        "fraction_of_read_bandwidth": round(times["read"] / times["step"], 3),
        "times_faster_than_jax_nn": round(times["jax_nn"] / times["step"], 2) if "jax_nn" in times else None,
        "cost_of_512_of_4096_tokens": round(times["step_512"] / times["step"], 3),
        "cost_of_pages": round(times["step_in_pages"] / times["step"], 3),
        "append_share": round(times["append"] / times["step"], 4),
        "cache_bytes": box[0].nbytes,
        "alias_bytes": compiled.alias_size_in_bytes,
        "temp_bytes": compiled.temp_size_in_bytes,
    }


def layer(repeats: int) -> dict:
    """A whole NNX layer, projections included, against `flax.nnx.MultiHeadAttention` with its own cache."""
    features = N * H // 4
    settings = {"num_heads": N, "in_features": features, "qkv_features": N * H, "num_kv_heads": K}
    theirs = nnx.MultiHeadAttention(**settings, decode=True, rngs=nnx.Rngs(0))
    ours = kvattn.layers.GroupedQueryAttention(**settings, rngs=nnx.Rngs(0))
    theirs.init_cache((B, S, features))
    theirs.cache_index[...] = jnp.int32(S - 40 - 2 * repeats)
    x = jax.random.normal(jax.random.key(1), (B, 1, features))
    apply, weights = kvattn.layers.stateless(ours)
    step = kvattn.jit(lambda weights, x, cache: apply(weights, x, cache=cache))
    box = [ours.make_cache(B, S, dtype=jnp.float32)]
    graph, state = nnx.split(theirs)

    @jax.jit
    def flax_step(state, x):
        module = nnx.merge(graph, state)
        return module(x), nnx.state(module)

    donated = jax.jit(flax_step, donate_argnums=0)
    flax_box = [state]

    def run_theirs():
        out, flax_box[0] = donated(flax_box[0], x)
        return out

    def run_ours(cache):
        out, box[0] = step(weights, x, cache)
        return out

    clock = Clock(max(repeats // 3, 5), "layer")
    clock.add("flax", run_theirs)
    clock.add("kvattn", run_ours, lambda: (with_lengths(box[0], S - 1),))
    times = clock.run()
    return {
        "flax_ms": round(times["flax"] * 1e3, 2),
        "kvattn_ms": round(times["kvattn"] * 1e3, 2),
        "times_faster": round(times["flax"] / times["kvattn"], 2),
    }


def dispatch(repeats: int, num_layers: int = 32) -> dict:
    """Host time of a decode step of a model of 32 tiny layers: flat leaves against the same through `stateless`."""
    config = DecoderConfig(vocab_size=16, model_dim=16, num_layers=num_layers, num_heads=4, num_kv_heads=2, mlp_dim=16)
    model = Decoder(config, rngs=nnx.Rngs(0))
    caches, x = model.make_cache(1, 8), jnp.ones((1, 1), jnp.int32)
    apply, weights = kvattn.layers.stateless(model)
    leaves, tree = jax.tree.flatten(caches)

    @jax.jit
    def flat(weights, x, leaves):
        out, new = apply(weights, x, jax.tree.unflatten(tree, leaves))
        return out, jax.tree.leaves(new)

    ours = jax.jit(apply)
    with_nnx = nnx.jit(lambda model, x, caches: model(x, caches))
    clock = Clock(repeats, "dispatch")
    clock.add("flat_leaves", lambda: flat(weights, x, leaves))
    clock.add("stateless", lambda: ours(weights, x, caches))
    clock.add("nnx_jit", lambda: with_nnx(model, x, caches))
    times = clock.run()
    return {
        **{f"{name}_ms": round(t * 1e3, 3) for name, t in times.items()},
        "stateless_over_flat": round(times["stateless"] / times["flat_leaves"], 3),
    }


def picture(report: dict, path: pathlib.Path) -> None:
    """A bar per way of taking the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for ax, name in zip(axes, ("float32", "bfloat16"), strict=True):
        row = report["step"][name]
        labels = ["jax.nn", "kvattn", "kvattn, 512 tokens", "reading K and V once"]
        values = [row["jax_nn_ms"], row["step_ms"], row["step_512_ms"], row["read_ms"]]
        bars = ax.barh(labels[::-1], values[::-1], color=["#999999", "#9ecae1", "#3182bd", "#e6550d"])
        ax.bar_label(bars, fmt=" %.1f")
        ax.set_title(name)
        ax.set_xlabel("ms per step")
        ax.set_xlim(0, max(values) * 1.15)
    figure.suptitle(f"Decode step, B{B} N{N} K{K} H{H}, {S} slots, {report['machine']['cores']} CPU cores")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--only", choices=["layer", "dispatch_32_layers"], help="measure one part, keep the others")
    args = parser.parse_args()
    parts = {"layer": layer, "dispatch_32_layers": dispatch}
    saved = RESULTS / "decode_cpu.json"
    if args.only:
        report = json.loads(saved.read_text())
        report[args.only] = parts[args.only](args.repeats)
        print(json.dumps(report[args.only], indent=2))
        if not args.no_save:
            saved.write_text(json.dumps(report, indent=2) + "\n")
        return
    report = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "kvattn": kvattn.__version__},
        "date": datetime.date.today().isoformat(),
        "shape": {"B": B, "N": N, "K": K, "H": H, "S": S},
        "step": {name: core(jnp.dtype(name).type, args.repeats) for name in ("float32", "bfloat16", "float16")},
        **{name: measure(args.repeats) for name, measure in parts.items()},
    }
    print(json.dumps(report, indent=2))
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        saved.write_text(json.dumps(report, indent=2) + "\n")
        picture(report, RESULTS / "decode_cpu.png")


if __name__ == "__main__":
    main()
