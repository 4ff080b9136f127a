"""What a way to split a cache over devices has to say, and which ways there are."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from kvattn._registry import Table
from kvattn._typing import Array
from kvattn.attend.step import Step
from kvattn.attend.tokens import NewTokens, PerHead
from kvattn.cache import Cache
from kvattn.errors import ConfigError
from kvattn.sharding.split import Split

DeviceStep = Callable[[NewTokens, PerHead, Any], tuple[Float[Array, "B T N Hv"], Any]]
"""A step on one device: the new tokens, what there is of each query head, the cache; out and the new cache."""


@dataclasses.dataclass(frozen=True)
class TokenSpecs:
    """How the arguments and the output of a step are split.

    Attributes:
        query: queries and output [B, T, N, H].
        tokens: new keys and values [B, T, K, H].
        row: one number, or T, per row.
        head: what there is of each query head.
    """

    query: PartitionSpec
    tokens: PartitionSpec
    row: PartitionSpec
    head: PartitionSpec

    def of(self, new: NewTokens, per_head: PerHead) -> tuple[NewTokens, PerHead]:
        """The placements as the trees of the arguments, None where one is None."""
        given = lambda x, spec: None if x is None else spec
        tokens = dataclasses.replace(
            new,
            query=self.query,
            key=given(new.key, self.tokens),
            value=given(new.value, self.tokens),
            num_new=self.row,
            refused=self.row,
            bad_count=self.row,
            ids=given(new.ids, self.row),
        )
        return tokens, jax.tree.map(lambda _: self.head, per_head)


@dataclasses.dataclass(frozen=True)
class Scheme(abc.ABC):
    """One way to split a cache over the devices along a mesh axis. Frozen and hashable: a step compiles once for it.

    `kvattn.sharding.register` makes one known by its name.
    """

    name: ClassVar[str]
    """What `by=` calls it."""

    is_split: ClassVar[bool] = True
    """Whether devices hold different parts of the cache, so that it can be told by how a cache lies."""

    fills_heads: ClassVar[bool] = True
    """Whether query heads that do not divide over the devices are filled up."""

    @abc.abstractmethod
    def check(self, split: Split, cache: Cache, num_heads: int | None) -> None:
        """Raises for a cache whose arrays do not divide as they are.

        Args:
            split: over what.
            cache: the cache, or its shapes.
            num_heads: N; None: not known yet.

        Raises:
            ShardingError: rows, heads, slots or pages that do not divide.
            UnsupportedError: a codec whose tokens cannot be split this way.
        """

    def arrange[C: Cache](self, split: Split, cache: C) -> C:
        """The cache with arrays that divide, where that can be brought about; `check` raises where it cannot."""
        return cache

    @abc.abstractmethod
    def cache_specs[C: Cache](self, split: Split, cache: C) -> C:
        """The cache's tree with a `PartitionSpec` for each array."""

    @abc.abstractmethod
    def token_specs(self, split: Split) -> TokenSpecs:
        """How the arguments and the output of a step are split."""

    @abc.abstractmethod
    def local(self, split: Split, step: Step, num_heads: int, copies: int) -> DeviceStep:
        """What each device does, inside `jax.shard_map` over all axes of the mesh.

        Args:
            split: over what.
            step: the step on a whole cache.
            num_heads: N, without heads that fill up.
            copies: what `copies` says.
        """

    def is_checked(self, cache: Cache) -> bool:
        """Whether JAX can check that devices agree on what they share (`check_vma` of `jax.shard_map`)."""
        return True

    def for_heads(self, split: Split, cache: Cache, num_heads: int) -> "Scheme":
        """The scheme for queries of so many heads."""
        return self

    def row_parts(self, split: Split) -> int:
        """Into how many parts rows are split, and with them the pages of a pool."""
        return split.num_data

    def copies(self, split: Split, cache: Cache, num_kv_heads: int) -> int:
        """On how many devices each of the new tokens' K heads is, with some of its query heads."""
        return 1

    def with_copies(self, x: Shaped[ArrayLike, "B T _ H"] | None, copies: int) -> Shaped[ArrayLike, "B T _ H"] | None:
        """New keys or values with as many heads as the cache has."""
        return x


_TABLE = Table[Scheme]("a scheme", "by", ("'auto'",))


def register(scheme: Scheme) -> None:
    """Makes a way to split caches known, so that `by=` can name it everywhere.

    Args:
        scheme: an instance of a subclass of `Scheme`.

    Raises:
        ConfigError: something else, or a name that is taken.
    """
    if not isinstance(scheme, Scheme):
        raise ConfigError(f"scheme must be an instance of a kvattn.sharding.Scheme, got {scheme!r}.")
    _TABLE.add(scheme.name, scheme)


def unregister(name: str) -> None:
    """Forgets a scheme.

    Raises:
        ConfigError: an unknown name.
    """
    _TABLE.remove(name)


def names() -> tuple[str, ...]:
    """The names `by` may take, besides "auto"."""
    return tuple(_TABLE.all())


def named(name: str) -> Scheme:
    """The scheme of a name.

    Raises:
        ConfigError: an unknown name.
    """
    return _TABLE.named(name)


def known() -> tuple[Scheme, ...]:
    """All schemes."""
    return tuple(_TABLE.all().values())
