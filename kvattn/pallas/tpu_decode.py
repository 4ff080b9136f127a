"""`"mosaic_tpu"`: decoding on TPUs, a walk over the tiles that hold something.

The grid is the list of tiles (`kvattn.pallas.tiles`), row after row, so Pallas fetches the next tile while this one is
worked on, across rows. A tile holds all key/value heads: one strided copy of keys, one of values; in a paged cache one
of each per page. Scores are [M, R] with M the new tokens times the query heads of a group; the running maximum, sum and
output of a row stay in VMEM until its last tile.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvattn import _manual
from kvattn._typing import Array
from kvattn.attend.request import Request, grouped, ungrouped
from kvattn.pallas import common, tiles, tpu_read
from kvattn.pallas.interpreter import interpreted
from kvattn.pallas.tuning import TpuConfig, lookup

ORDER = pltpu.CompilerParams(dimension_semantics=("arbitrary",))
"""One tile after the other, by one core: a row's state goes from tile to tile."""
INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
SMEM_BYTES = 512 << 10
"""For the plan, which is read from scalar memory."""
VMEM_GIVEN, VMEM_BYTES = 12 << 20, 40 << 20
"""What a kernel may be sure to get of vector memory, and what it asks for at most."""


def unsupported(request: Request, config: TpuConfig | None = None) -> str | None:
    """Why this kernel cannot take the request; None: it can."""
    view = request.view
    if (reason := common.refusal(request)) is not None:
        return reason
    if jnp.dtype(jnp.float16) in {x.dtype for x in common.arrays(view)}:
        return "TPU kernels have no float16, and a cache of it would be copied to be read as anything else"
    for store, head_dim in ((view.keys, view.key_head_dim), (view.values, view.value_head_dim)):
        reason = tpu_read.refuses(view.codec, head_dim, store["data"], store["data"].shape[-2])
        if reason is not None:
            return reason
    rows = rows_of(view, config)
    if view.page_table is not None and rows % view.page_size:
        return f"pages of {view.page_size} slots do not divide tiles of {rows}"
    entries = view.positions.shape[1] * -(-view.layout.num_slots // rows)
    per_entry = 3 + (rows // view.page_size if view.page_table is not None else 0)
    if 4 * entries * per_entry > SMEM_BYTES:
        return f"its plan of {entries} tiles does not fit in scalar memory"
    if vmem_bytes(request, config) > VMEM_BYTES:
        return f"its tiles need {vmem_bytes(request, config) >> 20} MiB of vector memory"
    return None


def attend(request: Request, config: TpuConfig | None = None) -> tuple[Array, Array, Array | None]:
    """Attention of a few new tokens; see `Request` for arguments and results."""
    view, mask, config = request.view, request.mask, config or config_for(request)
    form = common.format_of(view)
    batch, length = request.query.shape[:2]
    heads, rows = view.num_kv_heads, rows_of(view, config)
    query = grouped(request.query, heads)
    group = query.shape[2]
    dtypes = (request.query.dtype, view.keys["data"].dtype)
    wide = jnp.float32 if jnp.float32 in dtypes or jnp.float16 in dtypes else jnp.bfloat16
    # New tokens and query heads of a group are rows of one matrix, of which 8 or 16 lie in a register.
    count = group * length
    padded = -(-count // 16) * 16
    query = jnp.pad(query.reshape(batch, heads, count, -1), ((0, 0), (0, 0), (0, padded - count), (0, 0)))
    query = tpu_read.spread(query, form)
    at = jnp.pad(common.query_positions(request), ((0, 0), (0, padded - count)), constant_values=-1)

    slots = -(-_tokens(view) // rows) * rows
    positions = common.slot_positions(request, slots)
    chosen = tiles.plan(request, positions, rows)
    scalars = [chosen.count, chosen.row, chosen.tile, chosen.whole]
    per_tile = 1
    if view.page_table is not None:
        per_tile = rows // view.page_size
        num_pages = view.keys["data"].shape[1]
        scalars.append(tiles.pages_of(chosen, view.page_table, per_tile, num_pages).reshape(-1))

    names, paged = list(view.keys), view.page_table is not None
    stores = []
    for store in (view.keys, view.values):
        for name in names:
            last = name in view.codec.token_minor
            x = store[name]
            if not last and tpu_read.tokens_last(x.shape[-1]):
                # As it lies already: no copy.
                x, last = x.swapaxes(-1, -2), True
            if not interpreted():
                # Otherwise XLA moves what fits there into VMEM as a whole, empty slots and all.
                x = pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM)
            stores.extend((x, part, last) for part in range(per_tile))
    by_row = lambda *tail: pl.BlockSpec((1, *tail), lambda i, n, row, *_: (row[i], *(0,) * len(tail)))
    kv_heads = positions.shape[1]
    in_specs = [
        by_row(*query.shape[1:]),
        by_row(padded, 1),
        pl.BlockSpec((1, kv_heads, rows), lambda i, n, row, tile, *_: (row[i], 0, tile[i])),
        *(_page_spec(x, part, per_tile) if paged else _store_spec(x, rows, last) for x, part, last in stores),
    ]
    inputs = [query.astype(wide), at[..., None], positions, *(x for x, _, _ in stores)]
    slopes = common.query_slopes(request)
    if slopes is not None:
        inputs.append(jnp.pad(slopes, ((0, 0), (0, padded - count)))[..., None])
        in_specs.append(pl.BlockSpec((heads, padded, 1), lambda *_: (0, 0, 0)))
    out_specs = [by_row(heads, padded, view.value_head_dim), by_row(heads, padded, 1)]
    result = lambda *shape: _manual.result(shape, jnp.float32, (scalars, inputs))
    out_shape = [result(batch, heads, padded, view.value_head_dim), result(batch, heads, padded, 1)]
    if request.want_mass:
        out_specs.append(pl.BlockSpec((1, heads, padded, rows), lambda i, n, row, tile, *_: (row[i], 0, 0, tile[i])))
        out_shape.append(result(batch, heads, padded, slots))
    body = functools.partial(
        _body,
        names=names,
        readers=[
            functools.partial(
                tpu_read.Store,
                format=form,
                last=tpu_read.tokens_last(store["data"].shape[-1]),
                head_dim=head_dim,
                wide=wide,
            )
            for store, head_dim in ((view.keys, view.key_head_dim), (view.values, view.value_head_dim))
        ],
        per_tile=per_tile,
        rule=mask,
        scale=request.scale,
        softcap=request.softcap,
        alibi=slopes is not None,
        num_scalars=len(scalars),
    )
    out, lse, *scores = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=_grid(chosen),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((heads, padded, 1), jnp.float32),
                pltpu.VMEM((heads, padded, 1), jnp.float32),
                pltpu.VMEM((heads, padded, view.value_head_dim), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=params(vmem_bytes(request, config)),
        interpret=INTERPRETER if interpreted() else False,
        name="kvattn_tpu_decode",
    )(*scalars, *inputs)

    split = lambda x: ungrouped(x[:, :, :count].reshape(batch, heads, group, length, *x.shape[3:]))
    out, lse = tpu_read.restored(split(out), form), split(lse)[..., 0]
    if not request.want_mass:
        return out, lse, None
    (scores,) = scores
    seen = jnp.repeat(chosen.needed, rows, axis=1)[:, None, None]
    by_head = grouped(lse[..., None], heads).reshape(batch, heads, count, 1)
    by_head = jnp.where(jnp.isneginf(by_head), jnp.inf, by_head)
    probs = jnp.where(seen, jnp.exp(scores[:, :, :count] - by_head), 0)
    return out, lse, jnp.sum(probs, axis=2)[..., : view.layout.num_slots] / group


def params(vmem: int) -> pltpu.CompilerParams:
    """Those of a kernel that needs so many bytes of vector memory."""
    return ORDER if vmem <= VMEM_GIVEN else dataclasses.replace(ORDER, vmem_limit_bytes=vmem + (8 << 20))


def vmem_bytes(request: Request, config: TpuConfig | None = None) -> int:
    """Bytes of vector memory: two tiles, queries and results twice, the state once; widths fill registers."""
    view, rows = request.view, rows_of(request.view, config)
    wide = lambda n: -(-n // tpu_read.LANES) * tpu_read.LANES
    stores = common.arrays(view)
    tokens = _tokens(view) * view.positions.shape[1] if view.page_table is None else view.page_size * stores[0].shape[1]
    tile = sum(x.size * x.dtype.itemsize for x in stores) // tokens * rows
    count = view.num_kv_heads * -(-request.query.shape[1] * request.query.shape[2] // view.num_kv_heads // 16) * 16
    groups = view.keys["scale"].shape[-2] if common.format_of(view).is_grouped else 1
    queries = count * groups * wide(view.key_head_dim)
    results = count * (wide(view.value_head_dim) + tpu_read.LANES + (rows if request.want_mass else 0))
    return 2 * tile + 4 * (2 * queries + 3 * results + count * tpu_read.LANES)


def _grid(chosen: tiles.Plan) -> tuple[Any, ...]:
    """As many steps as there are tiles to read, known on the device only."""
    return (chosen.count[0],)


def key(request: Request) -> str:
    """What sizes depend on, as tables name it."""
    view = request.view
    return f"mosaic_tpu {common.storage(view)}, {view.num_kv_heads} heads"


def fits(request: Request, config: TpuConfig) -> bool:
    """Whether the kernel takes the call with these sizes."""
    return unsupported(request, config) is None


def config_for(request: Request) -> TpuConfig:
    """The sizes of the table, or the usual ones."""
    found = lookup(key(request), jax.local_devices()[0].device_kind)
    return found if isinstance(found, TpuConfig) and fits(request, found) else TpuConfig()


def rows_of(view: Any, config: TpuConfig | None = None) -> int:
    """Slots per tile: about `tile_bytes` of keys, a multiple of what lies in a register, whole pages."""
    config = config or TpuConfig()
    slots = _tokens(view)
    data = view.keys["data"]
    token_bytes = view.num_kv_heads * data.shape[-1] * data.dtype.itemsize
    lanes = tpu_read.LANES
    rows = min(max(config.tile_bytes // token_bytes // lanes * lanes, lanes), config.most_rows)
    if view.page_table is not None:
        pages = max(1, min(rows // view.page_size, 16, view.page_table.shape[1]))
        return pages * view.page_size
    return slots if slots <= rows else rows


def _tokens(view: Any) -> int:
    """Slots of a row that are to be walked; a contiguous array may have some more than the cache uses."""
    return view.layout.num_slots if view.page_table is not None else view.keys["data"].shape[3]


def _store_spec(x: Array, rows: int, tokens_last: bool) -> pl.BlockSpec:
    """How a tile of an array of a contiguous cache is fetched: [1, B, K, C, F], or [1, B, K, F, C] with tokens last."""
    heads = x.shape[2]
    if tokens_last:
        return pl.BlockSpec((1, 1, heads, x.shape[3], rows), lambda i, n, row, tile, *_: (0, row[i], 0, 0, tile[i]))
    return pl.BlockSpec((1, 1, heads, rows, x.shape[4]), lambda i, n, row, tile, *_: (0, row[i], 0, tile[i], 0))


def _page_spec(x: Array, part: int, per_tile: int) -> pl.BlockSpec:
    """How one page of a tile is fetched: [K, P, R, F] or [K, P, F, R]."""
    heads, _, *page = x.shape
    return pl.BlockSpec((heads, 1, *page), lambda i, n, row, tile, whole, pages: (0, pages[i * per_tile + part], 0, 0))


def _body(*refs, names, readers, per_tile, rule, scale, softcap, alibi, num_scalars):
    """One tile of one row."""
    count, row, whole = refs[0], refs[1], refs[3]
    query, at, positions = refs[num_scalars : num_scalars + 3]
    rest: list[Any] = list(refs[num_scalars + 3 :])
    stores = []
    for reader in readers:
        stores.append(reader({name: rest[n * per_tile : (n + 1) * per_tile] for n, name in enumerate(names)}))
        rest = rest[len(names) * per_tile :]
    keys, values = stores
    slopes = rest.pop(0) if alibi else None
    *outs, top, total, acc = rest
    out, lse = outs[:2]
    heads = query.shape[1]
    i = pl.program_id(0)
    here = row[i]

    @pl.when((i == 0) | (row[jnp.maximum(i - 1, 0)] != here))
    def _():
        top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def tile(every_slot_is_filled: bool) -> None:
        q_at = at[0]  # [M, 1]
        for k in range(heads):
            kv_at = positions[0, min(k, positions.shape[1] - 1)][None]  # [1, R]
            scores = keys.scores(query[0, k], k, scale)
            if softcap is not None:
                scores = jnp.tanh(scores / softcap) * softcap
            if slopes is not None:
                scores = scores + slopes[k] * (kv_at - q_at).astype(jnp.float32)
            allowed = (q_at >= 0) & rule.between(kv_at, q_at, q_at)
            # Masked by selecting, never by adding: what lies in an unused slot may be NaN.
            scores = jnp.where(allowed, scores, -jnp.inf)
            if len(outs) > 2:
                outs[2][0, k] = scores
            old = top[k]
            new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep, probs = jnp.exp(old - shift), jnp.exp(scores - shift)
            top[k] = new
            total[k] = total[k] * keep + jnp.sum(probs, axis=1, keepdims=True)
            mixed = values.mix(probs, k, None if every_slot_is_filled else kv_at >= 0)
            acc[k] = acc[k] * keep + mixed

    pl.when(whole[i] == 1)(lambda: tile(True))
    pl.when(whole[i] == 0)(lambda: tile(False))

    @pl.when((i == count[0] - 1) | (row[jnp.minimum(i + 1, row.shape[0] - 1)] != here))
    def _():
        sums = total[...]
        empty = sums == 0
        sums = jnp.where(empty, 1.0, sums)
        out[0] = jnp.where(empty, 0.0, acc[...] / sums)
        lse[0] = jnp.where(empty, -jnp.inf, jnp.log(sums) + top[...])
