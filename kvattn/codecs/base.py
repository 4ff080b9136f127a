"""What a codec is: how keys and values are stored, and how they are read.

A codec reads its store as the two products attention needs, scores from encoded keys and mixtures of encoded values,
one block of slots at a time. Scales can thus be folded into scores and probabilities instead of widening the cache. A
codec knows neither policies nor meshes.

Most codecs store each token on its own: they write `encode`, `decode`, `scores` and `mix`, and inherit the rest. One
whose tokens share a scale (`kvattn.codecs.kivi`) also says how its store is made, written and read.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from kvattn._typing import Array, Encoded, Rows
from kvattn.codecs.format import Format

Role = Literal["keys", "values"]


@dataclasses.dataclass(frozen=True)
class Codec:
    """Base of the codecs. Frozen and hashable: a static part of the cache.

    The cache lays out each named array in blocks, [blocks, B, K, R, F] (`kvattn.cache.layout`, the `layout` of the
    methods below). Arrays named in `token_minor` (scales) lie with tokens along the last axis, [blocks, B, K, F, R],
    and so does the data of the keys where the backend likes that; `scores` is told by `transposed`.
    """

    token_minor: ClassVar[tuple[str, ...]] = ()

    rounds: ClassVar[bool] = True
    """Whether derivatives must be led past the codes: rounding has none that is of use. See `as_they_came`."""

    @property
    def format(self) -> Format | None:
        """How kernels read single tokens. None: they cannot, so `"xla"` reads them by `scores` and `mix`."""
        return None

    # One token.

    def encode(self, x: Array) -> dict[str, Array]:
        """Encodes tokens [..., H] into named arrays [..., F]."""
        raise NotImplementedError

    def decode(self, encoded: Encoded, head_dim: int, dtype: Any) -> Array:
        """Decodes named arrays [..., F] into [..., H] of `dtype`."""
        raise NotImplementedError

    def unfit(self, x: Array, dtype: Any) -> Array | None:
        """bool [...]: the tokens of [..., H] that a cache of `dtype` cannot store; None where it can store all."""
        del x, dtype
        return None

    def refusal(self, dtype: Any) -> str:
        """What is wrong with tokens that are `unfit`, to follow "keys or values"."""
        del dtype
        return f"that are NaN or infinite, which {self} cannot encode"

    # One block, as `block` returns it.

    def scores(self, query: Array, keys: Encoded, transposed: bool) -> Array:
        """query [B, K, M, H] times encoded keys of one block: float32 (or wider) [B, K, M, R]."""
        raise NotImplementedError

    def mix(self, probs: Array, values: Encoded, filled: Array) -> Array:
        """probs [B, K, M, R] times encoded values of one block: [B, K, M, >= H], float32 or wider.

        `filled` bool [B, 1 or K, R] tells the slots that hold a token. What lies in the others, NaN
        included, must not reach the result. Features from H on mean nothing.
        """
        raise NotImplementedError

    def keys(self, block: Encoded, head_dim: int, transposed: bool, dtype: Any) -> Array:
        """Decodes the keys of one block: [B, K, R, H] of `dtype`."""
        slots = {n: x.swapaxes(-1, -2) if transposed or n in self.token_minor else x for n, x in block.items()}
        return self.decode(slots, head_dim, dtype)

    # A whole store.

    @property
    def rows(self) -> int | None:
        """The slots per block this codec needs. None: any number."""
        return None

    def refuses(self, in_order: bool) -> str | None:
        """Why this codec cannot serve a policy; None: it can.

        Args:
            in_order: whether under that policy slot s always holds the token of position s.
        """
        del in_order
        return None

    def as_they_came(self, store: Encoded, counts: Array) -> tuple[tuple[Array, Array], ...]:
        """The tokens that a store holds beside their codes, which derivatives reach.

        Args:
            store: the arrays.
            counts: int32 [B], tokens.

        Returns:
            pairs of slots int32 [B, M], negative for none, and tokens [B, K, M, H].
        """
        del store, counts
        return ()

    def can_trim(self, lengths: Array, num_tokens: Array) -> Rows:
        """bool [B]: whether the last `num_tokens` of `lengths` tokens can be taken back as if they had never come."""
        del lengths
        return num_tokens >= 0

    def for_chunk(self, dtype: Any) -> "Codec":
        """How the new tokens of a chunk see each other: as the next chunk will see them, so that chunking is no matter.

        Args:
            dtype: of the new tokens.
        """
        del dtype
        return self

    def transposed(self, layout: Any, role: Role, name: str) -> bool:
        """Whether the array `name` lies with tokens along the last axis."""
        return name in self.token_minor or (role == "keys" and layout.transposed_keys)

    def axes(self, layout: Any, role: Role, name: str) -> str:
        """The names of the axes of the array `name`, as `kvattn.cache.axes` has them."""
        return layout.axes("features slots" if self.transposed(layout, role, name) else "slots features")

    def empty(self, layout: Any, role: Role, batch_size: int, num_kv_heads: int, head_dim: int, dtype: Any) -> Encoded:
        """The store of an empty cache whose tokens come in `dtype`."""
        token = jax.eval_shape(self.encode, jax.ShapeDtypeStruct((batch_size, num_kv_heads, head_dim), dtype))
        return {
            name: layout.zeros(batch_size, num_kv_heads, x.shape[-1], x.dtype, self.transposed(layout, role, name))
            for name, x in token.items()
        }

    def lay_out(self, layout: Any, role: Role, x: Array) -> Encoded:
        """The store of the tokens [B, K, S, H], S = layout.num_slots."""
        return {n: layout.to_blocks(e, self.transposed(layout, role, n)) for n, e in self.encode(x).items()}

    def write(self, store: Encoded, layout: Any, role: Role, slots: Array, x: Array) -> Encoded:
        """Encodes tokens and stores them.

        Args:
            store: before.
            layout: how it lies.
            role: whose store.
            slots: int32 [B, T] or [B, K, T]; negative: not stored.
            x: [B, K, T, H].
        """
        encoded = self.encode(x)
        return {n: layout.write(old, slots, encoded[n], self.transposed(layout, role, n)) for n, old in store.items()}

    def block(self, store: Encoded, layout: Any, role: Role, i: Array, counts: Array) -> Mapping[str, Array]:
        """Block i of a store: its arrays [B, K, R, F] or [B, K, F, R], and what else `scores` or `mix` must know.

        Args:
            store: the arrays.
            layout: how they lie.
            role: whose.
            i: the block.
            counts: int32 [B] or [B, K]: slots from this number on are empty.
        """
        del counts
        return {n: layout.take(x, i, self.transposed(layout, role, n)) for n, x in store.items()}

    def dense(self, store: Encoded, layout: Any, role: Role, head_dim: int, counts: Array, dtype: Any) -> Array:
        """Decodes a store slot by slot: [B, K, C, H] of `dtype`."""
        del counts
        slots = {n: layout.from_blocks(x, self.transposed(layout, role, n)) for n, x in store.items()}
        return self.decode(slots, head_dim, dtype)


def wider(*dtypes: Any) -> Any:
    """The dtype that holds all of them, whatever `jax_numpy_dtype_promotion` says: the casts are written out."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes))


def accumulator(*dtypes: Any) -> Any:
    """The dtype sums are kept in: float32, or float64 where an operand is float64."""
    return wider(jnp.float32, *(d for d in dtypes if jnp.dtype(d) == jnp.float64))


def not_finite(x: Array) -> Array:
    """bool [...]: tokens of [..., H] that hold NaN or infinity, in float32 at least."""
    return ~jnp.all(jnp.isfinite(x.astype(jnp.float32)), axis=-1)
