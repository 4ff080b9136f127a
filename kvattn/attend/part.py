"""Which part of a cache a step reads and writes: all of it, unless devices share it (`kvattn.sharding`)."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from jaxtyping import Float, Int32, PyTree

from kvattn._typing import Array
from kvattn.attend import api
from kvattn.attend.at_once import Appended
from kvattn.attend.tokens import NewTokens
from kvattn.cache import Cache, View
from kvattn.cache.pages import Store


@dataclasses.dataclass(frozen=True)
class Part:
    """All the slots, and all the query heads that read them. Hashable."""

    is_share: ClassVar[bool] = False
    """Whether there are slots elsewhere, so that attention to these is a part of it."""

    def write[C: Cache](
        self,
        cache: C,
        slots: Int32[Array, "B *K T"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"] | None,
        implementation: api.Implementation = "xla",
    ) -> C:
        """`Cache.write`, by a kernel where `implementation` has one."""
        return cache.write(
            slots, key, value, api.writer(cache.store, implementation, arrays=cache.keys, platform=cache.platform)
        )

    def appender(
        self, new: NewTokens, cache: Cache, implementation: api.Implementation
    ) -> Callable[[NewTokens, Cache], Appended] | None:
        """`kvattn.attend.api.appender`, of what has all the slots."""
        return None if self.is_share else api.appender(new, cache, implementation)

    def view(self, cache: Cache, *, held: bool = False) -> View:
        """The slots, every token where the policy says that it is seen. `held` as in `Cache.view`."""
        return cache.view(cache.policy.cache_positions(cache.state), held=held)

    def slots(self, store: Store, slots: Int32[Array, "B *K T"]) -> Int32[Array, "B *K T"]:
        """The slots by their numbers in the view; negative where they are not in it."""
        return slots

    def of_chunk(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"] | None, positions: Int32[Array, "B T"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"] | None, Int32[Array, "B S"]]:
        """The new tokens that are read here, and their positions."""
        return key, value, positions

    def joined(
        self, out: Float[Array, "B T N Hv"], lse: Float[Array, "B T N"]
    ) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
        """Attention to the slots and new tokens of all, from that to those read here."""
        return out, lse

    def of_group(self, tree: PyTree) -> PyTree:
        """The mean over all the query heads of a group, from that over those that are here."""
        return tree

    def all_slots(self, cache: Cache, tree: PyTree) -> PyTree:
        """Arrays [B, K, C, ...] of all slots, from those of the slots here."""
        return tree

    def all_new(self, tree: PyTree, length: int) -> PyTree:
        """Arrays [B, K, T, ...] of all new tokens, from those of the tokens read here."""
        return tree


WHOLE = Part()
