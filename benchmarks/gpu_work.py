"""What the tasks of `gpu_suite.py` do, each in a process of its own: values, times, peers, sizes.

Values are looked at by the rule of the tests: float64 is the truth, an honest computation in the dtype of the kernel's
products the measure of its error (`tests/oracles.py`). What no token lies in holds NaN.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import append_cases
import gpu_clock
import gpu_peers
import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import oracles
from gpu_cases import LIMIT, PEER_LIMIT, SHAPES, SIZES, Case, ValueCase
from gpu_peers import NotThere, Problem, Program, einsum_attention, rows_of
from runner import Report

import kvattn
import kvattn.pallas
from kvattn.attend import Request
from kvattn.cache import Layout
from kvattn.masks import Mask
from kvattn.pallas import gpu_decode, gpu_ways, tuning

CODECS = {
    "bfloat16": None, "float16": None, "Int8": kvattn.Int8(), "Float8": kvattn.Float8(), "Int4(64)": kvattn.Int4(64),
    "Int4(32)": kvattn.Int4(32),
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"mask": Mask(window=50)},
    "window and sinks": {"mask": Mask(window=20, num_sinks=3)},
    "a part": {"mask": Mask(begin=4, end=180)},
    "softcap": {"softcap": 2.0},
    "large softcap": {"softcap": 50.0},
    "slopes": {"alibi_slopes": True},
    "mass": {"want_mass": True},
}
REPEATS = 50
"""Runs of a kernel on the device that must agree bit by bit."""


class Wrong(Exception):
    """Values that are off; the message says by how much."""


class Stopwatch:
    """What compiling costs: JAX's own account, and the first call, in which Mosaic compiles its kernels."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        for name, words in (("trace", "jaxpr_trace"), ("lower", "jaxpr_to_mlir"), ("compile", "backend_compile")):
            if words in event:
                self.seconds[name] = self.seconds.get(name, 0) + seconds

    def first(self, run: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, float]]:
        """The result of a first call, and its seconds."""
        self.seconds.clear()
        start = time.perf_counter()
        out = jax.block_until_ready(run(*args))
        return out, {n: round(s, 3) for n, s in {**self.seconds, "first_call": time.perf_counter() - start}.items()}


STOPWATCH = Stopwatch()


def host() -> jax.Device:
    """Where expected values are computed, so that no fault of a GPU is in them."""
    return jax.local_devices(backend="cpu")[0]


@contextlib.contextmanager
def as_on_a_gpu(mode: str) -> Iterator[None]:
    """Lets the kernel run where there is no GPU: in JAX's interpreter, or, to be lowered only, as it is."""
    best = Layout.best.__func__
    gpu_layout = classmethod(lambda cls, slots, size, **_: best(cls, slots, size, "gpu"))
    with contextlib.ExitStack() as stack:
        if mode != "device":
            stack.enter_context(mock.patch.object(Layout, "best", gpu_layout))
        if mode == "interpret":
            stack.enter_context(kvattn.pallas.interpret())
        if mode == "lower":
            stack.enter_context(kvattn.pallas.ahead_of_time())
        yield


