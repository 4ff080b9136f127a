"""Which layers of a model share page tables, and what their pages cost.

Layers that keep tokens by the same rule have them in the same slots, so one table serves them all: each has a pool of
its own, and page p is page p of every one. Layers with a window hold a few pages of a sequence at a time, the others
all of them; one table for both would have the former hold what they never read. So a model's caches fall into groups,
and the host keeps one table, and one list of free pages, for each.

Layers under a policy whose heads keep different numbers of tokens let go of different ones: each is a group by itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.typing import ArrayLike

from kvattn import _checks, _paging
from kvattn.cache.axes import axis_of
from kvattn.cache.base import nbytes_of
from kvattn.cache.paged import PagedKVCache
from kvattn.cache.shared import Levels, levels_of
from kvattn.codecs import Codec
from kvattn.errors import ConfigError, DTypeError, ShapeError
from kvattn.policies import Policy

Caches = tuple[PagedKVCache, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that share tables. Hashable, without arrays.

    Attributes:
        layers: their numbers.
        policy: which tokens they keep.
        codec: in how many bits.
        num_kv_heads: K.
        page_size: R, tokens of a page.
        num_pages: P, pages of each layer's pool. Where heads have tables of their own, also K P strips of pages.
        max_pages: W, columns of the tables.
        page_bytes: of one page of one layer: keys, values and scales of all heads.
    """

    layers: tuple[int, ...]
    policy: Policy
    codec: Codec
    num_kv_heads: int
    page_size: int
    num_pages: int
    max_pages: int
    page_bytes: int

    def pages(self, length: int, chunk: int = 1) -> int:
        """The most pages that a sequence holds at once while it grows to `length` tokens.

        With heads of different numbers this is the bound, all heads keeping everything; `PagedKVCache.live` tells what
        they hold.

        Args:
            length: tokens.
            chunk: tokens that come at a time, which take their pages before others are given back.
        """
        _checks.integer("length", length, 0)
        _checks.integer("chunk", chunk, 1)
        return pages_at_once(self.policy, self.page_size, length, chunk)

    def nbytes(self, length: int, chunk: int = 1) -> int:
        """Bytes of those pages, in all layers of the group.

        Args:
            length: as in `pages`.
            chunk: likewise.
        """
        return len(self.layers) * self.pages(length, chunk) * self.page_bytes


def pages_at_once(policy: Policy, page_size: int, length: int, chunk: int = 1) -> int:
    """The most pages that a sequence of up to `length` tokens holds at once under a policy.

    Where slots are used again: those of all slots. Where a window leaves its pages behind: those that a query can see,
    wherever they begin, and those of the tokens that come with it.

    Args:
        policy: which.
        page_size: R.
        length: tokens.
        chunk: tokens that come at a time.
    """
    if policy.in_order:
        return _paging.pages_at_once(length, page_size, window=policy.mask().window, chunk=chunk)
    return _paging.pages_at_once(length, page_size, slots=most_slots(policy, max(length, 1)))


def most_slots(policy: Policy, length: int) -> int:
    """C, the slots of a sequence of up to `length` tokens; a budget is set aside whole, however short the sequence."""
    try:
        return policy.num_slots(length)
    except ConfigError:
        return policy.num_slots(None)


