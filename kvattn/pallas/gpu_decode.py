"""`"mosaic_gpu"`: decoding on Hopper GPUs, a fixed number of programs that share out the tiles which hold something.

In each program one warpgroup fetches tiles by TMA into a ring in shared memory, another computes. Tokens are the long
side of both products ("swap AB"): scores are [tile, M] and outputs [H, M], M the new tokens times the query heads of a
group, rounded up to 8 only. A program writes one partial state per row and head that it met; `gpu_merge` merges them.

What the matrix unit takes in 16 bits is made exact enough by splitting: float32 queries go through it in two or three
parts, and so do probabilities. int8 goes to bfloat16 and float8 to float16, both exactly, with their scales multiplied
into scores and probabilities; four-bit values are decoded in registers.
"""

import math
import os

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Shaped

from kvattn._typing import Array
from kvattn.attend.registry import Result
from kvattn.attend.request import Request, grouped, ungrouped
from kvattn.cache.view import View
from kvattn.pallas import common
from kvattn.pallas.gpu_body import decode
from kvattn.pallas.gpu_merge import merge
from kvattn.pallas.gpu_spec import Spec, Stream, byte_runs, shared_bytes
from kvattn.pallas.gpu_tile import FLOAT16_UNIT
from kvattn.pallas.interpreter import interpreted
from kvattn.pallas.shares import survey
from kvattn.pallas.tuning import GpuConfig, lookup

FEWEST_THREADS = 4
LEAST_FEATURES, MOST_FEATURES = 64, 256
INTERPRETER = plgpu.InterpretGPUParams(detect_races=True)
SHARED_BYTES = 227 << 10
"""Of one block on Hopper."""
SHORTEST_COPY = 128
"""Bytes, and alignment, of what a copy writes into shared memory."""
FLOAT16_EXPONENT = int(math.log2(FLOAT16_UNIT))


def unsupported(request: Request) -> str | None:
    """Why this kernel cannot take the request; None: it can."""
    view = request.view
    if (reason := _threads() if interpreted() else _device()) is not None:
        return reason
    if (reason := common.refusal(request)) is not None:
        return reason
    form = common.format_of(view)
    if form.is_plain and view.keys["data"].dtype not in (jnp.bfloat16, jnp.float16):
        return f"a cache of {view.keys['data'].dtype} does not go through 16-bit matrix units"
    if view.page_table is None and view.layout.rows % 8:
        return f"it fetches eight slots at a time, and {view.layout.rows} are no multiple of 8"
    features = (view.key_head_dim, view.value_head_dim)
    if any(f % 16 or not LEAST_FEATURES <= f <= MOST_FEATURES for f in features):
        return f"head dims must be multiples of 16 from {LEAST_FEATURES} to {MOST_FEATURES}, here are {features}"
    if form.is_grouped:
        cuts = {c for f in features for a, b in byte_runs(f, form.group_size) for c in (a, b)}
        if any(c % 16 for c in cuts):
            return f"groups of {form.group_size} of {features} channels do not begin at multiples of 16 in the bytes"
    return _paging(request, GpuConfig().tile)


def _paging(request: Request, tile: int) -> str | None:
    """Why the pages of the request do not fit tiles; None: they do."""
    view = request.view
    if view.page_table is None:
        return None
    size = view.page_size
    if size % 8 or (size < tile and tile % size) or (size > tile and size % tile):
        return f"pages must have 8, 16, 32 or a multiple of {tile} slots, here are {size}"
    form = common.format_of(view)
    least = tile if form.is_grouped else SHORTEST_COPY // 4 if form.is_scaled else 8
    if size < least:
        return f"{view.codec} needs pages of {least} slots at least: those of {size} hold too few scales for one copy"
    return None


def _threads() -> str | None:
    """Why the interpreter cannot run here: two warpgroups and what started them each hold a thread of XLA's."""
    count = max(int(os.environ.get("NPROC") or os.cpu_count() or 1), jax.local_device_count())
    if count >= FEWEST_THREADS:
        return None
    return (
        f"its interpreter would wait for ever for one of {count} threads; start Python with NPROC=8 in the environment"
    )