def lowered(call: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """What can be known of a program for a GPU without one: it is lowered down to Mosaic's own code."""
    start = time.perf_counter()
    text = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    kernels = text.count("custom_call @mosaic_gpu")
    if not kernels:
        raise Wrong("the program for a GPU has no kernel in it")
    return {"kernels_lowered": kernels, "lower_s": round(time.perf_counter() - start, 2)}


# Values ---------------------------------------------------------------------------------------------------------------


def value_request(case: ValueCase, fill: Callable[[jax.Array], jax.Array]) -> Request:
    """The call of a case, on the host, with `fill` wherever there is no token."""
    slots, heads, kv_heads, size = SHAPES[case.shape]
    with jax.default_device(host()):
        dtype = jnp.dtype(case.store if CODECS[case.store] is None else "bfloat16")
        cache = kernel_cases.filled(
            [slots, 0, slots // 3 + 1], slots, kv_heads, size, codec=CODECS[case.store], dtype=dtype, fill=fill,
            page_size=case.page_size, rows=None if case.page_size else -(-slots // 8) * 8,
        )  # fmt: skip
        rules = dict(RULES[case.rule])
        if "alibi_slopes" in rules:
            rules["alibi_slopes"] = kvattn.alibi_slopes(heads)
        return kernel_cases.request_for(cache, heads, case.new, dtype=jnp.dtype(case.query), **rules)


def values(case: ValueCase, mode: str) -> dict[str, Any]:
    """Looks at the output, the logarithm and the attention per slot of one call."""
    if mode != "device":
        case = case.small()
    request = value_request(case, kernel_cases.worst)
    with as_on_a_gpu(mode):
        if (reason := gpu_decode.unsupported(request)) is not None:
            raise Wrong(f"the kernel refuses it: {reason}")
        if mode == "lower":
            return lowered(lambda r: gpu_decode.attend(r), request)
        run = jax.jit(lambda r: gpu_decode.attend(r))
        here = jax.device_put(request, jax.local_devices()[0])
        results, seconds = STOPWATCH.first(run, here)
        figures = {"compile": seconds, **judged(request, *results)}
        clean = run(jax.device_put(value_request(case, jnp.zeros_like), jax.local_devices()[0]))
        again = [clean] + [run(here) for _ in range(REPEATS if mode == "device" else 0)]
    for n, others in enumerate(again):
        for a, b in zip(results[:2], others[:2], strict=True):
            what = f"run {n} of the same" if n else "with NaN and with zeros where no token is, results"
            try:
                oracles.assert_same_bits(a, b, what)
            except AssertionError as error:
                raise Wrong(str(error)) from error
    return figures


def judged(request: Request, out: Any, lse: Any, mass: Any) -> dict[str, Any]:
    """Errors of a result, by the rule; raises `Wrong` where they are too large."""
    with jax.default_device(host()):
        out, lse = np.asarray(out), np.asarray(lse)
        exact, exact_lse = kernel_cases.truth(request)
        if request.query.dtype == jnp.float32:
            low, expected_mass = kernel_cases.honest(request)
        else:
            low = kernel_cases.narrow(request, gpu_decode._numbers(request)[0])
            expected_mass = kvattn.attend.attend(request, "reference")[2]
        low = np.asarray(low)
        empty = np.isneginf(exact_lse)
        try:
            oracles.assert_accurate(out, exact, low)
            oracles.assert_lse(lse, exact_lse)
            assert (out[empty] == 0).all(), "a row that attends to nothing is not 0"
            if request.want_mass:
                np.testing.assert_allclose(np.asarray(mass), np.asarray(expected_mass), atol=1e-5)
        except AssertionError as error:
            raise Wrong(" ".join(str(error).split())) from error
    return {"error": float(np.abs(out - exact).max()), "error_of_16_bits": float(np.abs(low - exact).max())}


def step(policy: str, mode: str) -> dict[str, Any]:
    """Chunks and tokens through `kvattn.cached_attention`: outputs and what is kept as by the reference."""
    with as_on_a_gpu(mode):
        if mode == "lower":
            made = kernel_cases.POLICIES[policy]
            cache = kvattn.KVCache.create(3, 2, 64, capacity=kernel_cases.variants.capacity_of(made, 20), policy=made)
            new = [jnp.ones((3, 1, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
            return lowered(lambda *a: kvattn.cached_attention(*a, implementation="mosaic_gpu"), *new, cache)
        try:
            kernel_cases.assert_steps_are_the_references("mosaic_gpu", policy, 64, jnp.bfloat16, (8, 1, 1))
        except AssertionError as error:
            raise Wrong(" ".join(str(error).split())) from error
    return {}


def append(store: str, place: str, mode: str) -> dict[str, Any]:
    """One token for each of nine rows: to the bit what XLA makes of it."""
    codec, dtype, given = append_cases.STORES[store]
    policy, page_size, slots = append_cases.PLACES[place]
    with as_on_a_gpu(mode):
        if mode == "device" and gpu_ways.by_threads():
            return {"note": "XLA appends on this GPU"}
        if mode == "lower":
            make = lambda: append_cases.both(
                append_cases.filled(policy, codec, dtype, page_size, slots),
                *append_cases.tokens(64, given, codec=codec),
            )
            return lowered(make)
        cache = append_cases.filled(policy, codec, dtype, page_size, slots)
        for seed in range(3):
            ours, theirs = append_cases.both(cache, *append_cases.tokens(64, given, seed, codec))
            for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
                try:
                    oracles.assert_same_bits(a, b, jax.tree_util.keystr(path))
                except AssertionError as error:
                    raise Wrong(" ".join(str(error).split())) from error
    return {}


def arrays(mode: str) -> dict[str, Any]:
    """`kvattn.pallas.decode_attention` and `paged_decode_attention`, as the reference."""
    with as_on_a_gpu(mode):
        if mode == "lower":
            q, k = jnp.ones((3, 4, 64), jnp.bfloat16), jnp.ones((3, 2, 48, 64), jnp.bfloat16)
            lengths = jnp.ones((3, 2), jnp.int32)
            call = lambda *a: kvattn.pallas.decode_attention(*a, implementation="mosaic_gpu")
            return lowered(call, q, k, k, lengths)
        try:
            kernel_cases.assert_arrays_agree("mosaic_gpu", "reference", 64, jnp.bfloat16, 4e-6)
        except AssertionError as error:
            raise Wrong(" ".join(str(error).split())) from error
    return {}


# Full size ------------------------------------------------------------------------------------------------------------

_write = jax.jit(lambda cache, *new: cache.write(*new), donate_argnums=0)


def empty_cache(case: Case, table: bool = True) -> Any:
    """A cache for a case that holds nothing; with a table of pages if there are any."""
    sizes: dict[str, Any] = {"codec": CODECS[case.store], "dtype": jnp.bfloat16}
    if not case.page_size:
        layout = Layout(case.slots, case.slots, False)
        return kvattn.KVCache.create(
            case.batch, case.kv_heads, case.size, capacity=case.slots, layout=layout, **sizes
        )  # fmt: skip
    counts, columns = -(-case.lengths() // case.page_size), case.slots // case.page_size
    cache = kvattn.PagedKVCache.create(
        int(counts.sum()), case.page_size, case.kv_heads, case.size, batch_size=case.batch, max_pages=columns, **sizes
    )
    if not table:
        return cache
    tables, pages = np.zeros((case.batch, columns), np.int32), np.random.default_rng(1).permutation(counts.sum())
    for row, mine in zip(tables, np.split(pages, np.cumsum(counts)[:-1]), strict=True):
        row[: len(mine)] = mine
    return cache.with_tables(tables, [0] * case.batch)


def filled_cache(case: Case, poison: bool, seed: int = 0) -> Any:
    """A cache full of random tokens; NaN where there is none, if there is to be poison."""
    cache, lengths = empty_cache(case), jnp.asarray(case.lengths(), jnp.int32)
    if poison:
        worst = lambda store: jax.tree.map(kernel_cases.worst, store)
        cache = cache.replace(keys=worst(cache.keys), values=worst(cache.values))
    step = min(case.slots, 4096)
    for start, key in zip(
        range(0, case.slots, step), jax.random.split(jax.random.key(seed), -(-case.slots // step)), strict=True
    ):
        slots = start + jnp.arange(step, dtype=jnp.int32)[None]
        slots = jnp.where(slots < lengths[:, None], slots, -1)
        shape = (case.batch, step, case.kv_heads, case.size)
        cache = _write(cache, slots, *(jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key)))
    return cache.replace(lengths=lengths)


def request_of(case: Case, cache: Any) -> Request:
    """The last `new` tokens of every row ask, in bfloat16."""
    query = jax.random.normal(jax.random.key(7), (case.batch, case.new, case.heads, case.size), jnp.bfloat16)
    positions = cache.lengths[:, None] - case.new + jnp.arange(case.new, dtype=jnp.int32)[None]
    return Request(query, positions, cache.view(), None, mask=Mask(window=case.window), scale=case.size**-0.5)


def valid_bytes(case: Case, request: Request) -> int:
    """Bytes of keys and values that a step has to read."""
    stored = [*request.view.keys.values(), *request.view.values.values()]
    slots = case.page_size * stored[0].shape[1] if case.page_size else case.batch * case.slots
    tokens = np.minimum(case.lengths(), (case.window or case.slots) + case.new - 1).sum()
    return int(sum(x.nbytes for x in stored) * tokens / slots)


def of_shapes(question: Callable[[Request], Any], case: Case) -> Any:
    """The answer to what does not depend on numbers, without memory for them."""
    answers = []
    jax.eval_shape(lambda: answers.append(question(request_of(case, empty_cache(case, table=False)))))
    return answers[0]


def exact(case: Case, request: Request) -> np.ndarray:
    """Attention in float32 for some rows."""
    attention = jax.jit(lambda r: einsum_attention(r, jnp.float32, jax.lax.Precision.HIGHEST))
    return np.asarray(attention(rows_of(request, case.some_rows())))


def error_of(case: Case, out: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a head, of its norm; infinite if anything is not finite."""
    out = out.reshape(case.batch, case.new, case.heads, -1)
    if not np.isfinite(out).all():
        return float("inf")
    norm = np.linalg.norm(expected, axis=-1)
    return float((np.linalg.norm(out[case.some_rows()] - expected, axis=-1) / np.maximum(norm, 1e-30)).max())


def near(error: float, limit: float = LIMIT, what: str = "the output") -> float:
    """The error, if it is small enough."""
    if error > limit:
        raise Wrong(f"{what} is off by {error:.1e}, more than {limit:g}")
    return error


@dataclasses.dataclass(frozen=True)
class Filled:
    """A case ready to be timed.

    Attributes:
        case: which.
        request: its call.
        expected: of some rows.
        size: bytes to be read.
    """

    case: Case
    request: Request
    expected: np.ndarray
    size: int

    @classmethod
    def of(cls, case: Case) -> "Filled":
        """Fills a cache."""
        request = request_of(case, filled_cache(case, poison=False))
        if (reason := gpu_decode.unsupported(request)) is not None:
            raise Wrong(f"the kernel refuses it: {reason}")
        return cls(case, request, exact(case, request), valid_bytes(case, request))

    def requests(self, mode: str) -> list[Request]:
        """As many as a cold cache takes."""
        return gpu_clock.copies_of(self.request, self.size) if mode == "device" else [self.request]


def beside_nan(case: Case) -> dict[str, float]:
    """The error where rows are not full, and NaN lies behind them; nothing for full rows."""
    if bool((case.lengths() == case.slots).all()):
        return {}
    poisoned = request_of(case, filled_cache(case, poison=True))
    out = np.asarray(jax.jit(lambda r: gpu_decode.attend(r)[0])(poisoned))
    return {"error_beside_nan": near(error_of(case, out, exact(case, poisoned)), what="the output beside NaN")}


def times(case: Case, mode: str) -> dict[str, Any]:
    """Values at full size, then times."""
    with as_on_a_gpu(mode):
        if mode == "lower":
            return lowered(lambda: gpu_decode.attend(request_of(case, empty_cache(case, table=False)))[:2])
        if mode == "interpret":
            case = case.small()
        row: dict[str, Any] = {"shape": case.shape(), **beside_nan(case)}
        filled = Filled.of(case)
        ours = Program(jax.jit(lambda r: gpu_decode.attend(r)[0]), filled.requests(mode))
        out, row["compile"] = STOPWATCH.first(ours.run, filled.request)
        row |= {"error": near(error_of(case, np.asarray(out), filled.expected)), "valid_bytes": filled.size}
        if mode == "device":
            row |= {"copies": len(ours.copies), "config": dataclasses.asdict(gpu_decode.config_for(filled.request))}
            row |= gpu_clock.timed(ours) | {"gpu": gpu_clock.gpu_state()}
    return row


def whole_step(case: Case, mode: str) -> dict[str, Any]:
    """The kernels of `kvattn.cached_attention` on a donated cache, copies of it in turn."""
    with as_on_a_gpu(mode):
        if mode == "interpret":
            case = case.small()
        step = functools.partial(kvattn.cached_attention, implementation="mosaic_gpu")
        query, key, value = (
            jax.random.normal(jax.random.key(n), (case.batch, 1, heads, case.size), jnp.bfloat16)
            for n, heads in enumerate((case.heads, case.kv_heads, case.kv_heads))
        )
        if mode == "lower":
            return lowered(lambda: step(query, key, value, empty_cache(case, table=False)))
        short = dataclasses.replace(case, valid=case.slots - 128)
        caches = [filled_cache(short, poison=False, seed=n) for n in range(4 if mode == "device" else 1)]
        expected = kvattn.cached_attention(query, key, value, caches[0], implementation="xla")[0]
        compiled, held = jax.jit(step, donate_argnums=3), [[cache] for cache in caches]

        def run(holder: list[Any]) -> jax.Array:
            out, holder[0] = compiled(query, key, value, holder[0])
            return out

        out, expected = (np.asarray(x, np.float32) for x in (run(held[0]), expected))
        norms = [np.linalg.norm(x, axis=-1) for x in (out - expected, expected)]
        row: dict[str, Any] = {"error": near(float((norms[0] / norms[1]).max()), what="the output beside XLA's")}
        if mode == "device":
            kernels, row["clock"], reasons = gpu_clock.kernels_of(Program(run, held))
            row |= {"kernels": kernels, "kernels_us": round(sum(kernels.values()), 2), "no_kernels": reasons}
    return row


def copy() -> dict[str, Any]:
    """The bandwidth that all else is measured by."""
    return {**gpu_clock.copy_bandwidth(), "gpu": gpu_clock.gpu_state()}


def peers(case: Case, parts: list[str], report: Report, mode: str, fa3: str | None) -> None:
    """Each peer of one case: not there, wrong, or timed."""
    with as_on_a_gpu(mode):
        if mode == "interpret":
            case = case.small()
        filled = Filled.of(case)
        problem = Problem(filled.requests(mode), case.lengths(), fa3, mode == "device")
        for name in parts:
            report.begin(name)
            try:
                with gpu_peers.freed(problem):
                    program = gpu_peers.PEERS[name](problem)
                    out, seconds = STOPWATCH.first(program.values)
                    error = near(error_of(case, out, filled.expected), PEER_LIMIT)
                    row = {"note": program.note, "error": error, "compile": seconds}
                    if mode == "device":
                        row |= gpu_clock.timed(program)
                report.end("ok", **row)
            except NotThere as error:
                report.end("not there", reason=str(error))
            except Wrong as error:
                report.end("wrong", reason=str(error))


def sizes(case: Case, parts: list[str], report: Report, mode: str) -> None:
    """The step with other sizes of tiles, each first looked at, then timed."""
    with as_on_a_gpu(mode):
        if mode == "interpret":
            case = case.small()
        filled = None if mode == "lower" else Filled.of(case)
        requests = [] if filled is None else filled.requests(mode)
        for name in parts:
            report.begin(name)
            config = tuning.GpuConfig(*SIZES[name])
            attend = lambda request, config=config: gpu_decode.attend(request, config)[0]
            if not of_shapes(lambda request, config=config: gpu_decode.fits(request, config), case):
                report.end("not there", reason="shared memory is too small for it")
            elif filled is None:
                call = lambda attend=attend: attend(request_of(case, empty_cache(case, table=False)))
                report.end("ok", **lowered(call))
            else:
                program = Program(jax.jit(attend), requests)
                out, seconds = STOPWATCH.first(program.run, filled.request)
                error = error_of(case, np.asarray(out), filled.expected)
                row = {"key": gpu_decode.key(filled.request), "config": dataclasses.asdict(config), "compile": seconds}
                if error > LIMIT:
                    report.end("wrong", reason=f"the output is off by {error:.1e}", **row)
                else:
                    report.end("ok", error=error, **row, **(gpu_clock.timed(program) if mode == "device" else {}))
