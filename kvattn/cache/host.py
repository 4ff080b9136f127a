"""Caches larger than the device: keys and values in the host's memory (FlexGen, Sheng et al., arXiv:2303.06865).

The arrays are those of `Layout`, always in blocks. A block at a time comes to the device to be read; one that takes new
tokens comes, is written there, and goes back. So the device holds a few blocks, however many the host has.

Compiled programs do only two things to such arrays, as XLA's offloader knows no others: they copy a slice to the device
(`jax.lax.dynamic_slice`) and put one in its place (`jax.lax.dynamic_update_slice`). No gather, no scatter, no sum.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Int32, Shaped

from kvattn import _manual, _target
from kvattn._typing import Array
from kvattn.cache.layout import Layout
from kvattn.errors import UnsupportedError

MEMORY_KIND = "pinned_host"
"""What JAX calls the host's memory that devices copy from and to. Compiled programs know this one and their own."""

BLOCK_TOKENS = 512
"""Slots of a block on GPUs and TPUs: of 8 heads of 128 bfloat16, 1 MiB of keys and as much of values per row. Smaller
ones make for short copies, larger ones for more to move when a block takes one token. Chosen, not measured."""


def check_platform() -> None:
    """Refuses what cannot hold such a cache.

    Raises:
        UnsupportedError: the default backend knows no such memory. Of other platforms nobody is asked.
    """
    if _target.family(_target.platform()) != jax.default_backend():
        return
    kinds = [memory.kind for memory in jax.local_devices()[0].addressable_memories()]
    if MEMORY_KIND not in kinds:
        raise UnsupportedError(
            f"memory_kind={MEMORY_KIND!r}: the devices of the default backend ({jax.default_backend()!r}) have no such "
            f"memory, only {', '.join(map(repr, kinds))}. Leave memory_kind out."
        )


def is_on_host(x: object) -> bool:
    """Whether an array, or what stands for one inside jit, lies in the host's memory for JAX; NumPy's do not."""
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host


def to_host(x: Shaped[ArrayLike, "*shape"]) -> Shaped[Array, "*shape"]:
    """The array in the host's memory; on a mesh, split as it was."""
    return x if isinstance(x, jax.Array) and is_on_host(x) else jax.device_put(x, jax.memory.Space.Host)


