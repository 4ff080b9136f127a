"""One way of taking a decode step on CPU, in a process of its own: what `decode_peers.py` starts, and takes in turns.

    python benchmarks/decode_peer.py torch float32 OUT.npy

Every number on a line of standard input is how many steps to time; a line of JSON with the seconds of each comes back.
Keys, values and queries are the same everywhere, so outputs can be compared.
"""

import json
import sys
import time

import numpy as np

B, N, K, H, S = 8, 32, 8, 128, 4096


def numbers(name: str, *shape: int) -> np.ndarray:
    """Small normal numbers, the same in every process. Multiples of 1/64, so that bfloat16 holds them exactly."""
    drawn = np.random.default_rng(["query", "keys", "values"].index(name)).normal(size=shape)
    return (np.clip(np.round(drawn * 64), -256, 256) / 64).astype(np.float32)


def torch_step(kind: str, dtype: str):
    """PyTorch's `scaled_dot_product_attention`; "torch" packs the queries of a group, "torch gqa" asks for GQA."""
    import torch

    as_given = lambda *args: torch.from_numpy(numbers(*args)).to(getattr(torch, dtype))
    query, keys, values = as_given("query", B, N, 1, H), as_given("keys", B, K, S, H), as_given("values", B, K, S, H)
    attention = torch.nn.functional.scaled_dot_product_attention

    def step():
        with torch.inference_mode():
            if kind == "torch gqa":
                return attention(query, keys, values, enable_gqa=True)
            return attention(query.reshape(B, K, N // K, H), keys, values).reshape(B, N, 1, H)

    return step, lambda out: out.float().numpy().reshape(B, N, H)


def jax_step(kind: str, dtype: str):
    """The rest: "kvattn" and its storages, shorter texts and longer caches, "jax.nn", and reading keys and values."""
    import jax
    import jax.numpy as jnp

    import kvattn

    as_given = lambda *args: jnp.asarray(numbers(*args), dtype)
    query = as_given("query", B, N, 1, H).swapaxes(1, 2)
    shown = lambda out: np.asarray(out, np.float32).reshape(B, N, H)
    if kind == "read":
        both = as_given("keys", B, K, S, H), as_given("values", B, K, S, H)
        read = jax.jit(lambda keys, values: [jnp.sum(x, dtype=jnp.float32) for x in (keys, values)])
        return lambda: jax.block_until_ready(read(*both)), lambda out: None
    keys, values = (as_given(name, B, K, S, H).swapaxes(1, 2) for name in ("keys", "values"))
    if kind == "jax.nn":
        compiled = jax.jit(jax.nn.dot_product_attention)
        return lambda: jax.block_until_ready(compiled(query, keys, values)), shown
    codec, _, lengths = kind.removeprefix("kvattn").removeprefix(":").partition("@")
    filled, capacity = (int(n) for n in (lengths or f"{S}/{S}").split("/"))
    codec = getattr(kvattn, codec)() if codec else None
    cache = kvattn.KVCache.create(B, K, H, capacity=capacity, dtype=dtype, codec=codec)
    prompt = jnp.zeros((B, filled - 1, N, H), dtype), keys[:, : filled - 1], values[:, : filled - 1]
    _, cache = kvattn.jit(kvattn.cached_attention)(*prompt, cache)
    new = query, keys[:, filled - 1 : filled], values[:, filled - 1 : filled]

    def again(query, key, value, cache):
        """Appends a token and attends; and takes it back, which is a new length."""
        out, cache = kvattn.cached_attention(query, key, value, cache)
        return out, cache.trim(1)

    compiled, held = kvattn.jit(again), [cache]

    def step():
        out, held[0] = compiled(*new, held[0])
        return jax.block_until_ready(out)

    return step, shown


def main():
    kind, dtype, path = sys.argv[1:]
    step, shown = (torch_step if kind.startswith("torch") else jax_step)(kind, dtype)
    for _ in range(3):
        out = shown(step())
    if out is not None:
        np.save(path, out)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
