"""The axes of a cache's arrays, by name.

Every array says what its axes are, in words: ``cache.axes`` is the cache's tree with a string for each array, such as
"blocks rows heads slots features". Whoever repeats heads, picks rows, copies pages or splits a cache over a mesh goes
by these names, and need not know which cache, codec or policy is behind an array.

========  ==============================================================
rows      B: sequences
heads     K: key/value heads
blocks    of slots, of a contiguous cache
slots     R: of a block
pages     P: of a pool
offsets   R: slots of a page
columns   of the page table
spans     of pages that rows read together
members   rows of a span
recent    tokens that a codec keeps beside the slots, as they came
features  what is stored of a token
========  ==============================================================
"""

from collections.abc import Callable

import jax
from jaxtyping import Shaped

from kvattn._typing import Array
from kvattn.cache.host import by_block, is_on_host


def axis_of(name: str, axes: str) -> int | None:
    """Which axis has a name; None: none has."""
    names = axes.split()
    return names.index(name) if name in names else None


def along[T](name: str, change: Callable[[Shaped[Array, "..."], int], Shaped[Array, "..."]], tree: T, axes: T) -> T:
    """The tree with ``change(array, axis)`` for every array that has an axis of that name; on the host, block by block.

    Args:
        name: of the axis.
        change: what becomes of an array.
        tree: of arrays.
        axes: the same tree with strings.
    """

    def one(x: Shaped[Array, "..."], axes: str) -> Shaped[Array, "..."]:
        axis = axis_of(name, axes)
        if axis is None:
            return x
        return by_block(lambda block: change(block, axis - 1), x) if is_on_host(x) else change(x, axis)

    return jax.tree.map(one, tree, axes)
