"""What a smaller cache costs in perplexity: every policy against its budget, every codec against its bits.

    python examples/compress_cache.py                   # about ten minutes on two cores
    python examples/compress_cache.py --windows 2 --steps 64 --no-save

The byte model of examples/weights reads text it was not trained on. Three studies:

budget  a prompt of half the training context, then token by token to its end; only the latter is scored. A budget of
        20 % is a cache of a fifth of the context.
stream  token by token through eight times the training context. What the caches keep is fixed.
bits    as `budget`, nothing evicted, stored by each codec; and 2-bit keys and values rounded in groups along the
        channel or along the token, the same bits, in one pass without a cache.

Writes benchmarks/results/compress_cache.json and .png.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from einops import rearrange
from flax import nnx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import kvattn
from kvattn.layers import stateless

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results" / "compress_cache.json"
BUDGETS = (1.0, 0.5, 0.35, 0.2, 0.1, 0.05)
RECOVERIES = (1.0, 0.99, 0.97, 0.95, 0.9, 0.8, 0.6)
SPECIAL = (corpus.START,)
PUNCTUATION = tuple(b"\n .,;:()\"'`")
GROUP = 32
BITS = 2
"""Of the rounding that is compared along channels and along tokens."""


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", type=Path, default=HERE / "weights" / "bytes.safetensors")
    p.add_argument("--context", type=int, default=1024, help="what the model was trained on")
    p.add_argument("--windows", type=int, default=20, help="texts of that length")
    p.add_argument("--steps", type=int, help="tokens scored after each prompt (default: half the context)")
    p.add_argument("--stream", type=int, default=8, help="length of the long texts, in contexts")
    p.add_argument("--stream-budget", type=int, default=256, help="tokens kept there")
    p.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="shares of the context kept")
    p.add_argument("--recoveries", type=float, nargs="+", default=RECOVERIES, help="of FastGen")
    p.add_argument("--out", type=Path, default=RESULTS, help="where the figures go, and a picture beside them")
    p.add_argument("--no-save", action="store_true")
    return p.parse_args()


def policies(budget: int) -> dict[str, kvattn.policies.Policy]:
    """Those with a budget, spending the same number of tokens."""
    heavy = budget // 2
    return {
        "SlidingWindow": kvattn.SlidingWindow(budget),
        "StreamingLLM": kvattn.StreamingLLM(4, budget - 4),
        "H2O": kvattn.H2O(heavy, budget - heavy),
        "H2O, in-cache positions": kvattn.H2O(heavy, budget - heavy, positions_in="cache"),
        "Scissorhands": kvattn.Scissorhands(budget, drop=max(budget // 8, 1)),
    }


class Reader:
    """Reads texts through a cache and says what each byte cost."""

    def __init__(self, weights: Path):
        self.model = kvattn.models.load(weights, dtype=jnp.float32)
        self.apply, self.weights = stateless(self.model)

    def __call__(
        self, text: np.ndarray, prompt: int, *, capacity: int | None = None, policy=None, codec=None
    ) -> tuple[np.ndarray, float, float]:
        """Bits of every byte after the prompt, [B, L - prompt]; tokens kept per head at the end; bits per number.

        Args:
            text: uint8 [B, L]; START is put before it.
            prompt: how many tokens, START included, go in at once; 1 for none but START.
            capacity: as in `Decoder.make_cache`.
            policy: which tokens are kept.
            codec: in how many bits.
        """
        tokens = with_start(text)
        caches = self.model.make_cache(len(text), capacity, policy=policy, codec=codec)
        cost, caches = self._read(self.weights, tokens, caches, prompt)
        for cache in caches:
            cache.check()
        kept = float(np.mean([np.mean(cache.kept) for cache in caches]))
        return np.asarray(cost), kept, 8 * caches[0].nbytes / (sum(x.size for x in caches[0].dense()))

    @functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=3)
    def _read(self, weights, tokens, caches, prompt):
        logits, caches = self.apply(weights, tokens[:, :prompt], cache=caches)

        def step(carry, token):
            caches, logits = carry
            cost = -jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
            logits, caches = self.apply(weights, token[:, None], cache=caches)
            return (caches, logits[:, 0]), cost

        (caches, _), costs = jax.lax.scan(step, (caches, logits[:, -1]), tokens[:, prompt:].T)
        return costs.T / math.log(2), caches


def perplexity(bits: np.ndarray) -> float:
    """Per byte."""
    return round(float(2 ** np.mean(bits)), 4)


# The three studies --------------------------------------------------------------------------------


def budget_study(reader: Reader, text: np.ndarray, args: argparse.Namespace, bar: tqdm) -> list[dict]:
    """Perplexity of the second half of the context, by policy and budget."""
    context = args.context
    rows = []

    def measure(name: str, policy, capacity=None) -> None:
        bar.set_description(f"budget: {name}")
        cost, kept, _ = reader(text, context // 2, policy=policy, capacity=capacity)
        share = min(kept / (text.shape[1] + 1), 1.0)
        rows.append({"policy": name, "setting": str(policy), "kept": round(share, 4), "perplexity": perplexity(cost)})
        bar.update()

    measure("Full", kvattn.Full(), context + 1)
    for share in args.budgets:
        for name, policy in policies(max(round(share * context), 8)).items():
            measure(name, policy)
            rows[-1]["budget"] = share
    for recovery in args.recoveries:
        fastgen = kvattn.FastGen(recovery, SPECIAL, PUNCTUATION, frequent=0.3, local=0.1)
        measure("FastGen", fastgen, context + 1)
        rows[-1]["recovery"] = recovery
    return rows


def stream_study(reader: Reader, text: np.ndarray, context: int, budget: int, bar: tqdm) -> list[dict]:
    """Perplexity by position, far past what the model was trained on."""
    rows = []
    cases = {"Full": kvattn.Full(), **policies(budget)}
    for name, policy in cases.items():
        bar.set_description(f"stream: {name}")
        capacity = text.shape[1] + 1 if name == "Full" else None
        cost, _, _ = reader(text, 1, policy=policy, capacity=capacity)
        parts = cost[:, : cost.shape[1] // (context // 4) * (context // 4)].reshape(len(cost), -1, context // 4)
        rows.append(
            {
                "policy": name,
                "setting": str(policy),
                "position": [(i + 1) * (context // 4) for i in range(parts.shape[1])],
                "perplexity": [perplexity(parts[:, i]) for i in range(parts.shape[1])],
                "within_context": perplexity(cost[:, budget:context]),
                "past_context": perplexity(cost[:, context:]),
            }
        )
        bar.update()
    return rows


def bits_study(reader: Reader, text: np.ndarray, context: int, bar: tqdm) -> list[dict]:
    """Perplexity of the second half of the context, by codec."""
    rows = []
    codecs = {
        "float32": None,
        "Int8": kvattn.Int8(),
        "Float8": kvattn.Float8(),
        "Int4": kvattn.Int4(GROUP),
        "KIVI-4": kvattn.KIVI(4, GROUP, residual=GROUP),
        "KIVI-2": kvattn.KIVI(2, GROUP, residual=GROUP),
    }
    for name, codec in codecs.items():
        bar.set_description(f"bits: {name}")
        cost, _, bits = reader(text, context // 2, capacity=context + 1, codec=codec)
        rows.append({"codec": name, "setting": str(codec), "bits": round(bits, 2), "perplexity": perplexity(cost)})
        bar.update()
    for keys in ("channel", "token"):
        for values in ("channel", "token"):
            bar.set_description(f"bits: keys per {keys}, values per {values}")
            cost = rounded(reader, text, keys, values)[:, context // 2 - 1 :]
            rows.append({"keys": keys, "values": values, "bits": BITS, "perplexity": perplexity(cost)})
            bar.update()
    return rows


def rounded(reader: Reader, text: np.ndarray, keys: str, values: str) -> np.ndarray:
    """Bits of every byte, [B, L], in one pass; keys (as rotated) and values rounded to BITS along the named axis.

    The queries of a group of tokens see keys whose range their followers took part in: a comparison of axes, no codec.
    """

    def attention(query, key, value, **_):
        return kvattn.dot_product_attention(query, round_groups(key, keys), round_groups(value, values), is_causal=True)

    apply, _ = stateless(kvattn.models.Decoder(reader.model.config, attention_fn=attention, rngs=nnx.Rngs(0)))

    @jax.jit
    def read(weights, row):
        logits, _ = apply(weights, row[None, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[0]), row[1:, None], axis=1)[:, 0] / math.log(2)

    return np.stack([read(reader.weights, row) for row in with_start(text)])


def round_groups(x: jax.Array, axis: str) -> jax.Array:
    """[B, T, K, H] rounded to BITS between the least and the greatest of each GROUP of numbers.

    Args:
        x: keys or values; T a multiple of GROUP, H too or smaller.
        axis: "channel": a group is one channel of GROUP tokens. "token": GROUP channels of one token.
    """
    pattern = {"channel": "b (t g) k h -> b t g k h", "token": "b t k (h g) -> b t g k h"}[axis]
    groups = rearrange(x, pattern, g=GROUP if axis == "channel" else min(GROUP, x.shape[3]))
    low, high = jnp.min(groups, axis=2, keepdims=True), jnp.max(groups, axis=2, keepdims=True)
    step = (high - low) / (2**BITS - 1)
    codes = jnp.round((groups - low) / jnp.where(step > 0, step, 1))
    left, right = pattern.split(" -> ")
    return rearrange(codes * step + low, f"{right} -> {left}")


def with_start(text: np.ndarray) -> jax.Array:
    """uint8 [B, L] -> int32 [B, 1 + L]."""
    return jnp.asarray(np.pad(text, ((0, 0), (1, 0)), constant_values=corpus.START), jnp.int32)


# What comes out ----------------------------------------------------------------------------------


def tables(report: dict) -> list[Table]:
    """The three studies, for a console."""
    rows = report["budget"]
    budget = Table(title="perplexity per byte, by share of the context kept", title_justify="left")
    shares = sorted({row["budget"] for row in rows if "budget" in row}, reverse=True)
    for name in ("", *(f"{share:.0%}" for share in shares)):
        budget.add_column(name, justify="right" if name else "left")
    budget.add_row("Full", f"{rows[0]['perplexity']:.3f}")
    for name in dict.fromkeys(row["policy"] for row in rows if "budget" in row):
        costs = {row["budget"]: row["perplexity"] for row in rows if row["policy"] == name}
        budget.add_row(name, *(f"{costs[share]:.3f}" for share in shares))
    fastgen = [row for row in rows if row["policy"] == "FastGen"]
    adaptive = Table(title="FastGen, by the attention to recover", title_justify="left")
    for name in ("", *(f"{row['recovery']:g}" for row in fastgen)):
        adaptive.add_column(name, justify="right" if name else "left")
    adaptive.add_row("kept", *(f"{row['kept']:.0%}" for row in fastgen))
    adaptive.add_row("perplexity", *(f"{row['perplexity']:.3f}" for row in fastgen))
    stream = Table(title=f"{report['stream_length']} tokens, {report['stream_budget']} kept", title_justify="left")
    for name in ("", "within the training context", "past it"):
        stream.add_column(name, justify="right" if name else "left")
    for row in report["stream"]:
        stream.add_row(row["policy"], f"{row['within_context']:.3f}", f"{row['past_context']:.3f}")
    bits = Table(title="perplexity per byte, by storage", title_justify="left")
    for name in ("", "bits per number", "perplexity"):
        bits.add_column(name, justify="right" if name else "left")
    for row in report["bits"]:
        name = row.get("codec") or f"keys per {row['keys']}, values per {row['values']}"
        bits.add_row(name, f"{row['bits']:g}", f"{row['perplexity']:.3f}")
    return [budget, adaptive, stream, bits]


def plot(report: dict, path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    rows = report["budget"]
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["policy"] for row in rows[1:]))}
    colors["Full"] = "black"
    left.axhline(rows[0]["perplexity"], color="black", linewidth=1, label="Full")
    for name in dict.fromkeys(row["policy"] for row in rows[1:]):
        points = [(100 * row["kept"], row["perplexity"]) for row in rows if row["policy"] == name]
        left.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, color=colors[name])
    # FastGen's last points, which kept less than the sinks, are far outside.
    low, high = rows[0]["perplexity"], max(row["perplexity"] for row in rows[1:] if row["policy"] != "FastGen")
    left.set(xscale="log", xlabel="tokens kept, % of the context", ylabel="perplexity per byte", title="Eviction")
    left.set(xlim=(4, 110), ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low)))
    left.set_xticks([5, 10, 20, 35, 50, 100], ["5", "10", "20", "35", "50", "100"], minor=False)
    left.minorticks_off()
    for row in report["stream"]:
        middle.plot(row["position"], row["perplexity"], label=row["policy"], color=colors[row["policy"]])
    middle.axvline(report["context"], color="grey", linestyle=":", label="training context")
    middle.set(
        xlabel="position",
        ylabel="perplexity per byte",
        yscale="log",
        title=f"Long text, {report['stream_budget']} kept",
    )
    for row in report["bits"]:
        codec = row.get("codec")
        name = codec or f"keys/{row['keys']}, values/{row['values']}"
        right.plot(row["bits"], row["perplexity"], "o" if codec else "x", color="C0" if codec else "C3")
        place = {"Int8": (-8, -12), "float32": (-30, 6)}.get(name, (5, 4))
        right.annotate(name, (row["bits"], row["perplexity"]), xytext=place, textcoords="offset points", fontsize=7)
    right.set(xscale="log", yscale="log", xlabel="bits per number, scales included", title="Storage")
    right.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"], minor=False)
    right.minorticks_off()
    for axes in (left, middle):
        axes.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args = arguments()
    if not args.weights.exists():
        raise SystemExit(f"{args.weights} is not there: run examples/train_bytes.py first.")
    reader = Reader(args.weights)
    _, valid = corpus.split()
    context, steps = args.context, args.steps or args.context // 2
    length = context // 2 + steps
    starts = np.linspace(0, len(valid) - length - 1, args.windows).astype(int)
    texts = valid[starts[:, None] + np.arange(length)[None]]
    long = min(args.stream * context, len(valid) // 2)
    streams = valid[: len(valid) // long * long].reshape(-1, long)

    num_cases = 1 + len(args.budgets) * len(policies(8)) + len(args.recoveries) + 1 + len(policies(8)) + 6 + 4
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": {"jax": jax.__version__, "kvattn": kvattn.__version__},
        "model": {"weights": args.weights.name, **dataclasses.asdict(reader.model.config)},
        "context": context,
        "texts": list(texts.shape),
        "stream_length": long,
        "stream_budget": args.stream_budget,
    }
    with tqdm(total=num_cases, unit="case") as bar:
        report["bits"] = bits_study(reader, texts, context, bar)
        report["stream"] = stream_study(reader, streams, context, args.stream_budget, bar)
        report["budget"] = budget_study(reader, texts, args, bar)
    console = Console(highlight=False)
    for table in tables(report):
        console.print(table)
    if not args.no_save:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        plot(report, args.out.with_suffix(".png"))
        console.print(f"saved: {args.out.name} and .png")


if __name__ == "__main__":
    main()
