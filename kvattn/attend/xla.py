"""`"xla"`: attention by a loop over blocks of slots, for every backend.

Only blocks that hold a token some query can reach are visited, so a decode step costs what the tokens
cost and not what the cache could hold, and a prompt of any length needs no T x S array: queries go in
blocks as well, and each keeps a running maximum, sum and output.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, PyTree, Shaped

from kvattn import _manual
from kvattn._typing import Array, Encoded
from kvattn.attend.derivative import differentiable
from kvattn.attend.registry import Result
from kvattn.attend.request import Request, adjust, grouped, rotated, ungrouped
from kvattn.cache import Layout
from kvattn.codecs.base import accumulator

QUERY_ROWS = 512
"""Rows of the score matrix per key/value head and block: new tokens times query heads per group."""

HOST_SCORES = 2**25
"""Scores that are computed at once, 128 MiB, where each block of queries has all keys and values come over from the
host: then so many rows as that makes, if they are more."""


def unsupported(request: Request) -> str | None:
    """Why this implementation cannot take the request; None: it can."""
    del request
    return None


@differentiable
def attend(request: Request) -> Result:
    """Attention block by block. See `Request` for the meaning of arguments and results.

    Differentiable in both modes: derivatives are those of the reference.
    """
    length = request.query.shape[1]
    size, blocks = _query_blocks(request)
    if blocks == 1:
        return _query_block(request)
    by_block = _blocked(size, blocks)

    def one(block: tuple[Float[Array, "B size N H"], Int32[Array, "B size"]]) -> Result:
        query, positions = block
        return _query_block(dataclasses.replace(request, query=query, positions=positions))

    out, lse, mass = jax.lax.map(one, (by_block(request.query), by_block(request.positions, -1)))

    def joined(x: Float[Array, "blocks B size *rest"]) -> Float[Array, "B T *rest"]:
        return x.swapaxes(0, 1).reshape(x.shape[1], blocks * size, *x.shape[3:])[:, :length]

    return joined(out), joined(lse), None if mass is None else jnp.sum(mass, axis=0)


def _query_blocks(request: Request) -> tuple[int, int]:
    """Queries per block, and the number of blocks."""
    view, (batch, length, heads, _) = request.view, request.query.shape
    group, rows = heads // view.num_kv_heads, QUERY_ROWS
    if view.on_host:
        rows = max(rows, HOST_SCORES // (batch * view.num_kv_heads * view.layout.rows))
    size = max(1, min(length, rows // group))
    return size, -(-length // size)


def _blocked(size: int, blocks: int) -> Callable[..., Shaped[Array, "blocks B size *rest"]]:
    """Cuts [B, T, ...] into [blocks, B, size, ...]; the last block is filled up."""

    def cut(x: Shaped[Array, "B T *rest"], fill: float = 0) -> Shaped[Array, "blocks B size *rest"]:
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, blocks * size - x.shape[1])
        x = jnp.pad(x, padding, constant_values=fill)
        return x.reshape(x.shape[0], blocks, size, *x.shape[2:]).swapaxes(0, 1)

    return cut


def _query_block(request: Request) -> Result:
    """Attention of one block of queries: an online softmax over the blocks of slots within reach."""
    view = request.view
    walk = _Walk(request)
    shape = walk.shape

    def step(i: Int32[Array, ""], carry: tuple, block: Block) -> tuple:
        """Maximum and sum [B, K, G, T], output [B, K, G, T, Hv], scores [blocks, B, K, G, T, R] or None."""
        top, total, out, seen = carry
        scores, kv_positions = walk.scores(i, block)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # A row that has met nothing yet has maximum -inf, and -inf - -inf is NaN.
        shift = jnp.where(jnp.isneginf(new_top), 0, new_top)
        keep = jnp.exp(top - shift)
        weights = jnp.exp(scores - shift[..., None])
        values = block[1] if block else view.value_block(i)
        mixed = walk.mixed(weights, values, kv_positions)
        if request.want_mass:
            seen = jax.lax.dynamic_update_index_in_dim(seen, scores, i, 0)
        return new_top, total * keep + jnp.sum(weights, axis=-1), out * keep[..., None] + mixed, seen

    layout = view.layout
    carry: tuple = (
        jnp.full(shape, -jnp.inf, walk.acc),
        jnp.zeros(shape, walk.acc),
        jnp.zeros((*shape, view.value_head_dim), walk.acc),
        jnp.full((layout.num_blocks, *shape, layout.rows), -jnp.inf, walk.acc) if request.want_mass else None,
    )
    top, total, out, seen = walk.over_blocks(view.block, step, carry)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = jnp.where(empty[..., None], 0, out / total[..., None])
    lse = jnp.where(empty, -jnp.inf, jnp.log(total) + top)
    mass = None
    if request.want_mass:
        # The scores were kept: once the softmax sum is known they are probabilities without another product.
        probs = jnp.exp(seen - jnp.where(empty, jnp.inf, lse)[None, ..., None])
        mass = jnp.sum(jnp.mean(probs, axis=3, dtype=jnp.float32), axis=3)
        mass = layout.from_blocks(mass[..., None], False)[..., 0]
    return ungrouped(out), ungrouped(lse), mass


Block = tuple[Encoded, ...]
"""The keys of a block, and its values where they are wanted, once they are here; empty: they are read where used."""


class _Walk:
    """The blocks of slots that a block of queries can reach, and the scores in them."""

    def __init__(self, request: Request):
        view = request.view
        query = grouped(request.query, view.num_kv_heads)
        self.request = request
        self.shape = query.shape[:4]
        self.rows = query.reshape(*query.shape[:2], -1, query.shape[-1])
        self.acc = accumulator(query.dtype, *(x.dtype for x in view.keys.values()))
        near = jnp.any(request.reached(view.positions), axis=(1, 2, 3))
        self.first = jnp.argmax(near).astype(jnp.int32)
        end = view.layout.num_blocks - jnp.argmax(near[::-1]).astype(jnp.int32)
        self.last = jnp.where(jnp.any(near), end, self.first)

    def over_blocks[T](
        self, fetch: Callable[[Int32[Array, ""]], Block], step: Callable[[Int32[Array, ""], T, Block], T], start: T
    ) -> T:
        """What `step` makes of `start`, block by block.

        Where they lie on the host, a block is fetched while the one before is computed: it is known a step ahead, so
        that XLA can start the copy and go on. No block is fetched twice.
        """
        if not self.request.view.on_host:
            return _manual.fori_loop(self.first, self.last, lambda i, carry: step(i, carry, ()), start)

        def ahead(i: Int32[Array, ""], state: tuple[T, Block]) -> tuple[T, Block]:
            carry, block = state
            following = fetch(i + 1)
            return step(i, carry, block), following

        end = jnp.maximum(self.last - 1, self.first)
        carry, block = _manual.fori_loop(self.first, end, ahead, (start, fetch(self.first)))
        return _manual.fori_loop(end, self.last, lambda i, carry: step(i, carry, block), carry)

    def scores(
        self, i: Int32[Array, ""], block: Block = ()
    ) -> tuple[Float[Array, "B K G T R"], Int32[Array, "B K1 R"]]:
        """Scores against block i, -inf where masked, and the positions it holds (of one head or all)."""
        request, view = self.request, self.request.view
        kv_positions = jax.lax.dynamic_index_in_dim(view.positions, i, 0, keepdims=False)
        keys, transposed = block[0] if block else view.key_block(i), view.layout.transposed_keys
        if request.key_rope is None:
            scores = view.codec.scores(self.rows, keys, transposed).astype(self.acc)
        else:
            keys = view.codec.keys(keys, view.key_head_dim, transposed, self.acc)
            keys = rotated(keys, request, kv_positions)
            scores = jnp.einsum("bkmh,bkrh->bkmr", self.rows.astype(self.acc), keys)
        scores = adjust(scores.reshape(*self.shape, -1), request, request.positions, kv_positions)
        allowed = request.mask.allowed(request.positions, kv_positions)[:, :, None]
        # Masked by selecting, never by adding: what lies in an unused slot may be NaN.
        return jnp.where(allowed, scores, -jnp.inf), kv_positions

    def mixed(
        self, weights: Float[Array, "B K G T R"], values: Encoded, kv_positions: Int32[Array, "B K1 R"]
    ) -> Float[Array, "B K G T Hv"]:
        """Weights times the values of a block that holds these positions.

        Weights of what a query may not attend to are 0, but 0 * NaN is NaN: where a value is not finite, the tokens of
        the query are taken one by one, and what each may not attend to is selected away.
        """
        request, (*_, length), size = self.request, self.shape, self.request.view.value_head_dim

        def product(weights: Float[Array, "B K G T R"], filled: Bool[Array, "B K1 R"]) -> Float[Array, "B K G T Hv"]:
            rows = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
            mixed = request.view.codec.mix(rows, values, filled)[..., :size]
            return mixed.astype(self.acc).reshape(*weights.shape[:-1], size)

        def one(t: Int32[Array, ""], mixed: Float[Array, "B K G T Hv"]) -> Float[Array, "B K G T Hv"]:
            at = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, t, 1, axis)
            allowed = request.mask.allowed(at(request.positions, 1), kv_positions)[:, :, 0]
            old = at(mixed, 3)
            # What is finite stays bit by bit as it is: a neighbour's NaN must not be seen by how a row is rounded.
            new = jnp.where(jnp.isfinite(old), old, product(at(weights, 3), allowed))
            return jax.lax.dynamic_update_slice_in_dim(mixed, new, t, 3)

        mixed = product(weights, request.reached(kv_positions))
        if length == 1:
            return mixed
        # A loop and no branch: under `jax.vmap` both sides of a branch are computed.
        rounds = jnp.where(jnp.all(jnp.isfinite(mixed)), 0, length).astype(jnp.int32)
        return _manual.fori_loop(jnp.int32(0), rounds, one, mixed)


Piece = tuple[Float[Array, "B size N H"], Int32[Array, "B size"], Float[Array, "B size N"]]
"""Queries of a block, their positions, and the logarithm of their softmax sum."""


def measure(request: Request, lse: Float[Array, "B T N"], function: Callable[..., PyTree]) -> PyTree:
    """A statistic of the probabilities of several new tokens, once their softmax sum is known.

    Args:
        request: the call.
        lse: the logarithm of the whole softmax sum, over this view and any other.
        function: called with probs float32 [B, K, T, R] (mean over the query heads of a group), q_positions [B, T] and
            kv_positions [B, 1 or K, R]; returns a tree of arrays [B, K, R, ...], which are added up over blocks of
            queries.

    Returns:
        the tree with arrays [B, K, S, ...].
    """
    view = request.view
    layout = view.layout
    size, blocks = _query_blocks(request)
    by_block = _blocked(size, blocks)
    pieces = by_block(request.query), by_block(request.positions, -1), by_block(lse, jnp.inf)

    def at(i: Int32[Array, ""], walk: _Walk, block_lse: Float[Array, "B size N"], block: Block = ()) -> PyTree:
        scores, kv_positions = walk.scores(i, block)
        block_lse = grouped(block_lse[..., None], view.num_kv_heads)
        probs = jnp.exp(scores - jnp.where(jnp.isneginf(block_lse), jnp.inf, block_lse))
        return function(jnp.mean(probs, axis=2, dtype=jnp.float32), walk.request.positions, kv_positions)

    def one(piece: Piece) -> PyTree:
        query, positions, block_lse = piece
        walk = _Walk(dataclasses.replace(request, query=query, positions=positions))
        shapes = jax.eval_shape(lambda i: at(i, walk, block_lse), walk.first)
        empty = jax.tree.map(lambda x: jnp.zeros((layout.num_blocks, *x.shape), x.dtype), shapes)

        def step(i: Int32[Array, ""], total: PyTree, block: Block) -> PyTree:
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return jax.tree.map(lambda whole, part: put(whole, part), total, at(i, walk, block_lse, block))

        return walk.over_blocks(lambda i: (view.key_block(i),), step, empty)

    def add(total: PyTree, piece: Piece) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, one(piece)), None

    start = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    )
    total, _ = _manual.scan(add, start, pieces)
    return jax.tree.map(lambda x: _slots(layout, x), total)


def _slots(layout: Layout, x: Shaped[Array, "blocks B K R *rest"]) -> Shaped[Array, "B K C *rest"]:
    """What is known of every slot, slot by slot."""
    flat = layout.from_blocks(x.reshape(*x.shape[:4], -1), False)
    return flat.reshape(*flat.shape[:3], *x.shape[4:])
