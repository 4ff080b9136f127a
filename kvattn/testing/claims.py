"""What a cache promises: what is not claimed is not tested, but listed as not offered."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from kvattn.errors import ConfigError, RangeError
from kvattn.testing.oracles import TokenLists, seen_from

OVERFLOW = ("raises", "reports", "never")
SIDES = ("right", "left")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claims:
    """What a cache promises, and the sizes it is tried at.

    As it stands: causal attention over all tokens, prompts and chunks of any length, rows that advance together, and an
    error where a token does not fit.

    Attributes:
        window: a query sees the last so many tokens, its own included; None: all before it.
        sinks: and the first so many tokens of the sequence.
        chunk_size: of these only those of its own chunk of so many positions (Llama 4's local layers).
        budget: a query sees at most so many tokens, its own and others that the cache chooses by its own lights: H2O
            and its like. Which, is read out of the outputs; `window`, `sinks` and `chunk_size` are not given beside it.
        prompts: a step takes several tokens while the cache is empty.
        chunks: and when it is not.
        padding: sides on which a prompt may be padded: "right", "left".
        ragged: rows advance by their own numbers of tokens in any step, 0 included, padded on the first of those sides.
        empty_rows: pads, and rows without any token, come out as zeros.
        overflow: what happens to tokens past the capacity: the step "raises"; it "reports", drops the step whole in the
            rows where it does not fit, and the `failed` that is given to `check_cache` says which; or a sequence may be
            of any length ("never").
        rope_theta: the step rotates queries and keys (entry i with entry i + H/2) by RoPE of that base.
        positions: "true": by how many tokens came before; "cache": by the place among the tokens that a query sees.
        scale: factor of the scores; None: 1/√H.
        softcap: cap of the scores.
        jit: the step can be compiled by `jax.jit`, and the cache is a pytree that it may be given to keep: the checks
            run compiled, and see whether it is updated in place, and compiled once.
        capacity: how many tokens a sequence may have.
        batch_size: rows.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: of queries, keys and values.
        dtype: of queries, keys, values and outputs.
        tolerance: the largest error of an output, for caches that store in fewer bits than `dtype`. None: the accuracy
            rule, by which an output may be about twice as wrong as an honest computation in that dtype.

    Raises:
        ConfigError: claims that exclude each other.
        RangeError: sizes that are too small to look at.
    """

    window: int | None = None
    sinks: int = 0
    chunk_size: int | None = None
    budget: int | None = None
    prompts: bool = True
    chunks: bool = True
    padding: Sequence[str] = ()
    ragged: bool = False
    empty_rows: bool = False
    overflow: str = "raises"
    rope_theta: float | None = None
    positions: str = "true"
    scale: float | None = None
    softcap: float | None = None
    jit: bool = False
    capacity: int = 24
    batch_size: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: DTypeLike = "float32"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        sides = tuple(self.padding)
        if isinstance(self.padding, str) or not set(sides) <= set(SIDES):
            raise ConfigError(f"padding is a tuple of {SIDES}, got {self.padding!r}.")
        for name, value, known in (("overflow", self.overflow, OVERFLOW), ("positions", self.positions, POSITIONS)):
            if value not in known:
                raise ConfigError(f"{name} is one of {', '.join(known)}, got {value!r}.")
        if self.ragged and not sides:
            raise ConfigError("ragged=True pads steps: say on which side, padding=('right',) or ('left',).")
        if self.empty_rows and not sides:
            raise ConfigError("empty_rows=True is about pads: say on which side, padding=('right',) or ('left',).")
        if self.chunks and not self.prompts:
            raise ConfigError("chunks=True takes several tokens in a step, but prompts=False does not.")
        if self.budget is not None and (self.window, self.sinks, self.chunk_size) != (None, 0, None):
            raise ConfigError(
                "budget= leaves it to the cache what is seen: give no window, sinks or chunk_size beside it."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}.")
        if self.overflow != "never" and self.capacity < self.reach + 6:
            raise RangeError(
                f"capacity must be at least {self.reach + 6} to see the window, the sinks or the budget at work, "
                f"got {self.capacity}."
            )
        smallest = (("batch_size", 1), ("num_kv_heads", 1), ("head_dim", 2), ("window", 2), ("chunk_size", 2))
        for name, least in (*smallest, ("budget", 2), ("sinks", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RangeError(f"{name} must be {least} or more, got {value}.")

    @property
    def reach(self) -> int:
        """How many tokens it takes until one is no longer seen; 0: they all are."""
        return max((self.window or 0) + self.sinks * (self.window is not None), self.chunk_size or 0, self.budget or 0)

    @property
    def length(self) -> int:
        """Tokens of a sequence in most checks: a ring turns twice, and two places stay free where there is an end."""
        long = max(12, 2 * self.reach + 3)
        return long if self.overflow == "never" else min(long, self.capacity - 2)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype, as NumPy has it."""
        if self.dtype == "bfloat16":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(self.dtype)

    @property
    def side(self) -> str:
        """The side on which steps are padded."""
        return next(iter(self.padding), "right")

    def sees(self, position: int) -> set[int]:
        """The positions that a query at `position` attends to."""
        return seen_from(position, self.window, self.sinks, self.chunk_size)

    def oracle(self, exact: bool = True, batch_size: int | None = None) -> TokenLists:
        """The cache as lists of tokens: in float64, or computed honestly in `dtype`."""
        return TokenLists(
            self.batch_size if batch_size is None else batch_size,
            window=self.window,
            num_sinks=self.sinks,
            chunk=self.chunk_size,
            rope_theta=self.rope_theta,
            in_cache=self.positions == "cache",
            turns_in=np.float64 if exact else np.float32,
            dtype=np.float64 if exact else self.numpy_dtype,
            scale=self.scale,
            softcap=self.softcap,
        )


POSITIONS = ("true", "cache")