def groups_of(caches: Sequence[PagedKVCache]) -> tuple[Group, ...]:
    """The groups of a model's caches, in the order of their first layers.

    Args:
        caches: one per layer, or their shapes (`jax.eval_shape`).

    Raises:
        DTypeError: a cache without pages.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, cache in enumerate(caches):
        if not isinstance(cache, PagedKVCache):
            raise DTypeError(
                f"the cache of layer {i} is a {type(cache).__name__}: only a PagedKVCache has page tables."
            )
        alone = i if cache.policy.is_uneven else None
        rule = (cache.policy, cache.codec, cache.dtype, cache.page_size)
        heads = (cache.num_kv_heads, cache.key_head_dim, cache.value_head_dim, cache.values_in_keys)
        shapes = (cache.num_pages, cache.max_pages, *heads)
        found.setdefault((*rule, *shapes, alone), []).append(i)
    return tuple(_group(layers, caches[layers[0]]) for layers in found.values())


def _group(layers: list[int], cache: PagedKVCache) -> Group:
    arrays, axes = (jax.tree.leaves((x.keys, x.values)) for x in (cache, cache.axes))
    pool = sum(nbytes_of(x) for x, names in zip(arrays, axes, strict=True) if axis_of("pages", names) is not None)
    return Group(
        layers=tuple(layers),
        policy=cache.policy,
        codec=cache.codec,
        num_kv_heads=cache.num_kv_heads,
        page_size=cache.page_size,
        num_pages=cache.num_pages,
        max_pages=cache.max_pages,
        page_bytes=pool // cache.num_pages,
    )


def waste(groups: Sequence[Group], length: int, lengths: Sequence[int] | None = None) -> float:
    """The share of memory that one table for all layers would waste: they would all hold every token of a sequence.

    Args:
        groups: of a model.
        length: tokens of a sequence, those of an encoder included.
        lengths: how many of them come to the layers of each group. None: all.

    Raises:
        ShapeError: other than one length for each group.
    """
    lengths = [length] * len(groups) if lengths is None else list(lengths)
    if len(lengths) != len(groups):
        raise ShapeError(f"lengths must hold one number for each of {len(groups)} groups, got {len(lengths)}.")
    held = sum(group.nbytes(n) for group, n in zip(groups, lengths, strict=True))
    every = sum(len(group.layers) * _paging.pages_for(length, group.page_size) * group.page_bytes for group in groups)
    return 1 - held / every


def with_tables(
    caches: Sequence[PagedKVCache],
    tables: ArrayLike | Sequence[Any],
    lengths: ArrayLike | Sequence[int],
    shared: Sequence[Any] | None = None,
) -> Caches:
    """`PagedKVCache.with_tables` of all the layers of a model. Inside jit, as a part of the step, it costs nothing.

    Args:
        caches: one per layer.
        tables: one table for all layers, int [B, W]; or a list or tuple of tables, one for each group (`groups_of`).
        lengths: int [B], of all layers.
        shared: levels of spans that rows read together, or None, for the one table; where there is one for each group,
            also a list or tuple of those.

    Raises:
        ShapeError: other than one table, or one for each group; a table of another shape; likewise of `shared`.
        Else as `PagedKVCache.with_tables`.
    """
    groups = groups_of(caches)
    several = isinstance(tables, list | tuple) and len(tables) > 0 and np.ndim(tables[0]) > 1
    by_group: list[Any] = list(cast(Sequence[Any], tables)) if several else [tables] * len(groups)
    if len(by_group) != len(groups):
        raise ShapeError(
            f"the caches form {len(groups)} groups, got {len(by_group)} tables: one for all, or one for each."
        )
    if several and isinstance(shared, list | tuple) and len(shared) != len(groups):
        raise ShapeError(
            f"the caches form {len(groups)} groups, got {len(shared)} for shared: one for each, as tables, or None."
        )
    together = list(shared) if shared is not None and several else [shared] * len(groups)
    together = [None if levels is None else levels_of(levels) for levels in together]
    by_group = [x if hasattr(x, "dtype") else np.asarray(x) for x in by_group]
    for group, table, levels in zip(groups, by_group, together, strict=True):
        caches[group.layers[0]].with_tables(table, lengths, levels)  # raises what can be seen
    lengths = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    return _with_tables(tuple(caches), tuple(by_group), lengths, tuple(together))


@jax.jit
def _with_tables(caches: Caches, tables: tuple[Any, ...], lengths: Any, shared: tuple[Levels | None, ...]) -> Caches:
    found = list(caches)
    for group, table, levels in zip(groups_of(caches), tables, shared, strict=True):
        for i in group.layers:
            found[i] = caches[i].with_tables(table, lengths, levels)
    return tuple(found)