def to_device(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The array in the memory of the device, or devices, that it belongs to."""
    return jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x


def by_block(
    change: Callable[[Shaped[Array, "..."]], Shaped[Array, "..."]], blocks: Shaped[Array, "blocks ..."]
) -> Shaped[Array, "blocks ..."]:
    """What becomes of every block [...] of an array on the host, on the host again."""

    def one(i: Int32[Array, ""]) -> Shaped[Array, "..."]:
        return to_host(change(_block(blocks, i)))

    return jax.lax.map(one, jnp.arange(blocks.shape[0], dtype=jnp.int32))


def _forward_only(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays; derivatives and `jax.vmap` are refused by name.

    Both would do to the arrays on the host what only devices can: add them up, gather and select.
    """
    whole = custom_vmap(call)

    @whole.def_vmap
    def _(*args: Any) -> Any:
        raise UnsupportedError(
            "a cache in the host's memory cannot be mapped over by jax.vmap: its rows are the batch. Give the "
            'sequences as rows of one cache, or create it with memory_kind="device".'
        )

    guarded = jax.custom_jvp(whole)

    @guarded.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise UnsupportedError(
            "keys and values have no derivatives once they are in a cache in the host's memory. Create the cache with "
            'memory_kind="device", or stop the derivatives (jax.lax.stop_gradient) before they are written.'
        )

    return guarded


class HostLayout(Layout):
    """The blocks of a cache whose arrays of slots lie in the host's memory.

    What is made of them, one block or all of them, is on the device. The arrays of positions that a view has are there
    anyway, and pass as with `Layout`.
    """

    on_host: ClassVar[bool] = True

    @classmethod
    def best(
        cls,
        num_slots: int,
        token_bytes: int,
        backend: str | None = None,
        head_dim: int = 128,
        values_in_keys: bool = False,
    ) -> "HostLayout":
        """Blocks on every backend: on CPUs those of `Layout`, elsewhere of up to `BLOCK_TOKENS` slots."""
        one = Layout.best(min(num_slots, BLOCK_TOKENS), token_bytes, backend, head_dim, values_in_keys)
        if (backend or _target.platform()) == "cpu":
            one = Layout.best(num_slots, token_bytes, "cpu", head_dim, values_in_keys)
        return cls(num_slots, one.rows, one.transposed_keys)

    def empty(
        self, batch_size: int, num_kv_heads: int, block: tuple[int, ...], dtype: DTypeLike
    ) -> Shaped[Array, "blocks B K _ _"]:
        """An empty array, of which the device never holds more than a block."""
        return _empty((self.num_blocks, batch_size, num_kv_heads, *block), jnp.dtype(dtype))

    def take(
        self, blocks: Shaped[Array, "blocks B K _ _"], i: Int32[Array, ""], transposed: bool
    ) -> Shaped[Array, "B K _ _"]:
        """Block i, on the device."""
        del transposed
        return _take(blocks, i)

    def from_blocks(self, blocks: Shaped[Array, "blocks B K _ _"], transposed: bool) -> Shaped[Array, "B K C F"]:
        """The slots in order, all of them on the device."""
        return super().from_blocks(to_device(blocks), transposed)

    def put(
        self, blocks: Shaped[Array, "blocks B K _ _"], index: Int32[Array, "B M"], new: Shaped[Array, "B K M _ _"]
    ) -> Shaped[Array, "blocks B K _ _"]:
        """Replaces whole blocks of single rows; those past the end are dropped."""
        return _put(blocks, index, new.astype(blocks.dtype))

    def write(
        self,
        blocks: Shaped[Array, "blocks B K _ _"],
        slots: Int32[Array, "B *K T"],
        x: Shaped[Array, "B K T F"],
        transposed: bool,
    ) -> Shaped[Array, "blocks B K _ _"]:
        """Writes tokens into slots, block by block of those that take any; in place when the caller donates."""
        return _write(self, transposed)(blocks, slots, x.astype(blocks.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[Array, "blocks ..."]:
    return jax.lax.map(lambda _: to_host(jnp.zeros(shape[1:], dtype)), jnp.arange(shape[0], dtype=jnp.int32))


def _block(blocks: Shaped[Array, "blocks ..."], i: Int32[Array, ""]) -> Shaped[Array, "..."]:
    """Block i, on the device."""
    return to_device(jax.lax.dynamic_index_in_dim(blocks, i, 0, keepdims=False))


_take = _forward_only(_block)


@_forward_only
def _put(
    blocks: Shaped[Array, "blocks B K _ _"], index: Int32[Array, "B M"], new: Shaped[Array, "B K M _ _"]
) -> Shaped[Array, "blocks B K _ _"]:
    def change(i: Int32[Array, ""], block: Shaped[Array, "B K _ _"]) -> Shaped[Array, "B K _ _"]:
        here = index == i
        found = jnp.take_along_axis(new, jnp.argmax(here, axis=1)[:, None, None, None, None], axis=2)[:, :, 0]
        return jnp.where(jnp.any(here, axis=1)[:, None, None, None], found, block)

    return _changed(blocks, index, change)


@functools.cache
def _write(layout: HostLayout, transposed: bool) -> Callable[..., Any]:
    """Writes tokens; a block on the device is a cache of one block."""
    rows, one = layout.rows, Layout(layout.rows, layout.rows, layout.transposed_keys)

    @_forward_only
    def write(
        blocks: Shaped[Array, "blocks B K _ _"], slots: Int32[Array, "B *K T"], x: Shaped[Array, "B K T F"]
    ) -> Shaped[Array, "blocks B K _ _"]:
        number = jnp.where(slots < 0, layout.num_blocks, slots // rows)

        def change(i: Int32[Array, ""], block: Shaped[Array, "B K _ _"]) -> Shaped[Array, "B K _ _"]:
            return one.write(block[None], jnp.where(number == i, slots % rows, -1), x, transposed)[0]

        return _changed(blocks, number, change)

    return write


def _changed(
    blocks: Shaped[Array, "blocks B K _ _"],
    numbers: Int32[Array, "..."],
    change: Callable[[Int32[Array, ""], Shaped[Array, "B K _ _"]], Shaped[Array, "B K _ _"]],
) -> Shaped[Array, "blocks B K _ _"]:
    """The array with each block of these numbers changed on the device; numbers past the end are none."""
    count = blocks.shape[0]
    touched: Bool[Array, " blocks"] = jnp.zeros((count,), bool).at[numbers.reshape(-1)].set(True, mode="drop")
    order = jnp.argsort(~touched).astype(jnp.int32)  # stable: those first, in order

    def step(n: Int32[Array, ""], blocks: Shaped[Array, "blocks B K _ _"]) -> Shaped[Array, "blocks B K _ _"]:
        i = order[n]
        block = change(i, _block(blocks, i))
        return jax.lax.dynamic_update_index_in_dim(blocks, to_host(block[None]), i, 0)

    return _manual.fori_loop(jnp.int32(0), jnp.sum(touched, dtype=jnp.int32), step, blocks)
