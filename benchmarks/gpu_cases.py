"""What `on_device.py` looks at on a GPU: tables of values, of steps to be timed, and of goals. Needs no JAX."""

import dataclasses
import itertools

import numpy as np

LIMIT, PEER_LIMIT = 1e-2, 5e-2
"""Largest error of a head's output, of its norm, at full size: 16-bit operands give 1e-3 to 1e-2. Some peers round
more often."""

# Values ---------------------------------------------------------------------------------------------------------------

SHAPES = {
    "GQA": (200, 8, 2, 128),
    "MHA": (130, 4, 4, 64),
    "MQA of 71 heads": (150, 71, 1, 64),
    "heads of 80": (72, 4, 2, 80),
    "heads of 96": (72, 4, 2, 96),
    "heads of 112": (72, 4, 2, 112),
    "heads of 256": (136, 2, 1, 256),
    "one slot": (1, 4, 2, 128),
    "4096 slots": (4096, 32, 8, 128),
}
"""Slots of a row, query heads, key/value heads, head dim. Three rows: one full, one empty, one of a third and one."""
STORES = ("bfloat16", "float16", "Int8", "Float8", "Int4(64)", "Int4(32)")
RULES = ("plain", "window", "window and sinks", "a part", "softcap", "large softcap", "slopes", "mass")
POLICIES = ("Full", "SlidingWindow", "StreamingLLM", "H2O", "Scissorhands", "FastGen")


@dataclasses.dataclass(frozen=True)
class ValueCase:
    """One call of the kernel whose values are looked at.

    Args:
        store: how the cache keeps numbers.
        shape: a name of `SHAPES`.
        rule: one of `RULES`.
        page_size: 0 for a contiguous cache.
        query: dtype of the queries.
        new: T.
    """

    store: str
    shape: str = "GQA"
    rule: str = "plain"
    page_size: int = 0
    query: str = "bfloat16"
    new: int = 1

    @property
    def name(self) -> str:
        """For people."""
        words = [self.store, self.shape]
        words += [f"pages of {self.page_size}"] if self.page_size else []
        words += [f"{self.query} queries"] if self.query != "bfloat16" else []
        words += [f"{self.new} tokens"] if self.new > 1 else []
        words += [self.rule] if self.rule != "plain" else []
        return ", ".join(words)

    def small(self) -> "ValueCase":
        """For an interpreter."""
        return dataclasses.replace(self, shape="GQA") if self.shape == "4096 slots" else self


FIRST = ValueCase("bfloat16")
"""The simplest one: if it does not come out right nothing else is worth its time."""
VALUES = [
    # Every store: the simplest, pages, and full precision.
    *(ValueCase(store) for store in STORES[1:]),
    *(ValueCase(s, page_size=p) for s, p in zip(STORES, (8, 128, 32, 64, 64, 128), strict=True)),
    *(ValueCase(store, query="float32") for store in STORES),
    # Enough tokens for all multiprocessors to share them out.
    *(ValueCase(s, "4096 slots", page_size=p) for s in ("bfloat16", "Int8", "Float8", "Int4(64)") for p in (0, 64)),
    # Rules, over pages and three tokens.
    *(ValueCase("bfloat16", rule=rule, page_size=16, query="float32", new=3) for rule in RULES[1:]),
    # Several tokens, windows and attention per slot with codes.
    ValueCase("bfloat16", "4096 slots", new=8),
    ValueCase("Int8", rule="mass", page_size=32, query="float16", new=2),
    ValueCase("Float8", rule="window and sinks", page_size=64, new=4),
    ValueCase("Int4(64)", rule="window and sinks", page_size=64, new=8),
    ValueCase("Int4(64)", rule="mass", new=3),
    # Head counts and sizes.
    *(ValueCase("bfloat16", shape) for shape in SHAPES if shape not in ("GQA", "4096 slots")),
    ValueCase("Float8", "MQA of 71 heads", "mass", query="float16", new=2),
    ValueCase("Int8", "heads of 80"),
    ValueCase("Int8", "heads of 256"),
    ValueCase("Int4(32)", "heads of 96", query="float32"),
]
"""The likeliest to go wrong first."""
STEPS = [f"step of {policy}" for policy in POLICIES]
"""Chunks and tokens through `kvattn.cached_attention`: rings, sinks, evictions."""
APPENDS = (
    ("bfloat16", "Full"), ("Int8", "Full"), ("Float8", "pages"), ("Int4", "a ring in pages"), ("bfloat16", "a ring"),
    ("bfloat16", "a window in pages"), ("Int8", "a ring in pages"), ("Int4", "Full"), ("Float8", "Full"),
)  # fmt: skip
"""Stores and places of `tests/append_cases.py` that a token is appended to."""
ARRAYS = "arrays, lengths per head"
"""`kvattn.pallas.decode_attention` and `paged_decode_attention`."""

