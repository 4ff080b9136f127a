"""What kvattn is for, in a minute: cache sizes, a policy at work, shared prefixes, speed beside Flax.

    python examples/demo.py
    python examples/demo.py --only policy prefixes    some of it

The text is read by the byte model of examples/weights. `examples/decode_gqa.py` writes text, with your checkpoint too.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import decode_gqa
import jax.numpy as jnp
import numpy as np
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import kvattn
from kvattn.serving import Engine

console = Console(highlight=False, width=min(Console().width, 110) if Console().is_terminal else 100)


def sizes(weights: Path) -> RenderableType:
    """How large a cache is, and what each lever makes of it."""
    del weights
    plan = kvattn.memory.plan("llama-2-7b", "a10", length=4096)
    grouped = next(lever.plan for lever in kvattn.memory.levers(plan) if lever.name.startswith("GQA, 8"))
    rows = {
        "as it is": plan,
        "8 key/value heads (GQA)": grouped,
        "a window of 1024": plan.changed(policy=kvattn.SlidingWindow(1024)),
        "8 bits": plan.changed(codec=kvattn.Int8()),
        "all three": grouped.changed(policy=kvattn.SlidingWindow(1024), codec=kvattn.Int8()),
    }
    table = Table("", "cache of a sequence", "sequences that fit", "", box=None, padding=(0, 2, 0, 0))
    for name, each in rows.items():
        share = each.cache_bytes / plan.cache_bytes
        bar = Text("█" * max(round(32 * share), 1), style="cyan")
        table.add_row(name, decode_gqa.size(each.cache_bytes), str(each.max_batch), bar)
    return Group(Text("Llama 2 7B, 4,096 tokens in bfloat16, on an A10 of 24 GB", style="dim"), table)


def policy(weights: Path, budget: int = 96) -> RenderableType:
    """The letters that two policies keep of a text."""
    model = kvattn.models.load(weights, dtype=jnp.float32)
    text = decode_gqa.default_prompt()[:383]
    tokens = jnp.asarray([[decode_gqa.corpus.START, *text]])
    shown: list[RenderableType] = []
    policies = {
        f"StreamingLLM(4, {budget - 4})": kvattn.StreamingLLM(4, budget - 4),
        f"H2O({budget // 2}, {budget // 2})": kvattn.H2O(budget // 2, budget // 2),
    }
    for name, each in policies.items():
        cache = model.make_cache(1, capacity=tokens.shape[1], policy=each)
        step = kvattn.jit(lambda tokens, cache: model(tokens, cache)[1])
        for begin in range(0, tokens.shape[1], 64):
            cache = step(tokens[:, begin : begin + 64], cache)
        positions = np.asarray(cache[model.config.num_layers // 2].positions)[0]
        kept = set(positions.reshape(-1, positions.shape[-1])[0].tolist())
        letters = Text()
        for i, letter in enumerate(text.decode(errors="replace")):
            stays = i + 1 in kept or letter == "\n"
            letters.append(letter if stays else "·", style="bold cyan" if stays else "bright_black")
        shown += [Text(f"{name}: what it keeps of {len(text)} bytes, in one layer and head", style="dim"), letters]
    return Group(*shown)


def prefixes(weights: Path) -> RenderableType:
    """Questions that begin with the same system prompt."""
    model = kvattn.models.load(weights, dtype=jnp.float32)
    system = bytes([decode_gqa.corpus.START]) + decode_gqa.default_prompt()[:255]
    prompts = [
        system + question for question in (b"What is a list?", b"What is a tuple?", b"And a set?", b"And a dict?")
    ]
    engine = Engine(model, num_pages=64, page_size=16, max_batch=2, max_length=320, prefill_chunk=32)
    for prompt in prompts:
        engine.submit(prompt, 8)
    engine.run()
    stats = engine.stats()
    wide, found = 60, stats.cached_prompt_tokens / stats.prompt_tokens
    bar = Text("█" * round(wide * (1 - found)), style="cyan") + Text("░" * round(wide * found), style="bright_black")
    words = (
        f"{len(prompts)} prompts, {stats.prompt_tokens:,} tokens: {stats.prompt_tokens - stats.cached_prompt_tokens:,} "
    )
    return Group(Text(words + f"computed (█), {stats.cached_prompt_tokens:,} found in shared pages (░)"), bar)


def speed(weights: Path) -> RenderableType:
    """A layer's step, beside Flax's own."""
    del weights
    return Text(decode_gqa.beside_flax(8, 2048, 32, 8, 128, 256, repeats=5, codec=None))


PARTS: dict[str, tuple[str, Callable[[Path], RenderableType]]] = {
    "sizes": ("How large is a cache?", sizes),
    "policy": ("A policy at work", policy),
    "prefixes": ("Prefixes are computed once", prefixes),
    "speed": ("One step of a layer, on this machine", speed),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", type=Path, default=decode_gqa.WEIGHTS)
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = p.parse_args()
    if not args.weights.exists():
        raise SystemExit(f"{args.weights} is not there: run examples/train_bytes.py first.")
    decode_gqa.console.quiet = True  # its status line; the bar is here
    start = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(args.only))
        for name in args.only:
            title, part = PARTS[name]
            progress.update(task, description=title)
            shown = part(args.weights)
            console.rule(title, align="left")
            console.print(shown)
            console.print()
            progress.advance(task)
    console.print(
        f"{time.perf_counter() - start:.0f} s. Next: README.md, docs/tour.md, and examples/decode_gqa.py.", style="dim"
    )


if __name__ == "__main__":
    main()
