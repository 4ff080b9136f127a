"""`"xla"`: attention by a loop over blocks of slots, for every backend.

Only blocks that hold a token some query can reach are visited, so a decode step costs what the tokens
cost and not what the cache could hold, and a prompt of any length needs no T x S array: queries go in
blocks as well, and each keeps a running maximum, sum and output.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kvattn._typing import Array
from kvattn.attend import reference
from kvattn.attend.request import Request, adjust, grouped, ungrouped
from kvattn.codecs.base import accumulator

QUERY_ROWS = 512
"""Rows of the score matrix per key/value head and block: new tokens times query heads per group."""


def unsupported(request: Request) -> str | None:
    """Why this implementation cannot take the request; None: it can."""
    del request
    return None


def attend(request: Request) -> tuple[Array, Array, Array | None]:
    """Attention block by block. See `Request` for the meaning of arguments and results.

    Differentiable in both modes: derivatives are those of the reference.
    """
    floats, rest, structure = _split(request)
    return _attend(structure, rest, floats)


def _split(request: Request):
    """Separates what can be differentiated from what cannot."""
    leaves, structure = jax.tree.flatten(request)
    inexact = tuple(jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves)
    floats = tuple(x for x, keep in zip(leaves, inexact, strict=True) if keep)
    rest = tuple(x for x, keep in zip(leaves, inexact, strict=True) if not keep)
    return floats, rest, (structure, inexact)


def _join(structure, rest, floats) -> Request:
    tree, inexact = structure
    rest, floats = iter(rest), iter(floats)
    return jax.tree.unflatten(tree, [next(floats) if keep else next(rest) for keep in inexact])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(structure, rest, floats):
    request = _join(structure, rest, floats)
    group = request.query.shape[2] // request.view.num_kv_heads
    length = request.query.shape[1]
    size = max(1, QUERY_ROWS // group)
    if length <= size:
        return _query_block(request)
    # A block of queries after the other; the last one is filled up with pads.
    blocks = -(-length // size)
    padding = blocks * size - length
    query = jnp.pad(request.query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    positions = jnp.pad(request.positions, ((0, 0), (0, padding)), constant_values=-1)

    def by_block(x):
        return x.reshape(x.shape[0], blocks, size, *x.shape[2:]).swapaxes(0, 1)

    def one(block):
        query, positions = block
        return _query_block(dataclasses.replace(request, query=query, positions=positions))

    out, lse, mass = jax.lax.map(one, (by_block(query), by_block(positions)))

    def joined(x):
        return x.swapaxes(0, 1).reshape(x.shape[1], blocks * size, *x.shape[3:])[:, :length]

    return joined(out), joined(lse), None if mass is None else jnp.sum(mass, axis=0)


@_attend.defjvp
def _attend_jvp(structure, primals, tangents):
    rest, floats = primals
    primal = _attend(structure, rest, floats)
    _, tangent = jax.jvp(lambda *f: reference.attend(_join(structure, rest, f)), floats, tangents[1])
    return primal, tangent


def _query_block(request: Request):
    """Attention of one block of queries: an online softmax over the blocks of slots within reach."""
    view, mask = request.view, request.mask
    query = grouped(request.query, view.num_kv_heads)
    batch, kv_heads, group, length, features = query.shape
    rows = query.reshape(batch, kv_heads, group * length, features)
    acc = accumulator(query.dtype, *(x.dtype for x in view.keys.values()))
    transposed = view.layout.transposed_keys

    near = jnp.any(mask.reachable(request.positions, view.positions), axis=(1, 2, 3))
    first = jnp.argmax(near).astype(jnp.int32)
    last = jnp.where(jnp.any(near), view.layout.num_blocks - jnp.argmax(near[::-1]).astype(jnp.int32), first)

    def scores_of(i):
        keys, kv_positions = _block((view.keys, view.positions), i)
        scores = view.codec.scores(rows, keys, transposed).astype(acc)
        scores = scores.reshape(batch, kv_heads, group, length, -1)
        scores = adjust(scores, request, request.positions, kv_positions)
        allowed = mask.allowed(request.positions, kv_positions)[:, :, None]
        # Masked by selecting, never by adding: what lies in an unused slot may be NaN.
        return jnp.where(allowed, scores, -jnp.inf), kv_positions

    def step(i, carry):
        top, total, out = carry
        scores, kv_positions = scores_of(i)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # A row that has met nothing yet has maximum -inf, and -inf - -inf is NaN.
        shift = jnp.where(jnp.isneginf(new_top), 0, new_top)
        keep = jnp.exp(top - shift)
        weights = jnp.exp(scores - shift[..., None])
        values = _block(view.values, i)
        mixed = view.codec.mix(weights.reshape(*rows.shape[:3], -1), values, kv_positions >= 0)
        mixed = mixed.astype(acc).reshape(batch, kv_heads, group, length, -1)
        return new_top, total * keep + jnp.sum(weights, axis=-1), out * keep[..., None] + mixed

    carry = (
        jnp.full((batch, kv_heads, group, length), -jnp.inf, acc),
        jnp.zeros((batch, kv_heads, group, length), acc),
        jnp.zeros((batch, kv_heads, group, length, view.value_head_dim), acc),
    )
    top, total, out = jax.lax.fori_loop(first, last, step, carry)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = jnp.where(empty[..., None], 0, out / total[..., None])
    lse = jnp.where(empty, -jnp.inf, jnp.log(total) + top)
    mass = _mass(request, scores_of, lse, first, last) if request.want_mass else None
    return ungrouped(out), ungrouped(lse), mass


def _block(arrays, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), arrays)


def _mass(request: Request, scores_of, lse: Array, first: Array, last: Array) -> Array:
    """The probability each slot received: a second walk, now that the softmax sum is known."""
    layout = request.view.layout
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # a row that attends to nothing gives no mass

    def step(i, mass):
        probs = jnp.exp(scores_of(i)[0] - lse[..., None])
        return jax.lax.dynamic_update_index_in_dim(mass, jnp.sum(probs, axis=(2, 3), dtype=jnp.float32), i, 0)

    shape = (layout.num_blocks, lse.shape[0], lse.shape[1], layout.rows)
    mass = jax.lax.fori_loop(first, last, step, jnp.zeros(shape, jnp.float32))
    return layout.from_blocks(mass[..., None], False)[..., 0]
