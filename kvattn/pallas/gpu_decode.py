"""`"mosaic_gpu"`: decoding on GPUs, a fixed number of programs that share out the tiles which hold something.

Each program is one warpgroup, which computes while its next tiles are on their way into a ring in shared memory: by the
copy engine (TMA, `gpu_fetch`), or by its own threads before Hopper (`gpu_threads`); `gpu_ways` says which.
Tokens are the long side of both products ("swap AB"): scores are [tile, M] and outputs [H, M], M the new tokens times
the query heads of a group, rounded up to 8 only. A program writes one partial state per row and head that it met;
`gpu_merge` merges them.

What the matrix unit takes in 16 bits is made exact enough by splitting: float32 queries go through it in two or three
parts, and so do probabilities. Eight-bit numbers go to float16 and four-bit ones to bfloat16, exactly; their scales are
multiplied into scores and probabilities.
"""

import dataclasses
import os

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float32, Shaped

from kvattn import _target
from kvattn._typing import Array
from kvattn.attend.registry import Result
from kvattn.attend.request import Request, grouped
from kvattn.cache.view import View
from kvattn.masks import Mask
from kvattn.pallas import common, gpu_threads, gpu_ways
from kvattn.pallas.gpu_body import decode
from kvattn.pallas.gpu_merge import merge
from kvattn.pallas.gpu_queries import columns, position_columns, queries
from kvattn.pallas.gpu_spec import Spec, Stream, byte_runs, shared_bytes
from kvattn.pallas.interpreter import interpreted
from kvattn.pallas.shares import survey
from kvattn.pallas.tuning import GpuConfig, lookup

FEWEST_THREADS = 4
LEAST_FEATURES, MOST_FEATURES = 64, 256
INTERPRETER = plgpu.InterpretGPUParams(detect_races=True)
LEAST_TOKENS, MANY_SLOTS = 128, 1024
"""Of a row's tokens, what a program takes at least, where rows have room for so many that their states add up: half as
many programs have half as many to merge, which takes one load after the other."""
SHORTEST_COPY = 128
"""Bytes, and alignment, of what a copy writes into shared memory."""


def unsupported(request: Request) -> str | None:
    """Why this kernel cannot take the request; None: it can."""
    view = request.view
    if (reason := device_refusal()) is not None:
        return reason
    if (reason := common.refusal(request)) is not None:
        return reason
    if any(common.tokens_beside(view, store) > 1 for store in (view.keys, view.values)):
        return "tokens lie side by side in the pages, as TPUs like it; make the cache with platform='cuda'"
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
    if (reason := _paging(request, GpuConfig().tile)) is not None or request.query.size == 0:
        return reason
    spec = _spec(request, GpuConfig(stages=2))
    if gpu_ways.by_threads() and (reason := gpu_threads.refusal(spec)) is not None:
        return reason
    if (needed := shared_bytes(spec)) > gpu_ways.shared_bytes():
        return (
            f"two tiles take {needed >> 10} KiB of shared memory, of which this GPU has {gpu_ways.shared_bytes() >> 10}"
        )
    return None


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


def device_refusal() -> str | None:
    """Why these kernels cannot run where the program is made for; None: they can."""
    return _threads() if interpreted("cuda") else gpu_ways.refusal()


def _threads() -> str | None:
    """Why the interpreter cannot run here: a warpgroup and what started it each hold a thread of XLA's."""
    count = max(int(os.environ.get("NPROC") or os.cpu_count() or 1), jax.local_device_count())
    if count >= FEWEST_THREADS:
        return None
    return (
        f"its interpreter would wait for ever for one of {count} threads; start Python with NPROC=8 in the environment"
    )


def attend(request: Request, config: GpuConfig | None = None) -> Result:
    """Attention of a few new tokens; see `Request` for arguments and results."""
    view = request.view
    if request.query.size == 0:
        return _nothing(request)
    spec = _spec(request, config or config_for(request))
    interpret = INTERPRETER if interpreted("cuda") else None
    table = {} if view.page_table is None else {"table": view.page_table}
    rows = _rows(request, spec)
    states = decode(spec, interpret, {**rows, **queries(request, spec), **_streams(view, spec), **table})
    scores = states.pop("scores", None)
    rows_read = {name: x for name, x in rows.items() if name != "positions"}
    out, lse = merge(spec, interpret, rows_read, states, request.out_dtype or jnp.float32)
    return out, lse, None if scores is None else _mass(scores, lse, rows, spec)[..., : view.layout.num_slots]