def _device() -> str | None:
    """Why the default device cannot run it."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if capability is not None and str(capability) != "9.0":
        return f"it is made of Hopper's wgmma (compute capability 9.0); this GPU has {capability}"
    return None


def attend(request: Request, config: GpuConfig | None = None) -> Result:
    """Attention of a few new tokens; see `Request` for arguments and results."""
    view = request.view
    if request.query.size == 0:
        return _nothing(request)
    spec = _spec(request, config or config_for(request))
    batch, length, tile = spec.batch, request.query.shape[1], spec.config.tile
    heads, chunks, cols = view.num_kv_heads, spec.chunks, spec.cols
    query = grouped(request.query, heads)
    group = query.shape[2]
    count = group * length

    def columns(x: Array, fill: float) -> Array:
        """[..., M, rest] to [..., chunks, cols, rest]."""
        axis = x.ndim - 2
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, chunks * cols - count)
        x = jnp.pad(x, padding, constant_values=fill)
        return x.reshape(*x.shape[:axis], chunks, cols, x.shape[-1])

    query = columns(query.reshape(batch, heads, count, -1), 0).reshape(batch, spec.heads, cols, -1)
    query, factor = _split(query, spec)
    at = columns(common.query_positions(request)[..., None], -1)[..., 0]
    slopes = common.query_slopes(request)
    if slopes is not None:
        slopes = columns(slopes[..., None], 0).reshape(spec.heads, cols)
    sums = _sums(query, spec) if spec.format.is_grouped else None

    positions = common.slot_positions(request, spec.slots)
    rows = survey(request, positions, tile)
    stored = {
        stream.name: x if x.dtype == stream.dtype else jax.lax.bitcast_convert_type(x, stream.dtype)
        for x, stream in zip(_stored(view), spec.streams, strict=True)
    }
    vectors = {
        name: jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, spec.lanes - cols),))
        for name, x in (("at", at), ("factor", factor), ("slopes", slopes), ("sums", sums))
        if x is not None
    }
    table = {} if view.page_table is None else {"table": view.page_table}
    arrays = {**rows.arrays(), "query": query, "positions": positions, **stored, **table, **vectors}
    interpret = INTERPRETER if interpreted() else None
    partial, top, total, *scores = decode(spec, interpret, arrays)
    out, lse = merge(partial, top, total, rows.count, batch, spec.programs, interpret)

    def split(x: Array) -> Array:
        """[B, heads, cols, ...] to [B, T, N, ...]."""
        x = x.reshape(batch, heads, chunks * cols, *x.shape[3:])[:, :, :count]
        return ungrouped(x.reshape(batch, heads, group, length, *x.shape[3:]))

    out = out.reshape(spec.heads, batch, -1, cols).transpose(1, 0, 3, 2)[..., : view.value_head_dim]
    by_column = lse.reshape(spec.heads, batch, cols).swapaxes(0, 1)
    out, lse = split(out), split(by_column[..., None])[..., 0]
    if not request.want_mass:
        return out, lse, None
    tiles = jnp.arange(spec.slots, dtype=jnp.int32)[None] // tile
    hole, after, number = (x[:batch, None] for x in (rows.hole, rows.after, rows.count))
    seen = (tiles < hole) | ((tiles >= after) & (tiles < after + number - hole))
    shift = jnp.where(jnp.isneginf(by_column), jnp.inf, by_column)[:, :, None]
    probs = jnp.where(seen[:, None, :, None], jnp.exp(scores[0] - shift), 0)
    mass = jnp.sum(probs.reshape(batch, heads, chunks, spec.slots, cols), axis=(2, 4)) / group
    return out, lse, mass[..., : view.layout.num_slots]


def _nothing(request: Request) -> Result:
    """The answer to no query: no rows, or no new tokens."""
    (batch, *rest), view = request.query.shape[:3], request.view
    out = jnp.zeros((batch, *rest, view.value_head_dim), jnp.float32)
    mass = jnp.zeros((batch, view.num_kv_heads, view.layout.num_slots), jnp.float32) if request.want_mass else None
    return out, jnp.full((batch, *rest), -jnp.inf, jnp.float32), mass


def key(request: Request) -> str:
    """What sizes depend on, as tables name it."""
    spec = _spec(request, GpuConfig())
    return f"mosaic_gpu {common.storage(request.view)}, {spec.cols} columns, {spec.parts} parts"


def fits(request: Request, config: GpuConfig) -> bool:
    """Whether a multiprocessor has the shared memory for these sizes."""
    if request.view.page_table is not None and _paging(request, config.tile) is not None:
        return False
    return shared_bytes(_spec(request, config)) * config.blocks_per_sm <= SHARED_BYTES


def config_for(request: Request) -> GpuConfig:
    """The sizes of the table, or by rule: as many tiles in flight as shared memory holds."""
    if interpreted():
        return GpuConfig(stages=2)
    found = lookup(key(request), jax.local_devices()[0].device_kind)
    if isinstance(found, GpuConfig) and fits(request, found):
        return found
    spec = _spec(request, GpuConfig())
    # Two programs of 256 threads share the registers, 128 for each thread, as long as states and scores are small;
    # numbers that are decoded or split need more of them.
    most = 16 * 128 if spec.parts == 1 and not spec.decoded else 8 * 128
    blocks = 2 if spec.cols * spec.parts * spec.padded <= most and spec.padded <= 128 else 1
    choices = [GpuConfig(stages=n, blocks_per_sm=b) for b in range(blocks, 0, -1) for n in range(6, 1, -1)]
    return next((c for c in choices if fits(request, c)), choices[-1])


def _spec(request: Request, config: GpuConfig) -> Spec:
    """All that is static."""
    view = request.view
    count = request.query.shape[1] * (request.query.shape[2] // view.num_kv_heads)
    chunks, cols = _columns(count, view.value_head_dim)
    wide, parts = _numbers(request)
    form = common.format_of(view)
    names = [(role, name) for role, store in (("k", view.keys), ("v", view.values)) for name in store]
    streams = []
    for (role, name), x in zip(names, _stored(view), strict=True):
        # Eight-bit floats are bits on CPUs, and in the interpreter.
        dtype = jnp.dtype(x.dtype if name != "data" or form.dtype is None else form.dtype)
        streams.append(Stream(f"{role}_{name}", tuple(x.shape), dtype, name in view.codec.token_minor))
    return Spec(
        batch=request.query.shape[0],
        heads=view.num_kv_heads * chunks,
        chunks=chunks,
        cols=cols,
        per_head_positions=view.positions.shape[2] > 1,
        key_features=view.key_head_dim,
        value_features=view.value_head_dim,
        streams=tuple(streams),
        format=form,
        wide=jnp.dtype(wide),
        parts=parts,
        factor=wide == jnp.float16 and request.query.dtype != jnp.float16,
        mask=request.mask,
        scale=request.scale,
        softcap=request.softcap,
        alibi=request.alibi_slopes is not None,
        slots=-(-view.layout.num_slots // config.tile) * config.tile,
        page_size=view.page_size if view.page_table is not None else 0,
        want_scores=request.want_mass,
        config=config,
        programs=config.blocks_per_sm * (2 if interpreted() else _multiprocessors()),
        interpreted=interpreted(),
    )


def _multiprocessors() -> int:
    """Of the default device; of an H200 where there is no GPU, which is when kernels are compiled ahead of time."""
    return int(getattr(jax.local_devices()[0], "core_count", None) or 132)


def _stored(view: View) -> list[Shaped[Array, "_ _ _ _"]]:
    """The arrays of the cache without the axis of blocks, keys first."""
    stored = common.arrays(view)
    return stored if view.page_table is not None else [x[0] for x in stored]


def _columns(count: int, features: int) -> tuple[int, int]:
    """How the columns M are cut, as (chunks, columns of each): what registers hold, keys are read once per chunk."""
    most = {1: 72, 2: 48}.get(-(-features // 64), 24)
    chunks = -(-count // most)
    return chunks, -(-count // (8 * chunks)) * 8


def _numbers(request: Request) -> tuple[DTypeLike, int]:
    """In which dtype products are taken, and of how many parts float32 numbers consist in it."""
    view = request.view
    if common.format_of(view).dtype == jnp.float8_e4m3fn or view.keys["data"].dtype == jnp.float16:
        return jnp.float16, 2 if request.query.dtype == jnp.float32 else 1
    return jnp.bfloat16, {jnp.dtype(jnp.float32): 3, jnp.dtype(jnp.float16): 2}.get(request.query.dtype, 1)


def _split(query: Array, spec: Spec) -> tuple[Array, Array | None]:
    """[parts, ...] that sum up to the query, and, if there is one, the factor [B, heads, cols] taken out of it."""
    factor, wide = None, spec.wide
    if spec.factor:
        # float16 has neither the range of bfloat16 nor of float32. A power of two changes no digit.
        largest = jnp.max(jnp.abs(query.astype(jnp.float32)), axis=-1)
        exponent = jnp.clip(jnp.frexp(largest)[1] - FLOAT16_EXPONENT, -126, 127)
        factor = jnp.ldexp(jnp.float32(1), jnp.where(jnp.isfinite(largest) & (largest > 0), exponent, 0))
        query = query.astype(jnp.float32) / factor[..., None]
    if spec.parts == 1:
        return query.astype(wide)[None], factor
    rest, found = query.astype(jnp.float32), []
    for _ in range(spec.parts):
        # `reduce_precision` is never optimised away, two casts in a row may be.
        info = jnp.finfo(wide)
        piece = jax.lax.reduce_precision(rest, info.nexp, info.nmant)
        found.append(piece.astype(wide))
        rest = rest - piece
    return jnp.stack(found), factor


def _sums(query: Array, spec: Spec) -> Array:
    """float32 [B, heads, groups, cols]: sums of the query over the groups of channels, to go with the minima."""
    size = spec.format.group_size
    total = jnp.sum(query.astype(jnp.float32), axis=0)
    groups = math.ceil(spec.key_features / size)
    total = jnp.pad(total, ((0, 0), (0, 0), (0, 0), (0, groups * size - spec.key_features)))
    return jnp.sum(total.reshape(*total.shape[:3], groups, size), axis=-1).swapaxes(2, 3)
