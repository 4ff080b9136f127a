"""What the logits of a prompt cost: memory by the compiled program's own account, and time to the first token.

Three ways to take a prompt of 4,096 tokens at a vocabulary of 128,000: all its logits at once, all of them in chunks of
1,024 tokens (512 MiB of logits, what `kvattn.generate` did before), and those of its last token only (what it does).
Times are medians taken in turns in one process. Writes ``benchmarks/results/prompt_logits.json``.

    python benchmarks/prompt_logits.py [--repeats 5] [--no-save]
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvattn.layers import stateless
from kvattn.models import Decoder, DecoderConfig

LENGTH, CUT = 4096, 1024
CONFIG = DecoderConfig(vocab_size=128_000, model_dim=128, num_layers=2, num_heads=8, num_kv_heads=2, mlp_dim=352)
RESULTS = pathlib.Path(__file__).parent / "results"


def programs(model: Decoder):
    """The weights, and by name how many tokens a call takes and the program that takes them to the next token."""
    apply, weights = stateless(model)

    @functools.partial(jax.jit, donate_argnames="cache")
    def every(weights, tokens, num_new, cache):
        logits, cache = apply(weights, tokens, cache, num_new)
        logits = jnp.take_along_axis(logits, num_new[:, None, None] - 1, axis=1)
        return jnp.argmax(logits[:, 0], axis=-1), cache

    @functools.partial(jax.jit, donate_argnames="cache")
    def last(weights, tokens, num_new, cache):
        logits, cache = apply(weights, tokens, cache, num_new, logits_at=num_new[:, None] - 1)
        return jnp.argmax(logits[:, 0], axis=-1), cache

    return weights, {"all logits": (LENGTH, every), "all logits, cut": (CUT, every), "last logits": (LENGTH, last)}


def temporary_bytes(program, weights, chunk: int, model: Decoder) -> int:
    """What a call needs beside weights and caches."""
    shapes = jax.eval_shape(
        lambda: (jnp.zeros((1, chunk), jnp.int32), jnp.zeros(1, jnp.int32), model.make_cache(1, LENGTH))
    )
    return program.lower(weights, *shapes).compile().memory_analysis().temp_size_in_bytes


def first_token(program, weights, chunk: int, tokens, model: Decoder) -> tuple[float, int]:
    """Seconds to the first new token, and the token."""
    cache, num_new = jax.block_until_ready((model.make_cache(1, LENGTH), jnp.full((1,), chunk, jnp.int32)))
    start = time.perf_counter()
    for i in range(0, LENGTH, chunk):
        token, cache = program(weights, tokens[:, i : i + chunk], num_new, cache)
    token = int(token[0])
    return time.perf_counter() - start, token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()

    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    weights, ways = programs(model)
    tokens = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, CONFIG.vocab_size)
    times, memory, answers = {name: [] for name in ways}, {}, set()
    for name, (chunk, program) in ways.items():
        memory[name] = temporary_bytes(program, weights, chunk, model)
        answers.add(first_token(program, weights, chunk, tokens, model)[1])  # compiles
    if len(answers) > 1:
        raise SystemExit(f"the ways do not agree: {sorted(answers)}")
    for _ in range(args.repeats):
        for name, (chunk, program) in ways.items():
            times[name].append(first_token(program, weights, chunk, tokens, model)[0])

    result = {
        name: {"temporary_mb": memory[name] / 1e6, "seconds_to_first_token": float(np.median(times[name]))}
        for name in ways
    }
    print(f"{'':16} {'temporary':>12} {'first token':>12}")
    for name, row in result.items():
        print(f"{name:16} {row['temporary_mb']:9.1f} MB {row['seconds_to_first_token']:10.2f} s")
    if not args.no_save:
        about = {
            "what": __doc__.splitlines()[0],
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "jax": jax.__version__,
            "prompt": LENGTH,
            "model": {k: getattr(CONFIG, k) for k in ("vocab_size", "model_dim", "num_layers", "mlp_dim")},
            "repeats": args.repeats,
        }
        (RESULTS / "prompt_logits.json").write_text(json.dumps({**about, "ways": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
