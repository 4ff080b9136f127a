"""`"mosaic_gpu"`: decoding on Hopper GPUs, a fixed number of programs that share out the tiles which hold something.

In each program one warpgroup fetches tiles by TMA into a ring in shared memory, another computes. Tokens are the long
side of both products ("swap AB"): scores are [tile, M] and outputs [H, M], M the new tokens times the query heads of a
group, rounded up to 8 only. A program writes one partial state per row and head that it met; `gpu_merge` merges them.

What the matrix unit takes in 16 bits is made exact enough by splitting: float32 queries go through it in two or three
parts, and so do probabilities. int8 goes to bfloat16 and float8 to float16, both exactly, with their scales multiplied
into scores and probabilities; four-bit values are decoded in registers.
"""

import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from kvattn._typing import Array
from kvattn.codecs import Float8, Int4, Int8, Plain
from kvattn.pallas import interpreted
from kvattn.pallas.gpu_body import FLOAT16_UNIT, Spec, Stream, byte_runs, decode
from kvattn.pallas.gpu_merge import merge
from kvattn.pallas.shares import survey
from kvattn.pallas.tuning import GpuConfig, gpu_config
from kvattn.request import Request, grouped, ungrouped

MOST_TOKENS = 8
MOST_FEATURES = 256
INTERPRETER = plgpu.InterpretGPUParams(detect_races=True)
SHARED_BYTES = 227 << 10
"""Of one block on Hopper."""
SHORTEST_COPY = 128
"""Bytes, and alignment, of what a copy writes into shared memory."""
FLOAT16_EXPONENT = int(math.log2(FLOAT16_UNIT))


def unsupported(request: Request) -> str | None:
    """Why this kernel cannot take the request; None: it can."""
    view = request.view
    if not interpreted() and (reason := _device()) is not None:
        return reason
    if request.query.shape[1] > MOST_TOKENS:
        return f"it takes up to {MOST_TOKENS} new tokens, here are {request.query.shape[1]}"
    if request.key_rope is not None:
        return "it does not rotate keys while it reads them"
    codec, data = view.codec, view.keys.get("data")
    if not isinstance(codec, Plain | Int8 | Float8 | Int4):
        return f"it does not read {codec}"
    if isinstance(codec, Plain) and data.dtype not in (jnp.bfloat16, jnp.float16):
        return f"a cache of {data.dtype} does not go through 16-bit matrix units"
    if request.query.dtype == jnp.float64:
        return "it has no float64"
    if view.page_table is None and (view.layout.num_blocks != 1 or view.layout.transposed_keys):
        return "the cache lies in blocks, as CPUs like it; make it with Layout(capacity, capacity, False)"
    if view.page_table is None and view.layout.rows % 8:
        return f"it fetches eight slots at a time, and {view.layout.rows} are no multiple of 8"
    features = (view.key_head_dim, view.value_head_dim)
    if any(f % 16 or f > MOST_FEATURES for f in features):
        return f"head dims must be multiples of 16 up to {MOST_FEATURES}, here are {features}"
    if isinstance(codec, Int4):
        cuts = {c for f in features for a, b in byte_runs(f, codec.group_size) for c in (a, b)}
        if any(c % 16 for c in cuts):
            return f"groups of {codec.group_size} of {features} channels do not begin at multiples of 16 in the bytes"
    return _paging(request)


