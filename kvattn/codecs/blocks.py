"""What a codec asks of where its arrays lie."""

from typing import Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Int32, Shaped

from kvattn._typing import Array

Stored = Shaped[Array, "*lead _ _"]
"""[..., R, F], or [..., F, R] if transposed; the axes before are not the codec's business."""


@runtime_checkable
class Blocks(Protocol):
    """`kvattn.cache.Layout`, or the pages of a pool.

    Slots come in blocks of R.
    """

    @property
    def num_slots(self) -> int:
        """C."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks, the last one possibly partly unused."""
        ...

    @property
    def transposed_keys(self) -> bool:
        """Whether keys lie with tokens along the last axis."""
        ...

    def axes(self, block: str, /) -> str:
        """The names of the axes of an array whose blocks have these (`kvattn.cache.axes`)."""
        ...

    def zeros(self, batch_size: int, num_kv_heads: int, features: int, dtype: DTypeLike, transposed: bool) -> Stored:
        """An empty array of so many features per slot."""
        ...

    def empty(self, batch_size: int, num_kv_heads: int, block: tuple[int, ...], dtype: DTypeLike) -> Stored:
        """An empty array whose blocks have the shape `block`."""
        ...

    def take(self, blocks: Stored, i: Int32[Array, ""], transposed: bool, /) -> Shaped[Array, "B K _ _"]:
        """Block i."""
        ...

    def put(self, blocks: Stored, index: Int32[Array, "B M"], new: Shaped[Array, "B K M _ _"], /) -> Stored:
        """Replaces whole blocks; those past the end are dropped."""
        ...

    def from_blocks(self, blocks: Stored, transposed: bool, /) -> Shaped[Array, "B K C F"]:
        """The slots in order."""
        ...

    def write(
        self, blocks: Stored, slots: Int32[Array, "B *K T"], x: Shaped[Array, "B K T F"], transposed: bool, /
    ) -> Stored:
        """Writes tokens into slots, those not negative."""
        ...


@runtime_checkable
class Contiguous(Blocks, Protocol):
    """`kvattn.cache.Layout` alone."""

    def to_blocks(self, x: Shaped[Array, "B K S F"], transposed: bool, /) -> Stored:
        """Lays out tokens."""
        ...
