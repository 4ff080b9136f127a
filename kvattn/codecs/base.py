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
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int32, Shaped

from kvattn._typing import Array, Encoded, Rows
from kvattn.codecs.blocks import Blocks, Contiguous
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
    """Whether derivatives must bypass the codes: rounding has no useful ones. See `as_they_came`."""

    stores_alike: ClassVar[bool] = True
    """Whether keys and values are stored in the same way, so that values can be read from keys (`as_values`)."""

    @property
    def format(self) -> Format | None:
        """How kernels read single tokens. None: they cannot, so `"xla"` reads them by `scores` and `mix`."""
        return None

    # One token.

    def encode(self, x: Float[Array, "*shape H"]) -> dict[str, Shaped[Array, "*shape _"]]:
        """Encodes tokens into named arrays."""
        raise NotImplementedError

    def decode(self, encoded: Encoded, head_dim: int, dtype: DTypeLike) -> Float[Array, "... H"]:
        """Decodes named arrays [..., F] into tokens of `dtype`."""
        raise NotImplementedError

    def unfit(self, x: Float[Array, "*shape H"], dtype: DTypeLike) -> Bool[Array, "*shape"] | None:
        """The tokens that a cache of `dtype` cannot store; None where it can store all."""
        del x, dtype
        return None

    def refusal(self, dtype: DTypeLike) -> str:
        """What is wrong with tokens that are `unfit`, to follow "keys or values"."""
        del dtype
        return f"that are NaN or infinite, which {self} cannot encode"

    # One block, as `block` returns it.

    def scores(self, query: Float[Array, "B K M H"], keys: Encoded, transposed: bool) -> Float[Array, "B K M R"]:
        """The query times encoded keys of one block, float32 or wider."""
        raise NotImplementedError

    def mix(
        self, probs: Float[Array, "B K M R"], values: Encoded, filled: Bool[Array, "B #K R"]
    ) -> Float[Array, "B K M F"]:
        """Probabilities times encoded values of one block, float32 or wider; features from H on mean nothing.

        `filled` tells the slots that hold a token. What lies in the others, NaN included, must not reach the result.
        """
        raise NotImplementedError

    def keys(self, block: Encoded, head_dim: int, transposed: bool, dtype: DTypeLike) -> Float[Array, "B K R H"]:
        """Decodes the keys of one block."""
        slots = {n: x.swapaxes(-1, -2) if transposed or n in self.token_minor else x for n, x in block.items()}
        return self.decode(slots, head_dim, dtype)

    def as_values(self, keys: Encoded, transposed: bool) -> Encoded:
        """The keys of one block as `mix` reads values, for those that are the first numbers of their keys."""
        turned = {n: transposed and n not in self.token_minor for n in keys}
        return {n: x.swapaxes(-1, -2) if turned[n] else x for n, x in keys.items()}

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

    def as_they_came(
        self, store: Encoded, counts: Int32[Array, "B *K"]
    ) -> tuple[tuple[Int32[Array, "B M"], Float[Array, "B K M H"]], ...]:
        """The tokens that a store holds beside their codes, which derivatives reach.

        Args:
            store: the arrays.
            counts: tokens.

        Returns:
            pairs of slots, negative for none, and tokens.
        """
        del store, counts
        return ()

    def can_trim(self, lengths: Int32[Array, " B"], num_tokens: Int32[Array, " B"]) -> Rows:
        """Whether the last `num_tokens` of `lengths` tokens can be taken back as if they had never come."""
        del lengths
        return num_tokens >= 0

    def for_chunk(self, dtype: DTypeLike) -> "Codec":
        """How the new tokens of a chunk see each other: as the next chunk will, so that chunks do not matter.

        Args:
            dtype: of the new tokens.
        """
        del dtype
        return self

    def transposed(self, layout: Blocks, role: Role, name: str) -> bool:
        """Whether the array `name` lies with tokens along the last axis."""
        return name in self.token_minor or (role == "keys" and layout.transposed_keys)

    def axes(self, layout: Blocks, role: Role, name: str) -> str:
        """The names of the axes of the array `name`, as `kvattn.cache.axes` has them."""
        return layout.axes("features slots" if self.transposed(layout, role, name) else "slots features")

    def empty(
        self, layout: Blocks, role: Role, batch_size: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> Encoded:
        """The store of an empty cache whose tokens come in `dtype`."""
        token = jax.eval_shape(self.encode, jax.ShapeDtypeStruct((batch_size, num_kv_heads, head_dim), dtype))
        return {
            name: layout.zeros(batch_size, num_kv_heads, x.shape[-1], x.dtype, self.transposed(layout, role, name))
            for name, x in token.items()
        }

    def lay_out(self, layout: Contiguous, role: Role, x: Float[Array, "B K S H"]) -> Encoded:
        """The store of the tokens, S = layout.num_slots."""
        return {n: layout.to_blocks(e, self.transposed(layout, role, n)) for n, e in self.encode(x).items()}

    def write(
        self, store: Encoded, layout: Blocks, role: Role, slots: Int32[Array, "B *K T"], x: Float[Array, "B K T H"]
    ) -> Encoded:
        """Encodes tokens and stores them.

        Args:
            store: before.
            layout: how it lies.
            role: whose store.
            slots: negative: not stored.
            x: the tokens.
        """
        encoded = self.encode(x)
        return {n: layout.write(old, slots, encoded[n], self.transposed(layout, role, n)) for n, old in store.items()}

    def block(
        self, store: Encoded, layout: Blocks, role: Role, i: Int32[Array, ""], counts: Int32[Array, "B *K"]
    ) -> Mapping[str, Shaped[Array, "B ..."]]:
        """Block i of a store: its arrays [B, K, R, F] or [B, K, F, R], and what else `scores` or `mix` must know.

        Args:
            store: the arrays.
            layout: how they lie.
            role: whose.
            i: the block.
            counts: slots from this number on are empty.
        """
        del counts
        return {n: layout.take(x, i, self.transposed(layout, role, n)) for n, x in store.items()}

    def dense(
        self,
        store: Encoded,
        layout: Blocks,
        role: Role,
        head_dim: int,
        counts: Int32[Array, "B *K"],
        dtype: DTypeLike,
    ) -> Float[Array, "B K C H"]:
        """Decodes a store slot by slot."""
        del counts
        slots = {n: layout.from_blocks(x, self.transposed(layout, role, n)) for n, x in store.items()}
        return self.decode(slots, head_dim, dtype)


def wider(*dtypes: DTypeLike) -> np.dtype:
    """The dtype that holds all of them, whatever `jax_numpy_dtype_promotion` says: the casts are written out."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes))


def accumulator(*dtypes: DTypeLike) -> np.dtype:
    """The dtype sums are kept in: float32, or float64 where an operand is float64."""
    return wider(jnp.float32, *(d for d in dtypes if jnp.dtype(d) == jnp.float64))


def not_finite(x: Float[Array, "*shape H"]) -> Bool[Array, "*shape"]:
    """The tokens that hold NaN or infinity, in float32 at least."""
    return ~jnp.all(jnp.isfinite(x.astype(jnp.float32)), axis=-1)