def _paging(request: Request) -> str | None:
    """Why the pages of the request do not fit; None: they do."""
    view = request.view
    if view.page_table is None:
        return None
    size = view.page_size
    if size % 8 or (size < TILE and TILE % size) or (size > TILE and size % TILE):
        return f"pages must have 8, 16, 32 or a multiple of {TILE} slots, here are {size}"
    least = {Int8: SHORTEST_COPY // 4, Float8: SHORTEST_COPY // 4, Int4: TILE}.get(type(view.codec), 8)
    if size < least:
        return f"{view.codec} needs pages of {least} slots at least: those of {size} hold too few scales for one copy"
    return None


TILE = 64


def _device() -> str | None:
    """Why the default device cannot run it."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if capability is not None and str(capability) != "9.0":
        return f"it is made of Hopper's wgmma (compute capability 9.0); this GPU has {capability}"
    return None


def attend(request: Request, config: GpuConfig | None = None) -> tuple[Array, Array, Array | None]:
    """Attention of a few new tokens; see `Request` for arguments and results."""
    view = request.view
    batch, length = request.query.shape[:2]
    heads = view.num_kv_heads
    query = grouped(request.query, heads)
    group = query.shape[2]
    count = group * length
    chunks, cols = _columns(count, view.value_head_dim)
    config = config or gpu_config(request)
    wide, parts = _numbers(request)

    def columns(x: Array, fill: Any) -> Array:
        """[..., M, rest] to [..., chunks, cols, rest]."""
        axis = x.ndim - 2
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, chunks * cols - count)
        x = jnp.pad(x, padding, constant_values=fill)
        return x.reshape(*x.shape[:axis], chunks, cols, x.shape[-1])

    query = columns(query.reshape(batch, heads, count, -1), 0).reshape(batch, heads * chunks, cols, -1)
    query, factor = _split(query, wide, parts)
    at = jnp.broadcast_to(request.positions[:, None], (batch, group, length)).reshape(batch, count)
    at = columns(at[..., None], -1)[..., 0]
    slopes = request.alibi_slopes
    if slopes is not None:
        slopes = jnp.repeat(slopes.astype(jnp.float32).reshape(heads, group), length, axis=1)
        slopes = columns(slopes[..., None], 0).reshape(heads * chunks, cols)

    positions = view.layout.from_blocks(view.positions[..., None], False)[..., 0]
    positions = _whole_tiles(positions, config.tile)
    slots = positions.shape[2]
    codec = view.codec
    streams, arrays = [], []
    for role, store in (("k", view.keys), ("v", view.values)):
        for name, x in store.items():
            last = name in codec.token_minor
            if view.page_table is None:
                x = _aligned(x[0], config.tile) if last else x[0]
            if isinstance(codec, Float8) and x.dtype == jnp.uint8:
                x = jax.lax.bitcast_convert_type(x, jnp.float8_e4m3fn)
            streams.append(Stream(role + "_" + name, tuple(x.shape), jnp.dtype(x.dtype), last))
            arrays.append(x)
    spec = Spec(
        batch=batch,
        heads=heads * chunks,
        chunks=chunks,
        cols=cols,
        per_head_positions=positions.shape[1] > 1,
        key_features=view.key_head_dim,
        value_features=view.value_head_dim,
        streams=tuple(streams),
        codec=codec,
        wide=jnp.dtype(wide),
        parts=parts,
        factor=factor is not None,
        mask=request.mask,
        scale=request.scale,
        softcap=request.softcap,
        alibi=slopes is not None,
        slots=slots,
        page_size=view.page_size if view.page_table is not None else 0,
        want_scores=request.want_mass,
        config=config,
        interpreted=interpreted(),
    )
    rows = survey(request, positions, config.tile)
    sums = _sums(query, spec) if isinstance(codec, Int4) else None
    extras = [x for x in (view.page_table, factor, slopes, sums) if x is not None]
    interpret = INTERPRETER if interpreted() else None
    partial, top, total, *scores = decode(
        spec, interpret, *rows.arrays(), query, at, positions, *arrays, *extras
    )
    out, lse = merge(partial, top, total, rows.count, batch, config.programs, interpret)

    def split(x: Array) -> Array:
        x = x.reshape(batch, heads, chunks * cols, *x.shape[3:])[:, :, :count]
        return ungrouped(x.reshape(batch, heads, group, length, *x.shape[3:]))

    out = out.reshape(heads * chunks, batch, -1, cols).transpose(1, 0, 3, 2)[..., : view.value_head_dim]
    by_column = lse.reshape(heads * chunks, batch, cols).swapaxes(0, 1)
    out, lse = split(out), split(by_column[..., None])[..., 0]
    if not request.want_mass:
        return out, lse, None
    tiles = jnp.arange(slots, dtype=jnp.int32)[None] // config.tile
    hole, after, number = (x[:batch, None] for x in (rows.hole, rows.after, rows.count))
    seen = (tiles < hole) | ((tiles >= after) & (tiles < after + number - hole))
    shift = jnp.where(jnp.isneginf(by_column), jnp.inf, by_column)[:, :, None]
    probs = jnp.where(seen[:, None, :, None], jnp.exp(scores[0] - shift), 0)
    mass = jnp.sum(probs.reshape(batch, heads, chunks, slots, cols), axis=(2, 4)) / group
    return out, lse, mass[..., : view.layout.num_slots]


def _columns(count: int, features: int) -> tuple[int, int]:
    """How the columns M are cut, as (chunks, columns of each): what registers hold, keys are read once per chunk."""
    most = {1: 72, 2: 48}.get(-(-features // 64), 24)
    chunks = -(-count // most)
    return chunks, -(-count // (8 * chunks)) * 8


def _numbers(request: Request) -> tuple[Any, int]:
    """In which dtype products are taken, and of how many parts float32 numbers consist in it."""
    view = request.view
    if isinstance(view.codec, Float8) or view.keys["data"].dtype == jnp.float16:
        return jnp.float16, 2 if request.query.dtype == jnp.float32 else 1
    return jnp.bfloat16, {jnp.dtype(jnp.float32): 3, jnp.dtype(jnp.float16): 2}.get(request.query.dtype, 1)


def _split(query: Array, wide: Any, parts: int) -> tuple[Array, Array | None]:
    """[parts, ...] that sum up to the query, and, if there is one, the factor [B, heads, cols] taken out of it."""
    factor = None
    if wide == jnp.float16 and query.dtype != jnp.float16:
        # float16 has neither the range of bfloat16 nor of float32. A power of two changes no digit.
        largest = jnp.max(jnp.abs(query.astype(jnp.float32)), axis=-1)
        exponent = jnp.clip(jnp.frexp(largest)[1] - FLOAT16_EXPONENT, -126, 127)
        factor = jnp.ldexp(jnp.float32(1), jnp.where(jnp.isfinite(largest) & (largest > 0), exponent, 0))
        query = query.astype(jnp.float32) / factor[..., None]
    if parts == 1:
        return query.astype(wide)[None], factor
    rest, found = query.astype(jnp.float32), []
    for _ in range(parts):
        # `reduce_precision` is never optimised away, two casts in a row may be.
        info = jnp.finfo(wide)
        piece = jax.lax.reduce_precision(rest, info.nexp, info.nmant)
        found.append(piece.astype(wide))
        rest = rest - piece
    return jnp.stack(found), factor


def _whole_tiles(positions: Array, tile: int) -> Array:
    return jnp.pad(positions, ((0, 0), (0, 0), (0, -positions.shape[2] % tile)), constant_values=-1)


def _aligned(x: Array, tile: int) -> Array:
    """Scales [B, K, groups, S], whose rows have to begin at multiples of 16 bytes."""
    if x.shape[-1] * x.dtype.itemsize % 16 == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % tile)))


def _sums(query: Array, spec: Spec) -> Array:
    """float32 [B, heads, groups, cols]: sums of the query over the groups of channels, to go with the minima."""
    size = spec.codec.group_size
    total = jnp.sum(query.astype(jnp.float32), axis=0)
    groups = math.ceil(spec.key_features / size)
    total = jnp.pad(total, ((0, 0), (0, 0), (0, 0), (0, groups * size - spec.key_features)))
    return jnp.sum(total.reshape(*total.shape[:3], groups, size), axis=-1).swapaxes(2, 3)
