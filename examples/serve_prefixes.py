"""Serves chat turns, few-shot prompts and samples with `kvattn.serving.Engine`, with and without each of its features.

    python examples/serve_prefixes.py [--plot pages.png]
    python examples/serve_prefixes.py --checkpoint DIR     a HuggingFace folder instead of the byte model

Turns of a conversation begin with all that was said before; questions begin with the same examples; samples are of one
prompt. What begins alike is computed once, and what comes out is the same, which the example checks.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import corpus
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import kvattn
from kvattn.models import Decoder
from kvattn.serving import Engine, HostTier, Request

WEIGHTS = Path(__file__).parent / "weights" / "bytes.safetensors"
PAGE, ROWS = 16, 8

Encode = Callable[[str], list[int]]
Waves = Iterator[list[Request]]
"""Requests that are submitted together, once those before them are done."""


@dataclasses.dataclass
class Traffic:
    """Texts, and how they are asked for."""

    encode: Encode
    system: str
    pieces: list[str]
    max_new_tokens: int

    def chat(self, engine: Engine, conversations: int = 6, turns: int = 4) -> Waves:
        """Every turn begins with all that was said in its conversation."""
        said = [self.encode(self.system) for _ in range(conversations)]
        for turn in range(turns):
            for i in range(conversations):
                said[i] = [*said[i], *self.encode(self.pieces[turn * conversations + i])]
            wave = [engine.submit(text, self.max_new_tokens) for text in said]
            yield wave
            said = [[*text, *request.tokens[0]] for text, request in zip(said, wave, strict=True)]

    def few_shot(self, engine: Engine, questions: int = 16) -> Waves:
        """Questions after the same examples, all at once."""
        yield [engine.submit(self.encode(self.system + each), self.max_new_tokens) for each in self.pieces[:questions]]

    def samples(self, engine: Engine, number: int = ROWS) -> Waves:
        """Several answers to one question."""
        prompt = self.encode(self.system + self.pieces[0])
        yield [engine.submit(prompt, self.max_new_tokens, num_samples=number, temperature=0.8, seed=1)]


@dataclasses.dataclass
class Run:
    """What came of one kind of traffic on one engine."""

    tokens: list[list[list[int]]]
    computed: int
    hit_rate: float
    peak_pages: int
    waste: float
    tokens_per_second: float
    pages: list[tuple[int, int]]


def serve(engine: Engine, waves: Callable[[Engine], Waves], tick: Callable[[], object]) -> Run:
    """Runs the traffic, and counts."""
    tokens, pages, wastes, start = [], [], [], time.perf_counter()
    for wave in waves(engine):
        while engine.step():
            stats = engine.stats()
            pages.append((stats.pages, stats.cached_pages))
            wastes.append(stats.waste)
            tick()
        tokens += [request.tokens for request in wave]
    seconds, stats = time.perf_counter() - start, engine.stats()
    return Run(
        tokens,
        stats.prompt_tokens - stats.cached_prompt_tokens,
        stats.cached_prompt_tokens / stats.prompt_tokens,
        max(held for held, _ in pages),
        sum(wastes) / len(wastes),
        stats.new_tokens / seconds,
        pages,
    )


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", type=Path, default=WEIGHTS)
    p.add_argument("--checkpoint", type=Path, help="a HuggingFace folder, instead of the byte model")
    p.add_argument("--max-new-tokens", type=int, default=32)
    p.add_argument("--shared", type=int, default=700, help="bytes that all prompts have in common")
    p.add_argument("--pages", type=int, default=600, help="of the pool")
    p.add_argument("--plot", type=Path, help="a picture of the pages over time")
    return p.parse_args()


def opened(args: argparse.Namespace) -> tuple[Decoder, Encode]:
    """The model, and what makes tokens of text."""
    if args.checkpoint is None:
        return kvattn.models.load(args.weights, dtype=jnp.float32), lambda text: list(text.encode())
    tokenizer = kvattn.models.load_tokenizer(args.checkpoint)
    return kvattn.models.from_pretrained(args.checkpoint), lambda text: list(tokenizer.encode(text).ids)


def main() -> None:
    args, console = arguments(), Console(highlight=False)
    model, encode = opened(args)
    text = bytes(corpus.split()[1]).decode(errors="replace")
    pieces = [text[i : i + 60] for i in range(args.shared, args.shared + 60 * 24, 60)]
    traffic = Traffic(encode, text[: args.shared], pieces, args.max_new_tokens)
    longest = len(encode(text[: args.shared])) + 4 * (60 + args.max_new_tokens) + PAGE
    small = 2 * -(-longest // PAGE)
    features = {
        "nothing shared": dict(prefix_cache=False),
        "prefixes": {},
        "prefixes, guesses": dict(speculate=4),
        f"prefixes, {small} pages": dict(num_pages=small),
        f"prefixes, {small} pages, host": dict(num_pages=small, tiers=(HostTier(2**28),)),
    }
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("traffic", "engine", "computed", "hit rate", "pages", "waste", "tokens/s"):
        table.add_column(name, justify="left" if name in ("traffic", "engine") else "right")
    runs: dict[tuple[str, str], Run] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling ...", total=None)
        for feature, settings in features.items():
            options = {"num_pages": args.pages, "page_size": PAGE, "max_batch": ROWS, "max_length": longest, **settings}
            Engine(model, **options).warm_up()
            for name, waves in (("chat", traffic.chat), ("few shots", traffic.few_shot), ("samples", traffic.samples)):
                progress.update(task, description=f"{name}: {feature}")
                run = serve(Engine(model, **options), waves, lambda: progress.advance(task))
                runs[name, feature] = run
                numbers = (run.computed, run.hit_rate, run.peak_pages, run.waste, run.tokens_per_second)
                formats = ("{:,}", "{:.1%}", "{:,}", "{:.1%}", "{:,.0f}")
                shown = (form.format(number) for form, number in zip(formats, numbers, strict=True))
                table.add_row(name, feature, *shown)
    console.print(table)
    console.print(
        "computed: prompt tokens that were not found; pages: the most that sequences held; waste: of their slots"
    )
    for name in ("chat", "few shots", "samples"):
        same = all(runs[name, feature].tokens == runs[name, "nothing shared"].tokens for feature in features)
        console.print(f"{name}: {'the same tokens on every engine' if same else 'TOKENS DIFFER'}")
    if args.plot is not None:
        plot(args.plot, runs)
        console.print(f"written: {args.plot}")


def plot(path: Path, runs: dict[tuple[str, str], Run]) -> None:
    """Pages of sequences and of prefixes, over the ticks of every run."""
    from matplotlib.figure import Figure

    shown = [(key, run) for key, run in runs.items() if key[1] in ("nothing shared", "prefixes")]
    most = max(max(held, cached) for _, run in shown for held, cached in run.pages)
    figure = Figure(figsize=(11, 5), layout="constrained")
    for i, ((name, feature), run) in enumerate(shown):
        axes = figure.add_subplot(2, 3, i + 1)
        axes.plot([held for held, _ in run.pages], label="of sequences")
        axes.plot([cached for _, cached in run.pages], label="of prefixes")
        axes.set(title=f"{name}: {feature}", xlabel="tick", ylabel="pages", ylim=(0, 1.1 * most))
        if i == 0:
            axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
