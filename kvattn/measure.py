"""The decode step, timed: what ``kvattn bench`` shows. Prints nothing.

One step appends a token to every row and attends over the whole cache, which is donated. It is timed alone, called from
Python, and in a compiled loop of many, where the call does not count; and compared with a copy of as many bytes in the
same run, which is what memory gives at best.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from kvattn import _checks, _target
from kvattn._typing import Array, Keys, Outputs, Queries, Values
from kvattn.attend import api
from kvattn.attend.request import Request
from kvattn.cache import KVCache
from kvattn.cache.base import storage_dtype
from kvattn.codecs import Codec, Plain
from kvattn.errors import RangeError, UnsupportedError
from kvattn.masks import Mask
from kvattn.memory.formula import Layer
from kvattn.policies import Full, SlidingWindow
from kvattn.sharding.explicit import cached_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A decode step over a filled cache.

    Args:
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        batch_size: B.
        context: tokens that every row has seen, the new one included.
        window: keep and attend to the last tokens only.
        dtype: of queries, and of the cache where no codec says otherwise.
        codec: in how many bits the cache is.
        seed: of the random numbers.

    Raises:
        ConfigError, DTypeError, RangeError: sizes that cannot be.
        UnsupportedError: a codec that encodes tokens together (KIVI): one token cannot be taken back.
    """

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    batch_size: int = 8
    context: int = 4096
    window: int | None = None
    dtype: DTypeLike = "bfloat16"
    codec: Codec | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.head_counts(self.num_heads, self.num_kv_heads)
        _checks.integer("head_dim", self.head_dim, 1)
        _checks.integer("batch_size", self.batch_size, 1)
        _checks.integer("context", self.context, 2, RangeError)
        _checks.window(self.window)
        object.__setattr__(self, "dtype", storage_dtype(self.dtype))
        if self.codec is not None and self.codec.rows is not None:
            raise UnsupportedError(
                f"{self.codec} encodes tokens together, so a step cannot be taken back to be timed again: take a codec "
                "of single tokens."
            )

    @property
    def policy(self) -> Full | SlidingWindow:
        """What the window says."""
        return Full() if self.window is None else SlidingWindow(self.window)

    @property
    def tokens_read(self) -> int:
        """Tokens of a row that a step reads."""
        return self.context if self.window is None else min(self.context, self.window)

    @property
    def read_bytes(self) -> int:
        """Bytes of keys and values, with their scales, that a step reads."""
        dtype = jnp.dtype(self.dtype)
        codec = self.codec or Plain(dtype)
        layer = Layer(self.policy, codec, self.num_kv_heads, self.head_dim, dtype, _target.family(_target.platform()))
        return int(self.batch_size * layer.read_bytes(self.context))

    def inputs(self) -> tuple[Array, list[Array], Callable[[], KVCache]]:
        """A query [B, 1, N, H], the token's key and value [B, 1, K, H], and what makes the cache before it."""
        keys = jax.random.split(jax.random.key(self.seed), 5)
        shape = (self.batch_size, 1, self.num_heads, self.head_dim)
        query = jax.random.normal(keys[0], shape, self.dtype)
        one = (self.batch_size, 1, self.num_kv_heads, self.head_dim)
        token = [jax.random.normal(key, one, self.dtype) for key in keys[1:3]]

        @jax.jit
        def fresh() -> KVCache:
            cache = KVCache.create(
                self.batch_size,
                self.num_kv_heads,
                self.head_dim,
                capacity=self.context,
                policy=self.policy,
                codec=self.codec,
                dtype=self.dtype,
            )
            slots = (self.batch_size, cache.num_slots, self.num_kv_heads, self.head_dim)
            key, value = (jax.random.normal(k, slots, self.dtype) for k in keys[3:])
            return filled(cache, key, value, self.context - 1)

        return query, token, fresh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """What one implementation took.

    Attributes:
        implementation: as asked; None: the best.
        seconds: of a step within a compiled loop.
        seconds_alone: of one step called from Python.
        bandwidth: bytes per second of keys and values.
        error: largest difference of its output from the reference's.
        reason: why it did not run; None: it did, and only then the others mean something.
    """

    implementation: str | None
    seconds: float = 0.0
    seconds_alone: float = 0.0
    bandwidth: float = 0.0
    error: float = 0.0
    reason: str | None = None


