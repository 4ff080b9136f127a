"""A cache under test, with what is known of it, and the steps that are made with it."""

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np

from kvattn.testing.claims import Claims
from kvattn.testing.report import Call, Failure, Make, Step

Result = TypeVar("Result")


@dataclasses.dataclass
class Trial:
    """A cache under test.

    Attributes:
        make: makes an empty cache.
        step: appends and attends.
        claims: what it promises.
        lengths: reads int [B] out of a cache: how many tokens each row has seen.
        failed: reads bool [B] out of a cache: rows in which a step was dropped.
        fill: gives a cache with a number in all its unused memory.
        seed: of random tokens.
        traces: how often a compiled step was traced, by the shape of what it was given.
    """

    make: Make
    step: Step
    claims: Claims
    lengths: Callable[[Any], Any] | None = None
    failed: Callable[[Any], Any] | None = None
    fill: Callable[[Any, float], Any] | None = None
    seed: int = 0
    traces: Counter = dataclasses.field(default_factory=Counter)
    _remembered: dict[Hashable, Any] = dataclasses.field(default_factory=dict, repr=False)

    def sizes(self, capacity: int | None = None, batch_size: int | None = None) -> tuple[Any, ...]:
        """The arguments of `make`."""
        c = self.claims
        rows = c.batch_size if batch_size is None else batch_size
        return rows, c.capacity if capacity is None else capacity, c.num_kv_heads, c.head_dim, c.numpy_dtype

    def tokens(self, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random queries [B, T, N, H], keys and values [B, T, K, H]."""
        c = self.claims
        rng = np.random.default_rng((self.seed, seed))
        shapes = ((c.batch_size, length, heads, c.head_dim) for heads in (c.num_heads, *[c.num_kv_heads] * 2))
        query, key, value = (rng.normal(size=shape).astype(c.numpy_dtype) for shape in shapes)
        return query, key, value

    def remember(self, name: Hashable, make: Callable[[], Result]) -> Result:
        """What was made under a name before, or is now."""
        if name not in self._remembered:
            self._remembered[name] = make()
        return self._remembered[name]

    def session(self, fill: float | None = None) -> "Session":
        """An empty cache, its unused memory full of a number if one is given."""
        return Session(self, fill)

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """The step, compiled by `jax.jit`, which it is given the cache to keep."""
        import jax

        def step(cache: Any, query: Any, key: Any, value: Any, num_new: Any, padding: str | None) -> Any:
            """Appends queries [B, T, N, H], keys and values [B, T, K, H]."""
            self.traces[query.shape, padding] += 1
            options = {} if padding is None else {"num_new": num_new, "padding": padding}
            return self.step(cache, query, key, value, **options)

        return jax.jit(step, donate_argnums=0, static_argnums=5)

    def run(self, cache: Any, call: Call, eager: bool = False) -> tuple[Any, Any]:
        """One step: compiled, where that is claimed."""
        if eager or not self.claims.jit:
            return self.step(cache, call.query, call.key, call.value, **call.options)
        padding = None if call.num_new is None else call.padding
        with warnings.catch_warnings():  # that a cache is not updated in place is for its own check
            warnings.filterwarnings("ignore", message=".*donated buffers")
            return self.compiled(cache, call.query, call.key, call.value, call.num_new, padding)


class Session:
    """A sequence of steps with one cache, which remembers them.

    Args:
        trial: whose cache.
        fill: a number for its unused memory.
    """

    def __init__(self, trial: Trial, fill: float | None = None) -> None:
        self.trial, self.sizes = trial, trial.sizes()
        self.calls: list[Call] = []
        try:
            self.cache = trial.make(*self.sizes)
            if fill is not None and trial.fill is not None:
                self.cache = trial.fill(self.cache, fill)
        except Exception as error:
            raise self.failure("a cache", _told(error)) from error

    def __call__(self, call: Call, eager: bool = False) -> np.ndarray:
        """One step; its output [B, T, N, H].

        Raises:
            Failure: it raised, or gave something else.
        """
        self.calls.append(call)
        try:
            out, self.cache = self.trial.run(self.cache, call, eager)
            out = np.asarray(out)
        except Exception as error:
            raise self.failure(f"an output of the step with {call}", _told(error)) from error
        if out.shape != call.query.shape:
            raise self.failure(f"an output of shape {call.query.shape}", f"{out.shape}")
        if out.dtype != call.query.dtype:
            raise self.failure(f"an output in {call.query.dtype}", f"{out.dtype}")
        return out

    def failure(self, expected: str, seen: str) -> Failure:
        """A failure of the last call."""
        return Failure(expected, seen, self.calls, self.sizes)


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a sequence is cut into steps.

    Attributes:
        pieces: (T, num_new of each row or None) of every step.
        padding: the side that is padded.
    """

    pieces: tuple[tuple[int, tuple[int, ...] | None], ...]
    padding: str = "right"

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Plan":
        """All rows alike."""
        return cls(tuple((length, None) for length in lengths))

    def positions(self, batch_size: int) -> list[np.ndarray]:
        """int [B, T] of each step: the position of each token, -1 for pads."""
        have, found = np.zeros(batch_size, int), []
        for length, counts in self.pieces:
            new = np.full(batch_size, length) if counts is None else np.asarray(counts)
            t = np.arange(length)[None]
            if self.padding == "left":
                t = t - (length - new[:, None])
            found.append(np.where((t >= 0) & (t < new[:, None]), have[:, None] + t, -1))
            have = have + new
        return found

    def calls(self, tokens: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[Call]:
        """The steps, given queries [B, T, N, H], keys and values [B, T, K, H] of each."""
        return [
            Call(*new, None if counts is None else np.asarray(counts, np.int32), self.padding)
            for (_, counts), new in zip(self.pieces, tokens, strict=True)
        ]
