"""What a serving engine does inside, by hand: pages, prefix reuse, forks and copy-on-write on the byte model.

Questions after one few-shot prompt find its pages in a tree and compute only what follows. Samples of a question share
its pages until they part. Beams fork and end. `Pages` is all there is to it: `kvattn.serving.BlockPool` and
`RadixTree` on the host, a `kvattn.PagedKVCache` per layer on the device, and the model as it is.

    python examples/share_prefixes.py [--max-new-tokens 32] [--samples 4] [--beams 4]

What comes out is what `kvattn.generate` gives with caches of their own; the example compares.
"""

import argparse
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import kvattn
from kvattn.serving import BlockPool, RadixTree

PAGE = 16
WEIGHTS = Path(__file__).parent / "weights" / "bytes.safetensors"


class Pages:
    """Sequences of one model on shared pages."""

    def __init__(self, model, num_pages: int, max_length: int):
        self.pool, self.tree, self.width = BlockPool(num_pages, PAGE), RadixTree(PAGE), -(-max_length // PAGE)
        self.hits, self.computed, self.copied = {}, 0, 0
        c = model.config
        sizes = (num_pages, PAGE, c.num_kv_heads, c.head_dim)
        self.caches = tuple(
            kvattn.PagedKVCache.create(*sizes, batch_size=1, max_pages=self.width, dtype=jnp.float32)
            for _ in range(c.num_layers)
        )
        self.run = kvattn.jit(lambda tokens, cache, count: model(tokens, cache=cache, num_new=count))
        self.copy = kvattn.jit(lambda cache, pairs: tuple(each.copy_pages(*pairs) for each in cache))

    def read(self, seq, prompt: list[int]) -> np.ndarray:
        """Begins a sequence: finds what is there, computes the rest, keeps its whole pages. Logits of what follows."""
        hit = self.tree.match_prompt(prompt)
        self.tree.lock(hit)  # while the sequence lives
        while self.pool.can_allocate(len(prompt), prefix=hit.pages) != "now":
            if not (pages := self.tree.evict(8)):
                raise SystemExit("the pool is too small for this prompt: more pages, or fewer sequences at once.")
            self.pool.release(pages)
        self.pool.allocate(seq, len(prompt), prefix=hit.pages)
        logits = self._forward([seq], [prompt[hit.length :]])
        self.pool.hold(self.tree.adopt(prompt, self.pool.table(seq)))
        self.hits[seq] = hit
        self.computed += len(prompt) - hit.length
        return logits[0]

    def step(self, tokens: dict) -> np.ndarray:
        """Appends a token to every sequence given. Logits of what follows, a row each."""
        copies = [pair for seq in tokens for pair in self.pool.append(seq)]
        if copies:  # before anything is written, all at once
            pairs = np.full((2, len(tokens)), -1, np.int32)
            pairs[:, : len(copies)] = np.transpose(copies)
            self.caches = self.copy(self.caches, jnp.asarray(pairs))
            self.copied += len(copies)
        return self._forward(list(tokens), [[token] for token in tokens.values()])

    def fork(self, parent, child) -> None:
        """A second sequence with the same past; nothing is copied before one of the two writes."""
        self.pool.fork(parent, child)
        self.hits[child] = self.hits[parent]
        self.tree.lock(self.hits[child])

    def free(self, seq) -> None:
        """Ends a sequence. What the tree keeps of it stays."""
        self.pool.free(seq)
        self.tree.unlock(self.hits.pop(seq))

    def _forward(self, seqs: list, new: list[list[int]]) -> np.ndarray:
        counts = [len(tokens) for tokens in new]
        length = 1 if max(counts) == 1 else -(-max(counts) // 64) * 64  # few shapes, few programs
        rows = jnp.asarray([tokens + [0] * (length - len(tokens)) for tokens in new], jnp.int32)
        seen = [self.pool.length(seq) - count for seq, count in zip(seqs, counts, strict=True)]
        table = self.pool.page_table(seqs, self.width)
        caches = tuple(each.select([0] * len(seqs)).with_tables(table, seen) for each in self.caches)
        logits, self.caches = self.run(rows, caches, jnp.asarray(counts, jnp.int32))
        return np.stack([logits[row, count - 1] for row, count in enumerate(counts)])


def greedy(pages: Pages, seq, prompt: list[int], count: int) -> list[int]:
    """The most probable tokens."""
    tokens = [int(np.argmax(pages.read(seq, prompt)))]
    while len(tokens) < count:
        tokens.append(int(np.argmax(pages.step({seq: tokens[-1]}))))
    return tokens


def samples(pages: Pages, seq, prompt: list[int], count: int, number: int, temperature: float, seed: int) -> list:
    """So many texts after one prompt, which is read once."""
    draw = np.random.default_rng(seed)
    logits = np.repeat(pages.read((seq, 0), prompt)[None], number, axis=0)
    for i in range(1, number):
        pages.fork((seq, 0), (seq, i))
    texts = [[] for _ in range(number)]
    for step in range(count):
        weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
        for text, p in zip(texts, weights / weights.sum(axis=1, keepdims=True), strict=True):
            text.append(int(draw.choice(len(p), p=p.astype(np.float64) / p.sum(dtype=np.float64))))
        if step < count - 1:
            logits = pages.step({(seq, i): text[-1] for i, text in enumerate(texts)})
    return texts


def beams(pages: Pages, seq, prompt: list[int], count: int, width: int) -> tuple[list[int], float]:
    """The most probable of the texts that a beam search keeps, and its log-probability."""
    scores = np.asarray(jax.nn.log_softmax(pages.read((seq, 0, 0), prompt)))[None]
    live = [(0.0, [], (seq, 0, 0))]
    for step in range(1, count + 1):
        best = np.argsort(scores, axis=None)[::-1][:width]
        parents, tokens = np.unravel_index(best, scores.shape)
        grown = []
        for i, (parent, token) in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True)):
            pages.fork(live[parent][2], (seq, step, i))
            grown.append((float(scores[parent, token]), [*live[parent][1], token], (seq, step, i)))
        for _, _, loser in live:
            pages.free(loser)  # what no beam goes on from is free
        live = grown
        if step < count:
            logits = pages.step({name: text[-1] for _, text, name in live})
            scores = np.asarray([score for score, _, _ in live])[:, None] + np.asarray(jax.nn.log_softmax(logits))
    for _, _, name in live:
        pages.free(name)
    return live[0][1], live[0][0]


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", type=Path, default=WEIGHTS)
    p.add_argument("--max-new-tokens", type=int, default=32)
    p.add_argument("--shots", type=int, default=700, help="bytes that all prompts have in common")
    p.add_argument("--samples", type=int, default=4)
    p.add_argument("--beams", type=int, default=4)
    p.add_argument("--pages", type=int, default=256)
    return p.parse_args()


