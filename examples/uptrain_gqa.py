"""From multi-head to grouped-query and multi-query attention: convert a trained model, then train it a little more.

    python examples/uptrain_gqa.py                # about half an hour on one core of its own
    python examples/uptrain_gqa.py --steps 20 --no-save

The experiment of Ainslie et al. (arXiv:2305.13245) with a small model of bytes. A multi-head model is trained. Its key
and value heads are averaged in groups (`kvattn.models.convert_to_gqa`), and each converted model is trained for 5 % of
the steps more, on the same batches. So is the multi-head model itself, what it gains being no merit of conversion; and
so are models of the converted ones' shapes that start from random weights, which conversion has to beat. Several peaks
of the learning rate are tried, and the best counts, for every model its own.

Losses are bits per byte of text the models were not trained on. Writes benchmarks/results/uptrain_gqa.json and .png.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import platform
import statistics
import time
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from train_bytes import adamw, bits, causal_attention, learning_rate

import kvattn
from kvattn.layers import stateless
from kvattn.models import Decoder, DecoderConfig, convert_to_gqa

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "uptrain_gqa.json"


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=16000, help="of the multi-head model")
    p.add_argument("--fraction", type=float, default=0.05, help="share of these steps that a converted model gets")
    p.add_argument("--kv-heads", type=int, nargs="+", default=[4, 2, 1], help="what to convert to")
    p.add_argument("--learning-rate", type=float, default=2e-3)
    p.add_argument(
        "--uptrain-rates", type=float, nargs="+", default=[0.25, 1.0, 2.0], help="peaks of uptraining, of that"
    )
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--context", type=int, default=256)
    for name, default in (("layers", 3), ("model-dim", 128), ("heads", 8), ("head-dim", 16), ("mlp-dim", 256)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--decode-batch", type=int, default=16, help="sequences of the timed decode step")
    p.add_argument("--decode-length", type=int, default=1024, help="tokens each of them holds")
    p.add_argument("--repeats", type=int, default=50, help="timed steps; the median counts")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=RESULTS, help="where the figures go, and a picture beside them")
    p.add_argument("--no-save", action="store_true")
    return p.parse_args()


class Training:
    """Text, optimizer and progress; one `run` is one training."""

    def __init__(self, args: argparse.Namespace, bar: tqdm):
        self.args, self.bar = args, bar
        self.text, valid = corpus.split()
        starts = range(0, len(valid) - args.context, args.context)
        self.valid = corpus.windows(valid, starts, args.context)
        rated = optax.inject_hyperparams(lambda learning_rate: adamw(learning_rate, args.weight_decay))
        self.optimizer = rated(learning_rate=0.0)

    def run(self, name: str, model: Decoder, steps: int, peak: float, seed: int) -> tuple[Decoder, list[dict]]:
        """A trained copy of the model; losses at twenty steps, the first before all training.

        Args:
            name: for the progress bar.
            model: stays as it is.
            steps: how many.
            peak: of the learning rate, which rises for a tenth of the steps (at most 100) and falls as a cosine.
            seed: of the batches; equal seeds give equal batches.
        """
        args, draw = self.args, np.random.default_rng(seed)
        graph, weights = nnx.split(model)
        state = self.optimizer.init(weights)
        curve = [{"step": 0, "valid": self.loss(graph, weights)}]
        self.bar.set_description(name)
        for step in range(1, steps + 1):
            rate = learning_rate(peak, step, step / steps, warmup=min(100, max(steps // 10, 1)))
            state.hyperparams["learning_rate"] = jnp.asarray(rate)
            starts = draw.integers(0, len(self.text) - args.context, args.batch)
            weights, state = self._learn(graph, weights, state, corpus.windows(self.text, starts, args.context))
            if step == steps or step % max(steps // 20, 1) == 0:
                curve.append({"step": step, "valid": self.loss(graph, weights)})
                self.bar.set_postfix(valid=curve[-1]["valid"])
            self.bar.update()
        return nnx.merge(graph, weights), curve

    def loss(self, graph: nnx.GraphDef, weights: nnx.State) -> float:
        """Bits per byte of the validation text."""
        return round(float(self._loss(graph, weights, self.valid)), 4)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _learn(self, graph, weights, state, windows):
        gradients = jax.grad(lambda w: bits(nnx.merge(graph, w), windows))(weights)
        updates, state = self.optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _loss(self, graph, weights, windows):
        return bits(nnx.merge(graph, weights), windows)


def step_seconds(configs: list[DecoderConfig], batch: int, length: int, repeats: int) -> list[float]:
    """Median time of one decode step of each, in turns, with `length` tokens of `batch` sequences in the cache.

    With random weights: the time does not depend on them.
    """
    steps = []
    for config in configs:
        model = Decoder(config, rngs=nnx.Rngs(0))
        apply, weights = stateless(model)
        step = jax.jit(apply, donate_argnames="cache")
        cache = model.make_cache(batch, length + repeats + 1)
        _, cache = step(weights, jnp.ones((batch, length), jnp.int32), cache=cache)
        steps.append([step, weights, cache])
    times: list[list[float]] = [[] for _ in configs]
    token = jnp.ones((batch, 1), jnp.int32)
    for turn in range(repeats + 1):
        for taken, entry in zip(times, steps, strict=True):
            step, weights, cache = entry
            start = time.perf_counter()
            entry[2] = jax.block_until_ready(step(weights, token, cache=cache))[1]
            if turn:  # the first one compiles
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def cache_bytes(config: DecoderConfig) -> int:
    """Keys and values of one token in all layers, float32."""
    caches = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).make_cache(1, 1024))
    return sum(cache.nbytes for cache in caches) // 1024


def pretrained(training: Training) -> tuple[Decoder, list[dict]]:
    """The multi-head model, and its losses on the way."""
    args = training.args
    config = DecoderConfig(
        vocab_size=256,
        model_dim=args.model_dim,
        num_layers=args.layers,
        num_heads=args.heads,
        head_dim=args.head_dim,
        mlp_dim=args.mlp_dim,
    )
    model = Decoder(config, attention_fn=causal_attention, rngs=nnx.Rngs(args.seed))
    return training.run("MHA", model, args.steps, args.learning_rate, args.seed)


def uptrained(training: Training, mha: Decoder, count: int, steps: int) -> list[dict]:
    """What becomes of `mha` with `count` key/value heads: one run per learning rate, and one from random weights."""
    args = training.args
    model = convert_to_gqa(mha, count)
    runs = []
    for rate in args.uptrain_rates:
        name = f"{count} key/value heads, rate x {rate:g}"
        _, curve = training.run(name, model, steps, rate * args.learning_rate, args.seed + 1)
        runs.append({"num_kv_heads": count, "start": "converted", "rate": rate, "curve": curve})
    if count != args.heads:
        model = Decoder(model.config, attention_fn=causal_attention, rngs=nnx.Rngs(args.seed + 1))
        _, curve = training.run(f"{count}, from random weights", model, steps, args.learning_rate, args.seed + 1)
        runs.append({"num_kv_heads": count, "start": "random", "rate": 1.0, "curve": curve})
    return runs


def study(args: argparse.Namespace) -> dict:
    """All trainings; what is written down of them."""
    more = max(round(args.fraction * args.steps), 1)
    counts = [args.heads, *args.kv_heads]
    began = time.monotonic()
    total = args.steps + more * (len(counts) * len(args.uptrain_rates) + len(args.kv_heads))
    with tqdm(total=total, unit="step") as bar:
        training = Training(args, bar)
        mha, pretraining = pretrained(training)
        runs = [run for count in counts for run in uptrained(training, mha, count, more)]
    minutes = round((time.monotonic() - began) / 60, 1)

    def final(count: int, start: str) -> tuple[float, dict]:
        """The lowest loss after uptraining, and its run."""
        chosen = (run for run in runs if (run["num_kv_heads"], run["start"]) == (count, start))
        return min(((run["curve"][-1]["valid"], run) for run in chosen), key=lambda pair: pair[0])

    goal = min(pretraining[-1]["valid"], final(args.heads, "converted")[0])
    configs = [dataclasses.replace(mha.config, num_kv_heads=count) for count in counts]
    times = step_seconds(configs, args.decode_batch, args.decode_length, args.repeats)
    rows = []
    for count, config, seconds in zip(counts, configs, times, strict=True):
        loss, run = final(count, "converted")
        start = run["curve"][0]["valid"]
        row = {"num_kv_heads": count, "converted": start, "uptrained": loss, "rate": run["rate"]}
        if count != args.heads:
            row |= {"recovered": round((start - loss) / (start - goal), 4), "scratch": final(count, "random")[0]}
        rows.append(row | {"cache_bytes_per_token": cache_bytes(config), "step_ms": round(1e3 * seconds, 3)})
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"jax": jax.__version__, "kvattn": kvattn.__version__},
        "machine": f"{platform.machine()}, {jax.default_backend()}",
        "model": mha.config.to_json(),
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(mha))),
        "settings": {name: x for name, x in vars(args).items() if name not in ("out", "no_save")},
        "uptraining_steps": more,
        "bytes": {"train": len(training.text), "valid": training.valid[:, 1:].size},
        "minutes": minutes,
        "mha": pretraining[-1]["valid"],
        "rows": rows,
        "pretraining": pretraining,
        "uptraining": runs,
    }


def names(report: dict) -> dict[int, str]:
    """What the models are called, by their number of key/value heads."""
    heads = report["model"]["num_heads"]
    return {
        row["num_kv_heads"]: {heads: "MHA", 1: "MQA"}.get(row["num_kv_heads"], f"GQA-{row['num_kv_heads']}")
        for row in report["rows"]
    }


def tables(report: dict) -> list[Table]:
    """The results, and what each learning rate gave, for a console."""
    called, more = names(report), report["uptraining_steps"]
    title = f"bits per byte; MHA after {report['settings']['steps']} steps: {report['mha']:.3f}"
    result = Table(title=title, title_justify="left")
    columns = (
        "",
        "bytes per token",
        "decode step, ms",
        "converted",
        f"{more} steps later",
        "recovered",
        "from scratch",
    )
    for name in columns:
        result.add_column(name, justify="right" if name else "left")
    rates = Table(title=f"{more} steps later, by the peak of the learning rate", title_justify="left")
    for name in ("", *(f"x {rate:g}" for rate in report["settings"]["uptrain_rates"])):
        rates.add_column(name, justify="right" if name else "left")
    for row in report["rows"]:
        count = row["num_kv_heads"]
        result.add_row(
            called[count],
            f"{row['cache_bytes_per_token']:,}",
            f"{row['step_ms']:.2f}",
            f"{row['converted']:.3f}" if "recovered" in row else "",
            f"{row['uptrained']:.3f}",
            f"{row['recovered']:.0%}" if "recovered" in row else "",
            f"{row['scratch']:.3f}" if "scratch" in row else "",
        )
        runs = (run for run in report["uptraining"] if (run["num_kv_heads"], run["start"]) == (count, "converted"))
        losses = (run["curve"][-1]["valid"] for run in runs)
        rates.add_row(called[count], *(f"{loss:.3f}" for loss in losses))
    return [result, rates]


def plot(report: dict, path: Path) -> None:
    called = names(report)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, row in enumerate(report["rows"]):
        count = row["num_kv_heads"]
        for run in report["uptraining"]:
            if run["num_kv_heads"] == count and run["rate"] in (row["rate"], 1.0 if run["start"] == "random" else None):
                steps, losses = ([point[name] for point in run["curve"]] for name in ("step", "valid"))
                converted = run["start"] == "converted"
                label = called[count] if converted else f"{called[count]}, random start"
                left.plot(steps, losses, ".-" if converted else "--", color=f"C{i}", label=label)
        size = row["cache_bytes_per_token"]
        if "recovered" in row:
            arrow = {"arrowstyle": "->", "color": f"C{i}"}
            right.annotate("", (size, row["uptrained"]), (size, row["converted"]), arrowprops=arrow)
            right.plot(size, row["converted"], "x", color=f"C{i}", label="converted" if i == 1 else None)
        right.plot(size, row["uptrained"], "o", color=f"C{i}", label="trained further" if i == 0 else None)
        note = f"{called[count]}\n{row['step_ms']:.1f} ms"
        right.annotate(note, (size, row["uptrained"]), xytext=(8, 4), textcoords="offset points", fontsize=8)
    left.axhline(report["mha"], color="grey", linestyle=":", label="MHA before")
    left.set(xlabel="steps after conversion", ylabel="bits per byte", title="Uptraining")
    sizes = sorted(row["cache_bytes_per_token"] for row in report["rows"])
    right.set(xscale="log", xlabel="cache, bytes per token", ylabel="bits per byte", title="Quality, cache, step time")
    right.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    right.minorticks_off()
    right.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.6)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.2f}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args = arguments()
    report = study(args)
    console = Console(highlight=False)
    for table in tables(report):
        console.print(table)
    if not args.no_save:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        plot(report, args.out.with_suffix(".png"))
        console.print(f"saved: {args.out.name} and .png")


if __name__ == "__main__":
    main()