# Times ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a figure should reach.

    Args:
        kind: "copy" (at least per cent of a copy), "us" (at most), "span" (at most, gaps between kernels included),
            "faster" (at least so many times than another case), "within" (at most so many times another's time).
        value: the number.
        other: name of the other case.
    """

    kind: str
    value: float
    other: str = ""

    def __str__(self):
        return {
            "copy": f">= {self.value:g} % of copy",
            "us": f"<= {self.value:g} us",
            "span": f"<= {self.value:g} us in a compiled program",
            "faster": f">= {self.value:g}x faster than {self.other}",
            "within": f"<= {self.value:g}x {self.other}",
        }[self.kind]

    def measured(self, name: str, rows: dict[str, dict]) -> tuple[float, bool] | None:
        """The figure among rows by case, and whether it is reached; None: not measured."""
        row, other = rows.get(name, {}), rows.get(self.other, {})
        if "us" not in row or (self.other and "us" not in other):
            return None
        if self.kind in ("copy", "span"):
            value = row.get({"copy": "percent_of_copy", "span": "span_us"}[self.kind])
            if value is None:
                return None
        elif self.kind == "us":
            value = row["us"]
        else:
            value = other["us"] / row["us"] if self.kind == "faster" else row["us"] / other["us"]
        return value, (value >= self.value if self.kind in ("copy", "faster") else value <= self.value)


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step: B rows of S slots, N query and K key/value heads of H.

    `valid` tokens are in each row (None: S), or `"zipf"`: row r has a share of B * `mean` proportional to 1/r.
    `key` cases are timed by default. `peers` and `tuned`: whether peers run beside it, and whether sizes are tried.
    """

    name: str
    batch: int
    slots: int
    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    store: str = "bfloat16"
    page_size: int = 0
    valid: int | str | None = None
    mean: int = 4096
    new: int = 1
    window: int | None = None
    goals: tuple[Goal, ...] = ()
    key: bool = False
    peers: bool = False
    tuned: bool = False

    def lengths(self) -> np.ndarray:
        """int64 [B]."""
        if self.valid != "zipf":
            return np.full(self.batch, self.slots if self.valid is None else self.valid)
        share = 1 / np.arange(1, self.batch + 1)
        lengths = np.maximum(self.batch * self.mean * share / share.sum(), 1).astype(int)
        lengths[-1] += self.batch * self.mean - lengths.sum()
        return np.random.default_rng(0).permutation(np.minimum(lengths, self.slots))

    def some_rows(self) -> np.ndarray:
        """The longest, the shortest, the first and the last: as many as 2 GB of float32 hold, one at least."""
        lengths = self.lengths()
        rows = list(dict.fromkeys([int(lengths.argmax()), int(lengths.argmin()), 0, self.batch - 1]))
        return np.array(rows[: max(int(2e9 / (8 * self.slots * self.kv_heads * self.size)), 1)])

    def small(self) -> "Case":
        """For an interpreter."""
        part = lambda x: x if x is None else max(x * 256 // self.slots, 40)
        valid = self.valid if isinstance(self.valid, str) else part(self.valid)
        kv_heads = min(self.kv_heads, 2)
        heads = self.heads // self.kv_heads * kv_heads
        sizes = {"batch": min(self.batch, 2), "slots": 256, "mean": 120, "heads": heads, "kv_heads": kv_heads}
        return dataclasses.replace(self, **sizes, valid=valid, window=part(self.window))

    def shape(self) -> dict[str, object]:
        """Its sizes, for a record."""
        left_out = ("name", "goals", "key", "peers", "tuned")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        return {n: v for n, v in fields.items() if v is not None}


WHOLE = ("bf16 32x4096", "bf16 1x1024", "int8 32x4096", "bf16 32x4096, pages of 16")
"""Cases of which the whole step of `kvattn.cached_attention` is timed, too: a token appended, then attention."""
BASE = "bf16 32x4096"
CASES = [
    Case(BASE, 32, 4096, goals=(Goal("copy", 92), Goal("us", 138)), key=True, peers=True),
    Case("bf16 1x1024", 1, 1024, goals=(Goal("us", 9.5), Goal("span", 9.5)), key=True, peers=True),
    Case("int8 32x4096", 32, 4096, store="Int8", goals=(Goal("faster", 1.6, BASE), Goal("us", 85)), key=True,
         tuned=True),
    Case("fp8 32x4096", 32, 4096, store="Float8", goals=(Goal("faster", 1.6, BASE),), key=True, tuned=True),
    Case("int4 32x4096", 32, 4096, store="Int4(64)", goals=(Goal("faster", 2.2, BASE), Goal("us", 60)), key=True,
         tuned=True),
    Case("bf16 32x4096, pages of 64", 32, 4096, page_size=64, goals=(Goal("within", 1.02, BASE),), key=True,
         peers=True),
    Case("bf16 32x4096, pages of 16", 32, 4096, page_size=16, goals=(Goal("within", 1.05, BASE),), key=True),
    Case("bf16 1x32768", 1, 32768, goals=(Goal("us", 44),), key=True),
    Case("bf16 8x32768", 8, 32768, goals=(Goal("copy", 93),), key=True),
    Case("bf16 64/8 1x8192, pages of 32", 1, 8192, heads=64, page_size=32, goals=(Goal("us", 18),), key=True),
    Case("bf16 32xZipf", 32, 32768, valid="zipf", goals=(Goal("within", 1.10, BASE),), key=True),
    Case("bf16 71/1 of 64, 32x4096", 32, 4096, heads=71, kv_heads=1, size=64, goals=(Goal("us", 18),), key=True,
         tuned=True),
    Case("bf16 32/4 1x1024", 1, 1024, kv_heads=4, goals=(Goal("us", 9.5), Goal("span", 9.5))),
    Case("bf16 32/4 1x262144", 1, 262144, kv_heads=4),
    Case("fp8 32/4 1x262144", 1, 262144, kv_heads=4, store="Float8",
         goals=(Goal("within", 0.6, "bf16 32/4 1x262144"), Goal("copy", 70))),
    Case("int8 32x4096, pages of 64", 32, 4096, store="Int8", page_size=64,
         goals=(Goal("within", 1.02, "int8 32x4096"),)),
    Case("bf16 32xZipf, pages of 64", 32, 32768, valid="zipf", page_size=64,
         goals=(Goal("within", 1.10, "bf16 32x4096, pages of 64"),)),
    Case("bf16 32x2048", 32, 2048),
    Case("bf16 32x2048 of 16384", 32, 16384, valid=2048, goals=(Goal("within", 1.05, "bf16 32x2048"),)),
    Case("bf16 32/32 8x4096, pages of 16", 8, 4096, kv_heads=32, page_size=16,
         goals=(Goal("copy", 85), Goal("us", 147))),
    Case("bf16 71/1 of 64, 1x512", 1, 512, heads=71, kv_heads=1, size=64),
    Case("bf16 8x4096", 8, 4096),
    Case("bf16 8x131072, window 4096", 8, 131072, window=4096, goals=(Goal("within", 1.05, "bf16 8x4096"),)),
    Case("bf16 32x4096, 4 new tokens", 32, 4096, new=4, goals=(Goal("within", 1.05, BASE),)),
]  # fmt: skip
"""Bandwidth, latency, codes, pages, ragged rows, head counts; the ones that tell most first."""
AGAINST = {
    "FlashInfer": 1.0, "FA3": 1.0, "jax.nn xla": 3.0, "jax.nn cudnn": 1.0, "JAX Triton": 1.0,
}  # fmt: skip
"""Times faster than each peer, at every case it takes; all whose names begin so."""
PEERS = (
    "kvattn xla", "jax.nn cudnn", "jax.nn xla", "SDPA flash", "SDPA cudnn", "FA3", "FlashInfer", "FlashInfer tc",
    "FlashInfer XQA", "FlexAttention",
)  # fmt: skip
"""Beside ours by default, the slow ones to compile last."""
ALL_PEERS = (*PEERS, "einsum", "JAX Triton", "SDPA efficient")
"""Those of `gpu_peers.PEERS`."""
SIZES = {f"{t} tokens, {s} in flight, {b} per SM": (t, s, b) for b, s, t in itertools.product(
    (1, 2, 3), (2, 4, 6), (64, 128))}  # fmt: skip
"""What tuning tries: tile, stages and blocks of `kvattn.pallas.tuning.GpuConfig`."""