def main() -> None:
    args, console = arguments(), Console(highlight=False)
    model = kvattn.models.load(args.weights, dtype=jnp.float32)
    text = bytes(corpus.split()[1])
    shots = [corpus.START, *text[: args.shots]]
    ends = [b"\n\nThe expression ", b"\n\nComparisons are ", b"\n\nIf the value of ", b"\n\nThe global statement "]
    prompts = [shots + list(end) for end in ends]
    count = args.max_new_tokens
    pages = Pages(model, args.pages, len(prompts[0]) + 16 + count)
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    for name in ("", "prompts", "computed", "pages", "unshared", "copies"):
        table.add_column(name, justify="left" if not name else "right")

    def report(what: str, prompt_tokens: int) -> None:
        pages.pool.check()
        usage = pages.pool.usage()
        numbers = (prompt_tokens, pages.computed, usage.used_blocks, usage.table_entries, pages.copied)
        table.add_row(what, *(f"{number:,}" for number in numbers))
        pages.computed = pages.copied = 0

    with console.status("decoding ..."):
        answers = [greedy(pages, i, prompt, count) for i, prompt in enumerate(prompts)]
        report(f"{len(prompts)} questions after one prompt", sum(map(len, prompts)))
        for i in range(len(prompts)):
            pages.free(i)
        drawn = samples(pages, "sample", prompts[0], count, args.samples, 0.8, seed=0)
        report(f"{args.samples} samples of the first", args.samples * len(prompts[0]))
        for i in range(args.samples):
            pages.free(("sample", i))
        found, score = beams(pages, "beam", prompts[0], count, args.beams)
        report(f"{args.beams} beams of the first, ended", len(prompts[0]))
        expected = kvattn.generate(model, prompts, count)
    console.print(table)
    console.print("prompts, computed: tokens; pages: those in use, and what they would be without sharing")
    for name, tokens in (("greedy", answers[0]), *((f"sample {i}", x) for i, x in enumerate(drawn)), ("beam", found)):
        console.print(f"{name:>9}: {bytes(tokens)!r}", markup=False)
    console.print(f"log-probability of the best beam: {score:.2f}")
    same = sum(answer == alone for answer, alone in zip(answers, expected, strict=True))
    console.print(f"greedy tokens as those of kvattn.generate alone: {same} of {len(prompts)} prompts")
    pages.pool.release(pages.tree.evict(pages.tree.num_pages))
    console.print(f"pages that came back: {pages.pool.num_free} of {args.pages}")


if __name__ == "__main__":
    main()
