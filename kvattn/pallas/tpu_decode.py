"""`"mosaic_tpu"`: decoding on TPUs, a walk over the tiles that hold something.

The grid is the list of tiles (`kvattn.pallas.tiles`), row after row, so Pallas fetches the next tile while this one is
worked on, across rows. A tile holds all key/value heads: one strided copy of keys, one of values; in a paged cache one
of each per page. Scores are [M, R] with M the new tokens times the query heads of a group; the running maximum, sum and
output of a row stay in VMEM until its last tile.

Where a device has two cores that share its memory (v4, v5p), each walks along all tiles with half of the heads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Int32, Shaped

from kvattn import _manual, _target
from kvattn._typing import Array
from kvattn.attend.registry import Result
from kvattn.attend.request import Request, grouped, ungrouped
from kvattn.cache.view import View
from kvattn.pallas import common, tiles, tpu_bits, tpu_fetch, tpu_read
from kvattn.pallas.interpreter import interpreted
from kvattn.pallas.tuning import TpuConfig, lookup

ORDER: tuple[Any, ...] = ("parallel", "arbitrary")
"""Cores beside each other; one tile after the other: a row's state goes from tile to tile."""
INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
SMEM_BYTES = 512 << 10
"""For the plan, which is read from scalar memory."""
MOST_PAGES = 64
"""Of a tile; each is copied by instructions of its own."""
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
    if len({common.tokens_beside(view, store) for store in (view.keys, view.values)}) > 1:
        return f"of heads of {view.key_head_dim} and {view.value_head_dim} tokens lie side by side in one, not in both"
    rows = rows_of(view, config)
    if view.page_table is not None and rows % view.page_size:
        return f"pages of {view.page_size} slots do not divide tiles of {rows}"
    entries = view.positions.shape[1] * -(-view.layout.num_slots // rows)
    per_entry = 3 + (_parts(view, rows) if view.page_table is not None else 1)
    if 4 * entries * per_entry > SMEM_BYTES:
        return f"its plan of {entries} tiles does not fit in scalar memory"
    if vmem_bytes(request, config) > VMEM_BYTES:
        return f"its tiles need {vmem_bytes(request, config) >> 20} MiB of vector memory"
    return None


def attend(request: Request, config: TpuConfig | None = None) -> Result:
    """Attention of a few new tokens; see `Request` for arguments and results."""
    view, config = request.view, config or config_for(request)
    heads, rows, cores = view.num_kv_heads, rows_of(view, config), cores_for(view)
    batch, length = request.query.shape[:2]
    group = request.query.shape[2] // heads
    # New tokens and query heads of a group are rows of one matrix.
    count, total = group * length, rows_for(request)[1]
    slots = -(-_tokens(view) // rows) * rows
    positions = common.slot_positions(request, slots)
    chosen = tiles.plan(request, positions, rows)

    scalars = _scalars(view, chosen, positions, rows)
    seen = _side_by_side(view, positions, rows)
    inputs = {**_queries(request), "positions": _positions(view, seen, rows), **_stores(view, rows)}
    results = _results(request, total, slots, rows)
    arrays = [*scalars.values(), *(x for x, _ in inputs.values())]
    buffers = _buffers(view, rows)
    out, lse, *scores = pl.pallas_call(
        functools.partial(
            _body,
            names=(*scalars, *inputs, *results, "top", "total", "acc", *buffers),
            parts=_parts(view, rows),
            orders={name: order for name, (_, order) in _lying(view).items()},
            readers=_readers(request),
            rule=request.mask,
            scale=request.scale,
            softcap=request.softcap,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, *_grid(chosen)),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in results.values()],
            scratch_shapes=[
                *(pltpu.VMEM((heads // cores, total, size), jnp.float32) for size in (1, 1, _width(view))),
                *buffers.values(),
            ],
        ),
        out_shape=[_manual.result(shape, jnp.float32, arrays) for shape, _ in results.values()],
        # Plans name nothing that is out of range, and a copy is issued in a third of the time that its check takes.
        compiler_params=params(vmem_bytes(request, config), ORDER, checked=False),
        interpret=INTERPRETER if interpreted("tpu") else False,
        name="kvattn_tpu_decode",
    )(*arrays)

    split = lambda x: ungrouped(x[:, :, :count].reshape(batch, heads, group, length, *x.shape[3:]))
    beside = common.tokens_beside(view, view.values)
    out, lse = split(tpu_read.restored(out, common.format_of(view), native(), beside)), split(lse)[..., 0]
    if not request.want_mass:
        return out, lse, None
    seen = jnp.repeat(chosen.needed, rows, axis=1)[:, None, None]
    by_head = grouped(lse[..., None], heads).reshape(batch, heads, count, 1)
    by_head = jnp.where(jnp.isneginf(by_head), jnp.inf, by_head)
    probs = jnp.where(seen, jnp.exp(scores[0][:, :, :count] - by_head), 0)
    mass = _side_by_side(view, jnp.sum(probs, axis=2), rows, back=True)
    return out, lse, mass[..., : view.layout.num_slots] / group


def cores_for(view: View) -> int:
    """Among how many cores of the device the heads are shared out."""
    target = _target.current()
    cores = (target.num_cores or 1) if target.platform == "tpu" else 1
    return cores if view.num_kv_heads % cores == 0 else 1


def native() -> tpu_bits.Native:
    """What the device has instructions for."""
    return tpu_bits.Native.of(_target.current().device_kind)


def rows_for(request: Request) -> tuple[int, int]:
    """Rows of queries of a key/value head, filled up, and with those of all groups: registers have eight."""
    view, (_, length, heads, _) = request.view, request.query.shape
    groups = tpu_read.row_groups(common.format_of(view), view.key_head_dim)
    each = max(8 // groups, 1)
    padded = -(-length * heads // view.num_kv_heads // each) * each
    return padded, padded * groups


def _width(view: View) -> int:
    """Columns of outputs in the kernel: those of a row of values."""
    return view.value_head_dim * common.tokens_beside(view, view.values)


def _side_by_side(view: View, x: Shaped[Array, "*lead S"], rows: int, back: bool = False) -> Shaped[Array, "*lead S"]:
    """Slots in the order in which a tile has them (`tpu_read.Store.beside`); or `back` from it."""
    beside = common.tokens_beside(view, view.keys)
    if beside == 1:
        return x
    pages = rows // view.page_size
    order = (beside, pages) if back else (pages, beside)
    cut = x.reshape(*x.shape[:-1], -1, *order, view.page_size // beside)
    return cut.swapaxes(-3, -2).reshape(x.shape)


# What the kernel is given, by name ---------------------------------------------------------------

Operands = dict[str, tuple[Array, pl.BlockSpec]]
"""Arrays [...], and which block of each belongs to a step of the grid."""


def _scalars(
    view: View, chosen: tiles.Plan, positions: Int32[Array, "B K1 S"], rows: int
) -> dict[str, Int32[Array, " n"]]:
    """What the grid walks along: the tiles, and the parts of each that hold something."""
    scalars = {"count": chosen.count, "row": chosen.row, "tile": chosen.tile, "whole": chosen.whole}
    parts = _parts(view, rows)
    if not parts:
        return scalars
    batch, heads, slots = positions.shape
    holds = jnp.any(positions.reshape(batch, heads, slots // rows * parts, rows // parts) >= 0, axis=(1, 3))
    if view.page_table is not None:
        pages = tiles.pages_of(chosen, view.page_table, holds, view.keys["data"].shape[1])
        return {**scalars, "pages": pages.reshape(-1)}
    return {**scalars, "held": tiles.parts_of(chosen, holds)}


def _by_row(view: View, *block: int) -> pl.BlockSpec:
    """The block of an array [B, K, ...] that is a row's and of a core's heads."""
    heads, *rest = block
    return pl.BlockSpec(
        (1, heads // cores_for(view), *rest), lambda core, i, n, row, *_: (row[i], core, *(0,) * len(rest))
    )


def _queries(request: Request) -> Operands:
    """Queries [B, K, M, H], their positions [B, M, 1], and ALiBi's slopes [K, M, 1], filled up, for every group."""
    view, heads, (padded, total) = request.view, request.view.num_kv_heads, rows_for(request)
    query = grouped(request.query, heads)
    batch, _, group, length, _ = query.shape
    fill = ((0, 0), (0, padded - group * length))
    query = jnp.pad(query.reshape(batch, heads, group * length, -1), ((0, 0), *fill, (0, 0)))
    query = tpu_read.spread(query, common.format_of(view), native(), common.tokens_beside(view, view.keys))
    query = query.astype(_wide(request))
    by_row = lambda x, value: jnp.tile(jnp.pad(x, fill, constant_values=value), (1, total // padded))[..., None]
    found: Operands = {
        "query": (query, _by_row(view, *query.shape[1:])),
        "at": (
            by_row(common.query_positions(request), -1),
            pl.BlockSpec((1, total, 1), lambda core, i, n, row, *_: (row[i], 0, 0)),
        ),
    }
    slopes = common.query_slopes(request)
    if slopes is not None:
        spec = pl.BlockSpec((heads // cores_for(view), total, 1), lambda core, *_: (core, 0, 0))
        found["slopes"] = by_row(slopes, 0), spec
    return found


def _positions(view: View, positions: Int32[Array, "B K1 S"], rows: int) -> tuple[Int32[Array, "B K1 S"], pl.BlockSpec]:
    """Those of a tile's slots, for all heads or for those of a core."""
    heads = positions.shape[1]
    block = (1, max(heads // cores_for(view), 1), rows)
    return positions, pl.BlockSpec(block, lambda core, i, n, row, tile, *_: (row[i], core if heads > 1 else 0, tile[i]))


def _parts(view: View, rows: int) -> int:
    """How many parts of a tile the kernel fetches by itself (`tpu_fetch`); 0: the grid fetches whole blocks.

    It does so in contiguous caches of a length that no copies of `PIECE` tokens make up.
    """
    if view.page_table is not None:
        return rows // view.page_size
    parts, rest = divmod(rows, tpu_fetch.PIECE)
    return 0 if rest or parts > tpu_fetch.MOST_PIECES or _tokens(view) % tpu_fetch.PIECE else parts


def _stores(view: View, rows: int) -> Operands:
    """The arrays of the cache, as a whole if the kernel fetches parts of them by itself."""
    found: Operands = {}
    for name, (x, order) in _lying(view).items():
        if not interpreted("tpu"):
            # Otherwise XLA moves what fits there into VMEM as a whole, empty slots and all.
            x = pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM)
        whole = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
        found[name] = x, whole if _parts(view, rows) else _store_spec(x, rows, order.tokens_last, cores_for(view))
    return found


def _buffers(view: View, rows: int) -> dict[str, Any]:
    """Where the parts of two tiles lie, of each array; nothing if the grid fetches them."""
    parts = _parts(view, rows)
    if not parts:
        return {}
    found: dict[str, Any] = {"arrived": pltpu.SemaphoreType.DMA((2,))}
    for name, (x, order) in _lying(view).items():
        if view.page_table is not None:
            shape = parts, x.shape[0] // cores_for(view), *x.shape[2:]
        else:
            shape = x.shape[2] // cores_for(view), *((x.shape[3], rows) if order.tokens_last else (rows, x.shape[4]))
        found[f"{name} buffers"] = pltpu.VMEM((2, *shape), x.dtype)
    return found


def _lying(view: View) -> dict[str, tuple[Shaped[Array, "..."], tpu_fetch.Order]]:
    """The arrays of the cache as they lie in memory, which is no copy, and how.

    Except scales in pages of up to 64 tokens: kernels cannot ask for them as XLA lays them, page beside page. They
    are copied to [cores, P / n, K / cores, 128], n pages beside each other.
    """
    found: dict[str, tuple[Array, tpu_fetch.Order]] = {}
    for role, store in (("keys", view.keys), ("values", view.values)):
        for name, x in store.items():
            last = name in view.codec.token_minor
            if last and (beside := pages_beside(view)) > 1:
                fill = [(0, -x.shape[1] % beside), (0, 0), (0, tpu_read.LANES // beside - x.shape[3])]
                rows = jnp.pad(x, [(0, 0), *fill]).reshape(
                    cores_for(view), x.shape[0] // cores_for(view), -1, tpu_read.LANES
                )
                found[f"{role} {name}"] = rows.swapaxes(1, 2), tpu_fetch.Order(True, beside)
            elif not last and tpu_read.tokens_last(x.shape[-1]):
                found[f"{role} {name}"] = x.swapaxes(-1, -2), tpu_fetch.Order(True)
            else:
                found[f"{role} {name}"] = x, tpu_fetch.Order(last)
    return found


def pages_beside(view: View) -> int:
    """The scales of how many pages lie beside each other as the kernel is given them."""
    if view.page_table is None or view.page_size % tpu_read.LANES == 0 or view.page_size > tpu_read.LANES:
        return 1
    return tpu_read.LANES // (1 << (view.page_size - 1).bit_length())


def _results(request: Request, total: int, slots: int, rows: int) -> dict[str, tuple[tuple[int, ...], pl.BlockSpec]]:
    """Shapes of the results, float32, and the block that is written in a step."""
    view = request.view
    batch, heads, size = request.query.shape[0], view.num_kv_heads, _width(view)
    found = {
        "out": ((batch, heads, total, size), _by_row(view, heads, total, size)),
        "lse": ((batch, heads, total, 1), _by_row(view, heads, total, 1)),
    }
    if request.want_mass:
        block = pl.BlockSpec(
            (1, heads // cores_for(view), total, rows), lambda core, i, n, row, tile, *_: (row[i], core, 0, tile[i])
        )
        found["scores"] = (batch, heads, total, slots), block
    return found


def _readers(request: Request) -> dict[str, Callable[..., tpu_read.Store]]:
    """What reads keys and values inside the kernel."""
    view = request.view
    return {
        role: functools.partial(
            tpu_read.Store,
            format=common.format_of(view),
            last=tpu_read.tokens_last(store["data"].shape[-1]),
            wide=_wide(request),
            native=native(),
            page_size=view.page_size,
            pages_beside=pages_beside(view),
            beside=common.tokens_beside(view, store),
        )
        for role, store in (("keys", view.keys), ("values", view.values))
    }


def _wide(request: Request) -> DTypeLike:
    """The dtype of the products' operands."""
    dtypes = (request.query.dtype, request.view.keys["data"].dtype)
    return jnp.float32 if jnp.float32 in dtypes or jnp.float16 in dtypes else jnp.bfloat16


def params(vmem: int, order: tuple[Any, ...], *, checked: bool = True) -> pltpu.CompilerParams:
    """Those of a kernel that needs so many bytes of vector memory.

    Args:
        vmem: bytes.
        order: of the axes of its grid.
        checked: whether the device checks that copies stay within their arrays.
    """
    found: Any = pltpu.CompilerParams(dimension_semantics=order, disable_bounds_checks=not checked)
    return found if vmem <= VMEM_GIVEN else dataclasses.replace(found, vmem_limit_bytes=vmem + (8 << 20))


def vmem_bytes(request: Request, config: TpuConfig | None = None) -> int:
    """Bytes of vector memory: two tiles, queries and results twice, the state once; widths fill registers."""
    view, rows = request.view, rows_of(request.view, config)
    wide = lambda n: -(-n // tpu_read.LANES) * tpu_read.LANES
    stores = common.arrays(view)
    tokens = _tokens(view) * view.positions.shape[1] if view.page_table is None else view.page_size * stores[0].shape[1]
    tile = sum(x.size * x.dtype.itemsize for x in stores) // tokens * rows
    count = view.num_kv_heads * rows_for(request)[1]
    beside = common.tokens_beside(view, view.keys)
    queries = count * beside * wide(view.key_head_dim * beside)
    results = count * (wide(_width(view)) + tpu_read.LANES + (rows if request.want_mass else 0))
    return (2 * tile + 4 * (2 * queries + 3 * results + count * tpu_read.LANES)) // cores_for(view)


def _grid(chosen: tiles.Plan) -> tuple[Int32[Array, ""]]:
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
    found = lookup(key(request), _target.current().device_kind)
    return found if isinstance(found, TpuConfig) and fits(request, found) else TpuConfig()


def rows_of(view: View, config: TpuConfig | None = None) -> int:
    """Slots per tile: about `tile_bytes` of keys, a multiple of what lies in a register, whole pages."""
    config = config or TpuConfig()
    slots = _tokens(view)
    data = view.keys["data"]
    token_bytes = (
        view.num_kv_heads
        // cores_for(view)
        * data.shape[-1]
        * data.dtype.itemsize
        // common.tokens_beside(view, view.keys)
    )
    lanes = tpu_read.LANES
    rows = min(max(config.tile_bytes // token_bytes // lanes * lanes, lanes), config.most_rows)
    if view.page_table is not None:
        pages = max(1, min(rows // view.page_size, MOST_PAGES, view.page_table.shape[1]))
        return pages * view.page_size
    return slots if slots <= rows else rows


def _tokens(view: View) -> int:
    """Slots of a row that are to be walked; a contiguous array may have some more than the cache uses."""
    return view.layout.num_slots if view.page_table is not None else view.keys["data"].shape[3]


def _store_spec(x: Array, rows: int, tokens_last: bool, cores: int) -> pl.BlockSpec:
    """How a tile of an array of a contiguous cache is fetched: [1, B, K, C, F], or [1, B, K, F, C] with tokens last."""
    heads = x.shape[2] // cores
    if tokens_last:
        block = (1, 1, heads, x.shape[3], rows)
        return pl.BlockSpec(block, lambda core, i, n, row, tile, *_: (0, row[i], core, 0, tile[i]))
    block = (1, 1, heads, rows, x.shape[4])
    return pl.BlockSpec(block, lambda core, i, n, row, tile, *_: (0, row[i], core, tile[i], 0))


def _body(*refs, names, parts, orders, readers, rule, scale, softcap):
    """One tile of one row: query [1, K, M, H] against keys and values of all heads."""
    memory = dict(zip(names, refs, strict=True))
    count, row, whole = (memory[name] for name in ("count", "row", "whole"))
    query, at, positions = (memory[name] for name in ("query", "at", "positions"))
    slopes = memory.get("slopes")
    out, lse, top, total, acc = (memory[name] for name in ("out", "lse", "top", "total", "acc"))
    heads = query.shape[1]
    i = pl.program_id(1)
    here = row[i]
    fetcher = _fetcher(memory, parts, orders)
    stores = [readers[role](**_fetched(memory, role, fetcher, i)) for role in ("keys", "values")]

    if fetcher is not None:
        pl.when(i == 0)(functools.partial(fetcher.start, i))
        pl.when(i + 1 < count[0])(functools.partial(fetcher.start, i + 1))

    @pl.when((i == 0) | (row[jnp.maximum(i - 1, 0)] != here))
    def _():
        top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def tile(every_slot_is_filled: bool) -> None:
        keys, values = (store.ready() for store in stores)
        q_at = at[0]  # [M, 1]
        places = [positions[0, k][None] for k in range(positions.shape[1])]  # [1, R] of each head, or of all
        filled = [None if every_slot_is_filled else x >= 0 for x in places]
        # All heads at each stage, so that the wait for one head's product is spent on the others.
        scores = [keys.scores(query[0, k], k, scale, filled[k % len(places)]) for k in range(heads)]
        for k in range(heads):
            kv_at = places[k % len(places)]
            if softcap is not None:
                scores[k] = jnp.tanh(scores[k] / softcap) * softcap
            if slopes is not None:
                scores[k] = scores[k] + slopes[k] * (kv_at - q_at).astype(jnp.float32)
            allowed = (q_at >= 0) & rule.between(kv_at, q_at, q_at)
            # Masked by selecting, never by adding: what lies in an unused slot may be NaN.
            scores[k] = jnp.where(allowed, scores[k], -jnp.inf)
            if "scores" in memory:
                memory["scores"][0, k] = scores[k]
        old = [top[k] for k in range(heads)]
        new = [jnp.maximum(o, jnp.max(s, axis=1, keepdims=True)) for o, s in zip(old, scores, strict=True)]
        shift = [jnp.where(n == -jnp.inf, 0.0, n) for n in new]
        keep = [jnp.exp(o - s) for o, s in zip(old, shift, strict=True)]
        probs = [jnp.exp(x - s) for x, s in zip(scores, shift, strict=True)]
        sums = [jnp.sum(p, axis=1, keepdims=True) for p in probs]
        mixed = [values.mix(probs[k], k, filled[k % len(places)]) for k in range(heads)]
        for k in range(heads):
            top[k] = new[k]
            total[k] = total[k] * keep[k] + sums[k]
            acc[k] = acc[k] * keep[k] + mixed[k]

    if fetcher is not None:
        fetcher.wait(i)
    pl.when(whole[i] == 1)(lambda: tile(True))
    pl.when(whole[i] == 0)(lambda: tile(False))

    @pl.when((i == count[0] - 1) | (row[jnp.minimum(i + 1, row.shape[0] - 1)] != here))
    def _():
        sums = total[...]
        empty = sums == 0
        sums = jnp.where(empty, 1.0, sums)
        out[0] = jnp.where(empty, 0.0, acc[...] / sums)
        lse[0] = jnp.where(empty, -jnp.inf, jnp.log(sums) + top[...])


def _fetcher(memory: dict[str, Any], parts: int, orders: dict[str, tpu_fetch.Order]) -> tpu_fetch.Fetcher | None:
    """What brings the `parts` of a tile; None: the grid does."""
    if not parts:
        return None
    arrays = {name: (memory[name], memory[f"{name} buffers"], order) for name, order in orders.items()}
    core = pl.program_id(0)
    if "pages" in memory:
        where = tpu_fetch.Pages(memory["pages"], parts, core)
    else:
        where = tpu_fetch.Pieces(memory["row"], memory["tile"], memory["held"], parts, core)
    return tpu_fetch.Fetcher(where, arrays, memory["arrived"], memory["whole"])


def _fetched(memory: dict[str, Any], role: str, fetcher: tpu_fetch.Fetcher | None, tile: Any) -> dict[str, Any]:
    """What was fetched of each array of the keys or the values, part by part, as `tpu_read.Store` takes it."""
    if fetcher is not None:
        return {"parts": fetcher.held(tile, role), "places": fetcher.places(tile, role)}
    return {"parts": {name.split()[1]: [ref.at[0, 0]] for name, ref in memory.items() if name.startswith(f"{role} ")}}