def _rows(request: Request, spec: Spec) -> dict[str, Array]:
    """What says which tiles to read, and which tokens are in them."""
    at = request.positions[:, 0] if spec.is_single else position_columns(request, spec)
    if spec.in_order:
        view = request.view
        return {"at": at, "counts": view.counts if view.seen is None else view.seen}
    positions = common.slot_positions(request, spec.slots)
    return {"at": at, "positions": positions, **survey(request, positions, spec.config.tile).arrays()}


def _streams(view: View, spec: Spec) -> dict[str, Array]:
    """The arrays of the cache, in dtypes that the kernel knows."""
    return {
        stream.name: x if x.dtype == stream.dtype else jax.lax.bitcast_convert_type(x, stream.dtype)
        for x, stream in zip(_stored(view), spec.streams, strict=True)
    }


def _mass(
    scores: Float32[Array, "B heads S cols"], lse: Float32[Array, "B T N"], rows: dict[str, Array], spec: Spec
) -> Float32[Array, "B K S"]:
    """The attention each slot received."""
    tiles = jnp.arange(spec.slots, dtype=jnp.int32)[None] // spec.config.tile
    hole, after, number = (rows[name][: spec.batch, None] for name in ("hole", "after", "count"))
    # Scores of other tiles were never written.
    seen = (tiles < hole) | ((tiles >= after) & (tiles < after + number - hole))
    lse = columns(grouped(lse[..., None], spec.heads // spec.chunks), spec, -jnp.inf)[..., 0]
    shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse)[:, :, None]
    probs = jnp.where(seen[:, None, :, None], jnp.exp(scores - shift), 0)
    return jnp.sum(probs.reshape(spec.batch, -1, spec.chunks, spec.slots, spec.cols), axis=(2, 4)) / spec.group


def _nothing(request: Request) -> Result:
    """The answer to no query: no rows, or no new tokens."""
    (batch, *rest), view = request.query.shape[:3], request.view
    out = jnp.zeros((batch, *rest, view.value_head_dim), jnp.float32)
    mass = jnp.zeros((batch, view.num_kv_heads, view.layout.num_slots), jnp.float32) if request.want_mass else None
    return out, jnp.full((batch, *rest), -jnp.inf, jnp.float32), mass


def hides(request: Request) -> bool:
    """Whether no query gets anything of values that are not finite and that it may not attend to."""
    return request.query.size == 0 or _spec(request, config_for(request)).hides


def key(request: Request) -> str:
    """What sizes depend on, as tables name it."""
    spec = _spec(request, GpuConfig())
    way = "" if spec.unit == "wgmma" else ", mma by threads" if spec.by_threads else ", mma"
    return f"mosaic_gpu {common.storage(request.view)}, {spec.cols} columns, {spec.parts} parts{way}"


def fits(request: Request, config: GpuConfig) -> bool:
    """Whether a multiprocessor has the shared memory for these sizes."""
    if request.view.page_table is not None and _paging(request, config.tile) is not None:
        return False
    if config.unit == "wgmma" and gpu_ways.capability() != gpu_ways.HOPPER:
        return False
    return shared_bytes(_spec(request, config)) * config.blocks_per_sm <= gpu_ways.shared_bytes()


def config_for(request: Request) -> GpuConfig:
    """The sizes of the table, or by rule: as many tiles in flight as shared memory holds."""
    if interpreted("cuda"):
        return GpuConfig(stages=2)
    found = lookup(key(request), _target.current().device_kind)
    if isinstance(found, GpuConfig) and fits(request, found):
        return found
    spec = _spec(request, GpuConfig())
    # Programs wait for tiles of 16 bits, and work on codes: there longer tiles pay, and a third program where they
    # do not fit or leave programs idle. Two programs of 128 threads have registers enough whatever they need, 256 for
    # each thread; three have 168. Measured on an H200 (benchmarks/results/on_device-nvidia_h200-2026-11-27).
    is_worked_on = spec.decoded and spec.parts == 1 and spec.cols * spec.padded <= 8 * 128
    # `mma` needs more of them where values of four bits are decoded group by group.
    third = is_worked_on and not (spec.unit == "mma" and spec.format.is_grouped and not spec.by_group)
    choices = [GpuConfig(64, n, b) for b in ((3, 2, 1) if third else (2, 1)) for n in range(6, 1, -1)]
    if is_worked_on and spec.batch * spec.heads * spec.slots >= 2 * 128 * 2 * _multiprocessors():
        choices = [GpuConfig(128, n, 2) for n in (3, 2)] + choices
    found = next((c for c in choices if fits(request, c)), choices[-1])
    return dataclasses.replace(found, least_tiles=max(1, LEAST_TOKENS // found.tile) if spec.slots >= MANY_SLOTS else 1)


def _spec(request: Request, config: GpuConfig) -> Spec:
    """All that is static."""
    view = request.view
    count = request.query.shape[1] * (request.query.shape[2] // view.num_kv_heads)
    chunks, cols = _columns(count, view.value_head_dim)
    wide, parts = _numbers(request)
    form = common.format_of(view)
    names = [(role, name) for role, store in (("k", view.keys), ("v", view.values)) for name in store]
    streams = []
    for (role, name), x in zip(names, common.arrays(view), strict=True):
        # Eight-bit floats are bits on CPUs, and in the interpreter; the GPU widens signed bytes only.
        wanted = jnp.int8 if form.is_grouped else form.dtype
        dtype = jnp.dtype(x.dtype if name != "data" or wanted is None else wanted)
        shape = x.shape if view.page_table is not None else x.shape[1:]
        streams.append(Stream(f"{role}_{name}", tuple(shape), dtype, name in view.codec.token_minor))
    batch, length, query_heads, _ = request.query.shape
    ring = view.layout.num_slots if length == 1 and view.seen is not None and _is_reckoned(request.mask) else 0
    factor = wide == jnp.float16 and request.query.dtype != jnp.float16
    spec = Spec(
        batch=batch,
        length=length,
        query_heads=query_heads,
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
        factor=factor,
        mask=request.mask,
        scale=request.scale,
        softcap=request.softcap,
        alibi=request.alibi_slopes is not None,
        slots=-(-view.layout.num_slots // config.tile) * config.tile,
        page_size=view.page_size if view.page_table is not None else 0,
        in_order=(view.in_order or ring > 0) and not request.want_mass,
        ring=ring,
        # Slopes and scores are kept column by column, and want the columns of a group to begin with its first query.
        as_it_lies=length == 1
        and batch * query_heads >= cols
        and request.alibi_slopes is None
        and not request.want_mass,
        raw=jnp.dtype(request.query.dtype),
        want_scores=request.want_mass,
        config=config,
        programs=config.blocks_per_sm * (2 if interpreted("cuda") else _multiprocessors()),
        unit=gpu_ways.unit_of(config),
        looks=False,
        by_threads=gpu_ways.by_threads(),
        interpreted=interpreted("cuda"),
    )
    looking = dataclasses.replace(spec, looks=spec.may_look)
    least = dataclasses.replace(looking, config=dataclasses.replace(config, stages=2))
    return looking if shared_bytes(least) <= gpu_ways.shared_bytes() else spec


def _is_reckoned(mask: Mask) -> bool:
    """Whether `shares.turned` knows the mask."""
    return mask == Mask(causal=mask.causal, window=mask.window)


def _multiprocessors() -> int:
    """Of the device that the program is made for; of an H200 where nobody says which."""
    return _target.current().num_cores or 132


def _stored(view: View) -> list[Shaped[Array, "_ _ _ _"]]:
    """The arrays of the cache without the axis of blocks, keys first."""
    stored = common.arrays(view)
    return stored if view.page_table is not None else [x[0] for x in stored]


def _columns(count: int, features: int) -> tuple[int, int]:
    """How the columns M are cut, as (chunks, columns of each): what registers hold, keys are read once per chunk."""
    # Registers hold addresses too where threads copy.
    most = ({1: 40, 2: 32} if gpu_ways.by_threads() else {1: 72, 2: 48}).get(-(-features // 64), 24)
    chunks = -(-count // most)
    return chunks, -(-count // (8 * chunks)) * 8


def _numbers(request: Request) -> tuple[DTypeLike, int]:
    """In which dtype products are taken, and of how many parts float32 numbers consist in it."""
    view, query = request.view, request.query.dtype
    # Eight bits become float16 in fewer instructions than bfloat16.
    if common.format_of(view).is_scaled:
        return jnp.float16, 3 if query == jnp.float32 else 1
    if view.keys["data"].dtype == jnp.float16:
        return jnp.float16, 2 if query == jnp.float32 else 1
    return jnp.bfloat16, {jnp.dtype(jnp.float32): 3, jnp.dtype(jnp.float16): 2}.get(query, 1)