def timings(case: Case, implementations: Sequence[str | None], repeats: int) -> Iterator[Timing]:
    """Times implementations one after the other; each first has to agree with the reference to be worth looking at.

    Args:
        case: the step.
        implementations: names; None: the best that works.
        repeats: of every measurement; the median counts.
    """
    query, token, fresh = case.inputs()
    cache = jax.block_until_ready(fresh())
    inner = steps_per_call(case.read_bytes)
    reference, _ = step("reference")(query, *token, fresh())
    for name in implementations:
        try:
            out, cache = step(name)(query, *token, cache)
        except UnsupportedError as error:
            yield Timing(implementation=name, reason=str(error))
            continue
        error = float(jnp.max(jnp.abs(out.astype(jnp.float32) - reference.astype(jnp.float32))))
        alone = _Loop(step(name), query, token, cache)
        seconds_alone = seconds(alone, repeats)
        many = _Loop(step(name, inner), query, token, alone.cache)
        each = seconds(many, repeats) / inner
        cache = many.cache
        yield Timing(
            implementation=name,
            seconds=each,
            seconds_alone=seconds_alone,
            bandwidth=case.read_bytes / each,
            error=error,
        )


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call that waits for its result. The first calls, which compile, do not count."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def filled(cache: KVCache, key: Array, value: Array, length: int) -> KVCache:
    """A cache that has seen `length` tokens and holds the given ones [B, S, K, H] in its first slots: no prefill."""
    slots = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), key.shape[:2])
    return dataclasses.replace(cache.write(slots, key, value), lengths=jnp.full(key.shape[:1], length, jnp.int32))


def reader(cache: KVCache, num_heads: int, dtype: DTypeLike, implementation: str | None = None) -> str:
    """Which implementation reads this cache for a new token, and why not another.

    Raises:
        UnsupportedError: the named one cannot.
    """
    batch, features = cache.lengths.shape[0], cache.key_head_dim
    found = []

    def ask(cache: KVCache) -> None:
        query, positions = jnp.zeros((batch, 1, num_heads, features), dtype), jnp.zeros((batch, 1), jnp.int32)
        request = Request(query, positions, cache.view(), None, mask=Mask(), scale=features**-0.5)
        found.append(api.choose(request, implementation))

    jax.eval_shape(ask, cache)
    name, reasons = found[0]
    return f'"{name}"' + (f" ({'; '.join(reasons)})" if reasons else "")


@functools.cache
def step(implementation: str | None, inner: int = 1) -> Callable[..., tuple[Array, KVCache]]:
    """A program of `inner` steps, one after the other, each at the full context.

    From a query [B, 1, N, H], a key and a value [B, 1, K, H] and a cache, which is donated, to an output [B, 1, N, H]
    and the cache.
    """

    @functools.partial(jax.jit, donate_argnames="cache")
    def steps(query: Queries, key: Keys, value: Values, cache: KVCache) -> tuple[Outputs, KVCache]:
        def one(_: object, carry: tuple[Outputs, KVCache]) -> tuple[Outputs, KVCache]:
            out, cache = carry
            # The queries depend on what came before, so no step can be left out.
            out, cache = cached_attention(query + 0 * out, key, value, cache, implementation=implementation)
            return out, _rewound(cache)

        return one(0, (query, cache)) if inner == 1 else jax.lax.fori_loop(0, inner, one, (query, cache))

    return steps


def _rewound(cache: KVCache) -> KVCache:
    """The same cache without its last token, so that every step sees the same context. A ring just turns."""
    return cache if isinstance(cache.policy, SlidingWindow) else cache.trim(1)


@dataclasses.dataclass
class _Loop:
    """A step that hands its donated cache on to its next call."""

    step: Callable[..., tuple[Array, KVCache]]
    query: Array
    token: list[Array]
    cache: KVCache

    def __call__(self) -> None:
        """One call, waited for."""
        out, self.cache = self.step(self.query, *self.token, self.cache)
        out.block_until_ready()


def steps_per_call(read: int) -> int:
    """Enough steps in one call for its launch not to count: about 20 ms of work."""
    bandwidth = 10e9 if _target.platform() == "cpu" else 2e12
    return int(np.clip(0.02 * bandwidth / read, 1, 1000))


def copy_bandwidth(count: int, repeats: int) -> float:
    """Bytes per second, read and written together, of copying `count` bytes."""
    x, inner = jnp.zeros((count // 4096, 1024), jnp.float32), steps_per_call(2 * count)

    @functools.partial(jax.jit, donate_argnums=0)
    def copy(x: Float[Array, "rows 1024"]) -> Float[Array, "rows 1024"]:
        return jax.lax.fori_loop(0, inner, lambda _, x: x + 1, x)

    def run() -> None:
        nonlocal x
        x = copy(x)
        x.block_until_ready()

    return 2 * x.nbytes * inner / seconds(run, repeats)
