"""Decodes with grouped-query attention and a key/value cache.

python examples/decode_gqa.py
    text, with the byte model of examples/weights: speed, cache sizes as MHA, GQA and MQA, cached decoding
    against the full forward pass, and the layer's step beside flax.nnx.MultiHeadAttention's

python examples/decode_gqa.py --checkpoint DIR --prompt "Once upon a time"
    text from a HuggingFace folder of any family that kvattn.models.from_pretrained reads; without a tokenizer.json in
    it, prompt and text are token ids

python examples/decode_gqa.py --random --heads 32 --kv-heads 8 --head-dim 128 --batch 8 --context 4096
    the bare decode step at the shapes of a real model: time, bandwidth, per cent of a copy in the same run
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

import kvattn
from kvattn import measure
from kvattn.layers import GroupedQueryAttention, stateless

WEIGHTS = Path(__file__).parent / "weights" / "bytes.safetensors"
console = Console(highlight=False, width=min(Console().width, 120) if Console().is_terminal else 100)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0)
    text = p.add_argument_group("text")
    text.add_argument("--weights", type=Path, default=WEIGHTS)
    text.add_argument("--checkpoint", type=Path, help="a HuggingFace folder, instead of the byte model")
    text.add_argument("--dtype-of-weights", choices=["bfloat16", "float16", "float32"], help="default: as stored")
    text.add_argument("--prompt", help="default: the beginning of a page the model was not trained on")
    text.add_argument("--max-new-tokens", type=int, default=400)
    text.add_argument("--temperature", type=float, default=0.4)
    text.add_argument(
        "--cache-dtype",
        choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 on GPUs, whose kernel reads 16 bits and fewer; float32 elsewhere",
    )
    bare = p.add_argument_group("the bare step")
    bare.add_argument("--random", action="store_true", help="random queries, keys and values; no model")
    bare.add_argument("--heads", type=int, default=32)
    bare.add_argument("--kv-heads", type=int, default=8)
    bare.add_argument("--head-dim", type=int, default=128)
    bare.add_argument("--batch", type=int, default=8)
    bare.add_argument("--context", type=int, help="tokens in the cache (default 4096)")
    bare.add_argument("--window", type=int, help="keep and attend to the last tokens only")
    bare.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    bare.add_argument("--implementation", nargs="+", help="one or more, timed one after the other; default: the best")
    bare.add_argument("--repeats", type=int, default=15, help="timings; the median counts")
    return p.parse_args()


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


# Text ---------------------------------------------------------------------------------------------


def text_demo(args: argparse.Namespace) -> None:
    if not args.weights.exists():
        raise SystemExit(f"{args.weights} is not there: run examples/train_bytes.py first.")
    model = kvattn.models.load(args.weights, dtype=jnp.float32)
    config = model.config
    cache_dtype = jnp.dtype(args.cache_dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32"))
    codec = None if cache_dtype == jnp.float32 else kvattn.codecs.Plain(cache_dtype)
    prompt = args.prompt.encode() if args.prompt else default_prompt()
    prompt = bytes([corpus.START]) + prompt

    def decode() -> list[int]:
        return kvattn.generate(
            model, [prompt], args.max_new_tokens, codec=codec, temperature=args.temperature, seed=args.seed
        )[0]  # fmt: skip

    start = time.perf_counter()
    with console.status("compiling and decoding ..."):
        new = decode()
    first = time.perf_counter() - start
    start = time.perf_counter()
    decode()
    again = time.perf_counter() - start

    console.rule("prompt", align="left")
    console.print(Text(prompt[1:].decode(errors="replace"), style="dim"))
    console.rule(f"decoded, temperature {args.temperature}", align="left")
    console.print(Text(bytes(new).decode(errors="replace"), style="bold"))
    console.rule("numbers", align="left")

    rows = {
        "model": f"{config.num_layers} layers, {config.num_heads} query heads, {config.num_kv_heads} key/value heads "
        f"of {config.head_dim}, {sum(x.size for x in jax.tree.leaves(nnx.state(model))):,} parameters",
        "speed": f"{len(new) / again:,.0f} tokens/s, prompt of {len(prompt)} included ({first:.1f} s with compiling)",
    }
    capacity = len(prompt) + len(new)
    for name, kv_heads in (("MHA", config.num_heads), ("GQA", config.num_kv_heads), ("MQA", 1)):
        caches = jax.eval_shape(
            lambda kv_heads=kv_heads: [
                kvattn.KVCache.create(1, kv_heads, config.head_dim, capacity=capacity) for _ in range(config.num_layers)
            ]
        )
        rows[f"cache as {name}"] = f"{size(sum(c.nbytes for c in caches))}  ({capacity} tokens, bfloat16)"
    caches = jax.eval_shape(lambda: model.make_cache(1, capacity, codec=codec))
    rows["cache read by"] = f"{measure.reader(caches[0], config.num_heads, jnp.float32)}, {cache_dtype}"
    rows["cached - full"] = cached_against_full(model, [*prompt, *new], codec)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim, config.model_dim)
    rows["this layer's step"] = beside_flax(8, args.context or 4096, *heads, repeats=40, codec=codec)
    rows["a larger layer's"] = beside_flax(8, args.context or 4096, 32, 8, 128, 256, repeats=5, codec=codec)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows.items():
        table.add_row(*row)
    console.print(table)


def checkpoint_demo(args: argparse.Namespace) -> None:
    """Text, or token ids, from a HuggingFace folder."""
    with console.status(f"reading {args.checkpoint} ..."):
        model = kvattn.models.from_pretrained(args.checkpoint, dtype=args.dtype_of_weights)
    config, kind = model.config, jnp.dtype(model.embed.embedding[...].dtype)
    tokenizer = None
    if (args.checkpoint / "tokenizer.json").is_file():
        tokenizer = kvattn.models.load_tokenizer(args.checkpoint)
        prompt = tokenizer.encode(args.prompt or "The key to a fast decoder is").ids
    else:
        try:
            prompt = [int(token) for token in (args.prompt or "1 2 3").replace(",", " ").split()]
        except ValueError:
            raise SystemExit(
                f"{args.checkpoint} has no tokenizer.json: give --prompt as token ids, such as '1 2 3'."
            ) from None
    cache_dtype = jnp.dtype(args.cache_dtype or kind)
    codec = None if cache_dtype == kind else kvattn.codecs.Plain(cache_dtype)
    stream = kvattn.models.TextStream(tokenizer, prompt) if tokenizer else None

    def show(_: int, token: int) -> None:
        console.print(Text(stream.push(token) if stream else f"{token} ", style="bold"), end="")

    console.rule("prompt", align="left")
    console.print(Text(args.prompt or str(prompt), style="dim"))
    console.rule(f"decoded, temperature {args.temperature}", align="left")
    times = []
    for on_token in (show, None):  # the first run compiles
        start = time.perf_counter()
        new = kvattn.generate(
            model, [prompt], args.max_new_tokens, codec=codec, temperature=args.temperature, seed=args.seed,
            on_token=on_token,
        )[0]  # fmt: skip
        times.append(time.perf_counter() - start)
    console.print(Text(stream.finish() if stream else ""))
    console.rule("numbers", align="left")
    capacity = len(prompt) + len(new)
    caches = jax.eval_shape(lambda: model.make_cache(1, capacity, codec=codec))
    rows = {
        "model": f"{config.num_layers} layers, {config.num_heads} query heads, {config.num_kv_heads} key/value heads "
        f"of {config.head_dim}, {sum(x.size for x in jax.tree.leaves(nnx.state(model))):,} parameters in {kind}",
        "speed": f"{len(new) / times[1]:,.0f} tokens/s, prompt of {len(prompt)} included ({times[0]:.1f} s at first)",
        "cache": f"{size(sum(cache.nbytes for cache in caches))} for {capacity} tokens, read by "
        f"{measure.reader(caches[0], config.num_heads, kind)}, {cache_dtype}",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows.items():
        table.add_row(*row)
    console.print(table)


def default_prompt() -> bytes:
    """The first paragraphs of a held-out page."""
    _, valid = corpus.split()
    text = valid.tobytes()
    return text[text.index(b"Comparisons\n***") :][:520].rsplit(b"\n", 1)[0] + b"\n"


def cached_against_full(model: kvattn.models.Decoder, tokens: list[int], codec: kvattn.codecs.Codec | None) -> str:
    """The largest difference of the logits, token by token through the cache and all tokens at once."""
    tokens = jnp.asarray([tokens], jnp.int32)
    apply, weights = stateless(model)
    full, _ = jax.jit(apply)(weights, tokens)
    step = jax.jit(apply, donate_argnames="cache")
    cache = model.make_cache(1, tokens.shape[1], codec=codec)
    worst = 0.0
    with console.status("comparing with the full forward pass ..."):
        for t in range(tokens.shape[1]):
            logits, cache = step(weights, tokens[:, t : t + 1], cache=cache)
            worst = max(worst, float(jnp.max(jnp.abs(logits[:, 0] - full[:, t]))))
    return f"{worst:.1e} at most, over {tokens.shape[1]} x {full.shape[-1]} logits of spread {float(jnp.std(full)):.1f}"


def beside_flax(
    batch: int,
    context: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    features: int,
    repeats: int,
    codec: kvattn.codecs.Codec | None,
) -> str:
    """Step times of Flax's layer and of kvattn's with the same weights and tokens, and how far apart they are.

    Both run as plain `jax.jit` programs with a donated cache, which is the fastest way to run Flax's.
    """
    options = {"num_kv_heads": num_kv_heads, "qkv_features": num_heads * head_dim, "use_bias": False}
    theirs = nnx.MultiHeadAttention(num_heads, features, **options, decode=True, rngs=nnx.Rngs(0))
    ours = GroupedQueryAttention(num_heads, features, **options, rngs=nnx.Rngs(0))
    past, x = (jax.random.normal(jax.random.key(n), (batch, n, features)) for n in (context - repeats - 3, 1))

    theirs.init_cache((batch, context, features))
    keys, values = theirs.key(past), theirs.value(past)
    theirs.cached_key[...] = theirs.cached_key[...].at[:, : past.shape[1]].set(keys)
    theirs.cached_value[...] = theirs.cached_value[...].at[:, : past.shape[1]].set(values)
    theirs.cache_index[...] = jnp.int32(past.shape[1])
    graph, flax_cache, flax_weights = nnx.split(theirs, nnx.Cache, ...)

    @functools.partial(jax.jit, donate_argnums=0)
    def flax_step(cache, weights, x):
        layer = nnx.merge(graph, cache, weights)
        return layer(x), nnx.state(layer, nnx.Cache)

    apply, weights = stateless(ours)
    kvattn_step = jax.jit(apply, donate_argnames="cache")
    cache = measure.filled(ours.make_cache(batch, context, codec=codec), keys, values, past.shape[1])

    flax_times, times = [], []
    with console.status("measuring beside flax.nnx.MultiHeadAttention ..."):
        for _ in range(repeats + 3):
            start = time.perf_counter()
            y, flax_cache = flax_step(flax_cache, flax_weights, x)
            y.block_until_ready()
            middle = time.perf_counter()
            z, cache = kvattn_step(weights, x, cache=cache)
            z.block_until_ready()
            flax_times.append(middle - start)
            times.append(time.perf_counter() - middle)
    cache.check()
    step, flax = statistics.median(times[3:]), statistics.median(flax_times[3:])
    reads = measure.reader(cache, num_heads, x.dtype)
    return (
        f"{step * 1e3:.2f} ms, flax.nnx.MultiHeadAttention {flax * 1e3:.2f} ms: {flax / step:.1f} times; "
        f"largest difference {float(jnp.max(jnp.abs(y - z))):.0e} (batch {batch}, {context} tokens, "
        f"{num_heads} heads on {num_kv_heads} of {head_dim}, float32"
        + ("" if codec is None else f", the cache in {codec.dtype}, read by {reads}")
        + ")"
    )


# The bare step ------------------------------------------------------------------------------------


def bare_demo(args: argparse.Namespace) -> None:
    case = measure.Case(
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        batch_size=args.batch,
        context=args.context or 4096,
        window=args.window,
        dtype=args.dtype,
        seed=args.seed,
    )
    console.print(
        f"{jax.devices()[0].device_kind}: batch {args.batch}, {args.heads} query heads, {args.kv_heads} key/value "
        f"heads of {args.head_dim}, {case.tokens_read} of {case.context} tokens, {case.dtype}: "
        f"{size(case.read_bytes)} of keys and values"
    )
    with console.status("measuring ..."):
        results = list(measure.timings(case, args.implementation or [None], args.repeats))
        copied = measure.copy_bandwidth(max(case.read_bytes, 2**28), args.repeats)
    table = Table("implementation", "µs/step", "µs alone", "GB/s", "% of copy", "error", box=None)
    for result in results:
        if result.reason is None:
            table.add_row(
                result.implementation or "best", f"{result.seconds * 1e6:,.1f}", f"{result.seconds_alone * 1e6:,.1f}",
                f"{result.bandwidth / 1e9:,.1f}", f"{100 * result.bandwidth / copied:.0f}", f"{result.error:.1e}",
            )  # fmt: skip
    console.print(table)
    if not args.implementation:
        _, _, fresh = case.inputs()
        console.print(f"best: the cache is read by {measure.reader(jax.eval_shape(fresh), args.heads, case.dtype)}")
    for result in results:
        if result.reason is not None:
            console.print(f"not run: {result.reason}")
    console.print(
        f"µs/step: in a compiled loop of {measure.steps_per_call(case.read_bytes)}; µs alone: one step called from "
        f"Python. Medians of {args.repeats}, the cache donated. GB/s: of keys and values; a copy reads and writes "
        f'{copied / 1e9:,.1f} GB/s. error: the largest difference from implementation="reference".'
    )


def main() -> None:
    args = arguments()
    if args.random:
        bare_demo(args)
    elif args.checkpoint:
        checkpoint_demo(args)
    else:
        text_demo(args)


if __name__ == "__main__":
    main()
