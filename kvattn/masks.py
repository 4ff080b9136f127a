"""Who may attend to whom: one object, read by every implementation.

A mask is a rule over positions, not an array. The position of a token is the number of tokens of
its sequence that came before it, wherever the token happens to lie in memory; `EMPTY` (-1) marks an
empty slot or a pad. Lengths, left padding and ring order are therefore nothing but positions. The
rule is a conjunction, so adding a condition can only remove pairs::

    causal            kv <= q
    window = w        kv > q - w            (w tokens, the query's own included)
    chunk = c         kv >= q - q mod c     (positions are cut into chunks of c)
    num_sinks = n     kv < n                (exempts the first n tokens from the window)
    reach = r         kv > q - r            (for those n tokens too)
    begin, end        begin <= kv < end     (a part of the keys, to be merged with the others)
    segments          equal segment ids

For ``Mask(window=3, num_sinks=1)`` and six tokens, queries downwards::

    x . . . . .
    x x . . . .
    x x x . . .
    x x x x . .
    x . x x x .
    x . . x x x
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int32

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import ConfigError, UnsupportedError

EMPTY = -1
"""The position of an empty slot, and of a pad."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """A rule that says which query may attend to which key. Hashable, static under jit.

    Attributes:
        causal: keys of later positions are hidden.
        window: how many tokens a query sees, its own included. None: all.
        num_sinks: so many first tokens of the sequence stay visible whatever the window is.
        reach: and even of those a query sees none that is not among the last `reach` tokens. None: all.
        chunk: a query sees none from before its own chunk of so many positions. None: positions are not cut.
        begin: keys of smaller positions are hidden.
        end: keys from this position on are hidden. None: none.

    Raises:
        RangeError: window, reach or chunk < 1.
        ConfigError: num_sinks < 0, or a window or chunk without causality.
    """

    causal: bool = True
    window: int | None = None
    num_sinks: int = 0
    reach: int | None = None
    chunk: int | None = None
    begin: int = 0
    end: int | None = None

    def __post_init__(self):
        _checks.window(self.window)
        _checks.window(self.reach)
        _checks.window(self.chunk, "chunk")
        _checks.integer("num_sinks", self.num_sinks, 0)
        if not self.causal and any(limit is not None for limit in (self.window, self.reach, self.chunk)):
            raise ConfigError("a window or chunk is causal: it counts the query's own token and those before it.")

    def allowed(
        self,
        q_positions: Int32[Array, "B T"],
        kv_positions: Int32[Array, "B K1 S"],
        *,
        q_segments: Int32[Array, "B T"] | None = None,
        kv_segments: Int32[Array, "B S"] | None = None,
    ) -> Bool[Array, "B K1 T S"]:
        """The rule as an array.

        Args:
            q_positions: EMPTY for a pad, which attends to nothing.
            kv_positions: of one head, or of all K where they keep different tokens; EMPTY for an empty slot.
            q_segments: with `kv_segments`: only equal ids attend.
            kv_segments: see `q_segments`.
        """
        q = q_positions[:, None, :, None]
        kv = kv_positions[:, :, None, :]
        ok = (q >= 0) & self.between(kv, q, q)
        if q_segments is not None and kv_segments is not None:
            ok &= q_segments[:, None, :, None] == kv_segments[:, None, None, :]
        return ok

    def reachable(
        self, q_positions: Int32[Array, "B T"], kv_positions: Int32[Array, "*lead B K1 R"]
    ) -> Bool[Array, "*lead B K1 R"]:
        """An outer bound of `allowed` per key, cheap enough to skip whole blocks of keys by it.

        False where no query of the row can attend.
        """
        real = q_positions >= 0
        last = jnp.max(jnp.where(real, q_positions, EMPTY), axis=1)[:, None, None]
        first = jnp.min(jnp.where(real, q_positions, _checks.INT32_MAX), axis=1)[:, None, None]
        lead = (1,) * (kv_positions.ndim - 3)
        last, first = last.reshape(lead + last.shape), first.reshape(lead + first.shape)
        return (last >= 0) & self.between(kv_positions, first, last)

    def between(
        self, kv: Int32[Array, "*#shape"], first: Int32[Array, "*#shape"], last: Int32[Array, "*#shape"]
    ) -> Bool[Array, "..."]:
        """Whether some query between the positions `first` and `last` may attend to the keys; in kernels too."""
        ok = kv >= self.begin  # empty slots are -1
        if self.end is not None:
            ok &= kv < self.end
        if self.causal:
            ok &= kv <= last
        if self.window is not None:
            near = kv > first - self.window
            ok &= near | (kv < self.num_sinks) if self.num_sinks else near
        if self.reach is not None:
            ok &= kv > first - self.reach
        if self.chunk is not None:
            ok &= kv >= first - jax.lax.rem(first, jnp.int32(self.chunk))
        return ok

    def first_seen(self, q_positions: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
        """The first position that a query may attend to, but for the sinks."""
        first = jnp.zeros_like(q_positions)
        for window in (self.window, self.reach):
            if window is not None:
                first = jnp.maximum(first, q_positions - window + 1)
        if self.chunk is not None:
            first = jnp.maximum(first, q_positions - q_positions % self.chunk)
        return first

    @property
    def is_bounded(self) -> bool:
        """Whether a query may be kept from tokens that came before it."""
        limits = self.window, self.reach, self.chunk, self.end
        return self.begin > 0 or any(limit is not None for limit in limits)

    def narrowed(self, window: int | None) -> "Mask":
        """What this mask and a window of `window` tokens both allow."""
        if window is None:
            return self
        if self.window is None or window <= self.window:
            return dataclasses.replace(self, window=window, num_sinks=0)
        return dataclasses.replace(self, reach=window) if self.num_sinks else self

    def cut(self, chunk: int | None) -> "Mask":
        """What this mask and chunks of `chunk` positions both allow.

        Raises:
            UnsupportedError: it has other chunks already.
        """
        if chunk is None or chunk == self.chunk:
            return self
        if self.chunk is not None:
            raise UnsupportedError(
                f"chunk={chunk} cuts positions otherwise than the policy does, into chunks of {self.chunk}: give the "
                "cache Chunked of the same size, or another policy."
            )
        return dataclasses.replace(self, chunk=chunk)
